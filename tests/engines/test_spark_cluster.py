"""A real Spark cluster: what it listens on, that batch and turns there equal a direct run, also after kills."""

import contextlib
import json
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines import definition, live, run
from pipelines.examples import flights
from pipelines.io.log import open_log
from pipelines.options import Deployment
from pipelines.replay import messages
from pipelines.runners import clusters, spark_cluster
from pipelines.runners.clusters import Cluster

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not (shutil.which("java") and shutil.which("mvn")), reason="no java, or no mvn"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of these tests alone, out of the jars that are here, or are composed now."""
    spark_cluster.server().jar()
    usual, place = clusters.folder("spark"), tmp_path_factory.mktemp("clusters")
    (place / "spark").mkdir()
    for name in ("lib", "job-server.jar", "job-server.pom.xml"):
        if (usual / name).exists():
            (place / "spark" / name).symlink_to(usual / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIPELINES_CLUSTERS", str(place))
        try:
            yield clusters.up("spark")
        finally:
            clusters.down("spark")


def applications(cluster: Cluster) -> tuple[int, int]:
    """Those that run on the master, and those that have ended."""
    with urllib.request.urlopen(f"{cluster.facts['web']}/json/", timeout=10) as answer:
        told = json.load(answer)
    return len(told["activeapps"]), len(told["completedapps"])


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


@pytest.fixture(scope="module")
def direct(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    return views(tmp_path_factory.mktemp("direct"), "DirectRunner", history=flights.HISTORY())


def test_batch_is_that_of_a_direct_run_and_all_listen_on_this_machine_alone(
    cluster: Cluster, direct: dict[str, tuple[int, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert views(tmp_path, "SparkRunner", history=flights.HISTORY()) == direct
    assert f"SparkRunner: on the cluster at {cluster.facts['master']}" in capsys.readouterr().err
    members = [psutil.Process(one.pid) for one in cluster.members]
    commands, addresses = [], set()
    for each in [child for one in members for child in (one, *one.children(recursive=True))]:
        with contextlib.suppress(psutil.NoSuchProcess):  # workers of the run end by themselves
            commands.append(" ".join(each.cmdline()))
            listening = [one for one in each.net_connections(kind="tcp") if one.status == psutil.CONN_LISTEN]
            addresses |= {one.laddr.ip.removeprefix("::ffff:") for one in listening}
    assert any("CoarseGrainedExecutorBackend" in command for command in commands)
    assert addresses == {"127.0.0.1"}


def test_a_stream_is_of_turns_in_one_application_and_gives_what_batch_gives(
    cluster: Cluster, direct: dict[str, tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "TURN_ROWS", 120_000)
    with open_log(f"{tmp_path}/log.db") as log:
        for sent in messages(definition.load("flights"), flights.HISTORY(), partitions=["0", "1"]):
            log.append(sent)
    found = views(tmp_path, "SparkRunner", mode="stream", live=f"{tmp_path}/log.db", until="end")
    assert found == direct
    assert applications(cluster) == (1, 0)


def test_it_goes_on_after_its_worker_its_executor_and_the_worker_pool_were_killed(
    cluster: Cluster, direct: dict[str, tuple[int, str]], tmp_path: Path
) -> None:
    for one in cluster.members:
        if one.name in ("worker", "worker pool"):
            every = [psutil.Process(one.pid), *psutil.Process(one.pid).children(recursive=True)]
            for each in every:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
            psutil.wait_procs(every, 10)
    assert clusters.found("spark") is None
    again = clusters.up("spark")
    kept = {one.name for one in again.members if one in cluster.members}
    assert kept == {"master", "job server"}
    assert views(tmp_path, "SparkRunner", history=flights.HISTORY()) == direct
