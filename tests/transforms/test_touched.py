"""Touched windows against all windows one by one."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.transforms import query
from pipelines.transforms.ranges import MOST, Range, gaps, inside, joined
from pipelines.transforms.touched import touched
from pipelines.transforms.windows import Sliding, Tumbling, Window

HOUR = 3_600_000_000
WINDOWS = [Tumbling("1h"), Tumbling("1d", timezone="Europe/Paris"), Tumbling("1mo"), Sliding("3h", every="45m")]
START = 1_711_800_000_000_000  # before the clocks change in Paris
TIMES = st.lists(st.integers(0, 400 * 24).map(lambda hours: START + hours * HOUR // 4), max_size=6)


def windows(window: Window, times: list[int]) -> set[tuple[int, int]]:
    tiles = f"SELECT {window.tile_start_sql(window.tile_sql('t'))} AS _tile FROM times"
    sql = f"WITH tiles AS ({tiles}) SELECT window_start AS s, window_end AS e FROM ({window.windows_sql('tiles')})"
    found = query.run(sql, {"times": pa.table({"t": pa.array(times, pa.int64())})})
    return set(zip(found["s"].to_pylist(), found["e"].to_pylist(), strict=True))


@pytest.mark.parametrize("window", WINDOWS, ids=repr)
@given(times=TIMES)
@settings(max_examples=5, deadline=None)
def test_every_window_of_a_row_is_in_and_all_of_its_rows_are_read(window: Window, times: list[int]) -> None:
    found = touched(window, np.array(times, np.int64))
    assert joined(found.starts) == found.starts
    assert joined(found.rows) == found.rows
    for start, end in windows(window, times):
        assert inside(found.starts, np.array([start])).all()
        assert any(part.start is not None and part.start <= start and end <= (part.stop or 0) for part in found.rows)
    # a window that starts there has all of its rows read, whether a new row is in it or not
    near = [time + step * HOUR // 4 for time in times for step in range(-4, 5)]
    for start, end in windows(window, near):
        if inside(found.starts, np.array([start])).all():
            assert any(
                part.start is not None and part.start <= start and end <= (part.stop or 0) for part in found.rows
            )


def test_many_windows_become_few_ranges() -> None:
    times = START + np.arange(0, 5000, 7, dtype=np.int64) * 24 * HOUR
    assert len(touched(Tumbling("1h"), times).rows) == MOST


RANGES = st.lists(st.tuples(st.none() | st.integers(0, 20), st.none() | st.integers(0, 20)), max_size=5)


@given(ends=RANGES)
@settings(max_examples=40, deadline=None)
def test_joined_ranges_and_their_gaps_hold_what_is_in_any_and_in_none(
    ends: list[tuple[int | None, int | None]],
) -> None:
    ranges, times = [Range(*bounds) for bounds in ends], np.arange(-2, 23)
    held = np.array([any(time in part for part in ranges) for time in times.tolist()])
    together = joined(ranges)
    assert inside(together, times).tolist() == held.tolist()
    assert len(joined(ranges, 2)) <= 2
    assert (inside(joined(ranges, 2), times) >= held).all()
    if together:
        assert inside(gaps(together), times).tolist() == (~held).tolist()
