"""Prism: batch and turns equal a direct run on a standing one, and a stream that loses rows there ends with exit 3."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines import definition, live, run
from pipelines.examples import flights
from pipelines.io.log import open_log
from pipelines.options import Deployment
from pipelines.replay import messages
from pipelines.runners import clusters, prism_cluster
from pipelines.runners.clusters import Cluster

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(
        not any(map(shutil.which, ("prism", "go", "/usr/local/go/bin/go"))) and not clusters.folder("prism").exists(),
        reason="no prism, and no go",
    ),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A Prism of these tests alone."""
    program = prism_cluster.binary(None, print)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIPELINES_CLUSTERS", str(tmp_path_factory.mktemp("clusters")))
        try:
            yield clusters.up("prism", prism_location=str(program))
        finally:
            clusters.down("prism")


def views(path: Path, runner: str, **places: Any) -> dict[str, tuple[int, str]]:
    deployment = Deployment(
        dimensions=flights.DIMENSIONS(),
        warehouse=f"{path}/warehouse",
        store=f"{path}/store.db",
        state=f"{path}/state",
        dead_letters=f"{path}/dead",
        report=f"{path}/run.json",
        runner=runner,
        **places,
    )
    facts = run.run(definition.load("flights"), deployment).facts
    return {name: (view["rows"], view["digest"]) for name, view in facts["views"].items()}


def test_batch_and_turns_on_a_standing_prism_are_those_of_a_direct_run(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(live, "TURN_ROWS", 120_000)
    with open_log(f"{tmp_path}/log.db") as log:
        for sent in messages(definition.load("flights"), flights.HISTORY(), partitions=["0", "1"]):
            log.append(sent)
    direct = views(tmp_path / "direct", "DirectRunner", history=flights.HISTORY())
    assert views(tmp_path / "batch", "PrismRunner", history=flights.HISTORY()) == direct
    turns = views(tmp_path / "turns", "PrismRunner", mode="micro-batch", live=f"{tmp_path}/log.db", until="end")
    assert turns == direct
    assert capsys.readouterr().err.count(f"PrismRunner: on the one at {cluster.endpoint}") == 2


SALES = """
import datetime
from pipelines import Count, Pipeline, Source, Tumbling, View
from pipelines.transforms import open_windows

class Sale:
    at: datetime.datetime
    shop: str

sales = Pipeline(
    "sales", source=Source(Sale, event_time="at"),
    views=(View("minutes", by="shop", window=Tumbling("1m"), n=Count()),), events=False,
)
by_span = open_windows._BySpan.process

def lossy(self, element):
    "As Prism does under load: now and then something goes nowhere."
    bucket, states = element
    minutes = states["_tile"].to_numpy() // 60_000_000
    return by_span(self, (bucket, states.filter(minutes % 5 != 0)))

if {lossy}:
    open_windows._BySpan.process = lossy
"""


@pytest.mark.parametrize("lossy", [False, True])
def test_a_stream_that_loses_rows_ends_with_exit_3_and_says_how_many(lossy: bool, tmp_path: Path) -> None:
    (tmp_path / "sales.py").write_text(SALES.replace("{lossy}", str(lossy)))
    rows = [{"at": f"2024-05-01T12:{n // 60 % 60:02}:{n % 60:02}Z", "shop": "abc"[n % 3]} for n in range(3000)]
    with open_log(f"{tmp_path}/log.db?partitions=2") as log:
        raw = [json.dumps(row).encode() for row in rows]
        log.append({"0": pa.table({"_raw": raw[::2]}), "1": pa.table({"_raw": raw[1::2]})})
    places = {"store": "store.db", "state": "live", "dead_letters": "dead", "report": "run.json"}
    command = [sys.executable, "-m", "pipelines.run", f"--pipeline={tmp_path}/sales.py:sales", "--mode=stream"]
    command += ["--runner=PrismRunner", f"--live={tmp_path}/log.db", "--until=end"]
    command += [f"--{name}={tmp_path}/{place}" for name, place in places.items()]
    command.append(f"--prism_location={prism_cluster.binary(None, print)}")  # its workers are threads of the run
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "preflight: PrismRunner: event-time timers of a stream" in done.stderr
    if lossy:
        assert done.returncode == 3, done.stderr
        assert "sales: the law of conservation is broken: view minutes: rows in 3,000 = rows out 2,400" in done.stderr
        assert "is off by 600: rows were lost" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
