"""A real Flink cluster: what it listens on, that batch there equals a direct run, that a stream survives kills."""

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines.runners import clusters
from pipelines.runners.clusters import Cluster
from tests.engines.flights import Views, views
from tests.engines.sales import Sales

ENGINE = "flink"

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not (shutil.which("java") and shutil.which("mvn")), reason="no java, or no mvn"),
]

RECOVERY = 60.0
"""Seconds within which a stream goes on after a member was killed and ``up`` was asked again."""


def processes(cluster: Cluster) -> list[psutil.Process]:
    members = [psutil.Process(one.pid) for one in cluster.members]
    return members + [child for one in members for child in one.children(recursive=True)]


def test_all_listen_on_this_machine_alone_and_the_ports_are_their_own(cluster: Cluster) -> None:
    every = {one.pid: one for one in processes(cluster)}
    found = [each for one in every.values() for each in one.net_connections(kind="tcp") if each.status == "LISTEN"]
    assert {each.laddr.ip.removeprefix("::ffff:") for each in found} == {"127.0.0.1"}
    assert {one.port for one in cluster.members} <= {each.laddr.port for each in found}
    assert clusters.found("flink") == cluster == clusters.up("flink")


def test_flights_have_the_digests_of_a_direct_run_in_batch_and_live(
    cluster: Cluster, direct: Views, log: str, tmp_path: Path
) -> None:
    assert views(tmp_path / "batch", "FlinkRunner") == direct
    assert views(tmp_path / "live", "FlinkRunner", mode="stream", live=log) == direct


@pytest.mark.parametrize(
    ("backend", "names"), [("filesystem", ("taskmanager", "jobmanager", "worker pool")), ("rocksdb", ("taskmanager",))]
)
def test_a_stream_survives_the_kill_of_every_member_and_equals_a_bounded_run(
    backend: str, names: tuple[str, ...], cluster: Cluster, direct: Views, tmp_path: Path, record_property: Any
) -> None:
    stream = Sales(tmp_path)
    stream.send(500)
    with stream.running(f"--state_backend={backend}", local=False) as process:
        stream.until_read(process, stream.length)
        for name in names:
            stream.send(300)
            time.sleep(3)  # a checkpoint, or not
            (killed,) = (one for one in clusters.up("flink").members if one.name == name)
            gone = psutil.Process(killed.pid)
            gone.kill()
            gone.wait(10)  # a great one takes its time, and is alive till then
            start = time.monotonic()
            stream.send(300)
            clusters.up("flink")
            stream.until_read(process, stream.length, RECOVERY)
            took = time.monotonic() - start
            record_property(f"recovery of the {name}", took)
            print(f"{name}: {took:.1f} s until what was sent meanwhile was counted")
        assert views(tmp_path / "batch", "FlinkRunner") == direct  # there is room beside a stream
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, stream.said[-3000:]
    stream.send(100)
    with stream.running(f"--state_backend={backend}", "--parallelism=1", local=False) as process:
        assert process.wait(120) == 2
    assert "is of another graph, as another --parallelism makes one" in stream.said
    with stream.running(f"--state_backend={backend}", "--until=end", local=False) as process:
        assert process.wait(120) == 0, stream.said[-3000:]
    stream.check()


def test_workers_end_with_their_pool(cluster: Cluster) -> None:
    (pool,) = (one for one in clusters.up("flink").members if one.name == "worker pool")
    children = psutil.Process(pool.pid).children(recursive=True)
    assert children
    os.kill(pool.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(children, 10)
    assert not alive
