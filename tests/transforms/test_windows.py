"""Windows against independent oracles: Python's zoneinfo for calendars, Beam's own windows for the rest."""

import datetime
import zoneinfo
from collections.abc import Sequence

import pyarrow as pa
import pytest
from apache_beam.transforms import window as beam_window
from apache_beam.utils.timestamp import Duration as BeamDuration
from apache_beam.utils.timestamp import Timestamp
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipelines.transforms import query
from pipelines.transforms.windows import Duration, Session, Sliding, Tumbling, Whole, Window, WindowError, floor_sql

EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
DAY = 86_400_000_000
YEAR_ONE, YEAR_10000 = -719_162 * DAY, 2_932_897 * DAY
FAST = settings(max_examples=15, deadline=None)

anytime = st.integers(YEAR_ONE, YEAR_10000 - 1)
modern = st.integers(0, 67 * 365 * DAY)
"""1970 to 2036: where time zones are in whole quarters of an hour, and all have rules."""


def micros(time: datetime.datetime) -> int:
    return (time - EPOCH) // datetime.timedelta(microseconds=1)


def moment(at: int) -> datetime.datetime:
    return EPOCH + datetime.timedelta(microseconds=at)


def found(window: Window, times: Sequence[int]) -> list[set[tuple[int, int]]]:
    """The windows of each time, by way of tiles, as rows get them."""
    numbered = f"(SELECT _n, {window.tile_sql('_t')} AS _number FROM b)"
    tiles = f"(SELECT _n, {window.tile_start_sql('_number')} AS _tile FROM {numbered})"
    table = pa.table({"_n": list(range(len(times))), "_t": pa.array(times, pa.int64())})
    sets: list[set[tuple[int, int]]] = [set() for _ in times]
    for row in query.run(
        f"SELECT _n, window_start, window_end FROM ({window.windows_sql(tiles)})", {"b": table}
    ).to_pylist():
        assert (row["window_start"], row["window_end"]) not in sets[row["_n"]]
        sets[row["_n"]].add((row["window_start"], row["window_end"]))
    return sets


def assigned(window: beam_window.WindowFn, at: int) -> set[tuple[int, int]]:
    context = beam_window.WindowFn.AssignContext(Timestamp(micros=at))
    return {(given.start.micros, given.end.micros) for given in window.assign(context)}


# Windows of fixed length

DURATIONS = ["1s", "7s", "1m", "13m", "1h", "5h", "1d", "2d", "3d", "1w", "2w"]


@FAST
@given(st.sampled_from(DURATIONS), st.lists(anytime, min_size=1, max_size=20))
@example("1d", [YEAR_ONE, YEAR_10000 - 1, -1, 0, 1])
def test_tumbling_windows_are_beams_fixed_windows(every: str, times: list[int]) -> None:
    size = Duration.parse(every).micros
    offset = 4 * DAY % size if size % DAY == 0 else 0  # whole days count from a Monday
    fixed = beam_window.FixedWindows(BeamDuration(micros=size), Timestamp(micros=offset))
    assert found(Tumbling(every), times) == [assigned(fixed, at) for at in times]


@pytest.mark.parametrize("every", ["1w", "2w"])
def test_weeks_start_on_monday(every: str) -> None:
    for start, _ in set().union(*found(Tumbling(every), [0, DAY, 10_000 * DAY])):
        assert moment(start).strftime("%a %H:%M") == "Mon 00:00"


SLIDING = [("10m", "1m"), ("10m", "3m"), ("1h", "25m"), ("1d", "1h"), ("25h", "1d"), ("1w", "1d"), ("9d", "3d")]
SLIDING += [("2w", "1w"), ("64h", "2d"), ("40h", "40h"), ("160h", "5d"), ("1m", "1m")]


@FAST
@given(st.sampled_from(SLIDING), st.lists(anytime, min_size=1, max_size=10))
def test_sliding_windows_are_beams(window: tuple[str, str], times: list[int]) -> None:
    size, every = (Duration.parse(text).micros for text in window)
    offset = 4 * DAY % every if every % DAY == 0 else 0
    sliding = beam_window.SlidingWindows(
        BeamDuration(micros=size), BeamDuration(micros=every), Timestamp(micros=offset)
    )
    assert found(Sliding(window[0], every=window[1]), times) == [assigned(sliding, at) for at in times]


def test_the_whole_has_one_window_without_ends() -> None:
    assert str(found(Whole(), [0, YEAR_ONE])) == "[{(None, None)}, {(None, None)}]"


# Calendars

ZONES = [
    "UTC", "Europe/Paris", "America/New_York", "Asia/Kolkata", "Asia/Kathmandu", "Australia/Lord_Howe",
    "America/Sao_Paulo",  # its clocks went forward at midnight: days that begin at 1:00
    "America/Havana",  # its clocks go back at 1:00: days with two midnights
    "Pacific/Apia",  # has no 30 December 2011
    "Asia/Tehran",
]  # fmt: skip
CALENDARS = ["1d", "2d", "10d", "1w", "2w", "1mo", "5mo", "1q", "2q", "1y", "3y"]


def calendar(every: str, zone: str, at: int) -> tuple[int, int]:
    """The window of a time, by Python: local dates counted from Monday 5 January 1970, or months from January 1970."""
    tz, number = zoneinfo.ZoneInfo(zone), Duration.parse(every)
    local = moment(at).astimezone(tz).date()
    if number.months:
        month = local.year * 12 + local.month - 1
        first = month - (month - 1970 * 12) % number.months
        ends = [datetime.date(m // 12, m % 12 + 1, 1) for m in (first, first + number.months)]
    else:
        days, monday = number.micros // DAY, datetime.date(1970, 1, 5)
        begin = local - datetime.timedelta(days=(local - monday).days % days)
        ends = [begin, begin + datetime.timedelta(days=days)]
    start, end = (micros(datetime.datetime.combine(day, datetime.time(), tz).astimezone(datetime.UTC)) for day in ends)
    return start, end


def around(zone: str) -> list[int]:
    """Times about every change of the clocks, to the microsecond."""
    tz, times, hour = zoneinfo.ZoneInfo(zone), [], datetime.timedelta(hours=1)
    at = datetime.datetime(2009, 1, 1, tzinfo=datetime.UTC)
    while at.year < 2020:
        if at.astimezone(tz).utcoffset() != (at + hour).astimezone(tz).utcoffset():
            times += [micros(at) + shift for shift in range(-2 * DAY, 2 * DAY, DAY // 24)]
            times += [micros(at + n * hour) - 1 for n in range(-2, 3)]
        at += hour
    return times


@FAST
@given(st.sampled_from(ZONES), st.sampled_from(CALENDARS), st.lists(modern, min_size=1, max_size=20))
@example("Pacific/Apia", "1d", [micros(datetime.datetime(2011, 12, 30, hour, tzinfo=datetime.UTC)) for hour in (9, 10)])
def test_calendar_windows_are_pythons(zone: str, every: str, times: list[int]) -> None:
    assert found(Tumbling(every, timezone=zone), times) == [{calendar(every, zone, at)} for at in times]


@pytest.mark.parametrize("zone", [zone for zone in ZONES if zone != "UTC"])
def test_days_about_a_change_of_the_clocks(zone: str) -> None:
    times = around(zone) or [0]
    windows = found(Tumbling("1d", timezone=zone), times)
    assert windows == [{calendar("1d", zone, at)} for at in times]
    for at, of in zip(times, windows, strict=True):
        ((start, end),) = of
        assert start <= at < end


@pytest.mark.parametrize(
    ("day", "hours"), [("2026-03-28", 24), ("2026-03-29", 23), ("2026-10-25", 25), ("2026-10-26", 24)]
)
def test_the_length_of_a_day_in_paris(day: str, hours: int) -> None:
    noon = micros(datetime.datetime.fromisoformat(f"{day}T11:00:00+00:00"))
    (((start, end),),) = found(Tumbling("1d", timezone="Europe/Paris"), [noon])
    assert (end - start) // (DAY // 24) == hours


def test_longest_holds() -> None:
    for every in [*CALENDARS, *DURATIONS]:
        for zone in ("UTC", "America/New_York") if every[-1] in "dwoqy" else ("UTC",):
            window = Tumbling(every, timezone=zone)
            for of in found(window, [n * 11 * DAY for n in range(200)]):
                ((start, end),) = of
                assert end - start <= window.longest


# Sessions


def sessions(gap: str, batches: Sequence[Sequence[tuple[str, int]]]) -> list[tuple[str, int, int]]:
    """By islands of each batch, and islands of those."""
    window, parts = Session(gap), []
    islands = window.islands_sql("b", ("k",))
    reduced = f"SELECT k, min(_start) AS _start, max(_last) AS _last FROM ({islands}) GROUP BY k, _island"
    for batch in batches:
        table = pa.table({"k": [key for key, _ in batch], "t": pa.array([at for _, at in batch], pa.int64())})
        floored = f"SELECT k, {floor_sql('t', 1000)} AS _start, _start AS _last FROM b"
        parts.append(query.run(reduced, {"b": query.run(floored, {"b": table})}))
    merged = query.run(f"{window.windows_sql(f'({reduced})')} ORDER BY k, window_start", {"b": pa.concat_tables(parts)})
    return [(row["k"], row["window_start"], row["window_end"]) for row in merged.to_pylist()]


class Merging(beam_window.WindowFn.MergeContext):  # type: ignore[misc]
    def __init__(self, windows: list[beam_window.IntervalWindow]) -> None:
        super().__init__(windows)
        self.kept = set(windows)

    def merge(self, to_be_merged: list[beam_window.IntervalWindow], result: beam_window.IntervalWindow) -> None:
        self.kept = self.kept - set(to_be_merged) | {result}


def beam_sessions(gap: str, rows: Sequence[tuple[str, int]]) -> list[tuple[str, int, int]]:
    fn = beam_window.Sessions(BeamDuration(micros=Duration.parse(gap).micros))
    told = []
    for key in sorted({key for key, _ in rows}):
        contexts = [fn.AssignContext(Timestamp(micros=at // 1000 * 1000)) for k, at in rows if k == key]
        merging = Merging([one for context in contexts for one in fn.assign(context)])
        fn.merge(merging)
        told += [(key, one.start.micros, one.end.micros) for one in sorted(merging.kept, key=lambda one: one.start)]
    return told


near = st.tuples(
    st.sampled_from("ab"), st.integers(-20_000_000, 20_000_000) | st.integers(-20, 20).map(lambda s: s * 10**6)
)


@FAST
@given(st.sampled_from(["1s", "2s", "5s"]), st.lists(near, min_size=1, max_size=30), st.data())
def test_sessions_are_beams_however_rows_are_cut(gap: str, rows: list[tuple[str, int]], data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(rows)), max_size=4).map(sorted))
    batches = [rows[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(rows)], strict=True) if stop > start]
    assert sessions(gap, batches) == beam_sessions(gap, rows)


def test_a_gap_of_exactly_its_length_ends_a_session() -> None:
    at = [0, 4_999_999, 9_998_000, 14_998_000]  # in ms: 0, 4,999, 9,998, 14,998: the last is 5,000 after
    assert sessions("5s", [[("a", t) for t in at]]) == [("a", 0, 14_998_000), ("a", 14_998_000, 19_998_000)]


def test_a_row_between_two_sessions_makes_them_one() -> None:
    apart = [[("a", 0)], [("a", 8_000_000)]]
    assert len(sessions("5s", apart)) == 2
    assert sessions("5s", [*apart, [("a", 4_000_000)]]) == [("a", 0, 13_000_000)]


# What is refused


@pytest.mark.parametrize("text", ["", "5", "m", "0m", "05m", "-1m", "1.5h", "5 m", "5M", "1min", "9999999999s"])
def test_a_duration_is_a_number_and_a_unit(text: str) -> None:
    with pytest.raises(WindowError, match="a whole number and a unit, as in 10s 5m 2h 1d 1w 1mo 1q 1y"):
        Duration.parse(text)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Tumbling("1d", timezone="Europe/Pariss"), "not an IANA time zone"),
        (lambda: Tumbling("1h", timezone="Europe/Paris"), "windows under a day are aligned in UTC"),
        (lambda: Tumbling("25h", timezone="Europe/Paris"), "whole days"),
        (lambda: Sliding("1mo", every="1d"), "months have no fixed length"),
        (lambda: Sliding("1h", every="2h"), "every must be at most size"),
        (lambda: Sliding("1h", every="0s"), "every must be at most size"),
        (lambda: Sliding("1w", every="1s"), "every row would be in 604800 windows"),
        (lambda: Session("0s"), "the gap is at least 1s"),
        (lambda: Session("1mo"), "months have no fixed length"),
    ],
)
def test_a_window_that_cannot_be_is_refused_in_one_line(make: object, told: str) -> None:
    assert callable(make)
    with pytest.raises(WindowError) as error:
        make()
    assert told in str(error.value)
    assert "\n" not in str(error.value)
