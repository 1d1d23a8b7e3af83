"""A pipeline live, over a log that grows in disorder, by speed layers that die; cut-overs to the batch layer between.

After each part what the layers hold is compared with bounded passes over the same log.
"""

import collections
import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from pipelines import live
from pipelines import run as runs
from pipelines.archive import archive
from pipelines.bounded import Answers, Bounded
from pipelines.definition import Pipeline
from pipelines.io.log import Bounds, Log
from pipelines.io.store import LIVE, Store
from pipelines.io.turns import Turn, Turns, forget
from pipelines.options import Deployment
from pipelines.runners import Engine
from pipelines.serving.merge import merged
from pipelines.transforms import progress, query
from pipelines.transforms.differences import Compared, compared
from pipelines.transforms.expressions import quote
from pipelines.transforms.intake import next_offset
from pipelines.transforms.windows import Whole

AGAIN = 0.02
"""The share of a partition's rows that are sent again at a time, as by a producer that was not answered."""

POINTS = (
    "before it reads",
    "before it writes state",
    "before it commits",
    "after it commits",
    "while it delivers",
    "after it delivers",
    "between turns",
)
"""Where a speed layer dies."""


SEVERAL = ("before it writes state", "while it delivers")
"""Of them, those that a turn passes several times."""


class Died(Exception):
    """What stands for a kill: nothing after it happens."""


class Mortal(Turns):
    """Turns whose process dies once, in whatever process: at a point of POINTS, when the file ``mark`` is there. It
    holds how often the point is passed before."""

    def __init__(self, uri: str, point: str, mark: str) -> None:
        super().__init__(uri)
        self.point, self.mark = point, mark

    def passed(self, point: str) -> None:
        """Raises Died where it is this turn's point."""
        if point != self.point or not os.path.exists(self.mark):
            return
        path = Path(self.mark)
        if left := int(path.read_text()):
            path.write_text(str(left - 1))
            return
        path.unlink()
        raise Died(f"died {point}")

    def intend(self, text: str) -> None:
        super().intend(text)
        self.passed("before it reads")

    def write(self, name: str, table: pa.Table) -> None:
        self.passed("before it writes state")
        super().write(name, table)

    def commit(self, turn: Turn) -> None:
        self.passed("before it commits")
        super().commit(turn)
        self.passed("after it commits")

    def sweep(self) -> None:
        self.passed("after it delivers")
        super().sweep()


class _Speed(live.SpeedLayer):
    def __init__(self, pipeline: Pipeline, deployment: Deployment, engine: Engine, flags: Sequence[str], point: str):
        self.mark = Path(f"{deployment.state}/die")
        self.mortal = Mortal(f"{deployment.state}/{pipeline.name}", point, str(self.mark))
        super().__init__(pipeline, deployment, engine, flags, lambda: 0.0, self.mortal)  # nothing is idle

    def _deliver(self, kind: str, view: str, rows: pa.Table) -> None:
        self.mortal.passed("while it delivers")
        super()._deliver(kind, view, rows)


@dataclasses.dataclass(eq=False)
class Trial:
    """One speed layer after the other, over a log that grows by what was sent. All chance is of the seed.

    turns, restarts: into so many parts the messages are cut, and so often a layer dies. points: where they died.
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
        self.speed = self._begun()

    def take(self, start: int, stop: int) -> None:
        """These of the turns."""
        for number in range(start, stop):
            given = {name: table for name, table in self._next(number).items() if len(table)}
            self.log.append(given)
            progress.advance(sum(map(len, given.values())))
            for _ in range(self._deaths[number]):
                self.speed = self._died()
            while self.speed.turn():
                pass

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
        """The next messages of each partition, and now and then some of before once more."""
        given = {}
        for name, at in self._sizes.items():
            parts = [_read(self.sent, name, at[number], at[number + 1])]
            if self.chance.random() < 0.3:
                rows = at[-1] - at[0]
                start = max(at[0], at[number] - int(self.chance.exponential(0.1) * rows))
                parts.append(_read(self.sent, name, start, min(at[number], start + int(AGAIN * rows))))
            given[name] = pa.concat_tables(parts)
        return given

    def _begun(self) -> _Speed:
        """From what is on disk."""
        forget()
        point = str(self.chance.choice(POINTS))
        speed = _Speed(self.pipeline, self.deployment, self.engine, self.flags, point)
        speed.deliver()
        return speed

    def _died(self) -> _Speed:
        speed, point = self.speed, self.speed.mortal.point
        if point != "between turns":
            speed.mark.write_text(str(self.chance.integers(0, 4) if point in SEVERAL else 0))
            try:
                speed.turn()
            except Exception:
                if speed.mark.exists():
                    raise
        if speed.mark.exists():  # the turn did not come by there so often
            speed.mark.unlink()
            point = "between turns"
        self.points[point] += 1
        speed.close()
        return self._begun()


def _read(log: Log, partition: str, start: int, stop: int) -> pa.Table:
    parts = [log.read(partition, stop, stop)]
    while start < stop and len(messages := log.read(partition, start, stop)):
        parts.append(messages)
        start = next_offset(messages)
    return pa.concat_tables(parts).select(["_raw", "_rows"])
