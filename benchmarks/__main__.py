"""Measures whole processes, in turn, and writes the page: ``python -m benchmarks``, or ``make bench``."""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import click

from benchmarks import cases, page
from benchmarks.cases import Case
from benchmarks.data import ROOT, Dataset
from benchmarks.figures import FIGURES, Figures, Run
from benchmarks.peers import OURS, Peer
from benchmarks.verify import WrongAnswerError, verify

QUICK = ROOT / "quick.json"
MEASURE = Path(__file__).with_name("measure.py")


class RunFailedError(Exception):
    """A program ended with another status than 0."""


@click.command()
@click.option("--quick", is_flag=True, help="About two minutes: one round, 3M rows at most; the page stays as it is.")
@click.option(
    "--once", is_flag=True, help="The peers that are measured once (after python -m benchmarks.environments)."
)
@click.option("--only", multiple=True, metavar="JOB-DATASET", help="Only these cases, as base-30M.")
@click.option("--peer", "names", multiple=True, help="Only these programs, as DuckDB.")
@click.option("--rounds", type=int, help="Another number of rounds than each case's own.")
def main(quick: bool, once: bool, only: tuple[str, ...], names: tuple[str, ...], rounds: int | None) -> None:
    """Measures this project against its peers: figures into docs/benchmarks.json, tables and chart from them."""
    path = QUICK if quick else FIGURES
    figures = Figures({}, []) if quick else Figures.load(path)
    figures.machine = _machine()
    session = datetime.now(UTC).isoformat(timespec="seconds")
    failures: list[str] = []
    for case in cases.QUICK if quick else cases.ONCE if once else cases.FULL:
        if not only or case.name in only:
            peers = [peer for peer in case.peers if not names or peer.name in names]
            for run in _rounds(case, peers, rounds or case.rounds, session, failures):
                figures.add(run)
                figures.save(path)
    if quick:
        click.echo(page.summary(figures))
    else:
        if not once:
            _profile(only, names)
        page.write(Figures.load(path))
    sys.exit(1 if failures else 0)


def _profile(only: tuple[str, ...], names: tuple[str, ...]) -> None:
    """Says where our own CPU-seconds go, of the cases that were asked for."""
    for job, dataset in cases.PROFILES:
        if (not only or f"{job}-{dataset}" in only) and (not names or OURS.name in names):
            command = [sys.executable, "-m", "benchmarks.profiling", job, dataset]
            subprocess.run(command, stdout=subprocess.DEVNULL, check=True)


def _rounds(case: Case, peers: list[Peer], rounds: int, session: str, failures: list[str]) -> Iterator[Run]:
    """Runs the case's programs in turn; one that fails or answers wrongly is left out from then on."""
    case.dataset.make()
    _warm(case.dataset)
    for number in range(rounds):
        for peer in list(peers):
            try:
                run = _run(case, peer, number, session)
            except (RunFailedError, WrongAnswerError) as error:
                failures.append(f"{case.name}: {peer.name}: {error}")
                click.echo(failures[-1], err=True)
                peers.remove(peer)
            else:
                click.echo(f"{case.name} {peer.name}: {run.cpu} CPU-s, {run.wall} s, {run.peak_mib} MiB", err=True)
                yield run


def _run(case: Case, peer: Peer, number: int, session: str) -> Run:
    """One run. The first of a session has its answer checked; the answer is removed afterwards."""
    target = ROOT / "out" / f"{case.name}-{peer.name.replace(' ', '-')}"
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(exist_ok=True)
    measured, log = target.with_suffix(".json"), target.with_suffix(".log")
    load = round(os.getloadavg()[0], 1)
    command = [sys.executable, str(MEASURE), str(measured), *peer.command(case.job, case.dataset, target)]
    with log.open("wb") as output:
        subprocess.run(command, env=peer.variables(), stdout=output, stderr=output, check=True)
    figures = json.loads(measured.read_text(encoding="utf-8"))
    if figures["status"] != 0:
        raise RunFailedError(f"status {figures['status']}, see {log}")
    accuracy = verify(case.job, case.dataset, target) if number == 0 else None
    shutil.rmtree(target)
    return Run(
        **figures,
        job=case.job,
        dataset=case.dataset.name,
        rows=case.dataset.rows,
        peer=peer.name,
        session=session,
        number=number,
        load=load,
        accuracy=accuracy,
    )


def _warm(dataset: Dataset) -> None:
    """Reads the files once, so that everyone finds them in the page cache."""
    for path in dataset.folder.glob("*.parquet"):
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def _machine() -> dict[str, str]:
    processor = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("model name")[2].splitlines()[0]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = ("apache-beam", "duckdb", "pyarrow", "deltalake", "polars", "pyspark")
    return {
        "processor": processor.strip("\t :"),
        "cores": str(os.cpu_count()),
        "memory": f"{memory:.0f} GiB",
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }


if __name__ == "__main__":
    main()
