"""Watermarks and lateness: functions of a partition and an offset alone, never of how much was read at once.

The watermark before an offset of a partition is the greatest event time of its earlier offsets minus the source's
disorder. A row is late for a view when the end of every window that it is in, plus the source's lateness, is not after
that watermark. So a restart, another poll size or another engine call the same rows late.

A partition that is idle is advanced by the clock: then its watermark is what was observed, kept with its offset.
Watermarks are whole milliseconds, as Beam's are.
"""

import dataclasses

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.transforms.windows import Micros, Sliding, Tumbling, Whole, Window

NEVER = -(2**63)
"""A watermark before any row was seen: nothing is late."""

WATERMARK = pa.field("_watermark", pa.int64())
"""What a row of a log carries: the watermark (µs, or NEVER) of its partition before it."""

SINCE = pa.field("_since", pa.int64())
"""What a row late for some of its sliding windows carries: the start (µs) of the first that it still counts in."""

EXPIRES = pa.field("_expires", pa.int64())
"""What a row carries until it is known once: the watermark (µs) from which on it would be late for every view."""

IDLE_AFTER = 10.0
"""Seconds without a row after which a partition is idle."""


@dataclasses.dataclass(frozen=True)
class Position:
    """How far a partition was read. offset: the next one. greatest: µs, of the event times before it. idle: µs, the
    watermark to which it was advanced while it was idle."""

    offset: int
    greatest: int | None = None
    idle: int | None = None

    def watermark(self, disorder: int) -> int:
        """
        >>> Position(9, greatest=5_000_500).watermark(disorder=1_000_000)
        4000000
        """
        own = NEVER if self.greatest is None else (self.greatest - disorder) // 1000 * 1000
        return max(own, NEVER if self.idle is None else self.idle)


def watermarks(
    times: Micros, known: npt.NDArray[np.bool_], position: Position, disorder: int
) -> tuple[Micros, int | None]:
    """The watermark before each row of a partition, in offset order, and the greatest event time after the last.

    known: which rows have an event time; the others move nothing.
    """
    least = np.iinfo(np.int64).min
    first = least if position.greatest is None else position.greatest
    greatest = np.maximum.accumulate(np.concatenate([[first], np.where(known, times, least)]))
    none = greatest == least
    found = np.where(none, NEVER, (np.where(none, 0, greatest) - disorder) // 1000 * 1000)
    if position.idle is not None:
        found = np.maximum(found, position.idle)
    return found[:-1], None if none[-1] else int(greatest[-1])


def live(window: Window) -> Window:
    """The window that the speed layer keeps for a view: Whole has no end, so it is kept by the hour.

    A reader merges the hours that the batch layer does not speak for yet.
    """
    return Tumbling("1h") if isinstance(window, Whole) else window


@dataclasses.dataclass(frozen=True)
class Lateness:
    """When rows are late for one view. allowed: µs, the source's lateness.

    >>> rule = Lateness(Tumbling("1m"), allowed=0)
    >>> rule.late(np.array([0, 0]), np.array([59_999_000, 60_000_000])).tolist()
    [False, True]
    """

    window: Window
    allowed: int

    def expires(self, times: Micros) -> Micros:
        """The watermark from which on a row of this time is late."""
        return self.window.ends(times) + self.allowed

    def late(self, times: Micros, watermark: Micros) -> npt.NDArray[np.bool_]:
        """Whether each row is late for all of its windows."""
        return self.expires(times) <= watermark

    def since(self, times: Micros, watermark: Micros) -> pa.Array:
        """SINCE: for rows that are not late for all of their windows, null where they are late for none."""
        if not isinstance(self.window, Sliding):
            return pa.nulls(len(times), SINCE.type)
        first = self.window.opens(times)  # the first window that a row is in ends after it
        opened = self.window.opens(np.maximum(watermark, NEVER + 2**62) - self.allowed)
        return pa.array(opened, SINCE.type, mask=opened <= first)

    def closes(self, starts: Micros) -> Micros:
        """The watermark from which on tiles, or sessions by their last row, can no longer change: no row for them is in
        time any more.

        A session stays a gap longer: a row in time may still join it, or two of them.
        """
        return self.expires(starts) + getattr(self.window, "micros", 0)

    def closed(self, starts: Micros, watermark: int) -> npt.NDArray[np.bool_]:
        """Which tiles, or sessions by their last row, are closed."""
        return self.closes(starts) <= watermark
