"""SIGKILLs while a log is archived and what is new computed: readers see a whole answer, the run after is exact."""

import json
import random
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest

from pipelines.io.sqlite_log import SqliteLog
from pipelines.io.store import open_store
from pipelines.io.table import open_table

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

KILLS = 15
START = datetime(2024, 5, 1, tzinfo=UTC)
DYING = Path(__file__).parent / "dying_lake.py"
VIEWS = {"by_shop": "shop, window_start, sales, revenue, median", "by_day": "window_start, shops, revenue"}
ORACLE = {
    "by_shop": """SELECT shop, date_trunc('hour', "at"), count(*), sum(cents)::BIGINT, median(cents)
                  FROM kept GROUP BY ALL""",
    "by_day": """SELECT date_trunc('day', "at"), count(DISTINCT shop), sum(cents)::BIGINT FROM kept GROUP BY 1""",
}


class Shop:
    """What was sent so far, and what it must come to."""

    def __init__(self, place: Path) -> None:
        self.log, self.chance = SqliteLog(place / "log.db", clock=lambda: START + timedelta(days=9)), random.Random(11)
        self.sent: list[dict[str, Any]] = []

    def send(self, count: int) -> None:
        """New sales in a few of 60 hours, some sent again, some refused."""
        hours = [self.chance.randrange(60) for _ in range(3)]
        for number in range(len(self.sent), len(self.sent) + count):
            seconds = self.chance.choice(hours) * 3600 + self.chance.randrange(3600)
            shop, cents = f"shop {self.chance.randrange(5)}", self.chance.randrange(-20, 10_000)
            self.sent.append({"id": number, "at": START + timedelta(seconds=seconds), "shop": shop, "cents": cents})
        news = [*self.sent[-count:], *self.chance.sample(self.sent, 5)]
        raw = pa.array([json.dumps(row, default=str).encode() for row in news], pa.large_binary())
        self.log.append({str(self.chance.randrange(2)): pa.table({"_raw": raw})})

    def expected(self, view: str) -> list[Any]:
        return asked(
            f"WITH kept AS (SELECT * FROM rows WHERE cents > 0) {ORACLE[view]}", pa.Table.from_pylist(self.sent)
        )


def asked(sql: str, rows: pa.Table) -> list[Any]:
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        connection.register("rows", rows)
        return connection.sql(f"SELECT * FROM ({sql}) ORDER BY ALL").fetchall()


def seen(place: Path, view: str) -> tuple[list[Any], list[Any]]:
    """What readers of the warehouse and of the store see."""
    sql = f"SELECT {VIEWS[view]} FROM rows"
    with open_store(str(place / "store.db")) as store:
        stored = store.scan(f"sales.{view}")
    return asked(sql, open_table(str(place / "warehouse/sales" / view)).dataset().to_table()), asked(sql, stored)


def start(point: int, place: Path) -> tuple[int, str]:
    command = [sys.executable, "-W", "ignore", str(DYING), str(point), str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode, done.stdout


def test_kills_while_archiving_and_computing_what_is_new(tmp_path: Path) -> None:
    shop, chance, killed = Shop(tmp_path), random.Random(3), 0
    shop.send(300)
    code, said = start(0, tmp_path)
    assert code == 0
    total = int(said.splitlines()[-1])
    for number in range(KILLS):
        before = {view: shop.expected(view) for view in VIEWS}
        shop.send(30)
        after = {view: shop.expected(view) for view in VIEWS}
        # anywhere, and as often in the last tenth, where it commits
        point = chance.randrange(1, total) if number % 2 else chance.randrange(total * 9 // 10, total)
        code, _ = start(point, tmp_path)
        killed += code != 0
        for view in VIEWS:
            for answer in seen(tmp_path, view):
                assert answer in (before[view], after[view]), f"{view}: half an answer after point {point} of {total}"
        if number % 3:
            shop.send(10)
        code, said = start(0, tmp_path)
        assert code == 0
        total = int(said.splitlines()[-1])
        for view in VIEWS:
            assert list(seen(tmp_path, view)) == [shop.expected(view)] * 2, view
    assert killed >= KILLS * 2 // 3
