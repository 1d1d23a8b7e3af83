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

from pipelines.reached import Reached
from pipelines.transforms.conservation import TALLY, Conservation

PATIENCE = 30.0
"""Seconds without a count that moves, after which what is missing is no longer on its way."""

SECONDS = 5.0
"""Between two lines."""


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a stream has written of itself. reached: None where its engine does not tell how far it is."""

    counts: Conservation
    reached: Reached | None = None

    @property
    def ended(self) -> bool:
        """Whether its input is over, and all of it counted."""
        return self.reached is not None and self.reached.ended


def facts(uri: str) -> Facts:
    """What a stream has written; nothing before the first."""
    try:
        with fsspec.open(uri, "rt", encoding="utf-8") as file:
            told = json.load(file)
    except (OSError, ValueError):  # not written yet, or being written
        return Facts(Conservation.of(TALLY.empty_table()))
    reached = told.get("reached")
    counts = Conservation.of(pa.Table.from_pylist(told["tallies"], TALLY))
    return Facts(counts, None if reached is None else Reached.of(reached))


def ended(uri: str) -> bool:
    """Whether a stream has written that its input is over, and all of it counted: asked often."""
    try:
        with fsspec.open(uri, "rb") as file:
            return b'"ended": true' in file.read()
    except OSError:
        return False


def counted(uri: str) -> Conservation:
    """What a stream has counted."""
    return facts(uri).counts


@dataclasses.dataclass
class Drift:
    """Tells, from facts that are looked at again and again, counts that do not add up, no longer move, and are not of
    rows that are still on their way: a slow or stuck engine loses nothing.

    >>> from pipelines.transforms.conservation import merge, tally
    >>> lost = Facts(Conservation.of(merge([tally("source", "read", 3), tally("source", "kept", 2)])))
    >>> drift = Drift()
    >>> drift.of(lost, at=0.0), drift.of(lost, at=PATIENCE)
    ([], ['read 3 = kept 2 + filtered 0 + rejected 0 + late 0 + duplicate 0 is off by 1: rows were lost'])
    """

    last: tuple[Conservation, bool] | None = None
    since: float = 0.0

    def of(self, facts: Facts, at: float) -> list[str]:
        """The broken laws, once they stay so. at: seconds of a clock."""
        arrived = facts.reached is None or facts.reached.settled
        if not arrived or self.last != (facts.counts, arrived):
            self.last, self.since = (facts.counts, arrived), at
        return facts.counts.violations() if at - self.since >= PATIENCE else []


@contextlib.contextmanager
def shown(
    title: str, uri: str, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
) -> Iterator[None]:
    """A line now and then of how far a stream is, and of what drifts, on stderr."""
    end, out, drift = threading.Event(), stream or sys.stderr, Drift()

    def lines() -> None:
        before, at = 0, clock()
        while not end.wait(SECONDS):
            told, now = facts(uri), clock()
            rows, rate = told.counts.rows, (told.counts.rows["read"] - before) / max(now - at, 1e-9)
            line = f"{rows['read']:,} rows · {max(rate, 0):,.0f} rows/s · late {rows['late']:,}"
            print(f"{title}: {line} · rejected {rows['rejected']:,}{_through(told)}", file=out, flush=True)
            for law in drift.of(told, now):
                print(f"{title}: ALERT: {law}", file=out, flush=True)
            before, at = rows["read"], now

    thread = threading.Thread(target=lines, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def _through(told: Facts) -> str:
    through = told.reached and told.reached.complete_through
    return f" · complete through {through[:19].replace('T', ' ')} UTC" if through else ""
