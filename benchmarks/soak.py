"""A stream on the Flink cluster while its members are killed: ``python -m benchmarks.soak`` (`make soak`).

A feeder sends rows all the time; every so often a TaskManager, the JobManager or the worker pool is killed and started
again by what ``pipelines cluster up`` does. A kill is recovered from when a reader of the store sees a window complete
that had not ended when it fell. In the end every row must be in the answers, and these must be the same as those of a
batch run over the archived log.
"""

import dataclasses
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import click
import psutil

from benchmarks import live, page
from benchmarks.data import ROOT
from benchmarks.feed import Phase, expected
from pipelines.io.log import open_log
from pipelines.runners import clusters

PAGE = Path("docs/engines.md")
FOLDER = ROOT / "soak"
JOB, PARTITIONS, READY = "live", 4, 60
VICTIMS = ("taskmanager", "jobmanager", "worker pool")
PATIENCE = 120
"""Seconds after the last row within which all must be visible."""


@dataclasses.dataclass(frozen=True)
class Kill:
    """Who was killed; seconds until a later window was complete, None: never."""

    victim: str
    recovery: float | None


class Watcher:
    """Follows the store as a reader does."""

    def __init__(self, place: live.Place, start: int, phases: list[Phase]) -> None:
        self.store = live.Store(place.store, place.job)
        self.watched = live.Watched(expected(start, phases, PARTITIONS))

    def until(self, window: int, deadline: float) -> bool:
        """Whether all windows up to this one (µs) are complete before a time (Unix seconds)."""
        while time.time() < deadline:
            if (rows := self.store.changes(self.watched.through)) is not None:
                self.watched.look(time.time(), rows)
            if self.watched.through > window:
                return True
            time.sleep(0.1)
        return False


def soak(kills: int, rate: int, every: int, seed: int) -> tuple[list[Kill], bool]:
    """The kills, and whether every row was counted and batch has the same answers."""
    chance = random.Random(seed)
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    clusters.up("flink", tell=lambda line: click.echo(line, err=True))
    phases = [Phase(rate, 30 + kills * every)]
    start = int(time.time()) + READY
    end = start + phases[0].seconds
    place = live.Place(FOLDER, JOB, end, rate * phases[0].seconds)
    uri = f"{place.log}?format=arrow&partitions={PARTITIONS}"
    with open_log(uri) as log:
        log.bounds()
    stream = _started("stream", live.ours(place, "stream", "--runner=FlinkRunner", "--trigger=0s"))
    feeder = _started("feeder", [sys.executable, "-m", "benchmarks.feed", uri, "arrow", str(start), *map(str, phases)])
    try:
        watcher = Watcher(place, start, phases)
        watcher.until((start + 5) * 1_000_000, start + 60.0)
        found = []
        for number in range(kills):
            due = start + 15 + number * every + chance.uniform(0, every / 4)
            time.sleep(max(0.0, due - time.time()))
            kill = _killed(chance.choice(VICTIMS), watcher, min(end - 5.0, time.time() + 120))
            found.append(kill)
            click.echo(f"{number + 1} of {kills}: {kill.victim}, {kill.recovery or 'not recovered'}", err=True)
        counted = watcher.until((end - 2) * 1_000_000, end + PATIENCE)
        stream.wait(PATIENCE)
    finally:
        for process in (feeder, stream):
            if process.poll() is None:
                process.kill()
                process.wait(60)
    return found, counted and _same(place)


def _killed(victim: str, watcher: Watcher, deadline: float) -> Kill:
    cluster = clusters.found("flink")
    assert cluster is not None
    member = next(one for one in cluster.members if one.name == victim)
    at = time.time()
    dead = psutil.Process(member.pid)
    dead.kill()
    dead.wait(10)
    clusters.up("flink")
    recovered = watcher.until(int(at + 1) * 1_000_000, deadline)
    return Kill(victim, round(time.time() - at, 1) if recovered else None)


def _same(place: live.Place) -> bool:
    """Whether a batch run over the archived log gives what the stream gave."""
    lake, report = FOLDER / "lake", FOLDER / "batch.json"
    pipeline = f"--pipeline=benchmarks/definitions.py:{JOB}"
    archive = [str(Path(sys.executable).with_name("pipelines")), "archive", pipeline, f"--live={place.log}"]
    subprocess.run([*archive, f"--lake={lake}"], check=True, stdout=subprocess.DEVNULL)
    batch = [sys.executable, "-m", "pipelines.run", pipeline, f"--lake={lake}", f"--report={report}", "--store=none"]
    places = (f"--warehouse={FOLDER / 'warehouse'}", f"--dead_letters={FOLDER / 'dead_batch'}")
    subprocess.run([*batch, *places], check=True, stdout=subprocess.DEVNULL)
    views = [json.loads(path.read_text(encoding="utf-8"))["views"] for path in (FOLDER / "run.json", report)]
    digests = [{name: (view["rows"], view["digest"]) for name, view in of.items()} for of in views]
    click.echo(f"stream {digests[0]}, batch {digests[1]}", err=True)
    return digests[0] == digests[1]


def _started(name: str, command: list[str]) -> subprocess.Popen[bytes]:
    variables = os.environ | {"PYTHONPATH": str(Path.cwd())}
    with (FOLDER / f"{name}.log").open("wb") as output:
        return subprocess.Popen(command, env=variables, stdout=output, stderr=output)


def table(kills: list[Kill]) -> str:
    """For the page, by victim."""
    rows = []
    for victim in (*VICTIMS, "all"):
        seconds = [kill.recovery for kill in kills if victim in ("all", kill.victim)]
        known = [value for value in seconds if value is not None]
        figures = [f"{statistics.median(known):.1f}", f"{max(known):.1f}"] if known else ["–", "–"]
        rows.append([victim, str(len(seconds)), str(len(seconds) - len(known)), *figures])
    return page.table(["killed", "times", "not recovered", "median s", "at most s"], rows)


@click.command()
@click.option("--kills", default=50, show_default=True)
@click.option("--rate", default=50_000, show_default=True, help="Rows a second.")
@click.option("--every", default=36, show_default=True, help="Seconds from kill to kill.")
@click.option("--seed", default=0, show_default=True)
def main(kills: int, rate: int, every: int, seed: int) -> None:
    """Kills members of the Flink cluster under a stream; exit 3 unless all is counted, as batch counts it."""
    start = time.monotonic()
    found, same = soak(kills, rate, every, seed)
    minutes = (time.monotonic() - start) / 60
    head = f"{len(found)} kills in {minutes:.0f} minutes at {rate:,} rows/s, seed {seed}: the final views "
    told = head + ("equal those of batch." if same else "**differ** from those of batch.")
    page.replace(PAGE, {"soak": f"{told}\n\n{table(found)}"})
    click.echo(told)
    if not same or any(kill.recovery is None for kill in found):
        sys.exit(3)


if __name__ == "__main__":
    main()
