"""Bytewax follows a log, an item per row: ``python live_bytewax.py LOG STORE ROWS``. Ends after so many rows.

Its own tumbling windows by event time. Its clock only moves with the rows, as otherwise a late answer of the log would
make rows late, and drop them. One worker and one partition: rows of several partitions would be late for each other.
"""

import sqlite3
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import bytewax.operators as op
import bytewax.operators.windowing as win
import pyarrow as pa
from bytewax.dataflow import Dataflow
from bytewax.inputs import FixedPartitionedSource, StatefulSourcePartition
from bytewax.outputs import FixedPartitionedSink, StatefulSinkPartition
from bytewax.testing import run_main

from pipelines.io.log import open_log

Row = tuple[str, tuple[datetime, float]]
Summary = tuple[int, float, float, float]
Answer = tuple[str, int, int, float, float, float, float]

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MOST = 50_000  # rows at a time
TABLE = '"live.per_second#0"'
COLUMNS = "key, window_start, n, total, mean, least, most"


class LogRows(FixedPartitionedSource[Row, None]):  # type: ignore[misc]
    """The rows of partition 0 as (key, (time, value))."""

    def __init__(self, uri: str, rows: int) -> None:
        self.uri, self.rows = uri, rows

    def list_parts(self) -> list[str]:
        return ["0"]

    def build_part(self, step_id: str, for_part: str, resume_state: None) -> "RowsOfPartition":
        return RowsOfPartition(self.uri, for_part, self.rows)


class RowsOfPartition(StatefulSourcePartition[Row, None]):  # type: ignore[misc]
    """What a partition has got since the last look."""

    def __init__(self, uri: str, partition: str, rows: int) -> None:
        self.log, self.partition, self.rows, self.offset = open_log(uri), partition, rows, 0
        self.awake: datetime | None = None

    def next_batch(self) -> list[Row]:
        if self.offset >= self.rows:
            raise StopIteration
        stop = min(self.log.bounds()[self.partition].end, self.offset + MOST)
        self.awake = None if stop > self.offset else datetime.now(UTC) + timedelta(milliseconds=20)
        return list(self._read(stop))

    def _read(self, stop: int) -> Iterator[Row]:
        while self.offset < stop:
            for message in self.log.read(self.partition, self.offset, stop)["_raw"]:
                rows = pa.ipc.open_stream(message.as_buffer()).read_all()
                self.offset += len(rows)
                pairs = zip(rows["ts"].to_pylist(), rows["value"].to_pylist(), strict=True)
                yield from zip(rows["key"].to_pylist(), pairs, strict=True)

    def next_awake(self) -> datetime | None:
        return self.awake

    def snapshot(self) -> None:
        return None


class StoreSink(FixedPartitionedSink[Answer, None]):  # type: ignore[misc]
    """The answers into SQLite."""

    def __init__(self, path: str) -> None:
        self.path = path

    def list_parts(self) -> list[str]:
        return ["store"]

    def build_part(self, step_id: str, for_part: str, resume_state: None) -> "StorePart":
        return StorePart(self.path)


class StorePart(StatefulSinkPartition[Answer, None]):  # type: ignore[misc]
    """A transaction for each batch of answers."""

    def __init__(self, path: str) -> None:
        self.connection = sqlite3.connect(path)
        self.connection.execute("PRAGMA journal_mode = WAL")
        self.connection.execute(f"CREATE TABLE {TABLE} ({COLUMNS}, PRIMARY KEY (key, window_start)) WITHOUT ROWID")

    def write_batch(self, values: list[Answer]) -> None:
        self.connection.executemany(f"INSERT OR REPLACE INTO {TABLE} VALUES (?, ?, ?, ?, ?, ?, ?)", values)
        self.connection.commit()

    def snapshot(self) -> None:
        return None


def time(row: tuple[datetime, float]) -> datetime:
    return row[0]


def nothing() -> Summary:
    return 0, 0.0, float("inf"), float("-inf")


def add(summary: Summary, row: tuple[datetime, float]) -> Summary:
    n, total, least, most = summary
    value = row[1]
    return n + 1, total + value, value if value < least else least, value if value > most else most


def both(one: Summary, other: Summary) -> Summary:
    return one[0] + other[0], one[1] + other[1], min(one[2], other[2]), max(one[3], other[3])


def answer(result: tuple[str, tuple[int, Summary]]) -> tuple[str, Answer]:
    key, (window, (n, total, least, most)) = result
    return "store", (key, window * 1_000_000, n, total, total / n, least, most)


def main(log: str, store: str, rows: str) -> None:
    flow = Dataflow("live")
    clock = win.EventClock(time, timedelta(0), now_getter=lambda: EPOCH, to_system_utc=lambda _: None)
    windows = win.TumblingWindower(length=timedelta(seconds=1), align_to=EPOCH)
    read = op.input("read", flow, LogRows(log, int(rows)))
    folded = win.fold_window("summary", read, clock, windows, nothing, add, both, ordered=False)
    op.output("write", op.map("answer", folded.down, answer), StoreSink(store))
    run_main(flow)


if __name__ == "__main__":
    main(*sys.argv[1:])
