"""128 bits that stand for a row's values in state: where two rows agree in them, the rows are taken as equal.

They are written into state and files, so they may never change: nothing depends on a library's own hash, on the machine
or on how a column is laid out. Two lanes of 64 bits take in the same words and mix them by other constants: those of
SplitMix64 (Steele, Lea and Flood 2014) and the first of Stafford's better mixers (2011); texts beyond 64 bytes come in
as 128 bits of BLAKE2b. 64 bits would lose a row in silence at a billion rows.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.transforms.buckets import floats, integers, is_text
from pipelines.transforms.errors import UserError

Lanes = npt.NDArray[np.uint64]
"""Shape (2, n); words, which both lanes take in alike, have shape (n,)."""


def _lanes(first: int, second: int) -> Lanes:
    return np.array([[first], [second]], np.uint64)


_SEED = _lanes(0x9E3779B97F4A7C15, 0x2545F4914F6CDD1D)
_NULL = _lanes(0xD1B54A32D192ED03, 0x8CB92BA72F3D8DD7)
_SHIFTS = [_lanes(30, 31), _lanes(27, 27), _lanes(31, 33)]
_FACTORS = [_lanes(0xBF58476D1CE4E5B9, 0x7FB5D329728EA185), _lanes(0x94D049BB133111EB, 0x81DADEF4BC2DD44D)]
_BLOCK = 8192
"""Rows at a time: what is worked on stays in the processor's cache."""
_LONG = 64
"""Bytes of text from which on BLAKE2b is faster than a pass per eight bytes."""


def fingerprints(table: pa.Table, columns: Sequence[str]) -> Lanes:
    """Shape (2, rows): 128 stable bits of the values of every row; the order of the columns matters.

    Equal as SQL's IS NOT DISTINCT FROM: null is one value, NaN is one value, -0.0 is 0.0, in lists and structs too; an
    integer's width and a text's encoding do not matter. About 5 ns per row and number, 40 per short text.

    Raises UserError for a column of maps or unions.

    >>> zero, negative, other = fingerprints(pa.table({"x": [0.0, -0.0, 1.0]}), ["x"]).T.tolist()
    >>> zero == negative, zero == other, [f"{lane:016x}" for lane in other]
    (True, False, ['f80a07838228f8ba', 'd1bbe7531dd0cca0'])
    """
    found = np.repeat(_SEED, len(table), axis=1)
    for name in columns:
        values = table[name].combine_chunks()
        if isinstance(values, pa.ChunkedArray):  # of no chunk
            continue
        shared = _words(name, values.dictionary) if _shares(values) else None
        for start in range(0, len(table), _BLOCK):
            block = values.slice(start, _BLOCK)
            words = _words(name, block) if shared is None else _nulls(shared[..., _indices(block)], block)
            _take_in(found[:, start : start + _BLOCK], words)
    return found


def _shares(values: pa.Array) -> bool:
    return pa.types.is_dictionary(values.type) and len(values.dictionary) > 0


def _indices(values: pa.DictionaryArray) -> npt.NDArray[np.integer]:
    return values.indices.fill_null(0).to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]


def _take_in(x: Lanes, words: Lanes) -> Lanes:
    """x, in place, with the words of one more value."""
    x ^= words
    x += _SEED
    x ^= x >> _SHIFTS[0]
    x *= _FACTORS[0]
    x ^= x >> _SHIFTS[1]
    x *= _FACTORS[1]
    x ^= x >> _SHIFTS[2]
    return x


def _words(name: str, values: pa.Array) -> Lanes:
    """What stands for each value: (n,) where 64 bits hold it, else (2, n)."""
    kind = values.type
    found: Lanes
    if pa.types.is_dictionary(kind):
        return _words(name, values.dictionary_decode())
    if pa.types.is_null(kind):
        found = np.zeros(len(values), np.uint64)
    elif pa.types.is_floating(kind):
        found = floats(values)
    elif pa.types.is_decimal(kind):
        found = _decimals(values)
    elif pa.types.is_temporal(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        found = integers(values)
    elif is_text(kind):
        found = _texts(values.cast(pa.large_binary()))
    elif pa.types.is_struct(kind):
        found = np.repeat(_SEED, len(values), axis=1)
        for inner in values.flatten():
            _take_in(found, _words(name, inner))
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        found = _lists(name, values)
    else:
        raise UserError(f"column {name!r} of type {kind} cannot be compared with earlier rows: use a list of structs")
    return _nulls(found, values)


def _nulls(words: Lanes, values: pa.Array) -> Lanes:
    if not values.null_count:
        return words
    null = values.is_null().to_numpy(zero_copy_only=False)
    found: Lanes = np.where(null, _NULL, words)
    return found


def _decimals(values: pa.Array) -> Lanes:
    whole = values.cast(pa.decimal128(38, values.type.scale)).fill_null(0)
    words: Lanes = np.frombuffer(whole.buffers()[1], "<u8", 2 * len(whole), 16 * whole.offset).reshape(-1, 2)
    return _take_in(np.repeat(_SEED, len(values), axis=1), words[:, 1]) ^ words[:, 0]


def _lists(name: str, values: pa.Array) -> Lanes:
    """The sum over a list of its values, each mixed with its place in the list."""
    lengths = pc.list_value_length(values).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    ends = np.cumsum(lengths)
    inner = values.flatten()
    each = _take_in(np.repeat(_SEED, len(inner), axis=1), _words(name, inner))
    _take_in(each, (np.arange(len(inner)) - np.repeat(ends - lengths, lengths)).astype(np.uint64))
    sums = np.zeros((2, len(inner) + 1), np.uint64)
    np.cumsum(each, axis=1, out=sums[:, 1:])
    return _take_in(sums[:, ends] - sums[:, ends - lengths], lengths.astype(np.uint64))


def _texts(values: pa.Array) -> Lanes:
    _, bounds, content = values.buffers()
    ends = np.frombuffer(bounds, "<i8", len(values) + 1, 8 * values.offset)
    starts, lengths = ends[:-1] - ends[0], np.diff(ends)
    found = _take_in(np.repeat(_SEED, len(values), axis=1), lengths.astype(np.uint64))
    if lengths.any():
        inner = np.frombuffer(content, np.uint8, int(ends[-1] - ends[0]), int(ends[0]))
        _short(found, inner, starts, lengths)
        long = np.flatnonzero(lengths > _LONG)
        if len(long):
            texts = values.take(pa.array(long)).dictionary_encode()
            digests = [hashlib.blake2b(text.as_buffer(), digest_size=16).digest() for text in texts.dictionary]
            found[:, long] = np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2).T[:, texts.indices.to_numpy()]
    return found


def _short(
    found: Lanes, content: npt.NDArray[np.uint8], starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
) -> None:
    """Mixes the texts of at most _LONG bytes into their lanes, eight bytes of every text at a time."""
    padded = np.concatenate([content, np.zeros(8, np.uint8)])
    words = np.ndarray((len(content) + 1,), "<u8", padded, strides=(1,))  # the eight bytes from every byte on
    for done in range(0, min(int(lengths.max()), _LONG), 8):
        rows = np.flatnonzero((lengths > done) & (lengths <= _LONG))
        beyond = 8 * np.maximum(8 - (lengths[rows] - done), 0).astype(np.uint64)
        word = words[starts[rows] + done] & (np.uint64(0xFFFFFFFFFFFFFFFF) >> beyond)
        if len(rows) == len(lengths):
            _take_in(found, word)
        else:
            found[:, rows] = _take_in(found[:, rows], word)
