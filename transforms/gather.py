"""The lists of sketches: gathered by the numbers of rows that a query gives each group, collapsed where they are long.

A query that gathered the values themselves would take twice to five times as long, and hold each several times.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.transforms import query
from pipelines.transforms.lists import Ints, Lists, lengths, sums
from pipelines.transforms.sketches import LIMIT, NUMBER, Sketch
from pipelines.transforms.states import Sql, State

PENDING = 2 * LIMIT
"""How long a group's lists may grow before they are collapsed: collapsing waits for enough to do."""

GROUPS = 1 << 15
"""How many groups are collapsed at a time: a group's number and 48 bits of a hash fit 63 bits."""

BLOCK = 1 << 18
"""About how many values are collapsed at a time."""


def sketches(states: Iterable[State]) -> list[Sketch]:
    """Those of the states that have lists."""
    return [state for state in states if isinstance(state, Sketch)]


def numbered(rows: pa.Table) -> pa.Table:
    """The rows with their numbers, as queries over them need that make sketches."""
    return rows.append_column(NUMBER, pa.array(np.arange(len(rows), dtype=np.int32)))


def partials(sql: Sql, rows: pa.Table, states: Iterable[State]) -> pa.Table:
    """What a query makes of rows: by group, the partial states."""
    found = sketches(states)
    if not found:
        return query.run(sql, {"batch": rows})
    made = query.run(sql, {"batch": numbered(rows)})
    values = query.run(samples(found), {"batch": rows})
    groups = _groups(made, found)
    for state in found:
        column = values[state.raw].combine_chunks()
        none = pa.array([], made.schema.field(state.packed).type.value_type).to_numpy()
        blocks = []
        for some in groups.cut(_bounds(groups.lengths)):
            raw = _sampled(column, some)
            packed = Lists(np.zeros(len(raw.lengths), np.int64), none)
            blocks.append(_collapsed(state, raw, packed, final=False))
        made = _replaced(made, state, blocks)
    return made


def samples(states: Iterable[State]) -> Sql:
    """The query for what rows are to sketches; empty where there is no sketch."""
    cells = ", ".join(f"{state.sample} AS {state.raw}" for state in sketches(states))
    return f"SELECT {cells}\nFROM batch" if cells else ""


def merged(sql: Sql, table: pa.Table, states: Iterable[State], *, final: bool = False) -> pa.Table:
    """What a query makes of states: by group, the states together; ``final`` as in ``collapse``.

    Some groups at a time, so that little more is held than the states before and after.
    """
    found = sketches(states)
    if not found:
        return query.run(sql, {"batch": table})
    made = query.run(sql, {"batch": numbered(table)})
    groups = _groups(made, found)
    for state in found:
        raw, packed = table[state.raw].combine_chunks(), table[state.packed].combine_chunks()
        sizes = (lengths(raw) + lengths(packed))[groups.values]
        blocks = []
        for some in groups.cut(_bounds(sums(sizes, groups.lengths))):
            blocks.append(_collapsed(state, _joined(raw, some), _joined(packed, some), final))
        made = _replaced(made, state, blocks)
    return made


def collapse(table: pa.Table, states: Iterable[State], *, final: bool = False) -> pa.Table:
    """The table with the long lists of its sketches collapsed; all other columns and the order of rows as they were.

    Without ``final`` only lists longer than PENDING are touched, so calling it after each merge costs little. With it
    every state takes its form of at most LIMIT values or a sketch; results and whatever is kept need that.
    """
    for state in sketches(states):
        raw, packed = Lists.of(table[state.raw]), Lists.of(table[state.packed])
        if _chosen(raw, packed, final).any():
            bounds = _bounds(raw.lengths + packed.lengths)
            pairs = zip(raw.cut(bounds), packed.cut(bounds), strict=True)
            table = _replaced(table, state, [_collapsed(state, *pair, final) for pair in pairs])
    return table


def _groups(made: pa.Table, found: list[Sketch]) -> Lists:
    """The numbers of the rows of each group."""
    numbers = Lists.of(made[found[0].raw])
    return Lists(numbers.lengths, numbers.values.astype(np.int64))


def _sampled(column: pa.Array, groups: Lists) -> Lists:
    """A list per group: the values of its rows that have one."""
    taken = column.take(pa.array(groups.values))
    present = taken.is_valid().to_numpy(zero_copy_only=False)
    return Lists(sums(present, groups.lengths), taken.drop_null().to_numpy())


def _joined(column: pa.ListArray, groups: Lists) -> Lists:
    """A list per group: those of its rows, one after the other."""
    rows = Lists.of(column.take(pa.array(groups.values)))
    return Lists(sums(rows.lengths, groups.lengths), rows.values)


def _bounds(sizes: Ints) -> Ints:
    """Where to cut groups of so many values into blocks: their keys fit 63 bits, their arrays the cache."""
    ends = np.cumsum(sizes + 2 * BLOCK // GROUPS)
    cuts = np.searchsorted(ends, np.arange(BLOCK, ends[-1] if len(ends) else 0, BLOCK))
    return np.unique(np.concatenate([[0], cuts, [len(ends)]]))


def _chosen(raw: Lists, packed: Lists, final: bool) -> npt.NDArray[np.bool_]:
    """Which groups are to be collapsed."""
    return (raw.lengths > LIMIT) | (packed.lengths > 0) if final else raw.lengths + packed.lengths > PENDING


def _collapsed(state: Sketch, raw: Lists, packed: Lists, final: bool) -> tuple[Lists, Lists]:
    chosen = _chosen(raw, packed, final)
    if not chosen.any():
        return raw, packed
    few, many = state.collapsed(raw.where(chosen), packed.where(chosen))
    return raw.replace(chosen, few), packed.replace(chosen, many)


def _replaced(table: pa.Table, state: Sketch, blocks: list[tuple[Lists, Lists]]) -> pa.Table:
    if not blocks:
        return table
    for name, parts in zip((state.raw, state.packed), zip(*blocks, strict=True), strict=True):
        field = table.schema.field(name)
        table = table.set_column(table.schema.get_field_index(name), field, Lists.joined(parts).arrow(field.type))
    return table
