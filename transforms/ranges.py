"""Ranges of time, and what lies in them: for SQL, for Arrow, and for people who read a commit's note."""

import dataclasses
import itertools
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt


@dataclasses.dataclass(frozen=True, order=True)
class Range:
    """Times in [start, stop), µs UTC; None is unbounded.

    >>> Range().everything, Range(start=0).everything
    (True, False)
    """

    start: int | None = None
    stop: int | None = None

    @property
    def everything(self) -> bool:
        return self.start is None and self.stop is None

    def sql(self, time: str) -> str:
        """Whether a time (SQL of µs) is inside."""
        limits = [f"{time} >= {self.start:d}"] if self.start is not None else []
        limits += [f"{time} < {self.stop:d}"] if self.stop is not None else []
        return f"({' AND '.join(limits) or 'true'})"

    def __contains__(self, time: int) -> bool:
        return (self.start is None or self.start <= time) and (self.stop is None or time < self.stop)


EVERYTHING = Range()
Ranges = tuple[Range, ...]
"""Ranges in order, none touching the next: as ``joined`` gives them."""

MOST = 32
"""Ranges that a run has, at most: what lies between the nearest of them is taken in, too."""


def joined(ranges: Iterable[Range], most: int | None = None) -> Ranges:
    """The same times as ranges in order, apart and not empty. most: no more than so many, closing the smallest gaps.

    >>> joined([Range(5, 7), Range(0, 2), Range(2, 3)])
    (Range(start=0, stop=3), Range(start=5, stop=7))
    >>> joined([Range(0, 1), Range(2, 3), Range(9, None)], most=2)
    (Range(start=0, stop=3), Range(start=9, stop=None))
    """
    least, greatest = float("-inf"), float("inf")
    ends = sorted(
        (least if part.start is None else part.start, greatest if part.stop is None else part.stop) for part in ranges
    )
    found: list[tuple[float, float]] = []
    for start, stop in ends:
        if start >= stop:
            continue
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], stop)
        else:
            found.append((start, stop))
    if most is not None and len(found) > most:
        widest = sorted(range(1, len(found)), key=lambda at: found[at - 1][1] - found[at][0])[: most - 1]
        opens = [0, *sorted(widest)]
        found = [(found[at][0], found[end - 1][1]) for at, end in zip(opens, [*opens[1:], len(found)], strict=True)]
    return tuple(
        Range(None if start == least else int(start), None if stop == greatest else int(stop)) for start, stop in found
    )


def gaps(ranges: Ranges) -> Ranges:
    """What lies outside: before, between and after.

    >>> gaps((Range(0, 3), Range(5, None)))
    (Range(start=None, stop=0), Range(start=3, stop=5))
    """
    between = [Range(before.stop, after.start) for before, after in itertools.pairwise(ranges)]
    first, last = ranges[0].start, ranges[-1].stop
    return (*([] if first is None else [Range(None, first)]), *between, *([] if last is None else [Range(last)]))


def sql(ranges: Ranges, time: str) -> str:
    """Whether a time (SQL of µs) is in any of them.

    >>> sql((Range(0, 3), Range(5, None)), "t")
    '((t >= 0 AND t < 3) OR (t >= 5))'
    """
    return f"({' OR '.join(part.sql(time) for part in ranges) or 'false'})"


def inside(ranges: Ranges, times: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which times (µs) are in any of them.

    >>> inside((Range(0, 3), Range(5, None)), np.array([2, 3, 4, 5])).tolist()
    [True, False, False, True]
    """
    found = np.zeros(len(times), np.bool_)
    for part in ranges:
        above = True if part.start is None else times >= part.start
        found |= above & (True if part.stop is None else times < part.stop)
    return found
