"""A trial of a speed layer that takes turns: it dies at any point of a turn, and starts again from what is on disk."""

import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from pipelines import live
from pipelines.definition import Pipeline
from pipelines.io.turns import Turn, Turns, forget
from pipelines.options import Deployment
from pipelines.runners import Engine
from pipelines.transforms import progress
from pipelines.transforms.conservation import Conservation
from pipelines.trial import Trial

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


class InTurns(Trial):
    """One speed layer after the other, each from where the one before it died."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.speed = self._begun()

    def take(self, start: int, stop: int) -> None:
        for number in range(start, stop):
            given = self._next(number)
            self.log.append(given)
            progress.advance(sum(map(len, given.values())))
            for _ in range(self._deaths[number]):
                self.speed = self._died()
            while self.speed.turn():
                pass

    @property
    def counts(self) -> Conservation:
        status = self.speed.status()
        assert status is not None
        return status.counts

    @property
    def told(self) -> str:
        assert self.speed.last is not None
        return f"{self.speed.last.number} turns"

    def close(self) -> None:
        self.speed.close()

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
