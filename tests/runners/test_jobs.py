import contextlib
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.flink_runner import FlinkJarJobServer
from apache_beam.runners.portability.local_job_service import LocalJobServicer

from pipelines import definition, run
from pipelines.examples import flights
from pipelines.options import Deployment
from pipelines.runners import flink, jobs, prism_cluster, spark
from pipelines.transforms.errors import DataRefused, UserError

NEEDS = {"FlinkRunner": ("java", "mvn"), "SparkRunner": ("java", "mvn"), "PrismRunner": ("/usr/local/go/bin/go",)}
READY = re.compile(r"ready at \S+:(\d+)")


@pytest.fixture
def clusters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PIPELINES_CLUSTERS", str(tmp_path))
    return tmp_path


def test_a_server_runs_as_long_as_its_block_and_tells_its_own_port(clusters: Path) -> None:
    says = f"echo $$ > {clusters}/pid; echo ready at localhost:4321; exec sleep 600"
    with jobs.serving("any", ["sh", "-c", says], READY) as endpoint:
        pid = int((clusters / "pid").read_text())
        os.kill(pid, 0)
        assert endpoint == "127.0.0.1:4321"
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert list((clusters / "any").iterdir()) == []


def test_a_server_that_does_not_start_is_told_in_a_line_with_its_log(clusters: Path) -> None:
    with (
        pytest.raises(UserError, match="does not start: no memory") as raised,
        jobs.serving("any", ["sh", "-c", "echo no memory; exit 1"], READY),
    ):
        pass
    (log,) = (clusters / "any").iterdir()
    assert str(log) in str(raised.value)
    assert log.read_text() == "no memory\n"


def test_a_graph_that_is_run_again_is_built_once_on_a_server_that_ends_with_it(tmp_path: Path) -> None:
    events: list[str] = []

    @contextlib.contextmanager
    def start() -> Iterator[str]:
        servicer = LocalJobServicer(str(tmp_path))
        events.append("up")
        yield f"127.0.0.1:{servicer.start_grpc_server()}"
        events.append("down")
        servicer.stop()

    class Asking:
        def build(self, root: beam.Pipeline) -> None:
            events.append("built")
            _ = root | beam.Create(["ran"]) | beam.Map(lambda word: (tmp_path / "ran").open("a").write(word))

    asking = Asking()
    again = asking.again = jobs.prepared(asking.build, start, [])  # type: ignore[attr-defined]
    assert events == []
    again()
    again()
    assert events == ["up", "built"]
    assert (tmp_path / "ran").read_text() == "ranran"
    del again, asking
    assert events == ["up", "built", "down"]


def test_a_composed_jar_names_its_libraries_and_is_made_once(clusters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maven = clusters / "mvn"
    maven.write_text(f"#!/bin/sh\nfolder=${{6#*=}}; mkdir $folder && touch $folder/{'a' * 80}.jar\n")
    maven.chmod(0o755)
    monkeypatch.setenv("PATH", f"{clusters}:{os.environ['PATH']}")
    server = flink.server(PipelineOptions([]))
    monkeypatch.setattr(FlinkJarJobServer, "local_jar", lambda *_: 1 / 0)
    server.jar()
    maven.unlink()
    manifest = zipfile.ZipFile(server.jar()).read("META-INF/MANIFEST.MF").decode()
    assert max(map(len, manifest.splitlines())) <= 72
    assert f"Class-Path: lib/{'a' * 80}.jar" in manifest.replace("\r\n ", "")


def test_a_jar_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match=r"--flink_job_server_jar=no\.jar"):
        flink.server(PipelineOptions(["--flink_job_server_jar=no.jar"])).jar()
    with pytest.raises(UserError, match=r"--spark_job_server_jar=no\.jar"):
        spark.server(PipelineOptions(["--spark_job_server_jar=no.jar"])).jar()
    with pytest.raises(UserError, match="--prism_location=no"):
        prism_cluster.binary("no", print)


@pytest.mark.slow
@pytest.mark.parametrize("runner", NEEDS)
def test_flights_have_the_same_digests_on_every_engine(runner: str, tmp_path: Path) -> None:
    if lacking := [name for name in NEEDS[runner] if shutil.which(name) is None]:
        pytest.skip(f"no {lacking[0]}")
    found = {}
    for name in ("DirectRunner", runner):
        place = tmp_path / name
        deployment = Deployment(
            history=flights.HISTORY(),
            dimensions=flights.DIMENSIONS(),
            warehouse=f"{place}/warehouse",
            store=f"{place}/store.db",
            dead_letters=f"{place}/dead",
            report=f"{place}/run.json",
            runner=name,
        )
        found[name] = run.run(definition.load("flights"), deployment).facts["views"]
    assert found[runner] == found["DirectRunner"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mvn") is None, reason="no mvn")
def test_what_a_worker_of_flink_raises_is_told_in_one_line(tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("at,n\n2024-05-01T12:00Z,1\n")
    (tmp_path / "d.py").write_text(
        "import datetime\n"
        "from pipelines import Check, Pipeline, Source\n"
        "class Row:\n    at: datetime.datetime\n    n: int\n"
        "d = Pipeline('d', source=Source(Row, event_time='at'), steps=(Check(on_fail='stop', none='n > 1'),))\n"
    )
    deployment = Deployment(
        history=str(rows),
        warehouse=f"{tmp_path}/warehouse",
        dead_letters=f"{tmp_path}/dead",
        report=f"{tmp_path}/run.json",
        store=None,
        runner="FlinkRunner",
    )
    with pytest.raises(DataRefused, match=r"none \(n > 1\) failed for .*; Check\(on_fail='stop'\) ends the run$"):
        run.run(definition.load(f"{tmp_path}/d.py:d"), deployment)
