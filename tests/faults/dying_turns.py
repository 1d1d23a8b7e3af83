"""Processes that write turns, for test_turn_kills.py: some kill themselves at a point, some compete.

python dying_turns.py killed FOLDER SEED KILLS    a line of JSON each: what it had committed, and how it ended
python dying_turns.py competing FOLDER PROCESSES TURNS    a line of JSON each: who, and the turns that it committed
python dying_turns.py owning FOLDER    owns the folder, says so, and never ends

A point is right before or right after a system call, counted over all threads: nothing else changes what is there.
"""

import io
import itertools
import json
import os
import random
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pyarrow as pa

from pipelines.io.turns import Overtaken, Turn, Turns

ROUND = 10  # kills of one folder


def rows(name: str) -> pa.Table:
    """What a state file of that name holds."""
    return pa.table({"name": [name] * 50, "n": list(range(50))})


def turn(number: int) -> Turn:
    """Three new files, and those of the turn before."""
    files = [f"view-{of}-{part}" for of in (number - 1, number) if of for part in range(3)]
    return Turn(number, tuple(files), {"offset": number * 100})


def take(turns: Turns, until: int, promised: Callable[[int], object]) -> None:
    """Turns up to that number, after what is there, like a pipeline that resumes."""
    with turns.own():
        last = turns.last()
        for number in range(last.number + 1 if last else 1, until + 1):
            for name in turn(number).files[-3:]:
                turns.write(name, rows(name))
            turns.commit(turn(number))
            promised(number)
            turns.sweep()


def forked(work: Callable[[], None]) -> tuple[int, str]:
    """A process that does the work: its signal or 0, and what it printed."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.dup2(write, 1)
            work()
        except BaseException:
            os.write(1, traceback.format_exc().encode())
        os._exit(0)
    os.close(write)
    with open(read, encoding="utf-8") as pipe:
        said = pipe.read()
    return os.WTERMSIG(os.waitpid(child, 0)[1]), said


def say(what: object) -> None:
    """At once and by one system call: a kill takes back nothing."""
    os.write(1, f"{what}\n".encode())


def points(folder: Path, until: int, stop_at: int) -> None:
    """Takes turns and dies at a point; or else tells after the turns how many points there were."""
    counter = itertools.count(1)

    def passed(_: FrameType, event: str, called: Any) -> None:
        system = event.startswith("c_") and (called.__module__ == "posix" or isinstance(called.__self__, io.FileIO))
        if system and next(counter) == stop_at:
            os.kill(os.getpid(), signal.SIGKILL)

    turns = Turns(str(folder))
    threading.setprofile(passed)
    sys.setprofile(passed)
    take(turns, until, say)
    sys.setprofile(None)
    threading.setprofile(None)
    say(f"points {next(counter)}")


def killed(folder: Path, seed: int, kills: int) -> None:
    """Waits for a line on stdin after each kill, while the test looks at what is there."""
    chance = random.Random(seed)
    take(Turns(str(folder / "warm")), 2, lambda _: None)  # so that no point is spent on imports
    _, said = forked(lambda: points(folder / "whole", 3, 0))
    total = int(said.split()[-1])
    for kill in range(kills):
        place, point = folder / str(kill // ROUND), chance.randrange(1, total)
        last = Turns(str(place)).last()
        ended, said = forked(lambda: points(place, (last.number if last else 0) + 3, point))  # noqa: B023  (runs here)
        say(json.dumps({"folder": str(place), "point": f"{point} of {total}", "signal": ended, "said": said}))
        sys.stdin.readline()


def competing(folder: Path, processes: int, until: int) -> None:
    """Without owning: each goes on from what is there, until all turns are."""

    def compete(who: int) -> None:
        turns, mine = Turns(str(folder)), []
        while (last := turns.last()) is None or last.number < until:
            number = last.number + 1 if last else 1
            name = f"open-{number}-{who}"
            turns.write(name, rows(name))
            try:
                turns.commit(Turn(number, (name,), {"who": who}))
                mine.append(number)
            except Overtaken:  # or another has gone on from this turn before this process looked again
                continue
        say(json.dumps([who, mine]))

    children = []
    for who in range(processes):
        child = os.fork()
        if child == 0:
            try:
                compete(who)
            except BaseException:
                say(traceback.format_exc())
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


def owning(folder: Path) -> None:
    with Turns(str(folder)).own():
        say("mine")
        signal.pause()


if __name__ == "__main__":
    what, place, *numbers = sys.argv[1:]
    run: dict[str, Callable[..., None]] = {"killed": killed, "competing": competing, "owning": owning}
    run[what](Path(place), *map(int, numbers))
