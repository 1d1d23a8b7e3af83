"""Live runs that kill themselves, for test_live_kills.py. Each pipeline has a folder with a log and its results.

python -m tests.faults.dying_live killed FOLDER SEED KILLS    a line of JSON for each process: how it ended, its commits
python -m tests.faults.dying_live once FOLDER NAME PHASE TIME POINT ROWS    one process, which may be one of those

A point is a function of the project that is called, or a system call, SQLite's or Delta's before and after, within a
phase: the point-th of the time-th call of one of PHASES, or else right after that call.
"""

import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import deltalake
import pyarrow as pa

import pipelines.graph
import pipelines.turn
from pipelines import live as speed
from pipelines import run as runs
from pipelines.io.delta import Delta
from pipelines.io.log import Log, open_log
from pipelines.io.parquet import ParquetStage
from pipelines.io.sqlite import SqliteStore
from pipelines.io.sqlite_log import SqliteLog
from pipelines.io.turns import Turns
from pipelines.live import SpeedLayer
from pipelines.runners import direct
from tests.faults.histories import NAMES, definition, deployment, disorder, sent

ROOT = str(Path(pipelines.turn.__file__).parent.parent)
OUTSIDE = ("posix", "sqlite3", deltalake._internal.RawDeltaTable.__module__)
TURN = 60  # rows of a turn
AHEAD = 4  # appends before the first turn
FRESH = 0.2  # the share of processes that start as new interpreters

PHASES: dict[str, tuple[type, str, int]] = {
    "start": (SpeedLayer, "__init__", 1),
    "intend": (Turns, "intend", 3),
    "read": (SqliteLog, "read", 9),
    "state": (Turns, "write", 12),
    "commit": (Turns, "commit", 3),
    "deliver": (SpeedLayer, "deliver", 3),
    "upsert": (SqliteStore, "upsert", 6),
    "delete": (SqliteStore, "delete", 2),
    "stage letters": (ParquetStage, "finish", 2),
    "commit letters": (Delta, "commit", 2),
    "sweep": (Turns, "sweep", 3),
}
"""What is called in each phase, and up to which call of it a process lives."""


def produce(log: Log, pieces: dict[str, list[pa.Table]], asked: Iterator[object]) -> None:
    """Appends a piece to each partition whenever it is asked to, and all that is left at the end."""
    left = {partition: iter(tables) for partition, tables in pieces.items()}

    def append() -> bool:
        found = {partition: piece for partition, tables in left.items() if (piece := next(tables, None)) is not None}
        if found:
            log.append(found)
        return bool(found)

    for _ in asked:
        append()
    while append():
        pass


def dying(phase: str, at: int, point: int) -> None:
    """From here on this process dies in the at-th call of a phase."""
    owner, name, _ = PHASES[phase]
    whole, times = getattr(owner, name), itertools.count(1)

    def call(*given: Any, **named: Any) -> Any:
        if next(times) != at:
            return whole(*given, **named)
        counter = itertools.count(1)

        def passed(frame: FrameType, event: str, called: Any) -> None:
            ours = event == "call" and _ours(frame.f_code.co_filename)
            if (ours or (event.startswith("c_") and _outside(called))) and next(counter) == point:
                os.kill(os.getpid(), signal.SIGKILL)

        threading.setprofile(passed)
        sys.setprofile(passed)
        whole(*given, **named)
        return os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, call)


def _ours(file: str) -> bool:
    return file.startswith(ROOT) and "site-packages" not in file


def _outside(called: Any) -> bool:
    """Whether a built-in function changes or reads what outlives the process."""
    module = getattr(called, "__module__", None) or type(getattr(called, "__self__", None)).__module__
    return module in OUTSIDE or isinstance(getattr(called, "__self__", None), io.FileIO)


def follow(folder: Path, name: str, log: str, rows: int) -> None:
    """A live run to the end of the log; tells what it commits, and when."""
    vars(speed).update(TURN_ROWS=rows, IDLE_AFTER=float("inf"))  # no clock moves a watermark: the runs are compared
    commit = Turns.commit

    def told(turns: Turns, turn: Any) -> None:
        commit(turns, turn)
        say(f"{turn.number} {time.monotonic()} {time.process_time()}")

    Turns.commit = told  # type: ignore[method-assign, assignment]
    speed.run(definition(name), deployment(folder, name, live=log, until="end"), direct)


def once(folder: Path, name: str, phase: str, at: int, point: int, rows: int) -> None:
    if phase:
        dying(phase, at, point)
    follow(folder, name, f"{folder}/log.db", rows)


def say(what: object) -> None:
    """At once and by one system call: a kill takes back nothing."""
    os.write(1, f"{what}\n".encode())


def forked(work: Callable[[], object], to: int) -> int:
    """A process that does the work, and what it prints goes to a descriptor."""
    child = os.fork()
    if child == 0:
        try:
            os.dup2(to, 1)
            work()
            os._exit(0)
        except BaseException:
            os.write(1, traceback.format_exc().encode())
        os._exit(1)
    return child


def killed(folder: Path, name: str, seed: int, kills: int) -> None:
    """Waits for a line on stdin after each process, while the test looks at what is there."""
    chance, log = random.Random(f"{seed} {name}"), f"{folder}/log.db"
    asked, ask = os.pipe()

    def producing() -> None:
        os.close(ask)
        with open_log(log) as appended:
            produce(appended, sent(name, kills), iter(lambda: os.read(asked, 1), b""))

    producer = forked(producing, 2)
    os.write(ask, b"." * AHEAD)
    dead = 0
    while dead < kills:
        phase = chance.choice([*PHASES])
        point = (phase, chance.randint(1, PHASES[phase][2]), int(300 ** chance.random()))
        dead += process(folder, point, TURN, chance.random() < FRESH, lambda: os.write(ask, b"."))
    os.close(ask)
    ended(producer)
    process(folder, ("", 0, 0), 10 * TURN, False, lambda: None)


def process(folder: Path, point: tuple[str, int, int], rows: int, fresh: bool, committed: Callable[[], object]) -> bool:
    """One process, which dies at the point; whether it did. fresh: a new interpreter, and no fork of this one."""
    read, write = os.pipe()
    began = time.monotonic()
    if fresh:
        words = ["-m", "tests.faults.dying_live", "once", folder, folder.name, *point, rows]
        child = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, stdout=write, stderr=write).pid
    else:
        child = forked(lambda: once(folder, folder.name, *point, rows), write)
    os.close(write)
    turns, other = [], []
    with open(read, encoding="utf-8") as pipe:
        for line in pipe:
            if line[:1].isdigit():
                number, *seconds = line.split()
                turns.append((int(number), float(seconds[0]) - began, float(seconds[1])))
                committed()
            else:
                other.append(line)
    committed()
    status = os.waitpid(child, 0)[1]
    told = {"name": folder.name, "phase": point[0], "point": " ".join(map(str, point)), "fresh": fresh}
    told |= {"signal": os.WTERMSIG(status), "code": os.WEXITSTATUS(status), "said": "".join(other)}
    told |= {"turns": [number for number, *_ in turns], "recovery": turns[0][1:] if turns else None}
    say(json.dumps(told))
    if not sys.stdin.readline():
        raise SystemExit("the test has ended")
    return os.WTERMSIG(status) == signal.SIGKILL


def ended(child: int) -> None:
    if (status := os.waitpid(child, 0)[1]) != 0:
        raise RuntimeError(f"a process ended with {status}")


def compared(folder: Path, name: str) -> None:
    """One run over the same log that nobody kills, in one turn; and where no row is late a batch run of its rows."""
    other = folder / "whole"
    other.mkdir()
    ended(forked(lambda: follow(other, name, f"{folder}/log.db", 1 << 19), 2))
    if not disorder(name).late:
        with open_log(f"{folder}/log.db") as log, open(folder / "history.jsonl", "wb") as file:
            for partition, bounds in log.bounds().items():
                for message in log.read(partition, bounds.start, bounds.end)["_raw"].to_pylist():
                    if b"2999-" not in message:  # a live run refuses the future, files may tell of it
                        file.write(message.replace(b"\n", b" ") + b"\n")
        given = deployment(folder / "whole", name, history=f"{folder}/history.jsonl")
        ended(forked(lambda: runs.run(definition(name), given), 2))


def main(folder: Path, seed: int, kills: int) -> None:
    for name in NAMES:
        (folder / name).mkdir()
        killed(folder / name, name, seed, kills // len(NAMES))
        compared(folder / name, name)
        say(json.dumps({"done": name}))
        sys.stdin.readline()


if __name__ == "__main__":
    what, place, *others = sys.argv[1:]
    run: dict[str, Callable[..., None]] = {"killed": main, "once": once}
    run[what](Path(place), *(int(word) if word.isdigit() else word for word in others))
