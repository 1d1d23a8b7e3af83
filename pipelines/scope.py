"""How much of its tables a bounded run computes: all, a range of event times, or what new rows have touched."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.io.lake import Extent, Lake
from pipelines.io.lake_rows import Since, arrived
from pipelines.io.store import Store
from pipelines.io.table import Table
from pipelines.transforms.ranges import EVERYTHING, MOST, Range, Ranges, joined
from pipelines.transforms.touched import touched
from pipelines.transforms.view import ViewPlan
from pipelines.transforms.windows import Tumbling, Whole

_HOURS, _HOUR = Tumbling("1h"), 3_600_000_000

Offsets = Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Scope:
    """rows: event times of the rows that are read. tables: by name, where the windows start (of "events": the event
    times) that are computed again; None: all of every table. offsets: of rows without an event time, those from there
    on are read; None: all. skipped: views that are left as they are. told: a line for the report."""

    rows: Ranges = (EVERYTHING,)
    tables: Mapping[str, Ranges] | None = None
    offsets: tuple[tuple[str, int], ...] | None = None
    skipped: tuple[str, ...] = ()
    told: str | None = None

    def of(self, table: str) -> Ranges:
        """What is computed again of a table."""
        return (EVERYTHING,) if self.tables is None else self.tables[table]

    @property
    def ranged(self) -> bool:
        return self.tables is not None


def between(views: Sequence[ViewPlan], within: Range) -> Scope:
    """The windows that start in a range, with the rows of the last of them, which may lie behind its end."""
    if within.everything:
        return Scope()
    ranged = [view for view in views if view.window.longest is not None]
    longest = max((view.window.longest or 0 for view in ranged), default=0)
    return Scope(
        rows=(Range(within.start, None if within.stop is None else within.stop + longest),),
        tables={"events": (within,), **{view.name: (within,) for view in ranged}},
        skipped=tuple(view.name for view in views if view not in ranged),
    )


def last(
    pipeline: str,
    views: Sequence[ViewPlan],
    tables: Mapping[str, Table],
    store: Store | None,
    lake: Lake,
    extent: Extent,
    definition: str,
) -> Scope:
    """What the rows touch that were archived since the last run, of each table since its own last commit: a run that
    died between two of them is made up for. All, where there is no such run to go on from.

    tables: those of the run by name, "dead letters" among them. Views of all time and of sessions are skipped: what new
    rows change of them cannot be told from a few windows.
    """
    ranged = [view for view in views if view.window.longest is not None]
    names = ["dead letters", *(name for name in tables if name == "events" or name in {view.name for view in ranged})]
    begun: dict[str, Offsets] = {}
    for name in names:
        commit = tables[name].last()
        notes = [{} if commit is None else commit.note]
        if store is not None and name not in ("dead letters", "events"):
            pointer = store.pointer(f"{pipeline}.{name}")
            notes.append(json.loads(pointer.note) if pointer is not None and pointer.note else {})
        if any(note.get("definition") != definition or note.get("lake") != lake.uri for note in notes):
            return Scope(told=f"since last: all, as no run of this definition over this lake has written {name}")
        begun[name] = _least([note["offsets"] for note in notes])
    found: dict[tuple[Any, ...], Since] = {}
    for offsets in begun.values():
        if (key := tuple(sorted(offsets.items()))) not in found:
            found[key] = arrived(lake, offsets, extent)
    new = {name: found[tuple(sorted(offsets.items()))] for name, offsets in begun.items()}
    hours = {name: touched(_HOURS, new[name].times) for name in names}
    changed = {view.name: touched(view.window, new[view.name].times) for view in ranged}
    rows = [*hours.values(), *changed.values()]
    every = joined((part for of in rows for part in of.rows), MOST)
    return Scope(
        rows=every,
        tables={"events": hours["events"].rows if "events" in hours else ()}
        | {name: of.starts for name, of in changed.items()},
        offsets=tuple(sorted(begun["dead letters"].items())),
        skipped=tuple(view.name for view in views if view not in ranged),
        told=_told(max(since.rows for since in new.values()), every),
    )


def endless(views: Sequence[ViewPlan]) -> tuple[str, ...]:
    """The views of all time, which the speed layer keeps by the hour."""
    return tuple(view.name for view in views if isinstance(view.window, Whole))


def spoken(views: Sequence[ViewPlan], through: int | None) -> dict[str, int]:
    """Up to where a run over a lake may speak for the views of all time: whole hours, as more rows may come behind."""
    return {} if through is None else dict.fromkeys(endless(views), through // _HOUR * _HOUR)


def hour_end(last: int) -> int:
    """Up to where a run over files speaks for the views of all time, all of whose rows it counts: to the end of the
    last hour that it has rows of, as for a view of hours. last: µs, the greatest event time.

    >>> hour_end(3_600_000_000), hour_end(3_599_999_999)
    (7200000000, 3600000000)
    """
    return (last // _HOUR + 1) * _HOUR


def _least(offsets: Sequence[Offsets]) -> Offsets:
    return {name: min(of.get(name, 0) for of in offsets) for name in sorted({name for of in offsets for name in of})}


def _told(rows: int, ranges: Ranges) -> str:
    if not rows:
        return "since last: nothing new in the lake"
    hours = sum((part.stop or 0) - (part.start or 0) for part in ranges) / _HOUR
    counted = "1 range" if len(ranges) == 1 else f"{len(ranges)} ranges"
    return f"since last: {rows:,} new rows, in {counted} of {np.ceil(hours):,.0f} hours together"
