import datetime
import json
import sys
import time
from pathlib import Path

import pytest

from pipelines import Check, Count, Mean, Pipeline, Source, Tumbling, View, report
from pipelines.options import Deployment
from pipelines.report import Facts, Report, Usage


class Reading:
    sensor: str
    seen: datetime.datetime
    celsius: float | None


READINGS = Pipeline(
    "readings",
    source=Source(Reading, event_time="seen"),
    steps=(Check(in_range="celsius between -40 and 125"),),
    views=(
        View("all", n=Count()),
        View("by_hour", by="sensor", window=Tumbling("1h"), mean=Mean("celsius"), n=Count(where="celsius > 0")),
    ),
)
FACTS: Facts = {
    "rows": {"read": 1_200, "kept": 180, "filtered": 0, "rejected": 1_020, "late": 0, "duplicate": 0},
    "rejected": {"null in seen": 20, "in_range": 1_000},
    "dropped": {"view:by_hour": {"mean failed": 2, "filtered": 30}},
    "unmatched": {"rooms": {"": 7}, "weather": {"": 2, "older than 3h": 1_794}},
    "views": {
        "all": {"rows": 1, "digest": "00ff", "complete_through": None},
        "by_hour": {"rows": 1_100, "digest": "a1b2", "complete_through": "2024-01-02T00:00:00+00:00"},
    },
    "boundary": "2024-01-02T00:00:00+00:00",
    "first": "2024-01-01T00:10:00.500000+00:00",
    "last": "2024-01-01T23:50:00+00:00",
    "skipped": ["all"],
}
DONE = Report(READINGS, Deployment("s3://k:secret@b/x.csv?null=NA", store=None), FACTS, Usage(12.34, 5.6, 302.4))


def test_the_report_of_a_run() -> None:
    assert DONE.head().splitlines() == [
        "readings · batch · DirectRunner",
        "  history    s3://k:***@b/x.csv, 2024-01-01 00:10:00.500000 … 2024-01-01 23:50 UTC",
    ]
    assert DONE.counts().splitlines() == [
        "",
        "  read 1,200 = kept 180 + filtered 0 + rejected 1,020 + late 0 + duplicate 0   ✓",
        "  rejected   1,000  in_range         celsius between -40 and 125",
        "  rejected      20  null in seen",
        "  dropped    view by_hour: filtered 30, mean failed 2",
        "  unmatched  rooms 7 · weather 2 + 1,794 (older than 3h)",
    ]
    assert DONE.views().splitlines() == [
        "  view      rows  digest  complete through",
        "  all          1  00ff    –",
        "  by_hour  1,100  a1b2    2024-01-02 00:00 UTC",
        "  all: left as it was; a range cannot recompute it",
    ]
    took, following = DONE.foot().splitlines()
    assert took == "  12.3 s · 5.6 CPU-s · peak 302 MiB · warehouse data/warehouse · report data/run.json"
    assert following.startswith("  next: ")
    assert following.endswith(
        'pipelines query "select sensor, sum(n) from readings.by_hour group by 1 order by 2 desc limit 5"'
    )


def test_the_next_command_can_be_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not the environment is on the PATH, and from its own project's folder in short."""
    folder = tmp_path / "project/.venv/bin"
    folder.mkdir(parents=True)
    (folder / "pipelines").write_text("#!/bin/sh")
    (folder / "pipelines").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin")
    assert "next: project/.venv/bin/pipelines query" in DONE.foot()
    monkeypatch.chdir(tmp_path / "project")
    assert "next: .venv/bin/pipelines query" in DONE.foot()
    monkeypatch.setenv("PATH", str(folder))
    assert "next: pipelines query" in DONE.foot()


def test_run_json_has_what_was_promised_and_no_secret() -> None:
    told = json.loads(DONE.json())
    assert list(told) == [
        "pipeline", "mode", "runner", "history", "rows", "rejected", "dropped", "unmatched", "views", "boundary",
        "seconds", "cpu_seconds", "peak_mib",
    ]  # fmt: skip
    assert told["history"] == "s3://k:***@b/x.csv?null=NA"
    assert told["views"]["by_hour"]["digest"] == "a1b2"
    assert (told["seconds"], told["cpu_seconds"], told["peak_mib"]) == (12.34, 5.6, 302.4)


def test_a_run_without_rows_is_told_too() -> None:
    nothing: Facts = {
        "rows": dict.fromkeys(FACTS["rows"], 0),
        "rejected": {},
        "dropped": {},
        "unmatched": {},
        "views": {},
        "boundary": None,
        "first": None,
        "last": None,
        "skipped": [],
    }
    empty = Report(READINGS, Deployment("x.csv"), nothing, DONE.usage)
    assert empty.head().endswith("history    x.csv")
    assert empty.counts().count("\n") == 1
    assert empty.views() == ""


def test_usage_counts_this_process() -> None:
    before = Usage.since(time.perf_counter())
    block = bytearray(64 * 2**20)
    block[:: 2**12] = b"x" * len(block[:: 2**12])
    sum(range(2_000_000))
    after = Usage.since(time.perf_counter() - 1)
    assert after.cpu_seconds > before.cpu_seconds
    assert after.peak_mib >= before.peak_mib >= 64
    assert after.seconds >= 1


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, ""),
        (1.5, "1.5"),
        (1 / 3, "0.3333333333"),
        (1234567.0, "1234567"),
        (10**20, "100000000000000000000"),
        (datetime.datetime(2024, 1, 1, 5, tzinfo=datetime.timezone(datetime.timedelta(hours=2))), "2024-01-01 03:00"),
        (True, "True"),
    ],
)
def test_cells(value: object, shown: str) -> None:
    assert report.cell(value) == shown


def test_a_grid_without_rows_has_its_names() -> None:
    assert report.grid(("a", "b"), []) == "a  b"


def test_a_live_run_says_where_it_goes_on() -> None:
    def last(**positions: int) -> str:
        facts: Facts = {**FACTS, "positions": positions}
        return Report(READINGS, Deployment(mode="micro-batch"), facts, DONE.usage).foot().splitlines()[-1]

    assert last(b=1_200, a=7) == "  goes on at partition a at 7 · b at 1,200"
    assert last() == "  goes on where the log begins"
