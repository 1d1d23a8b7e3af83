"""What a bucket keeps of open windows in the global window: taken in turn, dropped once closed, never before."""

import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from apache_beam.pvalue import TaggedOutput
from apache_beam.utils.timestamp import Timestamp

from pipelines import Count, Pipeline, Session, Sliding, Source, Tumbling, View
from pipelines.transforms import open_windows
from pipelines.transforms.conservation import Conservation, merge
from pipelines.transforms.lateness import Lateness
from pipelines.transforms.open_windows import Keep
from pipelines.transforms.speed import OpenView
from pipelines.transforms.windows import Window

MINUTE = 60_000_000


class Sale:
    """A row."""

    at: datetime.datetime
    shop: str


class Bag(list[pa.Table]):
    """State as a worker sees it."""

    def read(self) -> list[pa.Table]:
        return list(self)

    def add(self, table: pa.Table) -> None:
        self.append(table)


class Timer:
    at: Timestamp | None = None

    def set(self, at: Timestamp) -> None:
        self.at = at

    def clear(self) -> None:
        self.at = None


class Bucket:
    """One bucket by hand: a view of counts by shop, at a clock that stands at 0."""

    def __init__(self, window: Window, trigger: int | None) -> None:
        pipeline = Pipeline(
            "sales", source=Source(Sale, event_time="at"), views=(View("v", by="shop", window=window, n=Count()),)
        )
        self.view = OpenView(pipeline.plan(live=True).views[0], Lateness(window, MINUTE))
        self.keep = Keep(self.view, trigger, lambda: 0.0)
        self.settled, self.recent, self.waiting = Bag(), Bag(), Bag()
        self.turn, self.due, self.close = Timer(), Timer(), Timer()

    def send(self, *minutes: float) -> None:
        times = pa.array(np.array([m * MINUTE for m in minutes], np.int64)).cast(pa.timestamp("us", "UTC"))
        rows = pa.table({"shop": pa.array(["a"] * len(minutes)), "event_time": times})
        if "_since" in self.view.plan.partial_schema.names:
            rows = rows.append_column("_since", pa.nulls(len(rows), pa.int64()))
        self.keep.process(((0, 0), self.view.plan.partials(rows)), self.waiting, self.turn, self.due)

    def in_turn(self) -> list[tuple[str, float, int]]:
        self.turn.clear()
        return self.given(self.keep.in_turn(self.settled, self.recent, self.waiting, self.due, self.close))

    def on_time(self) -> list[tuple[str, float, int]]:
        self.due.clear()
        return self.given(self.keep.on_time(self.settled, self.recent, self.waiting, self.turn, self.close))

    def drop(self) -> list[tuple[str, float, int]]:
        assert self.close.at is not None
        at, self.close.at = self.close.at, None
        state = self.settled, self.recent, self.waiting, self.turn, self.due, self.close
        return self.given(self.keep.drop(at, *state))

    def given(self, outputs: Any) -> list[tuple[str, float, int]]:
        """Answers as (start, minutes, n), sessions that are gone as (gone, minutes, 0)."""
        self.tallies: list[pa.Table] = []
        found = []
        for output in outputs:
            if isinstance(output, TaggedOutput) and output.tag == "tallies":
                self.tallies.append(output.value)
                continue
            rows = output.value if isinstance(output, TaggedOutput) else output
            for row in rows.to_pylist():
                found.append(("n" if "n" in row else "gone", row["window_start"].timestamp() / 60, row.get("n", 0)))
        return sorted(found)

    @property
    def held(self) -> int:
        return sum(map(len, [*self.settled, *self.recent]))


def test_what_comes_waits_for_its_turn_and_changes_what_it_touches() -> None:
    bucket = Bucket(Sliding("10m", every="5m"), 1_000_000)
    bucket.send(1, 2)
    assert bucket.turn.at == Timestamp(1)
    assert bucket.due.at == Timestamp(5 * 60)
    assert bucket.in_turn() == [("n", -5, 2), ("n", 0, 2)]
    assert bucket.due.at is None
    bucket.send(7)
    assert bucket.in_turn() == [("n", 0, 3), ("n", 5, 1)]
    counts = Conservation.of(merge(bucket.tallies))
    assert counts.views["v"] == (0, 1, 2)


def test_without_a_trigger_it_waits_for_the_end_of_a_window() -> None:
    bucket = Bucket(Tumbling("5m"), None)
    bucket.send(1)
    bucket.send(6)
    assert bucket.turn.at is None
    assert bucket.due.at == Timestamp(5 * 60)
    assert bucket.on_time() == [("n", 0, 1), ("n", 5, 1)]


def test_an_end_of_input_takes_what_waits_and_leaves_no_timer_of_a_turn() -> None:
    bucket = Bucket(Sliding("10m", every="5m"), 1_000_000)
    bucket.send(1)
    assert bucket.on_time() == [("n", -5, 1), ("n", 0, 1)]
    bucket.send(2)
    assert bucket.drop() == [("n", -5, 2), ("n", 0, 2)]
    assert (bucket.turn.at, bucket.due.at, bucket.close.at) == (None, None, None)
    assert bucket.held == 0


def test_state_is_dropped_when_it_is_closed_and_not_before() -> None:
    bucket = Bucket(Session("1m"), None)
    for minute in range(0, 40, 4):
        bucket.send(minute)
        bucket.on_time()
    assert bucket.held == 10
    assert bucket.close.at == Timestamp(micros=(0 + 1 + 1 + 1) * MINUTE)  # last row + gap + lateness + gap
    bucket.drop()
    assert bucket.held == 9
    while bucket.close.at is not None:
        before = bucket.held
        bucket.drop()
        assert bucket.held <= before - before // 2
    assert bucket.held == 0


def test_a_row_between_two_sessions_makes_them_one() -> None:
    bucket = Bucket(Session("2m"), 1_000_000)
    bucket.send(0)
    bucket.send(3)
    assert bucket.in_turn() == [("n", 0, 1), ("n", 3, 1)]
    bucket.send(1.5)
    assert bucket.in_turn() == [("gone", 3, 0), ("n", 0, 3)]


def test_many_states_settle_and_stay_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_windows, "FEW", 2)
    bucket = Bucket(Tumbling("1m"), None)
    for minute in [*range(20), *range(20)]:
        bucket.send(minute)
        answers = bucket.on_time()
    assert answers == [("n", 19, 2)]
    assert bucket.held <= 40
    assert len(bucket.settled) == 1
