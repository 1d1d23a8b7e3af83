"""Any cut between batch and speed gives what one layer alone gives."""

import datetime
import functools
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings

from pipelines.definition import Pipeline, Source, View
from pipelines.io.store import LIVE, open_store
from pipelines.options import Deployment
from pipelines.run import run
from pipelines.scope import hour_end
from pipelines.serving.merge import merged
from pipelines.transforms.differences import compared
from pipelines.transforms.lateness import SINCE
from pipelines.transforms.measures import Count, Distinct, Last, Mean, Quantile, Sum
from pipelines.transforms.windows import Session, Sliding, Tumbling, Whole, Window

START = datetime.datetime(2024, 3, 30, 20, tzinfo=datetime.UTC)  # Paris goes to summer time in these hours
MINUTE, HOUR, DAY = 60_000_000, 3_600_000_000, 86_400_000_000
WINDOWS = [
    Tumbling("15m"),
    Tumbling("1d", timezone="Europe/Paris"),
    Sliding("1h", every="25m"),
    Session("20m"),
    Whole(),
]
Row = tuple[int, str | None, int]


class Event:
    at: datetime.datetime
    key: str | None
    x: int


@functools.cache
def pipeline(window: Window) -> Pipeline:
    measures: dict[str, Any] = {
        "n": Count(),
        "total": Sum("x"),
        "mean": Mean("x / 3"),
        "p90": Quantile("x", 0.9),
        "kinds": Distinct("x"),
        "last": Last("x"),
        "share": "total / n",
    }
    return Pipeline("p", source=Source(Event, event_time="at"), views=(View("v", by="key", window=window, **measures),))


def answers(window: Window, rows: list[Row], *, live: bool) -> pa.Table:
    plan = pipeline(window).plan(live=live).views[0]
    times = pa.array([START + datetime.timedelta(minutes=minute) for minute, _, _ in rows], pa.timestamp("us", "UTC"))
    columns = {
        "key": pa.array([key for _, key, _ in rows], pa.string()),
        "x": pa.array([x for *_, x in rows], pa.int64()),
    }
    table = pa.table({**columns, "event_time": times})
    if SINCE.name in plan.partial_schema.names:
        table = table.append_column(SINCE, pa.nulls(len(table), SINCE.type))
    return plan.finished(plan.merged([plan.partials(table)]))


def micros(minute: int) -> int:
    return int((START + datetime.timedelta(minutes=minute)).timestamp()) * 1_000_000


ROWS = st.lists(st.tuples(st.integers(0, 12 * 60), st.sampled_from(["a", "b", None]), st.integers(-5, 5)), max_size=30)


@pytest.mark.slow
@pytest.mark.parametrize("window", WINDOWS, ids=repr)
@settings(max_examples=40, deadline=None)
@given(rows=ROWS, cut=st.integers(-60, 14 * 60), ahead=st.integers(0, 120))
@example(rows=[(0, "a", 1), (19, "a", 2), (40, "a", 3)], cut=39, ahead=0)
@example(rows=[], cut=0, ahead=0)
def test_any_boundary_gives_what_one_layer_gives(window: Window, rows: list[Row], cut: int, ahead: int) -> None:
    """ahead: minutes of rows behind the boundary that the batch layer has read too."""
    boundary = micros(cut)
    if isinstance(window, Whole):
        boundary, ahead = boundary // HOUR * HOUR, 0
    read = [row for row in rows if micros(row[0]) < boundary + ahead * MINUTE]
    batch, live = answers(window, read, live=False), answers(window, rows, live=True)
    plan = pipeline(window).plan().views[0]
    found = merged(batch, boundary, live, plan)
    assert found.schema.equals(plan.schema)
    whole = answers(window, rows, live=False)
    assert compared(plan, found, whole).first == () and len(found) == len(whole)
    before = merged(plan.schema.empty_table(), None, live, plan)
    assert compared(plan, before, whole).first == ()


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(rows=ROWS, cut=st.integers(-60, 14 * 60))
@example(rows=[(59, "a", 1), (60, "a", 2)], cut=60)
@example(rows=[(60, "a", 1), (61, "a", 2), (120, None, 3)], cut=61)
def test_of_all_time_files_and_what_came_behind_them_count_each_row_once(rows: list[Row], cut: int) -> None:
    """The log has all rows, files those before the cut: these speak to the end of their last hour."""
    plan = pipeline(Whole()).plan().views[0]
    read = [row for row in rows if row[0] < cut]
    boundary = hour_end(max(micros(row[0]) for row in read)) if read else None
    batch, live = answers(Whole(), read, live=False), answers(Whole(), rows, live=True)
    behind = [row for row in rows if boundary is None or micros(row[0]) >= boundary]
    expected = answers(Whole(), read + behind, live=False)
    assert compared(plan, merged(batch, boundary, live, plan), expected).first == ()


def test_a_run_over_files_speaks_for_all_time_to_the_end_of_their_last_hour(tmp_path: Path) -> None:
    of, rows = pipeline(Whole()), list[Row]([(0, "a", 1), (61, "a", 2), (125, "b", 3)])
    columns = {"at": [START + datetime.timedelta(minutes=at) for at, *_ in rows], "key": [*"aab"], "x": [1, 2, 3]}
    pq.write_table(pa.table(columns).slice(0, 2), tmp_path / "rows.parquet")
    deployment = Deployment(
        history=f"{tmp_path}/rows.parquet",
        warehouse=f"{tmp_path}/warehouse",
        store=f"{tmp_path}/store",
        dead_letters=f"{tmp_path}/dead",
        report=f"{tmp_path}/run.json",
    )
    run(of, deployment)
    live, view = of.plan(live=True).views[0], "p.v"
    with open_store(f"{tmp_path}/store") as store:
        store.resume(view, live.schema, (*live.by, "window_start"))
        store.upsert(view, answers(Whole(), rows, live=True), generation=LIVE)
        pointer = store.pointer(view)
        assert pointer is not None and pointer.boundary == micros(120)
        found = merged(store.scan(view), pointer.boundary, store.scan(view, generation=LIVE), of.plan().views[0])
    assert found.select(["key", "n", "total"]).sort_by("key").to_pylist() == [
        {"key": "a", "n": 2, "total": 3},
        {"key": "b", "n": 1, "total": 3},
    ]


def test_what_only_the_batch_layer_knows_counts_before_the_boundary_and_nowhere_else() -> None:
    window = Tumbling("15m")
    plan = pipeline(window).plan().views[0]
    batch = answers(window, [(0, "a", 1), (1, "a", 2), (20, "a", 3)], live=False)
    live = answers(window, [(0, "a", 1), (21, "a", 4)], live=True)
    found = merged(batch, micros(15), live, plan).sort_by("window_start")
    assert found["total"].to_pylist() == [3, 4]


def test_a_session_that_has_grown_past_the_boundary_is_counted_once() -> None:
    """A row that came after the batch run joins two sessions, of which one had ended by the boundary."""
    window = Session("20m")
    plan = pipeline(window).plan().views[0]
    batch = answers(window, [(0, "a", 1), (0, "b", 1), (21, "a", 3)], live=False)
    live = answers(window, [(0, "a", 1), (0, "b", 1), (10, "a", 1), (21, "a", 3)], live=True)
    found = merged(batch, micros(20), live, plan).select(["key", "total"]).sort_by("key")
    assert found.to_pylist() == [{"key": "a", "total": 5}, {"key": "b", "total": 1}]
    until = merged(batch, micros(41), live, plan).select(["key", "total"])  # the batch layer speaks for all
    assert sorted(until["total"].to_pylist()) == [1, 1, 3]
