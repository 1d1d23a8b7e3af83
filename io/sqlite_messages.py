"""Messages as rows of a log's SQLite file, and back: the payloads end to end, compressed, and their lengths."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.io.log import MESSAGES, Format

Integers = npt.NDArray[np.int64]

SLICE = 4 << 20
"""Bytes of payloads in a row of the file, unless a single message has more: what a read decompresses at once."""

_CODEC = pa.Codec("lz4_raw")


class Packed(NamedTuple):
    """Messages that follow each other. last: offset of the last, relative to the first. taken: offsets of all.
    lengths, rows: int32 of each message, little-endian; rows is None where all have one. size: of the payloads in
    bytes, which is that of ``payloads`` where they do not compress.
    """

    last: int
    taken: int
    lengths: bytes
    rows: bytes | None
    size: int
    payloads: pa.Buffer


class Found(NamedTuple):
    """Messages as they were packed, with the offset of the first and the time (µs) at which the log took them."""

    start: int
    published: int
    lengths: bytes
    rows: bytes | None
    size: int
    payloads: bytes


def pack(messages: pa.Table, format: Format) -> list[Packed]:
    """Raises ValueError for what is no message: a producer's fault."""
    payloads, rows = _checked(messages, format)
    if not len(payloads):
        return []
    _, bounds, content = payloads.buffers()
    ends = np.frombuffer(bounds, "<i8", len(payloads) + 1, 8 * payloads.offset)
    slices = (ends[1:] - ends[0] - 1) // SLICE  # the number of the slice in which a message ends
    cuts = [0, *(np.flatnonzero(np.diff(slices)) + 1).tolist(), len(payloads)]
    return [_packed(ends[first : stop + 1], rows[first:stop], content) for first, stop in itertools.pairwise(cuts)]


def _checked(messages: pa.Table, format: Format) -> tuple[pa.LargeBinaryArray, Integers]:
    if odd := set(messages.column_names) - {"_raw", "_rows"}:
        raise ValueError(f"messages to append have _raw and _rows, not {sorted(odd)}")
    payloads = messages["_raw"].cast(pa.large_binary()).combine_chunks()
    if payloads.null_count:
        raise ValueError("a message to append is null: an empty one is b''")
    if "_rows" not in messages.column_names:
        if format == "arrow":
            raise ValueError("Arrow messages need _rows: how many rows, so how many offsets, each has")
        return payloads, np.ones(len(payloads), np.int64)
    if messages["_rows"].null_count:
        raise ValueError("_rows of a message is null")
    rows: Integers = messages["_rows"].to_numpy().astype(np.int64)
    if len(rows) and (rows.min() < 1 or (format != "arrow" and rows.max() > 1)):
        raise ValueError(f"_rows of a message in format {format} is {'at least ' * (format == 'arrow')}1")
    return payloads, rows


def _packed(ends: Integers, rows: Integers, content: pa.Buffer | None) -> Packed:
    size, taken = int(ends[-1] - ends[0]), int(rows.sum())
    plain = content.slice(int(ends[0]), size) if content and size else pa.py_buffer(b"")
    compressed = _CODEC.compress(plain) if size else plain
    return Packed(
        last=taken - int(rows[-1]),
        taken=taken,
        lengths=np.diff(ends).astype("<i4").tobytes(),
        rows=None if taken == len(rows) else rows.astype("<i4").tobytes(),
        size=size,
        payloads=compressed if compressed.size < size else plain,
    )


def unpack(partition: str, found: Sequence[Found], start: int, stop: int, max_bytes: int) -> pa.Table:
    """The messages at [start, stop), of at most ``max_bytes`` unless it is one, as MESSAGES in one chunk.

    Copies no payload but to decompress it, or to put what several appends brought end to end.
    """
    counts = np.array([len(part.lengths) // 4 for part in found], np.int64)
    lengths, rows = _integers(part.lengths for part in found), _integers(map(_rows, found))
    ends, taken = _ends(lengths), _ends(rows)
    shifts = np.array([part.start for part in found], np.int64) - taken[np.cumsum(counts) - counts]
    offsets = taken[:-1] + np.repeat(shifts, counts)
    first, last = np.searchsorted(offsets, (start, stop)).tolist()
    fitting = int(np.searchsorted(ends, ends[first] + max_bytes, "right")) - 1
    last = min(last, max(fitting, first + 1))
    published = np.repeat(np.array([part.published for part in found], np.int64), counts)
    payloads = [_plain(part) for part in found]
    content = payloads[0] if len(payloads) == 1 else pa.py_buffer(b"".join(payloads))
    return _table(
        partition,
        offsets[first:last],
        (ends[first : last + 1], content),
        published[first:last],
        rows[first:last],
    )


def empty(partition: str) -> pa.Table:
    """No messages."""
    none = np.zeros(0, np.int64)
    return _table(partition, none, (np.zeros(1, np.int64), pa.py_buffer(b"")), none, none)


def _table(
    partition: str, offsets: Integers, payloads: tuple[Integers, pa.Buffer], published: Integers, rows: Integers
) -> pa.Table:
    number = len(offsets)
    buffers = [None, pa.py_buffer(payloads[0]), payloads[1]]
    columns = [
        pa.DictionaryArray.from_arrays(pa.array(np.zeros(number, np.int32)), pa.array([partition])),
        pa.array(offsets),
        pa.LargeBinaryArray.from_buffers(pa.large_binary(), number, buffers),
        pa.array(published).view(pa.timestamp("us", "UTC")),
        pa.array(rows.astype(np.int32)),
    ]
    return pa.table(columns, schema=MESSAGES)


def _integers(parts: Iterator[bytes]) -> Integers:
    return np.frombuffer(b"".join(parts), "<i4").astype(np.int64)


def _ends(lengths: Integers) -> Integers:
    ends = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=ends[1:])
    return ends


def _rows(part: Found) -> bytes:
    return part.rows if part.rows is not None else np.ones(len(part.lengths) // 4, "<i4").tobytes()


def _plain(part: Found) -> pa.Buffer:
    if len(part.payloads) == part.size:
        return pa.py_buffer(part.payloads)
    return _CODEC.decompress(part.payloads, decompressed_size=part.size)
