"""DuckDB: ``python on_duckdb.py JOB FOLDER TARGET``. The fastest of the ways it offers that answer well enough.

The hour by integer arithmetic: ``time_bucket`` and ``date_trunc`` on TIMESTAMPTZ cost 10 to 100 % more. The percentile
exact: ``approx_quantile`` costs three times as much. Distinct users approximate: exact costs six times as much.
"""

import sys
from pathlib import Path

import duckdb

BASE = "count(*) AS n, sum(value) AS total, avg(value) AS mean, min(value) AS least, max(value) AS most"
MEASURES = {
    "base": BASE,
    "sketch": f"{BASE}, quantile_cont(value, 0.95) AS p95, approx_count_distinct(user) AS users",
}


def main(job: str, folder: str, target: str) -> None:
    Path(target).mkdir(parents=True, exist_ok=True)
    duckdb.sql(f"""
        COPY (
            SELECT key, make_timestamp(epoch_us(ts) // 3600000000 * 3600000000) AS hour, {MEASURES[job]}
            FROM read_parquet('{folder}/*.parquet') GROUP BY ALL
        ) TO '{target}/result.parquet' (FORMAT parquet)
    """)


if __name__ == "__main__":
    main(*sys.argv[1:])
