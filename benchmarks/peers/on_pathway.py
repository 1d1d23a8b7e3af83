"""Pathway, its static mode: ``python on_pathway.py JOB FOLDER TARGET``. Base only.

Parquet reaches it through pandas; its Delta connector asks for a licence key. A percentile would be a sorted tuple.
"""

import sys
from pathlib import Path

import pathway as pw


def main(job: str, folder: str, target: str) -> None:
    if job != "base":
        raise SystemExit("pathway: base only")
    Path(target).mkdir(parents=True, exist_ok=True)
    files = [pw.debug.table_from_parquet(str(path)) for path in sorted(Path(folder).glob("*.parquet"))]
    rows = files[0] if len(files) == 1 else pw.Table.concat_reindex(*files)
    hourly = rows.select(rows.key, rows.value, hour=rows.ts.dt.floor("1h"))
    views = hourly.groupby(hourly.key, hourly.hour).reduce(
        hourly.key,
        hourly.hour,
        n=pw.reducers.count(),
        total=pw.reducers.sum(hourly.value),
        mean=pw.reducers.avg(hourly.value),
        least=pw.reducers.min(hourly.value),
        most=pw.reducers.max(hourly.value),
    )
    pw.debug.table_to_parquet(views, f"{target}/result.parquet")


if __name__ == "__main__":
    main(*sys.argv[1:])
