"""Sessions of an unbounded graph, live and exact: ``python -m benchmarks.sessions FlinkRunner``.

A feeder appends rows of many keys to a log at a fixed rate, a run follows it to its end, and its answers are compared
with DuckDB's over all rows that were sent. Nothing of the page is written.
"""

import json
import math
import multiprocessing
import shutil
import sys
import time
from pathlib import Path

import click
import duckdb
import pyarrow as pa

from benchmarks import feed
from benchmarks.live import FOLDER, Place, _ended, _started, ours
from pipelines.io.log import open_log
from pipelines.io.store import LIVE, open_store

PARTITIONS = 4
EXPECTED = """
WITH gaps AS (
    SELECT key, value, epoch_us(ts) // 1000 AS ms, coalesce(ms - lag(ms) OVER of_key >= 1000, true) AS begins
    FROM rows WINDOW of_key AS (PARTITION BY key ORDER BY ms)
), numbered AS (SELECT *, sum(begins::INT) OVER (PARTITION BY key ORDER BY ms) AS number FROM gaps)
SELECT key, min(ms) AS start, count(*) AS n, min(value) AS least, max(value) AS most FROM numbered GROUP BY key, number
"""
FOUND = "SELECT key, epoch_ms(window_start) AS start, n, least, most FROM answers"
DIFFERENT = f"SELECT count(*) FROM (({EXPECTED}) EXCEPT ({FOUND}) UNION ALL (({FOUND}) EXCEPT ({EXPECTED})))"


def _feed(uri: str, start: int, phase: feed.Phase, keys: int) -> None:
    feed.KEYS = keys
    feed.feed(uri, "arrow", start, [phase])


def _rows(start: int, phase: feed.Phase, keys: int) -> pa.Table:
    """All that is sent."""
    feed.KEYS = keys
    ticks = feed.tables(start, [phase], PARTITIONS, ["key", "ts", "value"])
    return pa.concat_tables([rows for tick in ticks for rows in tick.values()])


@click.command()
@click.argument("runner")
@click.option("--rate", default=20_000, show_default=True)
@click.option("--keys", default=4_000, show_default=True)
@click.option("--seconds", default=60, show_default=True)
def main(runner: str, rate: int, keys: int, seconds: int) -> None:
    """Measures one run, and prints it as JSON."""
    folder = FOLDER / f"sessions-{runner}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    phase, start = feed.Phase(rate, seconds), math.ceil(time.time()) + 30
    place = Place(folder, "live_sessions", start + seconds, rate * seconds)
    uri = f"{place.log}?format=arrow&partitions={PARTITIONS}"
    with open_log(uri) as log:
        log.bounds()
    program = _started(folder / "program", ours(place, "stream", f"--runner={runner}", "--trigger=1s"))
    feeder = multiprocessing.Process(target=_feed, args=(uri, start, phase, keys))
    feeder.start()
    feeder.join()
    last = time.time()
    behind = place.rows - _read(folder / "state")
    costs = _ended(program, folder / "program")
    with open_store(str(place.store)) as store:
        answers = store.scan("live_sessions.visits", generation=LIVE)
    rows = _rows(start, phase, keys)
    with duckdb.connect() as connection:
        connection.register("rows", rows)
        connection.register("answers", answers)
        ((different,),) = connection.sql(DIFFERENT).fetchall()
    told = {
        "runner": runner,
        "rate": rate,
        "keys": keys,
        "seconds": seconds,
        "sent": len(rows),
        "behind at the end": behind,
        "drained": round(time.time() - last, 1),
        "counted": sum(answers["n"].to_pylist()),
        "sessions": len(answers),
        "different": different,
        "status": costs.status,
        "cpu": costs.cpu,
        "peak_mib": costs.peak_mib,
    }
    click.echo(json.dumps(told))


def _read(state: Path) -> int:
    """The rows that the run has told to have read."""
    try:
        tallies = json.loads((state / "live_sessions" / "stream.json").read_text(encoding="utf-8"))["tallies"]
    except (OSError, ValueError):
        return 0
    return sum(row["n"] for row in tallies if row["counter"] == "read")


if __name__ == "__main__":
    sys.exit(main())
