"""Streams on Flink that are stopped, killed and go on, each in a process of its own, as users run them."""

import contextlib
import dataclasses
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

import pyarrow as pa
import pytest

from pipelines import definition, testing
from pipelines.io.log import open_log
from pipelines.io.store import LIVE, open_store
from pipelines.runners.clusters import Cluster

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not (shutil.which("java") and shutil.which("mvn")), reason="no java, or no mvn"),
]

ENGINE = "flink"

NOON = datetime.datetime(2024, 5, 1, 12, tzinfo=datetime.UTC)
WAIT = 120.0

SALES = """
import datetime
from pipelines import Check, Count, Distinct, Pipeline, Session, Sliding, Source, Sum, Tumbling, View

class Sale:
    id: int
    at: datetime.datetime
    shop: str
    cents: int

measures = dict(n=Count(), cents=Sum("cents"), ids=Distinct("id"))
sales = Pipeline(
    "sales",
    source=Source(Sale, event_time="at", identity="id", disorder="30s", lateness="1h"),
    steps=(Check(paid="cents < %s"),),
    views=(
        View("minutes", by="shop", window=Tumbling("1m"), **measures),
        View("sliding", by="shop", window=Sliding("10m", every="5m"), **measures),
        View("visits", by="shop", window=Session("20s"), **measures),
    ),
    events=False,
)
"""


@dataclasses.dataclass
class Place:
    """A definition, its log and all that its runs make."""

    path: Path
    sent: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.define(900)
        with open_log(self.live) as log:
            log.bounds()

    def define(self, limit: int) -> None:
        (self.path / "sales.py").write_text(SALES % limit)

    @property
    def live(self) -> str:
        return f"{self.path}/log.db?partitions=2"

    def send(self, n: int, seed: int) -> None:
        """Half a minute of sales more, out of order by less than the disorder; every tenth twice."""
        chosen, start = random.Random(seed), NOON + datetime.timedelta(seconds=len(self.sent) / 50)
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
        raw = [
            json.dumps(row, default=lambda at: at.isoformat()).encode() for row in rows + chosen.sample(rows, n // 10)
        ]
        with open_log(self.live) as log:
            log.append({"0": pa.table({"_raw": raw[::2]}), "1": pa.table({"_raw": raw[1::2]})})

    def command(self, *flags: str) -> list[str]:
        places = {"live": self.live, "store": f"{self.path}/store.db", "state": f"{self.path}/live"}
        places |= {"dead_letters": f"{self.path}/dead", "report": f"{self.path}/run.json"}
        told = [f"--{name}={value}" for name, value in places.items()]
        run = [f"--pipeline={self.path}/sales.py:sales", "--mode=stream", "--runner=FlinkRunner"]
        return [sys.executable, "-m", "pipelines.run", *run, *told, *flags]

    @contextlib.contextmanager
    def running(self, *flags: str, local: bool = True) -> Iterator[subprocess.Popen[str]]:
        """A run; it and all of its processes are gone when the block ends. local: not on the cluster that is up."""
        command = self.command(*(["--flink_master=[local]"] if local else []), *flags)
        with (self.path / "said").open("a") as said:
            process = subprocess.Popen(command, stdout=said, stderr=said, text=True, start_new_session=True)
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def jobs(self, *asked: str) -> str:
        """The answer of ``pipelines jobs``."""
        program = [str(Path(sys.executable).with_name("pipelines")), "jobs", *asked, f"--state={self.path}/live"]
        return subprocess.run(program, check=True, capture_output=True, text=True).stdout

    @property
    def said(self) -> str:
        return (self.path / "said").read_text()

    @property
    def told(self) -> dict[str, Any]:
        """What the stream has told of itself."""
        try:
            return json.loads((self.path / "live/sales/stream.json").read_text())  # type: ignore[no-any-return]
        except (OSError, ValueError):
            return {"tallies": []}

    @property
    def read(self) -> int:
        return sum(row["n"] for row in self.told["tallies"] if row["counter"] == "read")

    def until_read(self, process: subprocess.Popen[str], rows: int) -> None:
        end = time.monotonic() + WAIT
        while self.read < rows:
            assert process.poll() is None and time.monotonic() < end, self.said[-3000:]
            time.sleep(0.05)

    def until_all(self) -> None:
        """Until all that was sent was read, by whomever."""
        end = time.monotonic() + WAIT
        while self.read < sum(self.lengths):
            assert time.monotonic() < end, self.said[-3000:]
            time.sleep(0.05)

    def check(self) -> None:
        """Every view over all that was sent, and the law over the whole life."""
        pipeline = definition.load(f"{self.path}/sales.py:sales")
        sale = definition.module(f"{self.path}/sales.py")["Sale"]
        rows = [testing.example(sale, **row) for row in self.sent]
        expected = testing.run(pipeline, rows).views
        plans = {plan.name: plan for plan in pipeline.plan(live=True).views}
        with open_store(f"{self.path}/store.db") as store:
            for name, plan in plans.items():
                found = store.scan(f"sales.{name}", generation=LIVE).select(plan.columns)
                assert plain(found) == plain(expected[name].select(plan.columns)), name
        counts = json.loads((self.path / "run.json").read_text())["rows"]
        assert counts["read"] == sum(self.lengths)
        assert counts["duplicate"] == counts["read"] - len(self.sent)
        assert counts["read"] == sum(counts[name] for name in ("kept", "filtered", "rejected", "late", "duplicate"))
        assert counts["late"] == 0

    @property
    def lengths(self) -> list[int]:
        with open_log(self.live) as log:
            return [held.end for held in log.bounds().values()]


def plain(table: pa.Table) -> list[dict[str, Any]]:
    return sorted(table.to_pylist(), key=lambda row: (row["shop"], row["window_start"]))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def ended(place: Place, *flags: str) -> None:
    """A run up to the end of the log."""
    with place.running("--until=end", *flags) as process:
        assert process.wait(WAIT) == 0, place.said[-3000:]


def test_a_stream_goes_on_where_it_was_stopped_and_refuses_another_definition(place: Place) -> None:
    place.send(1500, seed=1)
    with place.running() as process:
        place.until_read(process, 1000)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, place.said[-3000:]
    assert "stopped; the next run goes on from file:///" in place.said and "savepoint-" in place.said
    read = place.read
    place.send(1500, seed=2)
    place.define(800)
    with place.running() as process:
        assert process.wait(60) == 2
    assert "its state is of another steps than this run's; start it again with --rebuild" in place.said
    place.define(900)
    with place.running() as process:  # idle at its end, and stopped there
        place.until_read(process, sum(place.lengths))
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, place.said[-3000:]
        assert time.monotonic() - start < 20
    assert read < place.read
    ended(place)
    place.check()
    run = json.loads((place.path / "run.json").read_text())
    assert run["lag"] == 0
    assert run["views"]["minutes"]["complete_through"] > "2024-05-01T12:00"
    place.define(800)
    ended(place, "--rebuild")
    place.check()


@pytest.mark.parametrize("seed", [1])
def test_killed_again_and_again_it_ends_with_what_a_bounded_run_gives(place: Place, seed: int) -> None:
    chosen, kills = random.Random(seed), int(os.environ.get("KILLS", "5"))
    for number in range(kills):
        place.send(600, seed=number)
        with place.running() as process:
            place.until_read(process, place.read + 1)
            for more in range(chosen.randrange(4)):
                place.send(300, seed=100 * number + more)
                time.sleep(chosen.random() * 2)
            time.sleep(chosen.random() * 4)
    ended(place)
    place.check()
    assert "goes on from file:///" in place.said


def test_a_job_on_a_cluster_outlives_its_client_and_is_never_started_twice(cluster: Cluster, place: Place) -> None:
    place.send(900, seed=1)
    with place.running(local=False) as process:
        place.until_read(process, 1)
    place.send(300, seed=2)
    place.until_all()
    (listed,) = json.loads(place.jobs("list", "--json"))
    assert (listed["pipeline"], listed["state"]) == ("sales", "running")
    assert json.loads(place.jobs("show", "sales", "--json"))["at"].startswith(cluster.facts["rest"])
    with place.running(local=False) as process:
        assert process.wait(WAIT) == 2
    assert f"sales: already runs as job {listed['job']}" in place.said
    assert "savepoint-" in place.jobs("savepoint", "sales")
    assert "goes on from file:" in place.jobs("stop", "sales")
    place.send(300, seed=3)
    with place.running(local=False) as process:
        place.until_read(process, sum(place.lengths))
        assert "closed early and are incomplete" in place.jobs("stop", "sales", "--drain")
        assert process.wait(WAIT) == 0, place.said[-3000:]
    place.check()
    assert "incomplete" in json.loads((place.path / "run.json").read_text())


def test_a_mistake_ends_a_job_on_a_cluster(cluster: Cluster, place: Place) -> None:
    place.send(300, seed=1)
    text = (place.path / "sales.py").read_text()
    (place.path / "sales.py").write_text(text.replace("Check(paid", 'Check(on_fail="stop", paid'))
    with place.running(local=False) as process:
        assert process.wait(WAIT) == 3, place.said[-3000:]
    assert "Check(on_fail='stop') ends the run" in place.said
    (listed,) = json.loads(place.jobs("list", "--json"))
    assert listed["state"] == "canceled"
