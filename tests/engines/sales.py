"""Sales that go on, and the runs that follow them: what the tests of streams on Flink share."""

import contextlib
import dataclasses
import datetime
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines import definition, testing
from pipelines.io.log import open_log
from pipelines.io.store import LIVE, open_store

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
class Sales:
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

    def send(self, n: int) -> None:
        """As many sales more, fifty a second, out of order by less than the disorder; every tenth twice."""
        chosen, start = random.Random(len(self.sent)), NOON + datetime.timedelta(seconds=len(self.sent) / 50)
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

    def until_read(self, process: subprocess.Popen[str], rows: int, within: float = WAIT) -> None:
        end = time.monotonic() + within
        while self.read < rows:
            assert process.poll() is None and time.monotonic() < end, f"{self.read} of {rows} rows: {self.said[-3000:]}"
            time.sleep(0.05)

    def until_all(self) -> None:
        """Until all that was sent was read, by whomever."""
        end = time.monotonic() + WAIT
        while self.read < self.length:
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
        assert counts["read"] == self.length
        assert counts["duplicate"] == counts["read"] - len(self.sent)
        assert counts["read"] == sum(counts[name] for name in ("kept", "filtered", "rejected", "late", "duplicate"))
        assert counts["late"] == 0

    @property
    def length(self) -> int:
        """Of the log, in rows."""
        with open_log(self.live) as log:
            return sum(held.end for held in log.bounds().values())


def plain(table: pa.Table) -> list[dict[str, Any]]:
    return sorted(table.to_pylist(), key=lambda row: (row["shop"], row["window_start"]))
