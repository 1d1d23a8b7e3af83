"""Bytewax, an item per row: ``python on_bytewax.py JOB FOLDER TARGET``. Base only: it has no sketch.

One worker: rows are Python objects, so a second thread only waits for the interpreter's lock. ``fold_final`` on
(key, hour) is its cheapest way; its window operators cost more.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import bytewax.operators as op
import pyarrow as pa
import pyarrow.parquet as pq
from bytewax.dataflow import Dataflow
from bytewax.inputs import FixedPartitionedSource, StatefulSourcePartition
from bytewax.outputs import FixedPartitionedSink, StatefulSinkPartition
from bytewax.testing import run_main

Row = tuple[str, float]
Summary = tuple[int, float, float, float]
Result = dict[str, object]

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("hour", pa.timestamp("us", tz="UTC")),
        ("n", pa.int64()),
        ("total", pa.float64()),
        ("mean", pa.float64()),
        ("least", pa.float64()),
        ("most", pa.float64()),
    ]
)


class ParquetRows(FixedPartitionedSource[Row, None]):  # type: ignore[misc]
    """The rows as ("key|hour", value)."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def list_parts(self) -> list[str]:
        return sorted(str(path) for path in Path(self.folder).glob("*.parquet"))

    def build_part(self, step_id: str, for_part: str, resume_state: None) -> "RowsOfFile":
        return RowsOfFile(for_part)


class RowsOfFile(StatefulSourcePartition[Row, None]):  # type: ignore[misc]
    """The rows of one file, a batch at a time."""

    def __init__(self, path: str) -> None:
        self.batches: Iterator[pa.RecordBatch] = pq.ParquetFile(path).iter_batches(
            8_192, columns=["key", "ts", "value"]
        )

    def next_batch(self) -> list[Row]:
        batch = next(self.batches)  # StopIteration ends the input
        keys, values = batch["key"].to_pylist(), batch["value"].to_pylist()
        times = batch["ts"].cast(pa.int64()).to_pylist()
        return [(f"{key}|{time // 3_600_000_000}", value) for key, time, value in zip(keys, times, values, strict=True)]

    def snapshot(self) -> None:
        return None


class ParquetResult(FixedPartitionedSink[Result, None]):  # type: ignore[misc]
    """One file with the result."""

    def __init__(self, target: str) -> None:
        self.target = target

    def list_parts(self) -> list[str]:
        return ["result"]

    def build_part(self, step_id: str, for_part: str, resume_state: None) -> "ResultFile":
        return ResultFile(Path(self.target) / "result.parquet")


class ResultFile(StatefulSinkPartition[Result, None]):  # type: ignore[misc]
    """Collects the results and writes them at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Result] = []

    def write_batch(self, values: list[Result]) -> None:
        self.rows += values

    def snapshot(self) -> None:
        return None

    def close(self) -> None:
        pq.write_table(pa.Table.from_pylist(self.rows, SCHEMA), self.path)


def nothing() -> Summary:
    return 0, 0.0, float("inf"), float("-inf")


def add(summary: Summary, value: float) -> Summary:
    n, total, least, most = summary
    return n + 1, total + value, value if value < least else least, value if value > most else most


def row(result: tuple[str, Summary]) -> tuple[str, Result]:
    name, (n, total, least, most) = result
    key, hour = name.split("|")
    time = int(hour) * 3_600_000_000
    return "result", {"key": key, "hour": time, "n": n, "total": total, "mean": total / n, "least": least, "most": most}


def main(job: str, folder: str, target: str) -> None:
    if job != "base":
        raise SystemExit("bytewax: base only")
    Path(target).mkdir(parents=True, exist_ok=True)
    flow = Dataflow("base")
    rows = op.input("read", flow, ParquetRows(folder))
    views = op.fold_final("summary", rows, nothing, add)
    op.output("write", op.map("row", views, row), ParquetResult(target))
    run_main(flow)


if __name__ == "__main__":
    main(*sys.argv[1:])
