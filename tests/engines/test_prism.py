"""Prism: batch and turns equal a direct run on a standing one, and a stream that loses rows there ends with exit 3."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines import live
from pipelines.io.log import open_log
from pipelines.runners import clusters, prism_cluster
from pipelines.runners.clusters import Cluster
from tests.engines.flights import Views, views

ENGINE = "prism"

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(
        not any(map(shutil.which, ("prism", "go", "/usr/local/go/bin/go"))) and not clusters.folder("prism").exists(),
        reason="no prism, and no go",
    ),
]


def test_batch_and_turns_on_a_standing_prism_are_those_of_a_direct_run(
    cluster: Cluster,
    direct: Views,
    log: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(live, "TURN_ROWS", 120_000)
    assert views(tmp_path / "batch", "PrismRunner") == direct
    assert views(tmp_path / "turns", "PrismRunner", mode="micro-batch", live=log) == direct
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
    "As Prism did under load: now and then something goes nowhere."
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
    if lossy:
        assert done.returncode == 3, done.stderr
        assert "sales: the law of conservation is broken: view minutes: rows in 3,000 = rows out 2,400" in done.stderr
        assert "is off by 600: rows were lost" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
