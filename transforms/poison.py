"""Messages that no decoder takes, made of good ones: what replays send to see that a stream bears them."""

import json
from collections.abc import Callable
from typing import Literal

import pyarrow as pa

from pipelines.transforms.payloads import path
from pipelines.transforms.schema import RowSchema

Format = Literal["json", "avro", "arrow"]

_ODD = {"not": "a value of this type"}


def poison(message: bytes, kind: int, schema: RowSchema, format: Format) -> bytes:
    """A bad message made of a good one. kind: 0 cut off, 1 of no format, 2 with a value of the wrong type (avro: of a
    schema that nobody knows), 3 empty.

    >>> class Row:
    ...     n: int
    >>> [poison(b'{"n": 1}', kind, RowSchema.of(Row), "json") for kind in range(4)]
    [b'{"n"', b'\\xff\\xfeno message', b'{"n": {"not": "a value of this type"}}', b'']
    """
    kinds: tuple[Callable[[], bytes], ...] = (
        lambda: message[: len(message) // 2],
        lambda: b"\xff\xfeno message",
        lambda: _mistyped(message, schema, format),
        lambda: b"",
    )
    return kinds[kind]()


def _mistyped(message: bytes, schema: RowSchema, format: Format) -> bytes:
    if format == "avro":
        return b"\x00\xff\xff\xff\xff" + message[5:]
    strict = (f for f in schema.fields if not f.nullable and not _texts(f.type) and "." not in path(f))
    name = next((path(field) for field in strict), None)
    if format == "json":
        try:
            found = json.loads(message)
        except ValueError:  # of a history that was bad already
            return b"[]"
        return json.dumps([found] if name is None or not isinstance(found, dict) else {**found, name: _ODD}).encode()
    sink, odd = pa.BufferOutputStream(), pa.table({name or "": [_ODD] if name else [b"\xff"]})
    with pa.ipc.new_stream(sink, odd.schema) as stream:
        stream.write_table(odd)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def _texts(kind: pa.DataType) -> bool:
    """Whether a value of any type may be taken for it, as its text."""
    return kind in (pa.string(), pa.binary())
