"""Fifty SIGKILLs of a batch run: readers stay on a whole answer, and the run after is exact and leaves no trace."""

import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import deltalake
import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.io.store import open_store
from pipelines.io.table import open_table

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

KILLS, ROUND = 50, 5
ROWS = 6_000
VIEWS = ("by_shop", "by_day")
TABLES = (*(f"warehouse/sales/{name}" for name in ("events", *VIEWS)), "dead/sales")
DYING = Path(__file__).parent / "dying.py"


def history(folder: Path, seed: int) -> str:
    """Sales with some duplicates and refused rows, in two files of several row groups."""
    chance, start = random.Random(seed), datetime(2024, 5, 1, tzinfo=UTC)
    rows = [
        {
            "id": number,
            "at": start + timedelta(seconds=chance.randrange(3 * 86_400)),
            "shop": f"shop {chance.randrange(20)}",
            "cents": chance.randrange(-20, 10_000),
        }
        for number in range(ROWS)
    ]
    rows += rows[: ROWS // 20]
    schema = pa.schema(
        [("id", pa.int64()), ("at", pa.timestamp("us", "UTC")), ("shop", pa.string()), ("cents", pa.int64())]
    )
    folder.mkdir()
    for part in (0, 1):
        pq.write_table(
            pa.Table.from_pylist(rows[part::2], schema=schema), folder / f"{part}.parquet", row_group_size=1_000
        )
    return f"{folder}/*.parquet"


def expected(files: str) -> dict[str, list[tuple[object, ...]]]:
    """What each view holds after a whole run, by DuckDB alone."""
    kept = f"(SELECT DISTINCT * FROM '{files}' WHERE cents > 0)"
    hour, day = """date_trunc('hour', "at")""", """date_trunc('day', "at")"""
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        sums = "sum(cents)::BIGINT"
        shops = f"SELECT shop, {hour} AS w, count(*), {sums}, median(cents) FROM {kept} GROUP BY 1, 2 ORDER BY 1, 2"
        days = f"SELECT {day} AS w, count(DISTINCT shop), {sums} FROM {kept} GROUP BY ALL ORDER BY ALL"
        return {"by_shop": connection.sql(shops).fetchall(), "by_day": connection.sql(days).fetchall()}


def answers(table: pa.Table, view: str) -> list[tuple[object, ...]]:
    names = {
        "by_shop": ["shop", "window_start", "sales", "revenue", "median"],
        "by_day": ["window_start", "shops", "revenue"],
    }
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        connection.register("answers", table.select(names[view]))
        return connection.sql("SELECT * FROM answers ORDER BY ALL").fetchall()


def start(point: int, place: Path, files: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-W", "ignore", str(DYING), str(point), str(place), files]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def whole_run(place: Path, files: str) -> int:
    """Runs to the end; the number of points passed."""
    process = start(0, place, files)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return int(out.splitlines()[-1])


def read(place: Path) -> dict[str, list[list[tuple[object, ...]]]]:
    """What readers see of each view: in the warehouse, and in the store."""
    with open_store(str(place / "store.db")) as store:
        return {
            view: [
                answers(open_table(str(place / "warehouse/sales" / view)).dataset().to_table(), view),
                answers(store.scan(f"sales.{view}"), view),
            ]
            for view in VIEWS
        }


def leftovers(place: Path) -> list[str]:
    """Files in the tables' folders that no table knows, and rows of generations that no pointer names."""
    found = []
    for name in TABLES:
        folder = place / name
        known = {Path(path).name for path in deltalake.DeltaTable(str(folder)).file_uris()}
        current = max((file.name.split("-")[1] for file in folder.glob("part-*.parquet")), default="")
        found += [file.name for file in folder.glob(f"part-{current}-*") if file.name not in known]
    with sqlite3.connect(place / "store.db") as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in tables:
            columns = [row[1] for row in connection.execute(f'PRAGMA table_info("{table}")')]
            if "window_start" in columns and "_generation" in columns:
                generations = connection.execute(f'SELECT count(DISTINCT _generation) FROM "{table}"').fetchone()[0]
                found += [f"{table}: {generations} generations"] if generations > 1 else []
    return found


def points(total: int, chance: random.Random) -> Sequence[int]:
    """Anywhere in a run, and as often in its last tenth, where it commits."""
    return [
        chance.randrange(1, total) if chance.random() < 0.5 else chance.randrange(total * 9 // 10, total)
        for _ in range(ROUND)
    ]


def test_fifty_kills_leave_readers_on_a_whole_answer_and_the_next_run_exact(tmp_path: Path) -> None:
    chance = random.Random(2013)
    histories = [history(tmp_path / "old", 1), history(tmp_path / "new", 2)]
    right = [expected(files) for files in histories]
    place = tmp_path / "place"
    total = whole_run(place, histories[0])
    killed = 0
    for number in range(KILLS // ROUND):
        old, new = (number % 2, 1 - number % 2)
        for point in points(total, chance):
            process = start(point, place, histories[new])
            _, err = process.communicate()
            assert process.returncode in (-signal.SIGKILL, 0), err
            killed += process.returncode == -signal.SIGKILL
            for view, seen in read(place).items():
                for answer in seen:
                    assert answer in (right[old][view], right[new][view]), (
                        f"{view}: half an answer after point {point} of {total}"
                    )
        total = whole_run(place, histories[new])
        for view, seen in read(place).items():
            assert seen == [right[new][view]] * 2, view
        assert leftovers(place) == []
    assert killed >= KILLS * 9 // 10
