"""A view's graph, part by part: shares of a batch, and states that wait on the shelf, give what one table would."""

import collections
import datetime
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pytest

from pipelines import Count, Distinct, Pipeline, Quantile, Session, Sliding, Source, Sum, Tumbling, View
from pipelines.transforms import aggregate, gather
from pipelines.transforms.aggregate import Merge, Partial
from pipelines.transforms.spill import Shelf, shelved, spill_folder
from pipelines.transforms.tables import TABLES
from pipelines.transforms.view import ViewPlan
from pipelines.transforms.windows import Window

BUCKETS = 3


class Visit:
    key: str
    ts: datetime.datetime
    value: float
    user: int


HOUR = Tumbling("1h")


def plan(window: Window = HOUR, **measures: Any) -> ViewPlan:
    views = (View("hourly", by="key", window=window, n=Count(), **measures),)
    return Pipeline("visits", source=Source(Visit, event_time="ts"), views=views).plan().views[0]


SKETCHED = plan(p95=Quantile("value", 0.95), users=Distinct("user"))


def rows(n: int, seed: int = 0) -> pa.Table:
    chance = random.Random(seed)
    stamps = [datetime.datetime(2026, 1, 5, chance.randrange(3), tzinfo=datetime.UTC) for _ in range(n)]
    return pa.table(
        {
            "key": [f"key {chance.randrange(20)}" for _ in range(n)],
            "event_time": pa.array(stamps, pa.timestamp("us", "UTC")),
            "value": [chance.lognormvariate(3, 1) for _ in range(n)],
            "user": [chance.randrange(900) for _ in range(n)],
        }
    )


def partials(of: ViewPlan, table: pa.Table) -> list[tuple[int, pa.Table]]:
    return [
        made for made in Partial(of, BUCKETS, (), None).process(table) if not isinstance(made, beam.pvalue.TaggedOutput)
    ]


def answers(of: ViewPlan, merged: list[pa.Table]) -> list[dict[str, Any]]:
    found = pa.concat_tables(map(of.finished, merged)).select(of.columns)
    return list(found.sort_by([("key", "ascending"), ("window_start", "ascending")]).to_pylist())


def whole(of: ViewPlan, tables: list[pa.Table]) -> list[dict[str, Any]]:
    return answers(of, [of.partials(pa.concat_tables(tables))])


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Shelf]:
    with spill_folder(tmp_path) as folder:
        yield Shelf(folder)


def test_of_a_large_batch_no_group_is_in_two_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregate, "SHARE", 400)
    table = rows(1000)
    parts = partials(SKETCHED, table)
    groups = [(row["key"], row["_tile"]) for _, states in parts for row in states.select(["key", "_tile"]).to_pylist()]
    assert len(groups) == len(set(groups))
    assert len(parts) == len({bucket for bucket, _ in parts}) == BUCKETS
    assert answers(SKETCHED, [states for _, states in parts]) == whole(SKETCHED, [table])


def test_a_row_that_a_measure_fails_on_is_refused_with_its_key_from_every_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(aggregate, "SHARE", 400)
    table = rows(1000).append_column("_source", pa.array(["a.csv"] * 1000).dictionary_encode())
    table = table.append_column("_offset", pa.array(range(1000), pa.int64())).append_column("ts", table["event_time"])
    made = list(Partial(plan(p95=Quantile("100 / (user // 9)", 0.95)), BUCKETS, (), None).process(table))
    dead = pa.concat_tables([m.value for m in made if isinstance(m, beam.pvalue.TaggedOutput) and m.tag == "dead"])
    of = [row for row in table.to_pylist() if row["user"] < 9]
    found = sorted(json.loads(letter)["key"] for letter in dead["payload"].to_pylist())
    assert of
    assert found == sorted(row["key"] for row in of)


@pytest.mark.parametrize("cut", [0, 2])
@pytest.mark.parametrize("run", [1, 20_000, 1 << 30])
@pytest.mark.parametrize("pending", [1, 30_000, 1 << 30])
def test_what_waits_on_the_shelf_is_merged_as_in_memory(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, pending: int, run: int, cut: int
) -> None:
    monkeypatch.setattr(aggregate, "RUN", run)
    monkeypatch.setattr(aggregate, "PENDING", pending)
    tables = [rows(300, seed) for seed in range(6)]
    halved = [half for half in (tables[:cut], tables[cut:]) if half]
    merge = Merge(SKETCHED, BUCKETS, shelf)
    halves = []
    for half in halved:
        accumulators = {bucket: merge.create_accumulator() for bucket in range(BUCKETS)}
        for table in half:
            for bucket, states in partials(SKETCHED, table):
                accumulators[bucket] = merge.add_input(accumulators[bucket], states)
        halves.append({b: TABLES.decode(TABLES.encode(merge.compact(a))) for b, a in accumulators.items()})
    merged = [merge.extract_output(merge.merge_accumulators([half[b] for half in halves])) for b in range(BUCKETS)]
    assert answers(SKETCHED, merged) == whole(SKETCHED, tables)


@pytest.mark.parametrize(("window", "back"), [(HOUR, [0]), (Sliding("2h", every="1h"), [0, 1]), (Session("30m"), [0])])
@pytest.mark.parametrize("block", [100, 1 << 18])
def test_each_group_has_the_values_of_its_rows(
    monkeypatch: pytest.MonkeyPatch, window: Window, back: list[int], block: int
) -> None:
    monkeypatch.setattr(gather, "BLOCK", block)
    measures = {
        "p95": Quantile("value", 0.95),
        "users": Distinct("user"),
        "low": Quantile("value", 0.5, where="user < 99"),
    }
    of = plan(window, **measures)
    tables = [rows(n, seed) for seed, n in enumerate((4, 700, 90))]
    found = answers(of, [of.merged([of.merged([of.partials(table) for table in tables[:2]]), of.partials(tables[2])])])
    groups = collections.defaultdict(list)
    for row in pa.concat_tables(tables).to_pylist():
        for hours in back:
            groups[row["key"], row["event_time"] - datetime.timedelta(hours=hours)].append((row["value"], row["user"]))
    assert len(found) == len(groups)
    for row in found:
        group = groups[row["key"], row["window_start"]]
        low = [value for value, user in group if user < 99]
        assert row["p95"] == pytest.approx(np.quantile([value for value, _ in group], 0.95))
        assert row["users"] == len({user for _, user in group})
        assert row["low"] == (pytest.approx(np.quantile(low, 0.5)) if low else None)


def test_memory_holds_little_of_what_waits(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregate, "PENDING", 12_000)
    merge = Merge(SKETCHED, 1, shelf)
    accumulator = merge.create_accumulator()
    for seed in range(20):
        accumulator = merge.add_input(accumulator, SKETCHED.partials(rows(50, seed)))
        assert sum(table.nbytes for table in accumulator if not shelved(table)) <= 12_000
    assert any(map(shelved, accumulator))


@pytest.mark.parametrize("of", [SKETCHED, plan(total=Sum("value"))])
def test_what_waits_in_memory_does_not_hold_the_states_of_other_buckets(shelf: Shelf, of: ViewPlan) -> None:
    merge = Merge(of, BUCKETS, shelf)
    accumulator = merge.create_accumulator()
    for seed in range(3):
        accumulator = merge.add_input(accumulator, of.partials(rows(3000, seed)).slice(7, 2))
    waiting = accumulator[1:]
    assert sum(map(len, waiting)) == 6
    assert not any(map(shelved, waiting))
    assert sum(table.get_total_buffer_size() for table in waiting) < 2 * sum(table.nbytes for table in waiting)


def test_states_of_fixed_size_are_merged_in_memory(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregate, "PENDING", 12_000)
    view, tables = plan(total=Sum("value")), [rows(200, seed) for seed in range(20)]
    merge = Merge(view, 1, shelf)
    accumulator = merge.create_accumulator()
    for table in tables:
        accumulator = merge.add_input(accumulator, view.partials(table))
    assert not any(map(shelved, accumulator))
    assert sum(table.nbytes for table in accumulator) < 30_000
    assert answers(view, [merge.extract_output(accumulator)]) == whole(view, tables)
