"""Watermarks and lateness against plain Python, which lists the windows of a row one by one."""

import datetime
import itertools
import zoneinfo
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipelines.transforms.lateness import NEVER, Lateness, Position, live, watermarks
from pipelines.transforms.windows import Session, Sliding, Tumbling, Whole, Window

MINUTE, HOUR, DAY = 60_000_000, 3_600_000_000, 86_400_000_000
EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
START = 1_711_800_000_000_000  # 2024-03-30 12:00 UTC; Paris goes to summer time in the night

Windows = list[tuple[int, int]]


def micros(time: datetime.datetime) -> int:
    return (time - EPOCH) // datetime.timedelta(microseconds=1)


def tumbling(every: int) -> Callable[[int], Windows]:
    return lambda time: [(time // every * every, time // every * every + every)]


def sliding(size: int, every: int) -> Callable[[int], Windows]:
    def of(time: int) -> Windows:
        starts = range(time // every * every, time - size, -every)
        return [(start, start + size) for start in sorted(starts)]

    return of


def days(zone: str, length: int = 1) -> Callable[[int], Windows]:
    """Of so many days, from a Monday on."""

    def of(time: int) -> Windows:
        local = (EPOCH + datetime.timedelta(microseconds=time)).astimezone(zoneinfo.ZoneInfo(zone)).date()
        first = local - datetime.timedelta((local - datetime.date(1970, 1, 5)).days % length)
        ends = (first, first + datetime.timedelta(length))
        start, end = (
            datetime.datetime.combine(day, datetime.time(), zoneinfo.ZoneInfo(zone)).astimezone(datetime.UTC)
            for day in ends
        )
        return [(micros(start), micros(end))]

    return of


def months(zone: str) -> Callable[[int], Windows]:
    def of(time: int) -> Windows:
        local = (EPOCH + datetime.timedelta(microseconds=time)).astimezone(zoneinfo.ZoneInfo(zone))
        after = datetime.date(local.year + local.month // 12, local.month % 12 + 1, 1)
        start, end = (
            datetime.datetime.combine(day, datetime.time(), zoneinfo.ZoneInfo(zone)).astimezone(datetime.UTC)
            for day in (local.date().replace(day=1), after)
        )
        return [(micros(start), micros(end))]

    return of


WINDOWS: dict[Window, Callable[[int], Windows]] = {
    Tumbling("15m"): tumbling(15 * MINUTE),
    Tumbling("1d", timezone="Europe/Paris"): days("Europe/Paris"),
    Tumbling("1w", timezone="America/New_York"): days("America/New_York", 7),
    Tumbling("1d", timezone="Australia/Lord_Howe"): days("Australia/Lord_Howe"),  # half an hour of summer time
    Tumbling("1mo", timezone="Asia/Kathmandu"): months("Asia/Kathmandu"),
    Sliding("1h", every="10m"): sliding(HOUR, 10 * MINUTE),
    Sliding("1h", every="25m"): sliding(HOUR, 25 * MINUTE),
    Session("20m"): lambda time: [(time // 1000 * 1000, time // 1000 * 1000 + 20 * MINUTE)],
    live(Whole()): tumbling(HOUR),
}
FEW = settings(max_examples=8)
EACH = pytest.mark.parametrize("window", WINDOWS, ids=repr)
TIMES = st.lists(st.integers(START - 40 * DAY, START + 40 * DAY) | st.integers(START, START + DAY), max_size=8)


@given(
    st.lists(st.none() | st.integers(-(10**7), 10**7), max_size=12),
    st.sets(st.integers(0, 12)),
    st.sampled_from([0, 1, 1_500, 10**6]),
    st.none() | st.integers(-(10**4), 10**4).map(lambda ms: ms * 1000),
)
@example([None, -1, 1999, None, 5], {1, 3}, 0, None)
def test_the_watermark_is_of_the_rows_before_however_they_are_cut(
    times: list[int | None], cuts: set[int], disorder: int, idle: int | None
) -> None:
    expected, greatest = [], None
    for time in times:
        own = NEVER if greatest is None else (greatest - disorder) // 1000 * 1000
        expected.append(own if idle is None else max(own, idle))
        greatest = greatest if time is None else time if greatest is None else max(greatest, time)
    found, position = list[int](), Position(0, idle=idle)
    bounds = sorted({0, len(times), *(cut for cut in cuts if cut < len(times))})
    for low, high in itertools.pairwise(bounds):
        part = times[low:high]
        known = np.array([time is not None for time in part])
        before, last = watermarks(np.array([time or 0 for time in part]), known, position, disorder)
        found += before.tolist()
        position = Position(high, last, idle)
    assert found == expected
    assert position.greatest == greatest
    assert position.watermark(disorder) == max(
        NEVER if idle is None else idle, NEVER if greatest is None else (greatest - disorder) // 1000 * 1000
    )


@EACH
@FEW
@given(TIMES)
def test_the_end_is_that_of_the_last_window(window: Window, times: list[int]) -> None:
    assert window.ends(np.array(times, np.int64)).tolist() == [max(end for _, end in WINDOWS[window](t)) for t in times]


@EACH
@FEW
@given(TIMES, st.integers(-2 * HOUR, 26 * HOUR), st.sampled_from([0, 1, 30 * MINUTE]))
@example([START, START - 1], 0, 0)
def test_late_is_what_comes_after_all_its_windows_and_partly_after_some(
    window: Window, times: list[int], after: int, allowed: int
) -> None:
    watermarks = [(time + after) // 1000 * 1000 for time in times]
    rule, late, since = Lateness(window, allowed), list[bool](), list[int | None]()
    for time, watermark in zip(times, watermarks, strict=True):
        every = WINDOWS[window](time)
        still = [start for start, end in every if end + allowed > watermark]
        late.append(not still)
        since.append(None if not still or len(still) == len(every) else min(still))
    of, marks = np.array(times, np.int64), np.array(watermarks, np.int64)
    assert rule.late(of, marks).tolist() == late
    assert [None if bad else at for bad, at in zip(late, rule.since(of, marks).to_pylist(), strict=True)] == since
    before = np.full(len(times), NEVER)
    assert not rule.late(of, before).any() and rule.since(of, before).null_count == len(times)


@EACH
@FEW
@given(
    st.integers(START - 40 * DAY, START + 40 * DAY),
    st.integers(-3 * HOUR, 30 * HOUR),
    st.sampled_from([0, 30 * MINUTE]),
    st.integers(0, HOUR),
)
def test_what_is_closed_no_row_in_time_can_change(
    window: Window, time: int, after: int, allowed: int, further: int
) -> None:
    rule, watermark = Lateness(window, allowed), (time + after) // 1000 * 1000
    if isinstance(window, Session):
        last = time // 1000 * 1000
        joining = np.array([last + further % (20 * MINUTE), last])  # a row less than a gap after the last, or at it
    else:
        last = int(window._tiles(np.array([time]))[0])
        assert window.tile
        joining = np.array([last + further % window.tile, last])
    late = rule.late(joining, np.full(2, watermark))
    closed = bool(rule.closed(np.array([last]), watermark)[0])
    assert late.all() or not closed
    if not isinstance(window, Session):
        assert closed == bool(late[1])


@pytest.mark.parametrize(("month", "day", "hours"), [(3, 31, 23), (10, 27, 25), (6, 1, 24)])
def test_days_of_23_and_25_hours_end_at_midnight(month: int, day: int, hours: int) -> None:
    paris = Lateness(Tumbling("1d", timezone="Europe/Paris"), 0)
    start = micros(datetime.datetime(2024, month, day, tzinfo=zoneinfo.ZoneInfo("Europe/Paris")))
    end = start + hours * HOUR
    assert paris.expires(np.array([start, end - 1])).tolist() == [end, end]
    assert paris.late(np.array([start, start]), np.array([end - 1000, end])).tolist() == [False, True]
