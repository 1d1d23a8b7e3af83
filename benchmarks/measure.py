"""One command as a whole process tree: its CPU-seconds, wall time and peak memory, as JSON.

``python benchmarks/measure.py FIGURES.json COMMAND…`` is a process of its own for two reasons: it adopts what the
command leaves behind (a JVM whose parent is gone), so that nobody's CPU-seconds are missed; and it stays small, because
Linux hands a parent's greatest resident size on to the child that it starts.
"""

import ctypes
import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

PR_SET_CHILD_SUBREAPER = 36
INTERVAL = 0.1


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a command cost.

    ``cpu``: user and system seconds of every process of the tree, from the kernel's accounts (wait4), not sampled.
    ``wall``: seconds until the command itself ended. ``peak_mib``: the greatest sum of resident sizes over the tree,
    sampled every 100 ms (shared pages count once per process), but at least the kernel's exact peak of its largest
    process (ru_maxrss).
    """

    status: int
    cpu: float
    wall: float
    peak_mib: float


class Sampler(threading.Thread):
    """Watches the resident size of this process's descendants."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(INTERVAL):
            self.peak = max(self.peak, sum(map(_resident, psutil.Process().children(recursive=True))))

    def end(self) -> None:
        self._ended.set()
        self.join()


def measure(command: list[str]) -> Measured:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    sampler = Sampler()
    sampler.start()
    start = time.monotonic()
    child = subprocess.Popen(command)
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.monotonic() - start
    cpu, largest = usage.ru_utime + usage.ru_stime, usage.ru_maxrss
    _end_leftovers()
    while True:
        try:
            _, _, usage = os.wait4(-1, 0)
        except ChildProcessError:
            break
        cpu, largest = cpu + usage.ru_utime + usage.ru_stime, max(largest, usage.ru_maxrss)
    sampler.end()
    peak = max(sampler.peak, largest * 1024) / 2**20
    return Measured(os.waitstatus_to_exitcode(status), round(cpu, 3), round(wall, 3), round(peak, 1))


def _end_leftovers() -> None:
    """Gives what the command left running ten seconds to end by itself; that too is its cost."""
    deadline = time.monotonic() + 10
    while (left := _alive()) and time.monotonic() < deadline:
        time.sleep(INTERVAL)
    for process in left:
        process.kill()


def _alive() -> list[psutil.Process]:
    def running(process: psutil.Process) -> bool:
        try:
            return bool(process.status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False

    return [process for process in psutil.Process().children(recursive=True) if running(process)]


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(dataclasses.asdict(measure(sys.argv[2:]))), encoding="utf-8")
