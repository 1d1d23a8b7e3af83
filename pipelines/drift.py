"""The law of conservation while a stream runs: what was read and is nowhere yet is on its way, or it was lost."""

import contextlib
import dataclasses
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TextIO

import fsspec
import pyarrow as pa

from pipelines.transforms.conservation import TALLY, Conservation

PATIENCE = 30.0
"""Seconds without a count that moves, after which what is missing is no longer on its way."""

SECONDS = 5.0
"""Between two lines."""


def counted(facts: str) -> Conservation:
    """What a stream has written of its counts; nothing before the first."""
    try:
        with fsspec.open(facts, "rt", encoding="utf-8") as file:
            rows = json.load(file)["tallies"]
    except (OSError, ValueError):  # not written yet, or being written
        rows = []
    return Conservation.of(pa.Table.from_pylist(rows, TALLY))


@dataclasses.dataclass
class Drift:
    """Tells, from counts that are looked at again and again, those that do not add up and no longer move.

    >>> from pipelines.transforms.conservation import merge, tally
    >>> lost = Conservation.of(merge([tally("source", "read", 3), tally("source", "kept", 2)]))
    >>> drift = Drift()
    >>> drift.of(lost, at=0.0), drift.of(lost, at=PATIENCE)
    ([], ['read 3 = kept 2 + filtered 0 + rejected 0 + late 0 + duplicate 0 is off by 1: rows were lost'])
    """

    last: Conservation | None = None
    since: float = 0.0

    def of(self, counts: Conservation, at: float) -> list[str]:
        """The broken laws, once they stay so. at: seconds of a clock."""
        if counts != self.last:
            self.last, self.since = counts, at
        return counts.violations() if at - self.since >= PATIENCE else []


@contextlib.contextmanager
def shown(
    title: str, facts: str, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
) -> Iterator[None]:
    """A line now and then of how far a stream is, and of what drifts, on stderr."""
    end, out, drift = threading.Event(), stream or sys.stderr, Drift()

    def lines() -> None:
        before, at = 0, clock()
        while not end.wait(SECONDS):
            counts, now = counted(facts), clock()
            rows, rate = counts.rows, (counts.rows["read"] - before) / max(now - at, 1e-9)
            told = f"{rows['read']:,} rows · {max(rate, 0):,.0f} rows/s · late {rows['late']:,}"
            print(f"{title}: {told} · rejected {rows['rejected']:,}", file=out, flush=True)
            for law in drift.of(counts, now):
                print(f"{title}: ALERT: {law}", file=out, flush=True)
            before, at = rows["read"], now

    thread = threading.Thread(target=lines, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
