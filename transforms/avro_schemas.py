"""The Avro schemas of a log's messages: how a message names the schema it was written with, and where that one is.

The wire format is Confluent's (docs.confluent.io, "Wire format"): a zero byte, the id of the schema as a big-endian
32-bit integer, then the record. Schemas are files ``<id>.avsc`` of one folder.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.transforms.avro import layout_of
from pipelines.transforms.errors import UserError
from pipelines.transforms.payloads import Faults, Rows

HEADER = 5
"""Bytes before the record."""

_found: dict[tuple[str, int], str] = {}


@dataclasses.dataclass(frozen=True)
class Schemas:
    """A folder of schemas, local or of any scheme that fsspec knows. A file's content never changes.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     schemas = Schemas(folder)
    ...     number = schemas.add('{"type": "record", "name": "R", "fields": []}')
    ...     list(schemas.find([number, 7])) == [number]
    True
    """

    folder: str

    def find(self, numbers: Iterable[int]) -> dict[int, str]:
        """The schemas (JSON text) of these ids, without the ids that have none. The folder is listed only for an id
        that is new. Raises UserError for a folder that is not there, or a schema that is no record's."""
        numbers = list(numbers)
        if any((self.folder, number) not in _found for number in numbers):
            there = self._names()
            for number in numbers:
                if (self.folder, number) not in _found and f"{number}.avsc" in there:
                    _found[self.folder, number] = self._read(number)
        return {number: _found[self.folder, number] for number in numbers if (self.folder, number) in _found}

    def add(self, schema: str) -> int:
        """The id of a schema, which is in the folder afterwards."""
        number = schema_id(schema)
        system, folder = self._system()
        system.makedirs(folder, exist_ok=True)
        where = f"{folder}/{number}.avsc"
        if not system.exists(where):
            system.pipe_file(f"{where}.{os.getpid()}", schema.encode())
            system.mv(f"{where}.{os.getpid()}", where)
        return number

    def _names(self) -> set[str]:
        system, folder = self._system()
        system.invalidate_cache()
        try:
            return {os.path.basename(place) for place in system.ls(folder, detail=False)}
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"schemas={self.folder}: no such folder; it must hold the writers' <id>.avsc") from None

    def _read(self, number: int) -> str:
        system, folder = self._system()
        try:
            text: str = system.cat_file(f"{folder}/{number}.avsc").decode()
            layout_of(text)
            name = _endless(json.loads(text), ())
        except ValueError as error:
            said = " ".join(str(error).split())
            raise UserError(f"{self.folder}/{number}.avsc: not the Avro schema of a record ({said})") from None
        if name is not None:
            raise UserError(f"{self.folder}/{number}.avsc: type {name} is within itself; give its values as JSON text")
        return text

    def _system(self) -> tuple[Any, str]:
        import fsspec

        try:
            system, folder = fsspec.core.url_to_fs(self.folder)
        except (ImportError, ValueError) as error:  # a known scheme whose package is missing; an unknown scheme
            raise UserError(f"schemas={self.folder}: {' '.join(str(error).split())}") from error
        return system, folder.rstrip("/")


def _endless(kind: Any, within: tuple[str, ...]) -> str | None:
    """The name of a type that is within itself: a message of 20 kB can be so deep in it that fastavro crashes."""
    if isinstance(kind, str):
        return kind if kind.rpartition(".")[2] in within else None
    if isinstance(kind, list):
        return next(filter(None, (_endless(branch, within) for branch in kind)), None)
    if "fields" in kind:
        within = (*within, kind["name"].rpartition(".")[2])
        return next(filter(None, (_endless(field["type"], within) for field in kind["fields"])), None)
    inner = (kind[part] for part in ("type", "items", "values") if part in kind)
    return next(filter(None, (_endless(found, within) for found in inner)), None)


def split_headers(raw: pa.LargeBinaryArray, faults: Faults) -> dict[int, Rows]:
    """The ids that messages name, and which do. The others are faults.

    >>> found = split_headers(pa.array([b"\\0\\0\\0\\0\\7rest", b"rest"], pa.large_binary()), faults := Faults())
    >>> {number: rows.tolist() for number, rows in found.items()}, faults.reasons()[0].to_pylist()
    ({7: [0]}, ['no schema id'])
    """
    rows = faults.others(len(raw))
    ends = np.frombuffer(raw.buffers()[1], np.int64)[raw.offset : raw.offset + len(raw) + 1]
    data = np.frombuffer(raw.buffers()[2] or b"", np.uint8)
    starts = ends[:-1][rows]
    headed = (ends[1:][rows] - starts) >= HEADER
    headed[headed] = data[starts[headed]] == 0
    faults.add(rows[~headed], "no schema id", "no zero byte and schema id of 4 bytes at the start")
    rows, starts = rows[headed], starts[headed]
    numbers = data[starts[:, None] + np.arange(1, HEADER)].astype(np.int64) @ (256 ** np.arange(3, -1, -1))
    order = np.argsort(numbers, kind="stable")
    found, firsts = np.unique(numbers[order], return_index=True)
    return dict(zip(found.tolist(), np.split(rows[order], firsts[1:]), strict=False))


def schema_id(schema: str) -> int:
    """An id for a schema, from its content: 31 bits, so that another registry's small numbers hardly meet it."""
    plain = json.dumps(json.loads(schema), sort_keys=True, separators=(",", ":"))
    return int.from_bytes(hashlib.blake2b(plain.encode(), digest_size=4).digest(), "big") >> 1
