"""Rows in order, however many there are: sorted runs on disk, sealed, merged a few blocks at a time.

An external merge sort (Knuth, The Art of Computer Programming 3, 5.4) over Arrow tables: what fits in one run is sorted
in memory and never written. Runs that follow one another, as those of a history do, are merged without a second sort.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.transforms.spill import Shelf

RUN = 64 << 20
"""Bytes of rows that are sorted at once."""

BLOCK = 1 << 19
"""Bytes of a run that are read back at once; two of them for each run that overlaps are in memory."""


@dataclasses.dataclass(frozen=True)
class _Block:
    """first: the key of its first row. order: among all blocks. put: what stands for it on the shelf."""

    first: tuple[int, ...]
    order: int
    run: int
    put: pa.Table


def ordered(
    tables: Iterable[pa.Table], by: Sequence[str], folder: Path, *, run: int = RUN, block: int = BLOCK
) -> Iterator[pa.Table]:
    """The rows of all tables (of one schema), ascending. by: columns of int64 without nulls, whose values together no
    two rows share.

    folder: a spill folder; it is used when the rows are more than ``run`` bytes. The first table comes after all rows
    were taken. Raises UserError where the disk is full.

    >>> tables = [pa.table({"t": [3, 1]}), pa.table({"t": [2]})]
    >>> [table["t"].to_pylist() for table in ordered(tables, ["t"], Path("/nowhere"))]
    [[1, 2, 3]]
    """
    shelf, blocks = Shelf(folder), list[_Block]()
    runs = _runs(tables, by, run)
    before = next(runs, None)
    for number, following in enumerate(runs):
        assert before is not None
        blocks += _put(before, by, shelf, number, block, len(blocks))
        before = following
    if before is None:
        return
    if not blocks:
        yield before
        return
    blocks += _put(before, by, shelf, blocks[-1].run + 1, block, len(blocks))
    del before
    yield from _merged(sorted(blocks, key=lambda block: (block.first, block.order)), by, shelf)


def _runs(tables: Iterable[pa.Table], by: Sequence[str], run: int) -> Iterator[pa.Table]:
    gathered, size = list[pa.Table](), 0
    for table in tables:
        step = max(1, run * len(table) // max(table.nbytes, 1))
        for piece in (table.slice(at, step) for at in range(0, len(table), step)):
            if gathered and size + piece.nbytes > run:
                yield _sorted(gathered, by)
                gathered, size = [], 0
            gathered.append(piece)
            size += piece.nbytes
    if gathered:
        yield _sorted(gathered, by)


def _put(table: pa.Table, by: Sequence[str], shelf: Shelf, run: int, block: int, first: int) -> Iterator[_Block]:
    step = max(1, block * len(table) // max(table.nbytes, 1))
    for order, at in enumerate(range(0, len(table), step), first):
        yield _Block(tuple(table[name][at].as_py() for name in by), order, run, shelf.put(table.slice(at, step)))


def _merged(blocks: list[_Block], by: Sequence[str], shelf: Shelf) -> Iterator[pa.Table]:
    """blocks: by their first keys. As many are read at once as runs are begun and not ended, so a row is sorted about
    twice, however the runs overlap."""
    last = {block.run: block.order for block in sorted(blocks, key=lambda block: block.order)}
    begun, pending, at = set[int](), list[pa.Table](), 0
    while at < len(blocks):
        taken = blocks[at : at + max(4, len(begun))]
        at += len(taken)
        begun |= {block.run for block in taken}
        begun -= {block.run for block in taken if block.order == last[block.run]}
        rows = _sorted([*pending, *(shelf.get(block.put) for block in taken)], by)
        ready = _before(rows, by, blocks[at].first) if at < len(blocks) else len(rows)
        pending = [rows.slice(ready)]
        if ready:
            yield rows.slice(0, ready)


def _sorted(tables: list[pa.Table], by: Sequence[str]) -> pa.Table:
    table = pa.concat_tables(tables)
    keys = [table[name].to_numpy() for name in by]
    if _ascending(keys):
        return table
    order = np.argsort(keys[0], kind="stable") if len(keys) == 1 else np.lexsort(keys[::-1])
    return table.combine_chunks().take(pa.array(order))


def _ascending(keys: list[npt.NDArray[np.int64]]) -> bool:
    equal = np.ones(max(len(keys[0]) - 1, 0), np.bool_)
    for key in keys:
        if np.any(equal & (key[1:] < key[:-1])):
            return False
        equal &= key[1:] == key[:-1]
    return True


def _before(rows: pa.Table, by: Sequence[str], bound: tuple[int, ...]) -> int:
    """How many of the sorted rows come before the bound."""
    first, last = 0, len(rows)
    for name, value in zip(by, bound, strict=True):
        key = rows[name].slice(first, last - first).to_numpy()
        first, last = first + int(np.searchsorted(key, value)), first + int(np.searchsorted(key, value, "right"))
    return first
