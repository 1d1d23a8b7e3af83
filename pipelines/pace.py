"""The pace of a replay: rows by number or by event time, as a clock has it."""

import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pyarrow as pa

from pipelines.transforms.disorder import WHEN
from pipelines.transforms.errors import UserError

ROWS = 1 << 16
"""Rows that are sent at once, at most."""

TICK = 0.1
"""Seconds of a paced stream that are sent at once."""


@dataclasses.dataclass(frozen=True)
class Pace:
    """How fast rows are sent; as fast as they are taken if nothing is said. rate: rows a second. speedup: seconds of
    event time a second. clock: seconds. wait: waits so many seconds, or until it is True: then nothing more is sent.

    >>> Pace(speedup=3600).speedup
    3600
    """

    rate: float | None = None
    speedup: float | None = None
    clock: Callable[[], float] = time.monotonic
    wait: Callable[[float], bool] = dataclasses.field(default_factory=lambda: threading.Event().wait)

    def __post_init__(self) -> None:
        if self.rate is not None and self.speedup is not None:
            raise UserError("--rate and --speedup: one of them, rows a second or seconds of event time a second")
        for name, value in (("rate", self.rate), ("speedup", self.speedup)):
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"--{name}={value:g}: more than 0; leave it out to send as fast as the log takes it")

    def of(self, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """The rows, which are in the order of WHEN, in pieces, each as soon as it is time for it."""
        start, first, sent = 0.0, None, 0
        for rows in tables:
            if first is None:
                start, first = self.clock(), rows[WHEN.name][0].as_py()
            for piece in self._pieces(rows, first):
                due = start + (sent / self.rate if self.rate else 0.0)
                if self.speedup:
                    due += (piece[WHEN.name][-1].as_py() - first) / 1e6 / self.speedup
                if self._stopped(due):
                    return
                yield piece
                sent += len(piece)

    def _stopped(self, due: float) -> bool:
        """Whether it was to stop before it is time."""
        while (left := due - self.clock()) > 0:
            if self.wait(left):
                return True
        return self.wait(0)

    def _pieces(self, rows: pa.Table, first: int) -> Iterator[pa.Table]:
        step = min(ROWS, max(1, int(self.rate * TICK))) if self.rate else ROWS
        starts = np.arange(0, len(rows), step)
        if self.speedup:
            ticks = (rows[WHEN.name].to_numpy() - first) // max(1, int(TICK * self.speedup * 1e6))
            starts = np.union1d(starts, np.flatnonzero(np.diff(ticks)) + 1)
        for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True):
            yield rows.slice(start, stop - start)
