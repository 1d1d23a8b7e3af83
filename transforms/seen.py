"""De-duplication across the batches of a stream: which identities were seen, for as long as a repetition of them would
not be late.

What was seen is kept in pieces: immutable tables of fingerprints, never of values. A batch adds one piece, and pieces
are merged geometrically, each bigger than all that follow it together, so an identity is rewritten log2(n) times and a
batch searches log2(n) pieces.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.transforms.fingerprints import Lanes, fingerprints
from pipelines.transforms.identity import differences
from pipelines.transforms.lateness import NEVER

Ints = npt.NDArray[np.int64]

SEEN = pa.schema(
    {
        "id_hi": pa.uint64(),
        "id_lo": pa.uint64(),
        "content_hi": pa.uint64(),
        "content_lo": pa.uint64(),
        "source": pa.dictionary(pa.int32(), pa.string()),
        "offset": pa.int64(),
        "expires": pa.int64(),
    }
)
"""A piece: a row for each row that was kept, by (id_hi, id_lo), equal ones in the order they were kept. Where the row
stands (source, offset), and the watermark (µs) from which on its identity is forgotten."""


@dataclasses.dataclass(frozen=True)
class Fresh:
    """rows: those of identities that were not known, in the order they came in. duplicates: rows that say what the
    known row says.

    conflicts: rows with a known identity and other content. details: for each of them (string), where the known row
    stands, and the columns that differ if it is in the same batch. piece: SEEN, the rows as known; None if none is new.
    """

    rows: pa.Table
    duplicates: int
    conflicts: pa.Table
    details: pa.Array
    piece: pa.Table | None


@dataclasses.dataclass(frozen=True)
class Seen:
    """Compares rows with what was seen. identity: the columns that name an event; columns: those that an equal row
    must share. Equal is SQL's IS NOT DISTINCT FROM, by 128 bits.

    >>> rows = pa.table({"id": [1, 1], "_source": ["log", "log"], "_offset": [0, 1], "_watermark": [10, 20]})
    >>> seen = Seen(("id",), ("id",))
    >>> first = seen.advance([], rows, np.array([100, 110]))
    >>> first.rows["_offset"].to_pylist(), first.duplicates
    ([0], 1)
    >>> seen.advance([first.piece], rows, np.array([100, 110])).duplicates
    2
    """

    identity: tuple[str, ...]
    columns: tuple[str, ...]

    def advance(self, pieces: Sequence[pa.Table], rows: pa.Table, expires: Ints) -> Fresh:
        """One more batch: a row table with `_watermark` (int64 µs; NEVER, or null, before there is one).

        pieces: those that earlier batches and `compacted` gave, in order. expires: for each row, the watermark (µs)
        from which on its identity is forgotten. A row is compared with the first row of its identity whose expiry is
        after the row's own `_watermark`; within a batch the order is (_source, _offset). So any cut of a partition into
        batches, and any compaction between them, keep the same rows. Nothing is changed in place.
        """
        return _Batch(self, rows, np.asarray(expires, np.int64)).compare(pieces)


class _Batch:
    """The rows of a batch in the order of their identities, equal ones in log order; all arrays are in that order."""

    def __init__(self, seen: Seen, rows: pa.Table, expires: Ints) -> None:
        self._rows = rows
        self._content = tuple(name for name in seen.columns if name not in seen.identity)
        ids = fingerprints(rows, seen.identity)
        in_log = _log_order(rows)
        self._order = _by_id(ids) if in_log is None else in_log[_by_id(ids[:, in_log])]
        self._ids = ids[:, self._order]
        self._contents = fingerprints(rows, self._content)[:, self._order]
        self._expires = expires[self._order]
        watermarks = rows["_watermark"].fill_null(NEVER).to_numpy()
        self._watermarks = watermarks[self._order]
        new = np.ones(len(rows), np.bool_)
        new[1:] = np.any(self._ids[:, 1:] != self._ids[:, :-1], axis=0)
        self._starts = np.flatnonzero(new)
        self._group = np.cumsum(new) - 1
        self._open = np.ones(len(rows), np.bool_)  # not yet found in what is known
        self._conflicts: list[tuple[Ints, pa.Array]] = []

    def compare(self, pieces: Sequence[pa.Table]) -> Fresh:
        for piece in pieces:
            if len(piece):
                self._against(piece)
        kept = self._among_themselves()
        at = np.concatenate([np.empty(0, np.int64), *(at for at, _ in self._conflicts)])
        details = pa.concat_arrays([pa.array([], pa.string()), *(details for _, details in self._conflicts)])
        by_row = np.argsort(self._order[at])
        rows = self._rows
        if len(kept) < len(rows):
            mask = np.zeros(len(rows), np.bool_)
            mask[self._order[kept]] = True
            rows = rows.filter(pa.array(mask))
        return Fresh(
            rows,
            len(self._rows) - len(kept) - len(at),
            self._rows.take(pa.array(self._order[at][by_row])),
            details.take(pa.array(by_row)),
            self._piece(kept) if len(kept) else None,
        )

    def _against(self, piece: pa.Table) -> None:
        """Settles the rows whose identity the piece knows. It may know one more than once, earlier ones expired."""
        high, low, expires = (piece[name].to_numpy() for name in ("id_hi", "id_lo", "expires"))
        ids = self._ids[:, self._starts]
        at = np.searchsorted(high, ids[0])
        groups = np.flatnonzero(high[np.minimum(at, len(high) - 1)] == ids[0])
        at = at[groups]
        while len(groups):
            same = low[at] == ids[1, groups]
            rows, known = self._spread(groups[same], at[same])
            live = self._open[rows] & (expires[known] > self._watermarks[rows])
            self._settle(piece, rows[live], known[live])
            at = at + 1
            more = (at < len(high)) & (high[np.minimum(at, len(high) - 1)] == ids[0, groups])
            groups, at = groups[more], at[more]

    def _spread(self, groups: Ints, at: Ints) -> tuple[Ints, Ints]:
        """The rows of each group, and the group's value of at for each of them."""
        counts = np.diff(self._starts, append=len(self._group))[groups]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(self._starts[groups], counts) + within, np.repeat(at, counts)

    def _settle(self, piece: pa.Table, rows: Ints, known: Ints) -> None:
        self._open[rows] = False
        content = np.stack([piece["content_hi"].to_numpy()[known], piece["content_lo"].to_numpy()[known]])
        differs = np.any(content != self._contents[:, rows], axis=0)
        if differs.any():
            first = piece.select(["source", "offset"]).take(pa.array(known[differs]))
            where = pc.binary_join_element_wise(
                first["source"].cast(pa.string()), first["offset"].cast(pa.string()), ":"
            )
            details = pc.binary_join_element_wise("differs from", where, "of an earlier batch", " ")
            self._conflicts.append((rows[differs], details.combine_chunks()))

    def _among_themselves(self) -> Ints:
        """Settles what no piece knows. The rows that are kept, in order: of each identity the first, and the first that
        comes after that one's expiry, and so on."""
        kept = []
        rows = np.flatnonzero(self._open)
        while len(rows):
            first = np.ones(len(rows), np.bool_)
            first[1:] = self._group[rows[1:]] != self._group[rows[:-1]]
            kept.append(rows[first])
            leader = kept[-1][np.cumsum(first) - 1][~first]
            rows = rows[~first]
            live = self._expires[leader] > self._watermarks[rows]
            differs = live & np.any(self._contents[:, rows] != self._contents[:, leader], axis=0)
            if differs.any():
                later = self._rows.take(pa.array(self._order[rows[differs]]))
                known = self._rows.take(pa.array(self._order[leader[differs]]))
                self._conflicts.append((rows[differs], differences(later, known, self._content)))
            rows = rows[~live]
        return np.sort(np.concatenate([np.empty(0, np.int64), *kept]))

    def _piece(self, kept: Ints) -> pa.Table:
        rows = pa.array(self._order[kept])
        lanes = [*self._ids[:, kept], *self._contents[:, kept]]
        source = self._rows["_source"].combine_chunks().take(rows).cast(SEEN.field("source").type)
        offset = self._rows["_offset"].combine_chunks().take(rows)
        return pa.Table.from_arrays([*lanes, source, offset, self._expires[kept]], schema=SEEN)


def _log_order(rows: pa.Table) -> Ints | None:
    """The rows by (_source, _offset); None if they stand so."""
    sources = rows["_source"].combine_chunks()
    offsets = rows["_offset"].to_numpy()
    if not pa.types.is_dictionary(sources.type):
        sources = sources.dictionary_encode()
    names = np.array(sources.dictionary.to_pylist(), dtype=object)
    rank = np.argsort(np.argsort(names, kind="stable"))[sources.indices.to_numpy()] if len(names) else offsets
    step = np.diff(rank)
    if np.all((step > 0) | ((step == 0) & (np.diff(offsets) >= 0))):
        return None
    return np.lexsort((offsets, rank))


def _by_id(ids: Lanes) -> Ints:
    """By (high, low), equal ones as they stand."""
    order = np.argsort(ids[0], kind="stable")  # of runs that are sorted: merges them
    high = ids[0][order]
    equal = np.flatnonzero(high[1:] == high[:-1])
    if np.any(ids[1][order[equal]] != ids[1][order[equal + 1]]):  # half the bits agree by chance
        return np.lexsort((ids[1], ids[0]))
    return order


def compacted(pieces: Sequence[pa.Table], watermark: int | None) -> list[pa.Table]:
    """The pieces without most of what expired, each bigger than all that follow it together. Those that need no change
    are the very tables that were given.

    watermark (µs): no row still to come has a lower `_watermark`; a piece is rewritten without what expired by then
    when that is half of it. None: nothing has expired. An answer of `Seen` never depends on it.

    >>> piece = SEEN.empty_table()
    >>> compacted([piece], None)
    []
    """
    kept = [piece for piece in (_unexpired(piece, watermark) for piece in pieces) if len(piece)]
    following = 0
    start = len(kept)
    for at in reversed(range(len(kept))):
        if len(kept[at]) <= following:
            start = at
        following += len(kept[at])
    return kept if start == len(kept) else [*kept[:start], merged(kept[start:], watermark)]


def _unexpired(piece: pa.Table, watermark: int | None) -> pa.Table:
    if watermark is None:
        return piece
    live = piece["expires"].to_numpy() > watermark
    return piece.filter(pa.array(live)) if 2 * np.count_nonzero(live) <= len(piece) else piece


def merged(pieces: Sequence[pa.Table], watermark: int | None = None) -> pa.Table:
    """One piece of many that follow each other, without what expired by the watermark."""
    every = pa.concat_tables(pieces).unify_dictionaries()
    if watermark is not None:
        every = every.filter(pc.greater(every["expires"], watermark))
    every = every.combine_chunks()
    ids = np.stack([every["id_hi"].to_numpy(), every["id_lo"].to_numpy()])
    return every.take(pa.array(_by_id(ids)))
