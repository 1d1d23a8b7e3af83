"""Open windows however their rows come: any batches, any pieces, any time at which what is closed is forgotten.

The oracle is plain Python, over all rows that are in time at once.
"""

import collections
import dataclasses
import datetime
import functools
import itertools
import zoneinfo
from collections.abc import Iterable, Sequence
from typing import Any

import hypothesis.strategies as st
import pyarrow as pa
import pytest
from hypothesis import example, given, settings

from pipelines.definition import Pipeline, Source, View
from pipelines.transforms import speed
from pipelines.transforms.conservation import Conservation
from pipelines.transforms.lateness import NEVER, WATERMARK, Lateness
from pipelines.transforms.measures import Count, Distinct, Last, Max, Sum
from pipelines.transforms.speed import OpenView, Piece
from pipelines.transforms.windows import Session, Sliding, Tumbling, Whole, Window

EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
START = 1_711_828_800_000_000  # 2024-03-30 20:00 UTC; Paris goes to summer time in the night
SECOND, MINUTE, HOUR = 1_000_000, 60_000_000, 3_600_000_000
DISORDER, LATENESS = 10 * MINUTE, 30 * MINUTE
PARIS = Tumbling("1d", timezone="Europe/Paris")
WINDOWS: list[Window] = [Tumbling("15m"), PARIS, Sliding("1h", every="25m"), Session("20m"), Whole()]

Row = tuple[int, str | None, int]
"""Event time in seconds from START, key, value."""

Key = tuple[str | None, int]
Answers = dict[Key, dict[str, Any]]
"""By key and window_start, µs."""


class Event:
    at: datetime.datetime
    key: str | None
    x: int


@functools.cache
def view(window: Window) -> OpenView:
    measures: dict[str, Any] = {
        "n": Count(),
        "total": Sum("x"),
        "most": Max("x"),
        "kinds": Distinct("x"),
        "last": Last("x"),
    }
    declared = View("v", by="key", window=window, **measures)
    (plan,) = Pipeline("p", source=Source(Event, event_time="at"), views=(declared,)).plan(live=True).views
    return OpenView(plan, Lateness(plan.window, LATENESS))


def windows(window: Window, time: int) -> list[tuple[int, int]]:
    """Those of a row, but not of a session."""
    if isinstance(window, Sliding):
        size, every = HOUR, 25 * MINUTE
        return [(start, start + size) for start in range(time // every * every, time - size, -every)]
    if window == PARIS:
        zone = zoneinfo.ZoneInfo("Europe/Paris")
        day = (EPOCH + datetime.timedelta(microseconds=time)).astimezone(zone).date()
        ends = (
            datetime.datetime.combine(of, datetime.time(), zone).astimezone(datetime.UTC) - EPOCH
            for of in (day, day + datetime.timedelta(1))
        )
        start, end = (end // datetime.timedelta(microseconds=1) for end in ends)
        return [(start, end)]
    every = HOUR if isinstance(window, Whole) else 15 * MINUTE
    return [(time // every * every, time // every * every + every)]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of one partition with the watermark before each; and how far the view has closed what ended before."""

    rows: tuple[tuple[Row, int], ...]
    closed: int


def stream(rows: Sequence[Row], cuts: Iterable[int], lags: Sequence[int]) -> list[Batch]:
    """The rows in batches. lags: µs that what closes is behind the watermark, batch by batch."""
    bounds = sorted({0, len(rows), *(cut for cut in cuts if cut < len(rows))})
    batches, greatest, closed = [], NEVER, NEVER
    for number, (low, high) in enumerate(itertools.pairwise(bounds)):
        if greatest != NEVER:
            closed = max(closed, greatest - DISORDER - lags[number % len(lags)])
        marked = []
        for row in rows[low:high]:
            marked.append((row, NEVER if greatest == NEVER else greatest - DISORDER))
            greatest = max(greatest, START + row[0] * SECOND)
        batches.append(Batch(tuple(marked), closed))
    return batches


def expected(window: Window, batches: list[Batch]) -> Answers:
    """Every row in the windows that are not over for it."""
    groups: dict[Key, list[tuple[int, int]]] = collections.defaultdict(list)
    timely: dict[str | None, list[tuple[int, int]]] = collections.defaultdict(list)
    ends: dict[Key, int] = {}
    for (second, key, x), watermark in (pair for batch in batches for pair in batch.rows):
        time = START + second * SECOND
        if isinstance(window, Session):
            if time + window.micros + LATENESS > watermark:
                timely[key].append((time, x))
            continue
        for start, end in windows(window, time):
            if end + LATENESS > watermark:
                groups[key, start].append((time, x))
                ends[key, start] = end
    for key, rows in timely.items():
        first, last = -(2**62), -(2**62)
        for time, x in sorted(rows):
            if time - last >= 20 * MINUTE:
                first = time
            last = time
            groups[key, first].append((time, x))
            ends[key, first] = last + 20 * MINUTE
    return {place: answer(rows, ends[place]) for place, rows in groups.items()}


def answer(rows: list[tuple[int, int]], end: int) -> dict[str, Any]:
    values = [x for _, x in rows]
    told = {"n": len(rows), "total": sum(values), "most": max(values), "kinds": len(set(values)), "last": max(rows)[1]}
    return {**told, "window_end": end}


def table(batch: Batch) -> pa.Table:
    times = pa.array([START + second * SECOND for (second, _, _), _ in batch.rows], pa.timestamp("us", "UTC"))
    columns = {
        "at": times,
        "key": pa.array([key for (_, key, _), _ in batch.rows], pa.string()),
        "x": pa.array([x for (_, _, x), _ in batch.rows], pa.int64()),
        "event_time": times,
        WATERMARK.name: pa.array([watermark for _, watermark in batch.rows], pa.int64()),
    }
    return pa.table(columns)


@dataclasses.dataclass
class Kept:
    """What a micro-batch keeps of a view between turns, and a store that takes its answers."""

    view: OpenView
    pieces: list[Piece] = dataclasses.field(default_factory=list)
    tables: dict[str, pa.Table] = dataclasses.field(default_factory=dict)
    store: Answers = dataclasses.field(default_factory=dict)
    read: int = 0
    rows: int = 0
    late: int = 0

    def take(self, batch: Batch) -> None:
        states, dead, tallies = self.view.partial(table(batch), {}, None, "json")
        assert not len(dead)
        counts = Conservation.of(tallies)
        self.late += counts.dropped["view:v"]["late"]
        moved = self.view.advance(self.pieces, self._read, [states], batch.closed)
        assert moved.rows == counts.views["v"][0]
        written = []
        for piece in moved.tables:
            assert 0 < len(piece) <= speed.PIECE
            name = f"{len(self.tables)}"
            self.tables[name] = piece
            written.append(Piece(name, *self.view.span(piece), len(piece)))
        every = [*moved.kept, *written]
        self.pieces = [piece for piece in every if not self.view.closed(piece, batch.closed)]
        for row in moved.gone.to_pylist():
            self.store.pop(self._key(row))
        answers = moved.answers.to_pylist()
        assert len({self._key(row) for row in answers}) == len(answers)
        for row in answers:
            names = ("n", "total", "most", "kinds", "last")
            told = {name: row[name] for name in names}
            self.store[self._key(row)] = {**told, "window_end": self._micros(row["window_end"])}
        self.rows += len(batch.rows)

    def _read(self, piece: Piece) -> pa.Table:
        self.read += 1
        return self.tables[piece.name]

    def _key(self, row: dict[str, Any]) -> Key:
        return row["key"], self._micros(row["window_start"])

    @staticmethod
    def _micros(time: datetime.datetime) -> int:
        return (time - EPOCH) // datetime.timedelta(microseconds=1)


ROWS = st.lists(
    st.tuples(st.integers(0, 8 * 3600), st.sampled_from(["a", "b", None]), st.integers(-3, 3)), min_size=1, max_size=25
)
NEAR = [(0, "a", 1), (45 * 60, "a", 2), (20 * 60, "a", 3), (25 * 60, "b", 4), (39 * 60, "a", 5), (3 * 3600, "b", 0)]
"""Sessions that are joined by a later row, and then one more by another."""


@pytest.mark.slow
@pytest.mark.parametrize("window", WINDOWS, ids=repr)
@settings(max_examples=30, deadline=None)
@given(
    rows=ROWS,
    cuts=st.sets(st.integers(1, 24)),
    lags=st.lists(st.sampled_from([0, MINUTE, HOUR, 2**61]), min_size=1, max_size=5),
    piece=st.sampled_from([1, 2, 5, 1 << 16]),
)
@example(rows=NEAR, cuts={1, 2, 3, 4, 5}, lags=[0], piece=1)
@example(rows=[(8 * 3600, "a", 1), (0, "a", 2), (7 * 3600, "a", 3), (26000, "a", 4)], cuts={1, 2, 3}, lags=[0], piece=1)
def test_any_batches_pieces_and_evictions_give_the_same_answers(
    window: Window, rows: list[Row], cuts: set[int], lags: list[int], piece: int
) -> None:
    batches = stream(rows, cuts, lags)
    kept = Kept(view(window))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(speed, "PIECE", piece)
        for batch in batches:
            kept.take(batch)
    assert kept.store == expected(window, batches)


@pytest.mark.parametrize("window", [Sliding("1h", every="25m"), Session("20m")], ids=repr)
def test_rows_one_by_one_give_what_all_at_once_give(window: Window) -> None:
    for cuts in (range(1, len(NEAR)), ()):
        batches = stream(NEAR, cuts, [0])
        kept = Kept(view(window))
        for batch in batches:
            kept.take(batch)
        assert kept.store == expected(window, batches)


def test_sessions_that_a_row_joins_are_gone_and_counted_once() -> None:
    kept = Kept(view(Session("20m")))
    for batch in stream(NEAR[:5], range(1, 5), [0]):
        before = set(kept.store)
        kept.take(batch)
        if batch.rows[0][0] == (39 * 60, "a", 5):
            assert before - set(kept.store) == {("a", START + 45 * MINUTE)}
    assert kept.store["a", START + 20 * MINUTE]["total"] == 10
    assert kept.store["a", START + 20 * MINUTE]["n"] == 3


def test_a_row_late_for_some_windows_counts_in_the_others() -> None:
    """The watermark is at 2:00; windows of an hour every 25 minutes, closed half an hour after."""
    late = (60 * 60 + 5 * 60, "a", 7)
    batches = stream([(130 * 60, "b", 0), late], {1}, [0])
    kept = Kept(view(Sliding("1h", every="25m")))
    for batch in batches:
        kept.take(batch)
    every = windows(Sliding("1h", every="25m"), START + late[0] * SECOND)
    still = [start for start, end in every if end + LATENESS > START + 120 * MINUTE]
    assert 0 < len(still) < len(every)
    assert {start for key, start in kept.store if key == "a"} == set(still)


def test_only_pieces_that_are_touched_are_read_and_closed_ones_go() -> None:
    kept = Kept(view(Tumbling("15m")))
    hours = [(hour * 3600, "a", 1) for hour in range(8)]
    for batch in stream(hours, range(1, 8), [2**61]):  # nothing is closed
        kept.take(batch)
    assert len(kept.pieces) == 8
    kept.read = 0
    kept.take(Batch((((7 * 3600 + 60, "a", 2), START + 7 * HOUR - DISORDER),), START + 4 * HOUR))
    assert kept.read == 1
    assert [piece.low for piece in kept.pieces] == [START + hour * HOUR for hour in (4, 5, 6, 7)]
    assert kept.store["a", START + 7 * HOUR]["n"] == 2
    assert len(kept.store) == 8
