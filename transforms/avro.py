"""Avro records to typed columns: an Avro schema as Arrow types, records as a table, payloads of a log by schema.

Times come as integers and become times in Arrow, so that no value is past what Python's own dates hold.
"""

import dataclasses
import functools
import io
import json
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import fastavro
import pyarrow as pa
from fastavro.schema import SchemaParseException, UnknownType

from pipelines.transforms.payloads import Faults, Parsed, path, untexted
from pipelines.transforms.schema import RowSchema

_PLAIN = {
    "null": pa.null(),
    "boolean": pa.bool_(),
    "int": pa.int64(),
    "long": pa.int64(),
    "float": pa.float64(),
    "double": pa.float64(),
    "bytes": pa.binary(),
    "string": pa.string(),
}
_TIMES = {
    "date": pa.date32(),
    "timestamp-millis": pa.timestamp("ms", "UTC"),
    "timestamp-micros": pa.timestamp("us", "UTC"),
    "timestamp-nanos": pa.timestamp("ns", "UTC"),
    "local-timestamp-millis": pa.timestamp("ms"),
    "local-timestamp-micros": pa.timestamp("us"),
    "local-timestamp-nanos": pa.timestamp("ns"),
}

ESCAPES = "surrogateescape"
"""How fastavro is to take text that is not UTF-8, so that one such value does not lose the rest of its block."""

Value = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Layout:
    """A record schema, made ready. schema: what fastavro decodes by. columns: name to type."""

    schema: dict[str, Any]
    columns: dict[str, pa.DataType]
    _values: dict[str, Value | None]

    @staticmethod
    def of(schema: Any) -> "Layout":
        """The layout of a record schema as parsed JSON. Raises ValueError for any other schema."""
        if not isinstance(schema, dict) or schema.get("type") != "record":
            raise ValueError("an Avro schema that is not a record")
        reader = _Reader({})
        parts = {field["name"]: reader.of(field["type"]) for field in schema["fields"]}
        return Layout(
            _without_times(schema),
            {name: kind for name, (kind, _) in parts.items()},
            {name: value for name, (_, value) in parts.items()},
        )

    def table(self, records: Sequence[dict[str, Any]], wanted: Sequence[str]) -> pa.Table:
        """The wanted columns of decoded records."""
        return pa.table({name: self._column(records, name) for name in wanted})

    def _column(self, records: Sequence[dict[str, Any]], name: str) -> pa.Array:
        values, value = [record[name] for record in records], self._values[name]
        if value is not None:
            values = [None if found is None else value(found) for found in values]
        kind = self.columns[name]
        try:
            return pa.array(values, kind)
        except UnicodeEncodeError:  # text that is not UTF-8, which was decoded with surrogates: its exact bytes again
            return pa.array(_bytes(values), untexted(kind))


@dataclasses.dataclass(frozen=True)
class Avro:
    """One Avro record a payload, by a schema (JSON text). header: bytes before the record, which are passed over.

    >>> from pipelines.transforms.schema import RowSchema
    >>> class Row:
    ...     n: int
    >>> schema = '{"type": "record", "name": "R", "fields": [{"name": "n", "type": "long"}]}'
    >>> parsed = Avro(schema).parse(pa.array([b"\\x02", b""], pa.large_binary()), RowSchema.of(Row))
    >>> parsed.columns["n"].to_pylist(), parsed.faults.reasons()[0].to_pylist()
    ([1], ['invalid avro'])
    """

    name: ClassVar[str] = "avro"
    schema: str
    header: int = 0

    def parse(self, raw: pa.LargeBinaryArray, schema: RowSchema, *, extra: bool = False) -> Parsed:
        """The schema's columns (extra: all of them), in their Avro types."""
        layout = layout_of(self.schema)
        faults, records = Faults(), []
        for row, payload in enumerate(raw.to_pylist()):
            try:
                records.append(_record(payload, self.header, layout))
            except Exception as error:  # whatever a decoder makes of bytes that are none of its own
                faults.add([row], "invalid avro", f"bytes that are no such Avro record ({type(error).__name__})")
        names = {path(field).partition(".")[0] for field in schema.fields}
        wanted = [name for name in layout.columns if extra or name in names]
        return Parsed(layout.table(records, wanted), faults.others(len(raw)) if len(faults) else None, faults)


def _record(payload: bytes, start: int, layout: Layout) -> dict[str, Any]:
    stream = io.BytesIO(payload)
    stream.seek(start)
    found = fastavro.schemaless_reader(stream, layout.schema, None, handle_unicode_errors=ESCAPES)
    if stream.tell() < len(payload) or not isinstance(found, dict):
        raise ValueError("more bytes than the record has")
    return found


@functools.lru_cache(16)
def layout_of(schema: str) -> Layout:
    """The layout of a record schema as text. Raises ValueError for what is none."""
    try:
        layout = Layout.of(json.loads(schema))
        # Made ready once: fastavro would do it for each record.
        parsed = cast(dict[str, Any], fastavro.parse_schema(layout.schema))
    except (KeyError, TypeError, AttributeError, SchemaParseException, UnknownType) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return dataclasses.replace(layout, schema=parsed)


class _Reader:
    """Arrow type of an Avro type, and what its values go through (None: nothing). names: the named types so far."""

    def __init__(self, names: dict[str, tuple[pa.DataType, Value | None]]) -> None:
        self._names = names

    def of(self, kind: Any) -> tuple[pa.DataType, Value | None]:
        if isinstance(kind, list):
            return self._union([branch for branch in kind if branch != "null"])
        if isinstance(kind, str):
            if kind in _PLAIN:
                return _PLAIN[kind], None
            return self._names.get(kind.rpartition(".")[2], (pa.string(), _text))
        if kind.get("logicalType") in _TIMES:
            return _TIMES[kind["logicalType"]], None
        if kind.get("logicalType") == "decimal" and kind["precision"] <= 38:
            return pa.decimal128(kind["precision"], kind.get("scale", 0)), None
        if kind["type"] == "array":
            item, value = self.of(kind["items"])
            return pa.list_(item), value and (lambda found: [None if one is None else value(one) for one in found])
        if kind["type"] in ("map", "decimal"):
            return pa.string(), _text
        named = self._named(kind)
        return named or self.of(kind["type"])

    def _named(self, kind: dict[str, Any]) -> tuple[pa.DataType, Value | None] | None:
        if kind["type"] not in ("record", "enum", "fixed"):
            return None
        name = kind["name"].rpartition(".")[2]
        self._names[name] = (pa.string(), _text)  # a type within itself has no end: JSON text there
        if kind["type"] != "record":
            self._names[name] = (pa.string() if kind["type"] == "enum" else pa.binary(), None)
            return self._names[name]
        parts = {field["name"]: self.of(field["type"]) for field in kind["fields"]}
        struct = pa.struct([pa.field(part, found) for part, (found, _) in parts.items()])
        through = {part: value for part, (_, value) in parts.items() if value is not None}
        self._names[name] = (struct, (lambda found: _through(found, through)) if through else None)
        return self._names[name]

    def _union(self, branches: list[Any]) -> tuple[pa.DataType, Value | None]:
        if not branches:
            return pa.null(), None
        return self.of(branches[0]) if len(branches) == 1 else (pa.string(), _text)


def _through(record: dict[str, Any], values: dict[str, Value]) -> dict[str, Any]:
    return {**record, **{name: value(record[name]) for name, value in values.items() if record[name] is not None}}


def _text(value: Any) -> str:
    """A map, or a value of a union of several types, as text: JSON where it is nested."""
    if isinstance(value, dict | list):
        return json.dumps(value, default=_text)
    if isinstance(value, bool):
        return "true" if value else "false"
    return value.decode(errors=ESCAPES) if isinstance(value, bytes) else str(value)


def _without_times(kind: Any) -> Any:
    """The schema with times as the integers they are written as; decimals stay, as Python holds every one of them."""
    if isinstance(kind, list):
        return [_without_times(branch) for branch in kind]
    if not isinstance(kind, dict):
        return kind
    plain = {name: value for name, value in kind.items() if name != "logicalType" or value == "decimal"}
    for name in ("type", "items", "values"):
        if name in plain:
            plain[name] = _without_times(plain[name])
    if "fields" in plain:
        plain["fields"] = [_without_times(field) for field in plain["fields"]]
    return plain


def _bytes(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode(errors=ESCAPES)
    if isinstance(value, list):
        return [_bytes(one) for one in value]
    if isinstance(value, dict):
        return {name: _bytes(one) for name, one in value.items()}
    return value
