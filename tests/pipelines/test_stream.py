"""The unbounded graph over a log that ends, beside the harness of definitions over the same rows."""

import dataclasses
import datetime
import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
import pyarrow as pa
import pytest

from pipelines import (
    Check,
    Count,
    Distinct,
    Filter,
    Max,
    Pipeline,
    Session,
    Sliding,
    Source,
    Sum,
    Tumbling,
    View,
    testing,
)
from pipelines.io.log import open_log
from pipelines.io.store import LIVE, open_store
from pipelines.io.table import open_table
from pipelines.options import Deployment
from pipelines.runners import flink
from pipelines.streaming import run
from pipelines.transforms.deadletters import DEAD_LETTERS

NOON = datetime.datetime(2024, 5, 1, 12, tzinfo=datetime.UTC)


class Bare:
    """FnApiRunner as an engine."""

    DISTRIBUTED = UNBOUNDED = DEALT = False

    @staticmethod
    def run(build: Callable[[beam.Pipeline], None], flags: Sequence[str]) -> None:
        with beam.Pipeline("FnApiRunner") as root:
            build(root)

    @staticmethod
    def prepared(build: Callable[[beam.Pipeline], None], flags: Sequence[str]) -> Callable[[], None]:
        raise NotImplementedError


class Sale:
    """A row."""

    id: int
    at: datetime.datetime
    shop: str
    cents: int


def views(*chosen: str) -> Pipeline:
    """The pipeline with these of its views, or with all."""
    measures: dict[str, Any] = {"n": Count(), "cents": Sum("cents"), "most": Max("cents"), "ids": Distinct("id")}
    every = (
        View("minutes", by="shop", window=Tumbling("1m"), **measures),
        View("days", by="shop", window=Tumbling("1d", timezone="Europe/Paris"), **measures),
        View("sliding", by="shop", window=Sliding("10m", every="5m"), **measures),
        View("visits", by="shop", window=Session("30s"), steps=(Filter("cents > 100"),), **measures),
    )
    return Pipeline(
        "sales",
        source=Source(Sale, event_time="at", identity="id", disorder="2h", lateness="1m"),
        steps=(Check(paid="cents < 900"), Filter("cents <> 7")),
        views=tuple(view for view in every if not chosen or view.name in chosen),
        events=False,
    )


def sales(n: int, seed: int = 1) -> list[dict[str, Any]]:
    """In the order of the log: ten minutes of sales, out of order, some twice."""
    chosen = random.Random(seed)
    rows = [
        {
            "id": number,
            "at": NOON + datetime.timedelta(microseconds=chosen.randrange(600_000_000)),
            "shop": chosen.choice("abcdé"),
            "cents": chosen.randrange(1000),
        }
        for number in range(n)
    ]
    return rows + chosen.sample(rows, n // 10)


def send(path: Path, rows: list[dict[str, Any]], *others: bytes) -> str:
    with open_log(f"{path}/log.db") as log:
        raw = [json.dumps(row, default=lambda at: at.isoformat()).encode() for row in rows]
        for at in range(0, len(raw), 97):
            log.append(
                {"0": pa.table({"_raw": raw[at : at + 97 : 2]}), "1": pa.table({"_raw": raw[at + 1 : at + 97 : 2]})}
            )
        if others:
            log.append({"1": pa.table({"_raw": list(others)})})
        return log.uri


def deployed(path: Path, live: str) -> Deployment:
    return Deployment(
        live=live,
        store=f"{path}/store.db",
        dead_letters=f"{path}/dead",
        state=f"{path}/live",
        until="end",
        trigger=0,
        buckets=1,
        mode="stream",
    )


def answers(path: Path, pipeline: Pipeline, view: str) -> list[dict[str, Any]]:
    plan = next(plan for plan in pipeline.plan().views if plan.name == view)
    with open_store(f"{path}/store.db") as store:
        return plain(store.scan(f"{pipeline.name}.{view}", generation=LIVE).select(plan.columns))


def plain(table: pa.Table) -> list[dict[str, Any]]:
    return sorted(table.to_pylist(), key=lambda row: (row["shop"], row["window_start"]))


def check(path: Path, pipeline: Pipeline, facts: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Every view against the definition over all rows, and the counts against the rows."""
    expected = testing.run(pipeline, [testing.example(Sale, **row) for row in rows]).views
    for view in pipeline.views:
        assert answers(path, pipeline, view.name) == plain(expected[view.name]), view.name
    counts = facts["rows"]
    distinct = {row["id"]: row["cents"] for row in rows}.values()
    assert counts["read"] == len(rows) + 2
    assert counts["duplicate"] == len(rows) - len(distinct)
    assert counts["rejected"] == 2 + sum(cents >= 900 for cents in distinct)
    assert counts["filtered"] == sum(cents == 7 for cents in distinct)
    dead = open_table(f"{path}/dead/sales.live", DEAD_LETTERS).dataset().to_table()
    assert len(dead) == counts["rejected"]


@pytest.mark.slow
@pytest.mark.parametrize("view", ["minutes", "sliding", "visits"])
def test_a_stream_gives_what_the_definition_gives(view: str, tmp_path: Path) -> None:
    """One view at a time: FnApiRunner forgets the timers of all but one. DirectRunner runs no unbounded graph."""
    rows, pipeline = sales(100), views(view)
    facts = run(pipeline, deployed(tmp_path, send(tmp_path, rows, b"no json", b"")), Bare)
    check(tmp_path, pipeline, facts, rows)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mvn") is None, reason="no mvn")
def test_it_gives_the_same_on_flink_and_again_over_what_is_there(tmp_path: Path) -> None:
    rows = sales(3000)
    deployment = dataclasses.replace(deployed(tmp_path, send(tmp_path, rows, b"no json", b"")), trigger=1_000_000)
    with flink.serving() as endpoint:
        for _ in range(2):
            facts = run(views(), deployment, flink, [f"--job_endpoint={endpoint}"])
            check(tmp_path, views(), facts, rows)
