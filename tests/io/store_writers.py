"""Writers of a store in processes of their own, for test_sqlite.py: some are killed, some compete.

python store_writers.py killed FOLDER SEED KILLS    one store a kill: prints a line "point of points, signal"
python store_writers.py competing FILE WRITERS TURNS
"""

import os
import random
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from pipelines.io.sqlite import SqliteStore
from pipelines.io.store import LIVE, Pointer
from pipelines.transforms.ranges import Range

HOUR = 3_600_000_000
KEYS = ("sensor", "window_start")
VIEWS = ("one", "two")
TICK = 500  # steps of SQLite's virtual machine


def rows(hours: range, n: int) -> pa.Table:
    """Twenty sensors an hour, each with n."""
    starts = [hour * HOUR for hour in hours for _ in range(20)]
    sensors = [f"s{number}" for _ in hours for number in range(20)]
    return pa.table(
        {"sensor": sensors, "window_start": pa.array(starts, pa.timestamp("us", "UTC")), "n": [n] * len(starts)}
    )


def run(store: SqliteStore, replace: Range, hours: range, n: int) -> None:
    """A batch run over both views, in several transactions, ended by one flip."""
    schema = rows(range(1), 0).schema
    generations = {view: store.begin(view, schema, KEYS, (replace,)) for view in VIEWS}
    for hour in hours:
        for view, generation in generations.items():
            store.upsert(view, rows(range(hour, hour + 1), n), generation=generation)
    store.flip({view: Pointer(generation, hours.stop * HOUR) for view, generation in generations.items()})


def first(store: SqliteStore) -> None:
    run(store, Range(), range(4), 1)


def second(store: SqliteStore) -> None:
    run(store, Range(1 * HOUR, 3 * HOUR), range(1, 3), 2)


def _forked(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def _second(path: Path, stop_at: int, seen: int | None = None) -> None:
    """The second run; SIGKILL itself at a tick or statement, or else tell their number."""
    ticks = 0

    def tick(*_: object) -> int:
        nonlocal ticks
        ticks += 1
        if ticks == stop_at:
            os.kill(os.getpid(), 9)
        return 0

    store = SqliteStore(path)
    connection = store._file.connection()
    connection.set_progress_handler(tick, TICK)
    connection.set_trace_callback(tick)
    second(store)
    if seen is not None:
        os.write(seen, str(ticks).encode())


def killed(folder: Path, seed: int, kills: int) -> None:
    read, seen = os.pipe()
    whole = folder / "whole.db"
    with SqliteStore(whole) as store:
        first(store)
    for number in range(kills):
        shutil.copy(whole, folder / f"{number}.db")
    _forked(lambda: _second(whole, -1, seen))
    os.close(seen)
    points = int(os.read(read, 99))
    for number in range(kills):
        path, point = folder / f"{number}.db", random.Random(seed + number).randint(1, points)
        print(point, points, _forked(lambda path=path, point=point: _second(path, point)))  # type: ignore[misc]


def competing(path: Path, writers: int, turns: int) -> None:
    """Each turn writes every key at once, at a version that no other writer has."""

    def write(writer: int) -> None:
        with SqliteStore(path) as store:
            store.resume("v", rows(range(1), 0).schema, KEYS)
            for turn in range(turns):
                version = turn * writers + writer
                store.upsert("v", rows(range(3), version), generation=LIVE, version=version)

    children = []
    for writer in range(writers):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                write(writer)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    sys.exit(max(os.waitpid(child, 0)[1] for child in children) and 1)


if __name__ == "__main__":
    what, place, *numbers = sys.argv[1:]
    {"killed": killed, "competing": competing}[what](Path(place), *map(int, numbers))
