"""A pipeline live, over a log that grows in disorder, by speed layers that die; cut-overs to the batch layer between.

After each part what the layers hold is compared with bounded passes over the same log. How the speed layer runs, in
turns or as an unbounded graph, is another module's: ``trial_turns``, ``trial_stream``.
"""

import collections
import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pyarrow as pa

from pipelines import run as runs
from pipelines.archive import archive
from pipelines.bounded import Answers, Bounded
from pipelines.definition import Pipeline
from pipelines.io.log import Bounds, Log
from pipelines.io.store import LIVE, Store
from pipelines.options import Deployment
from pipelines.runners import Engine
from pipelines.serving.merge import merged
from pipelines.transforms import query
from pipelines.transforms.conservation import Conservation
from pipelines.transforms.differences import Compared, compared
from pipelines.transforms.expressions import quote
from pipelines.transforms.intake import next_offset
from pipelines.transforms.windows import Whole

AGAIN = 0.02
"""The share of a partition's rows that are sent again at a time, as by a producer that was not answered."""


@dataclasses.dataclass(eq=False)
class Trial(ABC):
    """A speed layer over a log that grows by what was sent. All chance is of the seed.

    turns, restarts: into so many parts the messages are cut, and so often the layer dies. points: where it died.
    """

    pipeline: Pipeline
    deployment: Deployment
    engine: Engine
    flags: Sequence[str]
    sent: Log
    log: Log
    store: Store
    bounded: Bounded
    chance: np.random.Generator
    turns: int
    restarts: int
    points: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def __post_init__(self) -> None:
        self._deaths = collections.Counter(self.chance.integers(0, self.turns, self.restarts).tolist())
        self._sizes = {name: self._cuts(bounds) for name, bounds in self.sent.bounds().items()}
        self._spoken: dict[str, dict[str, int]] = {}

    @abstractmethod
    def take(self, start: int, stop: int) -> None:
        """Sends these of the parts, and has the speed layer take them to the last row."""

    @property
    @abstractmethod
    def counts(self) -> Conservation:
        """All that the speed layer has counted."""

    @property
    @abstractmethod
    def told(self) -> str:
        """What the speed layer did, for the report: as in "24 turns"."""

    def close(self) -> None:  # noqa: B027  (of most there is nothing left)
        """Ends what the speed layer has left."""

    def cut_over(self, since: Literal["last"] | None = None) -> bool:
        """Archives what the log holds and runs the batch layer over it; whether it has spoken for every view."""
        batch = dataclasses.replace(self.deployment, since=since)
        archive(self.pipeline, batch)
        before = self._generations()
        runs.run(self.pipeline, batch, self.flags)
        after = self._generations()
        ends = {name: bounds.end for name, bounds in self.log.bounds().items()}
        new = {name for name, generation in after.items() if generation != before[name]}
        self._spoken |= dict.fromkeys(new, ends)
        return len(new) == len(after)

    def speed_layer(self, timely: Answers) -> dict[str, Compared]:
        """What the speed layer gave, and a bounded pass over the rows in time: all windows but those that went at a
        cut-over."""
        found = {}
        for view in self.pipeline.plan(live=True).views:
            rows, pointer = self._live(view.name), self.store.pointer(self._named(view.name))
            expected = timely.views[view.name]
            if pointer is not None and pointer.boundary is not None:
                keys = [quote(name) for name in (*view.by, "window_start")]
                same = " AND ".join(f"a.{name} IS NOT DISTINCT FROM b.{name}" for name in keys)
                there = f"epoch_us(a.window_end) > {pointer.boundary} OR EXISTS (SELECT 1 FROM rows b WHERE {same})"
                expected = query.run(f"SELECT a.* FROM expected a WHERE {there}", {"expected": expected, "rows": rows})
            found[view.name] = compared(view, rows, expected)
        return found

    def both_layers(self, timely: Answers) -> dict[str, Compared]:
        """What readers see, and a bounded pass over all rows that the batch layer has read; behind its boundary over
        those in time."""
        found = {}
        for view in self.pipeline.plan().views:
            pointer, ends = self.store.pointer(self._named(view.name)), self._spoken[view.name]
            assert pointer is not None
            boundary = pointer.boundary
            served = merged(self.store.scan(self._named(view.name)), boundary, self._live(view.name), view)
            every = self._every(tuple(ends.items()), boundary if isinstance(view.window, Whole) else None)
            found[view.name] = compared(view, served, merged(every[view.name], boundary, timely.views[view.name], view))
        return found

    @functools.cache  # noqa: B019  (a trial ends with its process, or its test)
    def _every(self, ends: tuple[tuple[str, int], ...], before: int | None) -> dict[str, pa.Table]:
        return self.bounded.every(dict(ends), before)

    def _live(self, view: str) -> pa.Table:
        return self.store.scan(self._named(view), generation=LIVE)

    def _named(self, view: str) -> str:
        return f"{self.pipeline.name}.{view}"

    def _generations(self) -> dict[str, int]:
        pointers = {view.name: self.store.pointer(self._named(view.name)) for view in self.pipeline.views}
        return {name: LIVE if pointer is None else pointer.generation for name, pointer in pointers.items()}

    def _cuts(self, bounds: Bounds) -> list[int]:
        between = self.chance.integers(bounds.start, bounds.end, self.turns - 1, endpoint=True)
        return [bounds.start, *sorted(between.tolist()), bounds.end]

    def _next(self, number: int) -> dict[str, pa.Table]:
        """The next messages of each partition that has any, and now and then some of before once more."""
        given = {}
        for name, at in self._sizes.items():
            parts = [_read(self.sent, name, at[number], at[number + 1])]
            if self.chance.random() < 0.3:
                rows = at[-1] - at[0]
                start = max(at[0], at[number] - int(self.chance.exponential(0.1) * rows))
                parts.append(_read(self.sent, name, start, min(at[number], start + int(AGAIN * rows))))
            given[name] = pa.concat_tables(parts)
        return {name: table for name, table in given.items() if len(table)}


def _read(log: Log, partition: str, start: int, stop: int) -> pa.Table:
    parts = [log.read(partition, stop, stop)]
    while start < stop and len(messages := log.read(partition, start, stop)):
        parts.append(messages)
        start = next_offset(messages)
    return pa.concat_tables(parts).select(["_raw", "_rows"])
