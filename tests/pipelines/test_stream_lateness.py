"""Rows that come late, on an engine whose watermark moves while they do: counted by our own rule, never by Beam's."""

import collections
import dataclasses
import datetime
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines import Count, Pipeline, Session, Sliding, Source, Sum, Tumbling, View
from pipelines.io import follow, sqlite_log
from pipelines.io.log import open_log
from pipelines.io.store import LIVE, open_store
from pipelines.options import Deployment
from pipelines.runners import flink
from pipelines.streaming import run

SECOND = 1_000_000
NOON = int(datetime.datetime(2024, 5, 1, 12, tzinfo=datetime.UTC).timestamp()) * SECOND
DISORDER, LATENESS, GAP = 20 * SECOND, 60 * SECOND, 15 * SECOND
Answers = dict[tuple[str, int, int], tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Sale:
    """A row."""

    id: int
    at: datetime.datetime
    shop: str
    cents: int


MEASURES: dict[str, Any] = {"n": Count(), "cents": Sum("cents")}
SALES = Pipeline(
    "sales",
    source=Source(Sale, event_time="at", identity="id", disorder="20s", lateness="1m"),
    views=(
        View("minutes", by="shop", window=Tumbling("1m"), **MEASURES),
        View("sliding", by="shop", window=Sliding("3m", every="1m"), **MEASURES),
        View("visits", by="shop", window=Session("15s"), **MEASURES),
    ),
    events=False,
)


def sales(n: int) -> list[list[tuple[int, int, str, int]]]:
    """An hour of (id, µs, shop, cents) in two partitions; every tenth up to seven minutes behind."""
    chosen = random.Random(7)
    parts: list[list[tuple[int, int, str, int]]] = [[], []]
    for number in range(n):
        behind = chosen.randrange((30 if chosen.random() < 0.9 else 400) * SECOND)
        at = NOON + number * 3600 * SECOND // n - behind
        parts[number % 2].append((number, at, chosen.choice("abcd"), chosen.randrange(100)))
    return parts


def expected(parts: list[list[tuple[int, int, str, int]]]) -> tuple[dict[str, Answers], int]:
    """The answers of each view, and how many rows are late for all: row by row, from the rule alone."""
    found: dict[str, Any] = {"minutes": collections.Counter(), "sliding": collections.Counter()}
    cents: dict[str, Any] = {"minutes": collections.Counter(), "sliding": collections.Counter()}
    visits, late = collections.defaultdict(list), 0
    for part in parts:
        watermark, greatest = -(2**63), -(2**63)
        for _, at, shop, paid in part:
            minute = at // (60 * SECOND) * 60 * SECOND
            windows = [("minutes", minute, minute + 60 * SECOND)]
            windows += [
                ("sliding", minute - ago * 60 * SECOND, minute - ago * 60 * SECOND + 180 * SECOND) for ago in range(3)
            ]
            timely = [window for window in windows if window[2] + LATENESS > watermark]
            for name, start, end in timely:
                found[name][shop, start, end] += 1
                cents[name][shop, start, end] += paid
            if visit := at // 1000 * 1000 + GAP + LATENESS > watermark:
                visits[shop].append((at // 1000 * 1000, paid))
            late += not timely and not visit
            greatest = max(greatest, at)
            watermark = (greatest - DISORDER) // 1000 * 1000
    answers = {name: {key: (n, cents[name][key]) for key, n in counts.items()} for name, counts in found.items()}
    return {**answers, "visits": sessions(visits)}, late


def sessions(visits: dict[str, list[tuple[int, int]]]) -> Answers:
    found: Answers = {}
    for shop, rows in visits.items():
        opened: list[list[int]] = []
        for at, paid in sorted(rows):
            if not opened or at - opened[-1][1] >= GAP:
                opened.append([at, at, 0, 0])
            opened[-1] = [opened[-1][0], at, opened[-1][2] + 1, opened[-1][3] + paid]
        found |= {(shop, first, last + GAP): (n, cents) for first, last, n, cents in opened}
    return found


def given(path: Path, view: str) -> Answers:
    with open_store(f"{path}/store.db") as store:
        rows = store.scan(f"sales.{view}", generation=LIVE)
    places = [
        rows["shop"].to_pylist(),
        *(rows[name].cast(pa.int64()).to_pylist() for name in ("window_start", "window_end")),
    ]
    values = rows["n"].to_pylist(), [int(cents) for cents in rows["cents"].to_pylist()]
    return dict(zip(zip(*places, strict=True), zip(*values, strict=True), strict=True))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mvn") is None, reason="no mvn")
def test_what_is_late_on_flink_is_what_the_rule_calls_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = sales(4000)
    with open_log(f"{tmp_path}/log.db") as log:
        for at in range(0, 2000, 100):
            log.append({str(name): messages(part[at : at + 100]) for name, part in enumerate(parts)})
        uri = log.uri
    read = sqlite_log.SqliteLog.read
    few: Any = lambda log, partition, start, stop: read(log, partition, start, min(stop, start + 50))  # noqa: E731
    monkeypatch.setattr(sqlite_log.SqliteLog, "read", few)
    monkeypatch.setattr(follow, "BUNDLE", 0.0)  # so the watermark moves some eighty times
    deployment = Deployment(
        live=uri,
        store=f"{tmp_path}/store.db",
        dead_letters=f"{tmp_path}/dead",
        state=f"{tmp_path}/live",
        until="end",
        buckets=2,
        mode="stream",
    )
    facts = run(SALES, deployment, flink)
    answers, late = expected(parts)
    assert late
    assert facts["rows"]["late"] == late
    for view in SALES.views:
        assert given(tmp_path, view.name) == answers[view.name], view.name


def messages(rows: list[tuple[int, int, str, int]]) -> pa.Table:
    epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    told = (
        {"id": number, "at": (epoch + datetime.timedelta(microseconds=at)).isoformat(), "shop": shop, "cents": cents}
        for number, at, shop, cents in rows
    )
    return pa.table({"_raw": [json.dumps(one).encode() for one in told]})
