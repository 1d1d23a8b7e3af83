"""Producers of a log in processes of their own, for test_sqlite_log.py: some are killed, some compete.

python log_producers.py endless FILE PRODUCER           appends until killed: a line for each append once it returned
python log_producers.py killed FOLDER SEED KILLS        one log a kill: prints a line "acknowledged, signal"
python log_producers.py competing FILE PRODUCERS APPENDS
"""

import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from pipelines.io.sqlite_log import SqliteLog

APPENDS, MESSAGES = 4, 50
TICK = 10  # steps of SQLite's virtual machine


def messages(producer: int, append: int, bytes_each: int = 100) -> dict[str, pa.Table]:
    """An append to two partitions: MESSAGES messages each that tell where they are from."""
    payloads = [b"%d %d %d " % (producer, append, number) for number in range(MESSAGES)]
    padded = [payload.ljust(bytes_each, b".") for payload in payloads]
    return {name: pa.table({"_raw": padded}) for name in ("0", "1")}


def endless(path: Path, producer: int) -> None:
    with SqliteLog(path) as log:
        append = 0
        while True:
            log.append(messages(producer, append, 20_000))
            print(append, flush=True)
            append += 1


def _child(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def _some(path: Path, answered: int, stop_at: int) -> None:
    """Several appends, SIGKILL itself at a tick or statement."""
    ticks = 0

    def tick(*_: object) -> int:
        nonlocal ticks
        ticks += 1
        if ticks == stop_at:
            os.kill(os.getpid(), 9)
        return 0

    log = SqliteLog(path)
    connection = log._file.connection()
    connection.set_progress_handler(tick, TICK)
    connection.set_trace_callback(tick)
    for append in range(APPENDS):
        log.append(messages(0, append))
        os.write(answered, b".")
    os.write(answered, b" %d" % ticks)


def killed(folder: Path, seed: int, kills: int) -> None:
    def run(name: str, point: int) -> tuple[bytes, int]:
        read, answered = os.pipe()
        child = _child(lambda: _some(folder / name, answered, point))
        status = os.waitpid(child, 0)[1]
        os.close(answered)
        return os.read(read, 999), os.WTERMSIG(status)

    points = int(run("whole.db", -1)[0].split()[1])
    for number in range(kills):
        answers, signal = run(f"{number}.db", random.Random(seed + number).randint(1, points))
        print(len(answers), signal)


def competing(path: Path, producers: int, appends: int) -> None:
    def produce(producer: int) -> None:
        with SqliteLog(path) as log:
            for append in range(appends):
                log.append(messages(producer, append))

    children = [_child(lambda producer=producer: produce(producer)) for producer in range(producers)]  # type: ignore[misc]
    sys.exit(max(os.waitpid(child, 0)[1] for child in children) and 1)


if __name__ == "__main__":
    what, place, *numbers = sys.argv[1:]
    works: dict[str, Callable[..., None]] = {"endless": endless, "killed": killed, "competing": competing}
    works[what](Path(place), *map(int, numbers))
