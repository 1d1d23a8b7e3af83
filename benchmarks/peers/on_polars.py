"""Polars, streaming engine: ``python on_polars.py JOB FOLDER TARGET``."""

import sys
from pathlib import Path

import polars as pl

VALUE = pl.col("value")
BASE = [
    pl.len().alias("n"),
    VALUE.sum().alias("total"),
    VALUE.mean().alias("mean"),
    VALUE.min().alias("least"),
    VALUE.max().alias("most"),
]
SKETCH = [VALUE.quantile(0.95, "linear").alias("p95"), pl.col("user").n_unique().alias("users")]
MEASURES = {"base": BASE, "sketch": BASE + SKETCH}


def main(job: str, folder: str, target: str) -> None:
    Path(target).mkdir(parents=True, exist_ok=True)
    rows = pl.scan_parquet(f"{folder}/*.parquet")
    views = rows.group_by("key", pl.col("ts").dt.truncate("1h").alias("hour")).agg(MEASURES[job])
    views.sink_parquet(f"{target}/result.parquet", engine="streaming")


if __name__ == "__main__":
    main(*sys.argv[1:])
