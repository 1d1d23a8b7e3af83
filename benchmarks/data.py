"""The benchmark's rows: generated, seeded, streamed a row group at a time, the same on every machine.

Rows are in no time order, so every row group touches every group: the worst case for whoever aggregates batch by batch.
"""

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path("data/bench")
HOURS = 168
START_US = 1_767_571_200_000_000  # Monday 2026-01-05 00:00 UTC
USERS = 50_000
ROW_GROUP = 1_000_000
FILE = 30 * ROW_GROUP

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("ts", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
        pa.field("user", pa.int64(), nullable=False),
        pa.field("id", pa.int64(), nullable=False),
    ]
)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Rows over ``keys`` × 168 hours, as Parquet files of at most 30M rows.

    Block i of one key count is the same in every size, so the larger sizes begin with the smaller.
    """

    name: str
    rows: int
    keys: int = 500

    @property
    def folder(self) -> Path:
        return ROOT / self.name

    @property
    def uri(self) -> str:
        return str(self.folder / "*.parquet")

    def make(self) -> None:
        """Writes what is missing. A file that was cut short is written again: the finished name comes last."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for first in range(0, self.rows, FILE):
            path = self.folder / f"rows-{first // FILE:03d}.parquet"
            if not path.exists():
                self._write(path, first, min(first + FILE, self.rows))

    def _write(self, path: Path, first: int, last: int) -> None:
        unfinished = path.with_suffix(".unfinished")
        with pq.ParquetWriter(unfinished, SCHEMA, use_dictionary=["key", "user"]) as writer:
            for start in range(first, last, ROW_GROUP):
                writer.write_table(block(start, min(ROW_GROUP, last - start), self.keys), row_group_size=ROW_GROUP)
        unfinished.rename(path)


DATASETS = {
    dataset.name: dataset
    for dataset in (
        Dataset("300k", 300_000),
        Dataset("3M", 3_000_000),
        Dataset("30M", 30_000_000),
        Dataset("300M", 300_000_000),
        Dataset("10M-groups", 30_000_000, keys=63_600),  # × 168 hours; about 94 % of the 10.7M pairs are met
    )
}


def block(start: int, rows: int, keys: int) -> pa.Table:
    """The rows numbered from ``start``, which is a whole number of row groups."""
    random = np.random.Generator(np.random.PCG64([start // ROW_GROUP, keys]))
    names = pa.array([f"sensor-{number:05d}" for number in range(keys)], pa.string())
    columns = [
        names.take(pa.array(random.integers(0, keys, rows, dtype=np.int32))),
        pa.array(START_US + random.integers(0, HOURS * 3_600_000_000, rows), pa.int64()).cast(SCHEMA.field("ts").type),
        pa.array(random.lognormal(3.0, 1.0, rows), pa.float64()),
        pa.array(random.integers(0, USERS, rows), pa.int64()),
        pa.array(_scatter(np.arange(start, start + rows, dtype=np.uint64)), pa.int64()),
    ]
    return pa.table(columns, schema=SCHEMA)


def _scatter(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Unique in no visible order: an odd factor is a bijection of the 64-bit integers."""
    return (numbers * np.uint64(0x9E3779B97F4A7C15)).view(np.int64)
