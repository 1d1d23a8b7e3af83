"""Every mode on every engine that is here, with the built-in flights: ``python -m benchmarks.matrix`` (`make matrix`).

Each cell is a run as a user starts it, in a process of its own. Its digests must be those of DirectRunner in batch: the
log that live runs follow holds the same flights, disordered, some twice. What a cluster that is up spends is counted
too. Figures go to docs/engines.json, the table and the chart to docs/engines.md.
"""

import dataclasses
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import click
import psutil

from benchmarks import live, page
from benchmarks.data import ROOT
from benchmarks.live import MEASURE, Case, Follower
from pipelines.runners import clusters, preflight

PAGE, FIGURES, CHART = Path("docs/engines.md"), Path("docs/engines.json"), Path("docs/engines.svg")
FOLDER = ROOT / "matrix"
LOG, DAY_LOG = FOLDER / "log.db", FOLDER / "day.db"
DAY = ("--from=2013-01-01", "--to=2013-01-02")
RATE, SECONDS = 5_000, 20
"""Of the stream at which latencies are taken: what every engine here holds."""


@dataclasses.dataclass(frozen=True)
class Engine:
    """Where runs go. cluster: the local cluster that must be up for it. flags: what keeps a run off one."""

    name: str
    runner: str
    modes: tuple[str, ...]
    cluster: str | None = None
    flags: tuple[str, ...] = ()


TURNS = ("batch", "micro-batch", "stream")
ENGINES = (
    Engine("DirectRunner", "DirectRunner", TURNS),
    Engine("Prism", "PrismRunner", ("batch", "stream"), "prism"),
    Engine("Flink, in the job server", "FlinkRunner", ("batch", "stream"), flags=("--flink_master=[local]",)),
    Engine("Flink, cluster", "FlinkRunner", ("batch", "stream"), "flink"),
    Engine("Spark, in the job server", "SparkRunner", TURNS, flags=("--spark_master_url=local[*]",)),
    Engine("Spark, cluster", "SparkRunner", TURNS, "spark"),
)


@dataclasses.dataclass
class Cell:
    """One run. said: why there is none, or why it failed. digests: by view. startup: seconds of a run over one day.
    p50, p99: seconds behind a window's end, at RATE rows/s."""

    engine: str
    mode: str
    said: str = ""
    digests: dict[str, str] = dataclasses.field(default_factory=dict)
    rows: int = 0
    wall: float = 0.0
    cpu: float = 0.0
    peak_mib: float = 0.0
    startup: float | None = None
    p50: float | None = None
    p99: float | None = None


class Spent(threading.Thread):
    """What the members of a cluster spend while it runs: CPU-seconds, and the greatest sum of resident sizes."""

    def __init__(self, engine: str | None) -> None:
        super().__init__(daemon=True)
        found = clusters.found(engine) if engine else None
        self.roots = [process for one in (found.members if found else ()) if (process := one.process())]
        self.before = self._seconds()
        self.peak, self._ended = 0.0, threading.Event()
        self.start()

    def run(self) -> None:
        while not self._ended.wait(0.2):
            self.peak = max(self.peak, sum(_of(one, _bytes) for one in self._tree()))

    def end(self) -> tuple[float, float]:
        self._ended.set()
        self.join()
        return self._seconds() - self.before, self.peak / 2**20

    def _tree(self) -> list[psutil.Process]:
        found = []
        for root in self.roots:
            try:
                found += [root, *root.children(recursive=True)]
            except psutil.NoSuchProcess:
                continue
        return found

    def _seconds(self) -> float:
        return sum(_of(one, _seconds) for one in self._tree())


def _of(process: psutil.Process, value: Any) -> float:
    try:
        return float(value(process))
    except psutil.NoSuchProcess:
        return 0.0


def _bytes(process: psutil.Process) -> int:
    return int(process.memory_info().rss)


def _seconds(process: psutil.Process) -> float:
    return float(sum(process.cpu_times()[:4]))  # also of the children that have ended


def cell(engine: Engine, mode: str) -> Cell:
    """Runs it all and answers what came out."""
    done = Cell(engine.name, mode)
    if mode == "stream" and (why := preflight.degraded(engine.runner)):
        done.said = f"takes turns: {why}"
        return done
    try:
        if engine.cluster and clusters.found(engine.cluster) is None:
            done.said = f"no cluster is up: pipelines cluster up {engine.cluster}"
            return done
        day = DAY if mode == "batch" else (f"--live={DAY_LOG}",)
        done.startup = round(_run(engine, mode, *day)["wall"], 1)
        whole = _run(engine, mode, *(() if mode == "batch" else (f"--live={LOG}",)))
        report = whole["report"]
        done.digests = {name: view["digest"] for name, view in report["views"].items()}
        done.rows, done.wall = report["rows"]["read"], round(whole["wall"], 1)
        done.cpu, done.peak_mib = round(whole["cpu"], 1), round(whole["peak_mib"])
        if mode != "batch":
            done.p50, done.p99 = _latency(engine, mode)
    except RuntimeError as error:
        done.said = str(error)
    return done


def _run(engine: Engine, mode: str, *more: str) -> dict[str, Any]:
    """One run of the flights, measured."""
    out = FOLDER / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    places = {"store": out / "store.db", "dead_letters": out / "dead", "report": out / "run.json"}
    places |= {"warehouse": out / "warehouse"} if mode == "batch" else {"state": out / "state"}
    command = [sys.executable, "-m", "pipelines.run", "--pipeline=flights", f"--mode={mode}"]
    command += [f"--runner={engine.runner}", *(f"--{name}={place}" for name, place in places.items())]
    command += [*engine.flags, *more, *(() if mode == "batch" else ("--until=end",))]
    spent = Spent(engine.cluster)
    measured = out / "measured.json"
    with (out / "log").open("wb") as log:
        subprocess.run([sys.executable, str(MEASURE), str(measured), *command], stdout=log, stderr=log, check=True)
    cpu, peak = spent.end()
    told = json.loads(measured.read_text(encoding="utf-8"))
    if told["status"]:
        raise RuntimeError((out / "log").read_text(encoding="utf-8").strip().splitlines()[-1])
    report = json.loads((out / "run.json").read_text(encoding="utf-8"))
    return {**told, "cpu": told["cpu"] + cpu, "peak_mib": told["peak_mib"] + peak, "report": report}


def _latency(engine: Engine, mode: str) -> tuple[float | None, float | None]:
    def command(place: live.Place) -> list[str]:
        early = "1s" if mode == "micro-batch" else "0s"
        return live.ours(place, mode, f"--runner={engine.runner}", f"--trigger={early}", *engine.flags)

    follower = Follower(engine.name.replace(", ", "-").replace(" ", "-"), command, ready=45)
    run = live.measured(Case("live", "arrow", RATE, (follower,), SECONDS), follower, SECONDS)
    if run.counted != run.sent:
        raise RuntimeError(f"{run.sent - run.counted:,} of {run.sent:,} rows were not counted")
    return run.p50, run.p99


def table(cells: list[Cell]) -> str:
    """For the page."""
    wanted = next((one.digests for one in cells if one.digests), {})
    header = ["engine", "mode", "passed", *(f"digest of {name}" for name in wanted), "rows/s", "wall s", "CPU-s"]
    header += ["peak MiB", "start-up s", "p50 s", "p99 s"]
    rows = []
    for one in cells:
        digests = [f"`{one.digests[name]}`" if one.digests else "–" for name in wanted]
        if not one.digests:
            rows.append([one.engine, one.mode, one.said, *digests, *["–"] * 7])
            continue
        passed = one.said or ("✓" if one.digests == wanted else "**other digests**")
        figures = [f"{one.rows / one.wall:,.0f}", f"{one.wall}", f"{one.cpu}", f"{one.peak_mib:,.0f}"]
        seconds = ["–" if value is None else f"{value:.1f}" for value in (one.startup, one.p50, one.p99)]
        rows.append([one.engine, one.mode, passed, *digests, *figures, *seconds])
    return page.table(header, rows)


def draw(cells: list[Cell], path: Path) -> None:
    """CPU-seconds and wall seconds of each cell that has run."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    from benchmarks.chart import COLOURS, STYLE

    ran = [one for one in cells if one.digests][::-1]
    with plt.rc_context({**STYLE, "svg.hashsalt": "engines"}):
        figure, axes = plt.subplots(figsize=(8, 0.45 * len(ran) + 1.2), layout="constrained")
        for shift, name, colour in ((0.2, "wall", COLOURS["base"]), (-0.2, "cpu", COLOURS["sketch"])):
            places = [number + shift for number in range(len(ran))]
            values = [getattr(one, name) for one in ran]
            bars = axes.barh(places, values, height=0.38, color=colour, label=f"{name} s".replace("cpu s", "CPU-s"))
            axes.bar_label(bars, [f" {value:.0f}" for value in values])
        axes.set_yticks(range(len(ran)), [f"{one.engine}, {one.mode}" for one in ran])
        axes.set_title("336,776 flights: seconds")
        axes.legend(frameon=False, loc="lower right")
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def _logs() -> None:
    """The logs that live runs follow: of the year, and of its first day."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    replay = [str(Path(sys.executable).with_name("pipelines")), "replay", "--pipeline=flights", "--seed=1"]
    for log, of in ((LOG, ()), (DAY_LOG, DAY)):
        disorder = (f"--live={log}", "--shuffle=30m", "--duplicate=0.01")
        subprocess.run([*replay, *disorder, *of], check=True, capture_output=True)


@click.command()
@click.option("--only", multiple=True, metavar="ENGINE", help="Only these engines; the others' figures stay.")
def main(only: tuple[str, ...]) -> None:
    """Runs the flights in every mode on every engine that is here."""
    known = {(name, mode) for engine in ENGINES for name, mode in ((engine.name, mode) for mode in engine.modes)}
    before = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else []
    cells = {(one["engine"], one["mode"]): Cell(**one) for one in before if (one["engine"], one["mode"]) in known}
    _logs()
    for engine in ENGINES:
        for mode in engine.modes if not only or engine.name in only else ():
            start = time.monotonic()
            done = cells[engine.name, mode] = cell(engine, mode)
            click.echo(
                f"{engine.name}, {mode}: {done.said or done.digests} ({time.monotonic() - start:.0f} s)", err=True
            )
    ordered = [cells[engine.name, mode] for engine in ENGINES for mode in engine.modes if (engine.name, mode) in cells]
    FIGURES.write_text(json.dumps([dataclasses.asdict(one) for one in ordered], indent=1) + "\n", encoding="utf-8")
    page.replace(PAGE, {"matrix": table(ordered)})
    draw(ordered, CHART)


if __name__ == "__main__":
    main()
