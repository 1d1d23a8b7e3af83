"""Avro files: blocks found by their sync markers, so that any range of bytes can be read alone."""

import contextlib
import dataclasses
import json
import zlib
from collections.abc import Iterator
from typing import IO

import fastavro
import numpy as np
import pyarrow as pa
from fastavro.schema import SchemaParseException

from pipelines.io.places import File
from pipelines.io.splits import Split, bookkeeping
from pipelines.transforms.avro import ESCAPES, Layout
from pipelines.transforms.conform import OFFSET, SOURCE
from pipelines.transforms.errors import UserError

ROWS = 1 << 15
"""Rows of a table, about: decoded records take about 1 kB each as Python objects."""

BYTES = 16 << 20
"""Stored bytes that a table's rows take, about."""

_SYNC = 16


@dataclasses.dataclass(frozen=True)
class Blocks:
    """An Avro file, opened for its header. columns: name to type. start: where its first block stands."""

    file: File
    start: int
    columns: dict[str, pa.DataType]

    @staticmethod
    def of(file: File) -> "Blocks":
        """Raises UserError for a header that is damaged, or a schema that is not a record."""
        with file.open() as handle, _damage(file):
            header = _Header.of(handle)
            return Blocks(file, header.size, header.layout.columns)

    def splits(self, wanted: tuple[str, ...], step: int) -> list[Split]:
        """Ranges of ``step`` bytes, each of the blocks that start in it; one where the whole file is compressed."""
        if self.file.codec:
            return [Split(self.file, self.start, None, self.file.size, columns=wanted)]
        starts = range(self.start, max(self.file.size, self.start + 1), step)
        ranges = ((start, min(start + step, self.file.size)) for start in starts)
        return [Split(self.file, start, stop, stop - start, columns=wanted) for start, stop in ranges]


def read(split: Split) -> Iterator[pa.Table]:
    """Tables of the split's columns, `_source` and `_offset`: the byte where the record's block starts, plus the
    record's number in it (so it grows along the file, and is found without a count of what lies before).
    Raises UserError where the file is damaged.
    """
    with split.file.open() as handle:
        with _damage(split.file):
            header = _Header.of(handle)
        for blocks in _gathered(_blocks(handle, header, split)):
            with _damage(split.file):
                stream = pa.BufferReader(b"".join([header.plain, *(block.data for block in blocks)]))
                records = list(fastavro.reader(stream, handle_unicode_errors=ESCAPES))
            offsets = np.concatenate([np.arange(block.start, block.start + block.count) for block in blocks])
            source, _ = bookkeeping(split.file.source, 0, len(records))
            table = header.layout.table(records, split.columns)  # type: ignore[arg-type]
            yield table.append_column(SOURCE, source).append_column(OFFSET, pa.array(offsets))


@dataclasses.dataclass(frozen=True)
class _Header:
    """layout: of the writer's schema. sync: what follows each block. size: bytes of the header. plain: the same header
    for times as integers.
    """

    layout: Layout
    sync: bytes
    size: int
    plain: bytes

    @staticmethod
    def of(handle: IO[bytes]) -> "_Header":
        found = fastavro.reader(handle)
        meta, sync = dict(found.metadata), found._header["sync"]
        layout = Layout.of(json.loads(meta["avro.schema"]))
        meta["avro.schema"] = json.dumps(layout.schema)
        sink = pa.BufferOutputStream()
        encoded = {name: value.encode() for name, value in meta.items()}
        fastavro.schemaless_writer(sink, {"type": "map", "values": "bytes"}, encoded)
        return _Header(layout, sync, handle.tell(), b"Obj\x01" + sink.getvalue().to_pybytes() + sync)


@dataclasses.dataclass(frozen=True)
class _Block:
    """data: the whole block with its counts and marker. start: its byte in the file. count: its records."""

    data: bytes
    start: int
    count: int


def _blocks(handle: IO[bytes], header: _Header, split: Split) -> Iterator[_Block]:
    """The blocks that start in the split."""
    handle.seek(max(split.start - _SYNC, header.size - _SYNC))
    with _damage(split.file):
        at = _after_marker(handle, header.sync)
    while at is not None and (split.stop is None or at < split.stop):
        handle.seek(at)
        with _damage(split.file):
            block = _block(handle, at, header.sync)
        if block is None:
            return
        yield block
        at += len(block.data)


def _after_marker(handle: IO[bytes], sync: bytes) -> int | None:
    """Where the first marker from here on ends."""
    at, seen = handle.tell(), b""
    while more := handle.read(1 << 20):
        seen += more
        found = seen.find(sync)
        if found >= 0:
            return at + found + _SYNC
        at, seen = at + len(seen) - _SYNC + 1, seen[1 - _SYNC :]
    return None


def _block(handle: IO[bytes], at: int, sync: bytes) -> _Block | None:
    head = b""
    numbers = []
    for _ in range(2):
        value = shift = 0
        while byte := handle.read(1):
            head += byte
            value |= (byte[0] & 0x7F) << shift
            shift += 7
            if byte[0] < 0x80:
                break
        numbers.append((value >> 1) ^ -(value & 1))
    if not head:
        return None
    count, size = numbers
    body = handle.read(max(size, 0) + _SYNC)
    if min(count, size) < 0 or len(body) < size + _SYNC or not body.endswith(sync):
        raise ValueError(f"the block at byte {at} is cut off")
    return _Block(head + body, at, count)


def _gathered(blocks: Iterator[_Block]) -> Iterator[list[_Block]]:
    gathered: list[_Block] = []
    for block in blocks:
        gathered.append(block)
        if sum(one.count for one in gathered) >= ROWS or sum(len(one.data) for one in gathered) >= BYTES:
            yield gathered
            gathered = []
    if gathered:
        yield gathered


# What decoders make of bytes that are none of theirs; a length that is not one asks for memory that there is not.
_FAILURES = (EOFError, LookupError, MemoryError, OverflowError, StopIteration, TypeError, ValueError)


@contextlib.contextmanager
def _damage(file: File) -> Iterator[None]:
    try:
        yield
    except (*_FAILURES, SchemaParseException, zlib.error) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{file.source}: damaged or cut-off Avro ({reason}); write it again") from error
