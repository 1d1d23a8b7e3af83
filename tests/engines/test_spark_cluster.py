"""A real Spark cluster: what it listens on, that batch and turns there equal a direct run, also after kills."""

import contextlib
import json
import shutil
import urllib.request
from pathlib import Path

import psutil
import pytest

from pipelines import live
from pipelines.runners import clusters
from pipelines.runners.clusters import Cluster
from tests.engines.flights import Views, views

ENGINE = "spark"

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not (shutil.which("java") and shutil.which("mvn")), reason="no java, or no mvn"),
]


def applications(cluster: Cluster) -> tuple[int, int]:
    """Those that run on the master, and those that have ended."""
    with urllib.request.urlopen(f"{cluster.facts['web']}/json/", timeout=10) as answer:
        told = json.load(answer)
    return len(told["activeapps"]), len(told["completedapps"])


def test_batch_is_that_of_a_direct_run_and_all_listen_on_this_machine_alone(
    cluster: Cluster, direct: Views, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert views(tmp_path, "SparkRunner") == direct
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
    cluster: Cluster, direct: Views, log: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "TURN_ROWS", 120_000)
    assert views(tmp_path, "SparkRunner", mode="stream", live=log) == direct
    assert applications(cluster) == (1, 0)


def test_it_goes_on_after_its_worker_its_executor_and_the_worker_pool_were_killed(
    cluster: Cluster, direct: Views, tmp_path: Path
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
    assert views(tmp_path, "SparkRunner") == direct
