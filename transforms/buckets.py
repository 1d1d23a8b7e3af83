"""Rows to buckets by a stable hash of their key values: what a shuffle and the state of a stream are split by.

The bucket of a key is written into state and files, so it may never change: nothing here depends on a library's own
hash, on the machine or on how a column is laid out. Numbers are mixed by the finalizer of SplitMix64 (Steele, Lea and
Flood 2014), short texts by eight bytes at a time, long ones by BLAKE2b.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.transforms.errors import UserError

Hashes = npt.NDArray[np.uint64]

_SEED = np.uint64(0x9E3779B97F4A7C15)
_NULL = np.uint64(0xD1B54A32D192ED03)
_LONG = 64
"""Bytes of text from which on BLAKE2b is faster than a pass of the whole column per eight bytes."""


def bucket(table: pa.Table, keys: Sequence[str], n: int) -> npt.NDArray[np.int32]:
    """The bucket, 0 to n-1, of every row. Equal keys are equal as in SQL's group by: null is one value, NaN is one
    value, -0.0 is 0.0; an integer's width and a text's encoding do not matter. No keys: bucket 0.

    Raises UserError for a key of lists or structs.

    >>> bucket(pa.table({"origin": ["EWR", "JFK", "EWR"], "day": [1, 2, 1]}), ["origin", "day"], 8).tolist()
    [0, 3, 0]
    """
    if not keys or n == 1:
        return np.zeros(len(table), np.int32)
    return (hashes(table, keys) % np.uint64(n)).astype(np.int32)


def split(table: pa.Table, keys: Sequence[str], n: int) -> list[tuple[int, pa.Table]]:
    """The rows of each bucket that has any, by bucket, in their order.

    >>> [(number, rows["x"].to_pylist()) for number, rows in split(pa.table({"x": [7, 8, 7]}), ["x"], 16)]
    [(1, [8]), (2, [7, 7])]
    """
    return cut(table, bucket(table, keys, n), n)


def cut(table: pa.Table, numbers: npt.NDArray[np.integer], n: int) -> list[tuple[int, pa.Table]]:
    """The rows by number (0 to n-1), each part a slice of one table that is sorted by it."""
    counts = np.bincount(numbers, minlength=n)
    present = np.flatnonzero(counts)
    if len(present) <= 1:
        return [(int(number), table) for number in present]
    small = numbers.astype(
        np.uint8 if n <= 256 else np.uint16 if n <= 65536 else np.uint32
    )  # the first two sort by radix
    table = table.take(pa.array(np.argsort(small, kind="stable")))
    starts = np.cumsum(counts) - counts
    return [(int(number), table.slice(int(starts[number]), int(counts[number]))) for number in present]


def hashes(table: pa.Table, keys: Sequence[str]) -> Hashes:
    """64 stable bits of the key values of every row; the order of the keys matters."""
    every = np.full(len(table), _SEED)
    if not len(table):
        return every
    for key in keys:
        every ^= _column(key, table[key].combine_chunks())
        _mix(every)
    return every


def _column(name: str, values: pa.Array) -> Hashes:
    kind = values.type
    if pa.types.is_dictionary(kind):
        indices = values.indices.fill_null(0).to_numpy(zero_copy_only=False)
        found = (
            _column(name, values.dictionary)[indices] if len(values.dictionary) else np.zeros(len(values), np.uint64)
        )
    elif pa.types.is_floating(kind):
        found = _mix(floats(values))
    elif pa.types.is_decimal(kind):
        found = _decimals(values)
    elif pa.types.is_temporal(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        found = _mix(integers(values))
    elif is_text(kind):
        found = _texts(values.cast(pa.large_binary()))
    elif pa.types.is_null(kind):
        found = np.zeros(len(values), np.uint64)
    else:
        raise UserError(f"column {name!r} of type {kind} cannot be a key: keys are numbers, texts, times or booleans")
    if values.null_count:
        found[values.is_null().to_numpy(zero_copy_only=False)] = _NULL
    return found


def is_text(kind: pa.DataType) -> bool:
    """Texts and bytes, of any encoding but a dictionary."""
    return any(is_kind(kind) for is_kind in _TEXTS)


_TEXTS = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_binary_view,
    pa.types.is_fixed_size_binary,
)


def _mix(x: Hashes) -> Hashes:
    """SplitMix64's next, in place."""
    x += _SEED
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def integers(values: pa.Array) -> Hashes:
    """Integers, booleans and times (µs; days; time of day) as 64 bits each, a copy; a null is 0."""
    kind = values.type
    if pa.types.is_timestamp(kind):
        values = values.cast(pa.timestamp("us", tz=kind.tz), safe=False).cast(pa.int64())
    elif pa.types.is_date(kind):
        values = values.cast(pa.date32()).cast(pa.int32())
    elif pa.types.is_temporal(kind):
        values = values.cast(pa.int32() if kind.bit_width == 32 else pa.int64())
    elif pa.types.is_boolean(kind):
        values = values.cast(pa.uint8())
    found = values.fill_null(0).to_numpy(zero_copy_only=False)
    wide: Hashes = (found if found.dtype == np.uint64 else found.astype(np.int64)).view(np.uint64)
    return wide.copy()


def floats(values: pa.Array) -> Hashes:
    """The bits of float64, a copy, in which NaN is one value and -0.0 is 0.0; a null is 0."""
    plain = values.cast(pa.float64()).fill_null(0.0).to_numpy(zero_copy_only=False)
    found: npt.NDArray[np.float64] = plain + 0.0  # a copy, in which -0.0 is 0.0
    found[np.isnan(found)] = np.nan
    return found.view(np.uint64)


def _decimals(values: pa.Array) -> Hashes:
    whole = values.cast(pa.decimal128(38, values.type.scale))
    words = np.frombuffer(whole.buffers()[1], "<u8", 2 * len(whole), 16 * whole.offset).astype(np.uint64).reshape(-1, 2)
    high = _mix(words[:, 1].copy())
    return _mix(words[:, 0] ^ high)


def _texts(values: pa.Array) -> Hashes:
    _, bounds, content = values.buffers()
    ends = np.frombuffer(bounds, "<i8", len(values) + 1, 8 * values.offset)
    starts, lengths = ends[:-1] - ends[0], np.diff(ends)
    found = _mix(lengths.astype(np.uint64))
    if lengths.any():
        inner = np.frombuffer(content, np.uint8, int(ends[-1] - ends[0]), int(ends[0]))
        _short(found, inner, starts, lengths)
        long = np.flatnonzero(lengths > _LONG)
        if len(long):
            texts = values.take(pa.array(long)).dictionary_encode()
            digests = [hashlib.blake2b(text.as_buffer(), digest_size=8).digest() for text in texts.dictionary]
            found[long] = np.frombuffer(b"".join(digests), "<u8")[texts.indices.to_numpy()]
    return found


def _short(
    found: Hashes, content: npt.NDArray[np.uint8], starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
) -> None:
    """Mixes the texts of at most _LONG bytes into their hashes, eight bytes of every text at a time."""
    padded = np.concatenate([content, np.zeros(8, np.uint8)])
    words = np.ndarray((len(content) + 1,), "<u8", padded, strides=(1,))  # the eight bytes from every byte on
    for done in range(0, min(int(lengths.max()), _LONG), 8):
        rows = np.flatnonzero((lengths > done) & (lengths <= _LONG))
        beyond = 8 * np.maximum(8 - (lengths[rows] - done), 0).astype(np.uint64)
        word = words[starts[rows] + done] & (np.uint64(0xFFFFFFFFFFFFFFFF) >> beyond)
        found[rows] = _mix(found[rows] ^ word)
