"""A real Flink cluster: what it listens on, that batch there equals a direct run, that a stream survives kills."""

import contextlib
import datetime
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest

from pipelines import definition, testing
from pipelines.io.log import open_log
from pipelines.io.store import LIVE, open_store
from pipelines.runners import clusters
from pipelines.runners.clusters import Cluster
from tests.engines.flights import Views, views

ENGINE = "flink"

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not (shutil.which("java") and shutil.which("mvn")), reason="no java, or no mvn"),
]

NOON = datetime.datetime(2024, 5, 1, 12, tzinfo=datetime.UTC)
RECOVERY = 60.0
"""Seconds within which a stream goes on after a member was killed and ``up`` was asked again."""

SALES = """
import datetime
from pipelines import Check, Count, Pipeline, Session, Source, Sum, Tumbling, View

class Sale:
    id: int
    at: datetime.datetime
    shop: str
    cents: int

sales = Pipeline(
    "sales",
    source=Source(Sale, event_time="at", identity="id", disorder="30s", lateness="1h"),
    steps=(Check(paid="cents < 900"),),
    views=(
        View("minutes", by="shop", window=Tumbling("1m"), n=Count(), cents=Sum("cents")),
        View("visits", by="shop", window=Session("20s"), n=Count(), cents=Sum("cents")),
    ),
    events=False,
)
"""


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


class Stream:
    """Sales that go on, and a run that follows them."""

    def __init__(self, path: Path) -> None:
        self.path, self.sent = path, list[dict[str, Any]]()
        self.live = f"{path}/log.db?partitions=2"
        (path / "sales.py").write_text(SALES)
        with open_log(self.live) as log:
            log.bounds()
        self.send(500)

    def send(self, n: int) -> None:
        """Out of order by less than the disorder; every tenth twice."""
        chosen = random.Random(len(self.sent))
        start = NOON + datetime.timedelta(seconds=len(self.sent) / 50)
        rows = [
            {
                "id": len(self.sent) + number,
                "at": start + datetime.timedelta(milliseconds=20 * number + chosen.randrange(20_000)),
                "shop": chosen.choice("abcdefgh"),
                "cents": chosen.randrange(1000),
            }
            for number in range(n)
        ]
        self.sent += rows
        raw = [json.dumps(row, default=lambda at: at.isoformat()).encode() for row in rows + rows[::10]]
        with open_log(self.live) as log:
            log.append({"0": pa.table({"_raw": raw[::2]}), "1": pa.table({"_raw": raw[1::2]})})

    @contextlib.contextmanager
    def running(self, *flags: str) -> Iterator[subprocess.Popen[bytes]]:
        places = {"live": self.live, "store": f"{self.path}/store.db", "state": f"{self.path}/live"}
        places |= {"dead_letters": f"{self.path}/dead", "report": f"{self.path}/run.json"}
        told = [f"--{name}={value}" for name, value in places.items()]
        command = [sys.executable, "-m", "pipelines.run", f"--pipeline={self.path}/sales.py:sales", "--mode=stream"]
        with (self.path / "said").open("ab") as said:
            process = subprocess.Popen([*command, "--runner=FlinkRunner", *told, *flags], stdout=said, stderr=said)
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    @property
    def read(self) -> int:
        try:
            told = json.loads((self.path / "live/sales/stream.json").read_text())
        except (OSError, ValueError):
            return 0
        return sum(row["n"] for row in told["tallies"] if row["counter"] == "read")

    def catch_up(self, process: subprocess.Popen[bytes], within: float) -> float:
        """Until all that was sent is counted; answers the seconds."""
        start, due = time.monotonic(), len(self.sent) + (len(self.sent) + 9) // 10
        while self.read < due:
            assert process.poll() is None, (self.path / "said").read_text()[-3000:]
            assert time.monotonic() - start < within, f"{self.read} of {due} are read"
            time.sleep(0.05)
        return time.monotonic() - start

    def check(self) -> None:
        """Every view over all that was sent, and the law."""
        pipeline = definition.load(f"{self.path}/sales.py:sales")
        sale = definition.module(f"{self.path}/sales.py")["Sale"]
        expected = testing.run(pipeline, [testing.example(sale, **row) for row in self.sent]).views
        with open_store(f"{self.path}/store.db") as store:
            for plan in pipeline.plan(live=True).views:
                found = store.scan(f"sales.{plan.name}", generation=LIVE).select(plan.columns)
                assert plain(found) == plain(expected[plan.name].select(plan.columns)), plan.name
        counts = json.loads((self.path / "run.json").read_text())["rows"]
        assert counts["read"] == sum(counts[name] for name in ("kept", "filtered", "rejected", "late", "duplicate"))
        assert counts["read"] - counts["duplicate"] == len(self.sent)


def plain(table: pa.Table) -> list[dict[str, Any]]:
    return sorted(table.to_pylist(), key=lambda row: (row["shop"], row["window_start"]))


@pytest.mark.parametrize(
    ("backend", "names"), [("filesystem", ("taskmanager", "jobmanager", "worker pool")), ("rocksdb", ("taskmanager",))]
)
def test_a_stream_survives_the_kill_of_every_member_and_equals_a_bounded_run(
    backend: str, names: tuple[str, ...], cluster: Cluster, direct: Views, tmp_path: Path, record_property: Any
) -> None:
    stream = Stream(tmp_path)
    with stream.running(f"--state_backend={backend}") as process:
        stream.catch_up(process, 120)
        for name in names:
            stream.send(300)
            time.sleep(3)  # a checkpoint, or not
            (killed,) = (one for one in clusters.up("flink").members if one.name == name)
            os.kill(killed.pid, signal.SIGKILL)
            start = time.monotonic()
            stream.send(300)
            clusters.up("flink")
            stream.catch_up(process, RECOVERY)
            took = time.monotonic() - start
            record_property(f"recovery of the {name}", took)
            print(f"{name}: {took:.1f} s until what was sent meanwhile was counted")
        assert views(tmp_path / "batch", "FlinkRunner") == direct  # there is room beside a stream
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, (tmp_path / "said").read_text()[-3000:]
    stream.send(100)
    with stream.running(f"--state_backend={backend}", "--until=end") as process:
        assert process.wait(120) == 0, (tmp_path / "said").read_text()[-3000:]
    stream.check()


def test_workers_end_with_their_pool(cluster: Cluster) -> None:
    (pool,) = (one for one in clusters.up("flink").members if one.name == "worker pool")
    children = psutil.Process(pool.pid).children(recursive=True)
    assert children
    os.kill(pool.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(children, 10)
    assert not alive
