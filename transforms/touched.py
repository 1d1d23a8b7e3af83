"""The windows that rows of some event times are in, as ranges: what must be computed again when such rows are new."""

import dataclasses

import numpy as np
import pyarrow as pa

from pipelines.transforms import query
from pipelines.transforms.ranges import MOST, Range, Ranges, joined
from pipelines.transforms.windows import Micros, Window


@dataclasses.dataclass(frozen=True)
class Touched:
    """starts: where the windows start. rows: the event times that they are of. Both µs UTC, empty without rows."""

    starts: Ranges
    rows: Ranges


def touched(window: Window, times: Micros) -> Touched:
    """The windows of these event times, of any window but Whole and Session, as a few ranges; what lies between two
    near ones may be in them, too, then with all of its rows.

    >>> from pipelines.transforms.windows import Sliding
    >>> minutes = np.array([7, 8, 60]) * 60_000_000
    >>> for part in touched(Sliding("10m", every="5m"), minutes).rows:
    ...     print(part.start // 60_000_000, part.stop // 60_000_000)
    0 15
    55 70
    """
    if not len(times):
        return Touched((), ())
    tiles = f"SELECT DISTINCT {window.tile_start_sql(window.tile_sql('t'))} AS _tile FROM times"
    sql = f"WITH tiles AS ({tiles}) SELECT DISTINCT window_start, window_end FROM ({window.windows_sql('tiles')})"
    found = query.run(sql, {"times": pa.table([times], ["t"])})
    starts, ends = found["window_start"].to_numpy(), found["window_end"].to_numpy()
    rows = joined(_distinct(starts, ends), MOST)
    last = [int(starts[(starts >= part.start) & (starts < part.stop)].max()) for part in rows]
    return Touched(tuple(Range(part.start, stop + 1) for part, stop in zip(rows, last, strict=True)), rows)


def _distinct(starts: Micros, ends: Micros) -> list[Range]:
    """The ranges [start, end), those that overlap or touch already together: there may be very many."""
    order = np.argsort(starts)
    starts, ends = starts[order], np.maximum.accumulate(ends[order])
    opens = np.flatnonzero(np.concatenate([[True], starts[1:] > ends[:-1]]))
    closes = np.concatenate([opens[1:] - 1, [len(starts) - 1]])
    return [Range(int(starts[first]), int(ends[last])) for first, last in zip(opens, closes, strict=True)]
