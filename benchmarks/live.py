"""Measures speed layers on a paced stream, into the figures and the page: ``python -m benchmarks.live``.

A feeder appends rows to a log, a program follows it and writes its answers to a SQLite store, and this process reads
the store: three processes, as in use. A window's latency is from the publication of the rows that bring the watermark
past its end (in every partition) to the moment at which a reader sees a key's last count of it.
"""

import dataclasses
import json
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import click
import numpy as np

from benchmarks import page
from benchmarks.data import ROOT
from benchmarks.feed import Fed, Phase, expected
from benchmarks.figures import FIGURES, Figures, LiveRun
from benchmarks.measure import Measured
from benchmarks.peers import ENVIRONMENTS, HERE
from pipelines.io.log import open_log

MEASURE = Path(__file__).with_name("measure.py")
FOLDER = ROOT / "live"
POLL = 0.01
PATIENCE = 60
"""Seconds after the last append within which a program must have shown every row."""

SURGE = 10
"""Seconds at twice the rate, after the measured ones."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a run's log and store are; end: Unix seconds of the last row's event time; rows: all that are sent."""

    folder: Path
    job: str
    end: int
    rows: int

    @property
    def log(self) -> Path:
        return self.folder / "log.db"

    @property
    def store(self) -> Path:
        return self.folder / "store.db"


@dataclasses.dataclass(frozen=True)
class Follower:
    """A program that follows the log. view: its table in the store: key, window_start (µs), n. ready: seconds that it
    is given to start."""

    name: str
    command: Callable[[Place], list[str]]
    partitions: int = 4
    ready: int = 8


def ours(place: Place, mode: str, *flags: str) -> list[str]:
    options = {
        "pipeline": f"benchmarks/definitions.py:{place.job}",
        "mode": mode,
        "live": place.log,
        "store": place.store,
        "state": place.folder / "state",
        "dead_letters": place.folder / "dead_letters",
        "report": place.folder / "run.json",
        "until": datetime.fromtimestamp(place.end, UTC).isoformat(),
    }
    return [sys.executable, "-m", "pipelines.run", *(f"--{name}={value}" for name, value in options.items()), *flags]


def _peer(program: str, *options: str, environment: str | None = None) -> Callable[[Place], list[str]]:
    python = str(ENVIRONMENTS / environment / "bin/python") if environment else sys.executable
    return lambda place: [python, str(HERE / program), str(place.log), str(place.store), str(place.rows), *options]


_TRIGGER = {"live": "0s", "live_identity": "1s"}
"""Early answers of an unbounded graph are asked of the second only."""


def _unbounded(runner: str) -> Callable[[Place], list[str]]:
    return lambda place: ours(place, "stream", f"--runner={runner}", f"--trigger={_TRIGGER[place.job]}")


MICRO = Follower("ours, micro-batch", lambda place: ours(place, "micro-batch", "--trigger=1s"))
FLINK = Follower("ours, Flink", _unbounded("FlinkRunner"), ready=60)
PRISM = Follower("ours, Prism", _unbounded("PrismRunner"), ready=20)
BYTEWAX = Follower("Bytewax", _peer("live_bytewax.py", environment="bytewax"), partitions=1)
BEAM = Follower("Beam, per row, micro-batch", _peer("live_beam_rows.py", "micro-batch"))
BEAM_FLINK = Follower("Beam, per row, Flink", _peer("live_beam_rows.py", "Flink"), ready=60)
FOLLOWERS = (MICRO, FLINK, PRISM, BYTEWAX, BEAM, BEAM_FLINK)


@dataclasses.dataclass(frozen=True)
class Case:
    """A job at a rate. job: of benchmarks/definitions.py. format: of the payloads."""

    job: str
    format: str
    rate: int
    followers: tuple[Follower, ...]
    seconds: int = 60


QUICK = (Case("live", "arrow", 200_000, (MICRO,), 10),)
FULL = (
    Case("live", "arrow", 200_000, (MICRO, FLINK)),
    Case("live", "arrow", 400_000, (MICRO, FLINK, PRISM)),
    Case("live", "arrow", 600_000, (MICRO,)),
    Case("live_identity", "json", 50_000, (MICRO,)),
    Case("live_identity", "json", 100_000, (MICRO, FLINK, PRISM)),
    Case("live", "arrow", 5_000, (BEAM_FLINK,)),
    Case("live", "arrow", 12_500, (BEAM, BEAM_FLINK, BYTEWAX)),
    Case("live", "arrow", 25_000, (BEAM, BEAM_FLINK, BYTEWAX)),
    Case("live", "arrow", 50_000, (BYTEWAX,)),
)


@dataclasses.dataclass
class Watched:
    """What a reader of the store saw. seen: for each key and window the last time that its count changed. history: time
    and rows that were visible."""

    wanted: dict[int, int]
    counts: dict[tuple[int, str], int] = dataclasses.field(default_factory=dict)
    seen: dict[tuple[int, str], float] = dataclasses.field(default_factory=dict)
    history: list[tuple[float, int]] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.missing = dict(self.wanted)

    @property
    def through(self) -> int:
        """The first window that is not complete yet; past all of them if there is none."""
        return next((window for window, rows in self.missing.items() if rows), max(self.missing) + 1)

    @property
    def visible(self) -> int:
        return sum(self.counts.values())

    def look(self, at: float, rows: list[tuple[str, int, int]]) -> None:
        """Takes what a read at this time has found."""
        for key, window, count in rows:
            if (known := self.counts.get((window, key), 0)) != count:
                self.counts[window, key] = count
                self.seen[window, key] = at
                self.missing[window] = self.missing.get(window, 0) + known - count
        self.history.append((at, self.visible))

    def latencies(self, passed: dict[int, float]) -> list[float]:
        """Of every key of the windows of which the time is given at which the watermark passed their end."""
        return [
            (self.seen[window, key] - passed[window]) if not self.missing[window] else math.inf
            for window, key in self.counts
            if window in passed
        ]

    def shown(self, at: float) -> int:
        """The rows that were visible at a time."""
        return max((rows for when, rows in self.history if when <= at), default=0)


class Store:
    """Reads answers as an outsider does. The file is another process's, and may not be there yet."""

    def __init__(self, path: Path, job: str) -> None:
        self.path, self.table = path, f'"{job}.per_second#0"'
        self._connection: sqlite3.Connection | None = None
        self._version = -1

    def changes(self, through: int) -> list[tuple[str, int, int]] | None:
        """The rows of this window and later ones, if anything has been committed since the last look."""
        if self._connection is None:
            if not self.path.exists():
                return None
            self._connection = sqlite3.connect(f"file:{self.path}?mode=ro", uri=True, timeout=10)
        with suppress(sqlite3.OperationalError):  # there is no table yet
            (version,) = self._connection.execute("PRAGMA data_version").fetchone()
            if version != self._version:
                query = f"SELECT key, window_start, n FROM {self.table} WHERE window_start >= ?"
                found = self._connection.execute(query, (through,)).fetchall()
                self._version = version
                return found
        return None


def watch(store: Store, watched: Watched, until: float, alive: Callable[[], bool]) -> None:
    """Reads the store until every row is visible, the program has ended, or it is too late."""
    last = False
    while time.time() < until and watched.through in watched.missing and not last:
        last = not alive()  # and one more look
        if (rows := store.changes(watched.through)) is not None:
            watched.look(time.time(), rows)
        time.sleep(POLL)


@click.command()
@click.option("--quick", is_flag=True, help="Half a minute; the page stays as it is.")
@click.option("--only", multiple=True, metavar="JOB-RATE", help="Only these cases, as live-200000.")
@click.option("--follower", "names", multiple=True, help="Only these programs, as Bytewax.")
@click.option("--rate", type=int, help="One case at this rate, of --follower and the job of --only; for a look.")
@click.option("--seconds", type=int, help="Another length of the measured phase.")
def main(quick: bool, only: tuple[str, ...], names: tuple[str, ...], rate: int | None, seconds: int | None) -> None:
    """Measures speed layers on a stream of a fixed rate."""
    figures = Figures.load(FIGURES)
    for case, follower in _chosen(QUICK if quick else FULL, only, names, rate):
        run = measured(case, follower, seconds or case.seconds)
        click.echo(json.dumps(dataclasses.asdict(run)), err=True)
        if not (quick or rate or seconds):
            figures = Figures.load(FIGURES)
            figures.add_live(run)
            figures.save(FIGURES)
            page.write(figures)


def _chosen(
    cases: tuple[Case, ...], only: tuple[str, ...], names: tuple[str, ...], rate: int | None
) -> Iterator[tuple[Case, Follower]]:
    if rate is not None:
        job = only[0] if only else "live"
        found = next(case for case in FULL if case.job == job)
        followers = [one for one in FOLLOWERS if one.name in (names or (MICRO.name,))]
        yield from ((dataclasses.replace(found, rate=rate), follower) for follower in followers)
        return
    for case in cases:
        if not only or f"{case.job}-{case.rate}" in only:
            yield from ((case, follower) for follower in case.followers if not names or follower.name in names)


def measured(case: Case, follower: Follower, seconds: int) -> LiveRun:
    """One run: the measured phase, then twice the rate, then time to catch up."""
    folder = FOLDER / f"{case.job}-{follower.name.replace(', ', '-').replace(' ', '-')}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    load = round(os.getloadavg()[0], 1)
    phases = [Phase(case.rate, seconds), Phase(2 * case.rate, SURGE)]
    rows = sum(phase.rate * phase.seconds for phase in phases)
    start = math.ceil(time.time()) + follower.ready
    stop = start + seconds + SURGE
    place = Place(folder, case.job, stop, rows)
    uri = f"{place.log}?format={case.format}&partitions={follower.partitions}"
    with open_log(uri) as log:
        log.bounds()
    program = _started(folder / "program", follower.command(place))
    feeding = [sys.executable, "-m", "benchmarks.feed", uri, case.format, str(start), *map(str, phases)]
    feeder = _started(folder / "feeder", feeding)
    watched = Watched(expected(start, phases, follower.partitions))
    watch(Store(place.store, case.job), watched, stop + PATIENCE, lambda: program.poll() is None)
    costs, fed = _ended(program, folder / "program"), _ended(feeder, folder / "feeder")
    sent = Fed(**json.loads((folder / "feeder.log").read_text(encoding="utf-8")))
    passed = {(start + n) * 1_000_000: sent.published[(n + 1) * 10 - 1] for n in range(seconds)}
    held_until = sent.published[seconds * 10 - 1]
    latencies = watched.latencies(passed)
    done = watched.history[-1][0] - sent.published[-1] if watched.visible == sent.rows else None
    return LiveRun(
        **dataclasses.asdict(costs),
        job=case.job,
        format=case.format,
        peer=follower.name,
        rate=case.rate,
        seconds=seconds,
        sent=sent.rows,
        counted=watched.visible,
        p50=_quantile(latencies, 0.5),
        p99=_quantile(latencies, 0.99),
        backlog=case.rate * seconds - watched.shown(held_until),
        surge=sent.rows - watched.shown(sent.published[-1]),
        drained=None if done is None else round(done, 2),
        feeder_cpu=fed.cpu,
        behind=sent.behind,
        load=load,
    )


def _quantile(values: list[float], q: float) -> float | None:
    """None where a window never came to its end."""
    found = float(np.quantile(values, q)) if values else math.inf
    return round(found, 3) if math.isfinite(found) else None


def _started(at: Path, command: list[str]) -> subprocess.Popen[bytes]:
    variables = os.environ | {"PYTHONPATH": str(Path.cwd())}
    with at.with_suffix(".log").open("wb") as output, at.with_suffix(".err").open("wb") as errors:
        return subprocess.Popen(
            [sys.executable, str(MEASURE), str(at.with_suffix(".json")), *command],
            env=variables,
            stdout=output,
            stderr=errors,
        )


def _ended(process: subprocess.Popen[bytes], at: Path) -> Measured:
    """What it cost, once it has ended; one that does not is interrupted, as by Ctrl-C."""
    try:
        process.wait(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        for child in _children(process.pid):
            os.kill(child, signal.SIGINT)
        process.wait()
    return Measured(**json.loads(at.with_suffix(".json").read_text(encoding="utf-8")))


def _children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8")
    return [int(child) for child in listed.split()]


if __name__ == "__main__":
    main()
