"""Batch runs over a lake: what they answer, how far they speak, and only what is new against all of it again."""

import dataclasses
import datetime
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest

from pipelines import Check, Count, Distinct, Pipeline, Sliding, Source, Sum, Tumbling, View, Whole
from pipelines.archive import archive, lake
from pipelines.io.sqlite_log import SqliteLog
from pipelines.io.store import LIVE, Pointer, open_store
from pipelines.io.table import open_table
from pipelines.options import Deployment
from pipelines.run import run
from pipelines.transforms.errors import UserError

pytestmark = pytest.mark.slow

START = datetime.datetime(2024, 5, 1, tzinfo=datetime.UTC)
HOUR = 3_600_000_000


class Sale:
    """A row of the log."""

    id: int
    at: datetime.datetime
    shop: str
    cents: int


SALES = Pipeline(
    "sales",
    source=Source(Sale, event_time="at", identity="id", disorder="10m"),
    steps=(Check(positive="cents > 0"),),
    views=(
        View("by_shop", by="shop", window=Tumbling("1h"), sales=Count(), cents=Sum("cents"), ids=Distinct("id")),
        View("by_day", window=Tumbling("1d", timezone="Europe/Paris"), sales=Count()),
        View("often", by="shop", window=Sliding("2h", every="30m"), sales=Count()),
        View("total", window=Whole(), sales=Count(), cents=Sum("cents")),
    ),
)
RANGED = ("by_shop", "by_day", "often")


@pytest.fixture
def place(tmp_path: Path) -> Deployment:
    return Deployment(
        live=str(tmp_path / "log.db"),
        lake=str(tmp_path / "lake"),
        warehouse=str(tmp_path / "warehouse"),
        store=str(tmp_path / "store.db"),
        dead_letters=str(tmp_path / "dead"),
        state=str(tmp_path / "state"),
        report=str(tmp_path / "run.json"),
    )


@pytest.fixture
def log(place: Deployment) -> Iterator[SqliteLog]:
    assert place.live
    with SqliteLog(place.live, clock=lambda: START + datetime.timedelta(days=30)) as log:
        yield log


def sale(number: int, hour: float, cents: int | str = 5, shop: str = "a") -> dict[str, Any]:
    return {"id": number, "at": START + datetime.timedelta(hours=hour), "shop": shop, "cents": cents}


def send(log: SqliteLog, place: Deployment, partition: int, *rows: dict[str, Any] | bytes) -> None:
    raw = [row if isinstance(row, bytes) else json.dumps(row, default=str).encode() for row in rows]
    log.append({str(partition): pa.table({"_raw": pa.array(raw, pa.large_binary())})})
    archive(SALES, place)


def beside(place: Deployment) -> Deployment:
    """The same lake, other tables."""
    names = ("warehouse", "store", "dead_letters", "report")
    others: dict[str, Any] = {name: f"{getattr(place, name)}.whole" for name in names}
    return dataclasses.replace(place, **others)


def tables(place: Deployment, *names: str) -> dict[str, list[Any]]:
    found = {}
    for name in names:
        folder = place.dead_letters if name == "dead" else place.warehouse
        table = open_table(f"{folder}/sales" if name == "dead" else f"{folder}/sales/{name}")
        found[name] = shown(table.dataset().to_table())
    return found


def stored(place: Deployment) -> dict[str, list[Any]]:
    assert place.store
    with open_store(place.store) as store:
        return {view: shown(store.scan(f"sales.{view}")) for view in RANGED}


def shown(table: pa.Table) -> list[Any]:
    """The rows without the states, whose lists have no order."""
    rows = table.select([column for column in table.column_names if not column.startswith("_")]).to_pylist()
    return sorted((tuple(row.values()) for row in rows), key=lambda row: [*map(str, row)])


def same_as_whole(place: Deployment) -> None:
    """Tables and store hold what a run over everything makes."""
    whole = beside(place)
    run(SALES, whole)
    names = ("events", "dead", *RANGED)
    assert tables(place, *names) == tables(whole, *names)
    assert stored(place) == stored(whole)


def pointer(place: Deployment, view: str) -> Pointer:
    assert place.store
    with open_store(place.store) as store:
        found = store.pointer(f"sales.{view}")
    assert found is not None
    return found


def oracle(place: Deployment, within: str = "true") -> list[Any]:
    """by_shop by DuckDB alone, from the lake's payloads."""
    payloads = lake(SALES, place.lake or "").table.dataset().to_table(["partition", "offset", "payload", "event_time"])
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        connection.register("payloads", payloads.filter(payloads["event_time"].is_valid()))
        rows = """SELECT (j ->> 'id')::BIGINT AS id, (j ->> 'at')::TIMESTAMPTZ AS t, j ->> 'shop' AS shop,
                         try_cast(j ->> 'cents' AS BIGINT) AS cents, partition, "offset"
                  FROM (SELECT decode(payload)::JSON AS j, partition, "offset" FROM payloads)"""
        first = f"""SELECT * FROM ({rows}) WHERE cents IS NOT NULL
                    QUALIFY row_number() OVER (PARTITION BY id ORDER BY partition, "offset") = 1"""
        return connection.sql(
            f"""SELECT shop, date_trunc('hour', t) AS w, w + INTERVAL 1 HOUR, count(*), sum(cents)::BIGINT,
                count(DISTINCT id) FROM ({first}) WHERE cents > 0 AND {within} GROUP BY 1, 2 ORDER BY 1, 2"""
        ).fetchall()


def test_a_run_over_a_lake_answers_for_all_and_speaks_to_the_least_partition(place: Deployment, log: SqliteLog) -> None:
    send(log, place, 0, sale(1, 1.1), sale(2, 1.2, shop="b"), sale(2, 1.2, shop="b"), b"poison", sale(3, 4.5, -1))
    send(log, place, 1, sale(4, 2.1), sale(5, 3.2), sale(6, 2.9), sale(7, 9999.0), sale(1, 7.0))
    report = run(SALES, place)
    assert report.facts["rows"] == {
        "read": 10, "kept": 5, "filtered": 0, "rejected": 4, "late": 0, "duplicate": 1,
    }  # fmt: skip
    assert report.facts["rejected"] == {"positive": 1, "conflict": 1, "invalid json": 1, "event time in the future": 1}
    assert tables(place, "by_shop")["by_shop"] == oracle(place, "t < TIMESTAMPTZ '2024-06-30'")
    # partition 1 has been at 7:00, partition 0 at 4:30; both wait 10 minutes for stragglers
    through = int(START.timestamp() * 1e6) + int(4.5 * HOUR) - HOUR // 6
    assert pointer(place, "by_shop").boundary == int(START.timestamp() * 1e6) + 4 * HOUR
    assert pointer(place, "total").boundary == through // HOUR * HOUR
    assert tables(place, "total")["total"] == [(None, None, 5, 25)]


def test_only_what_new_rows_touch_is_computed_again(place: Deployment, log: SqliteLog) -> None:
    chance = random.Random(5)
    send(log, place, 0, *[sale(number, chance.uniform(0, 200), shop=chance.choice("abc")) for number in range(300)])
    run(SALES, dataclasses.replace(place, since="last"))
    same_as_whole(place)
    before = pointer(place, "by_day")
    # late for two hours far apart, new ones, a repeated one, a refused one, poison, and one in a partition of its own
    send(log, place, 0, sale(1000, 20.5), sale(1001, 20.6, "x"), sale(1002, 130.1, shop="z"), b"{", sale(5, 20.5))
    send(log, place, 1, sale(1003, 210.0), sale(1004, 211.0, -3), sale(1003, 210.0))
    report = run(SALES, dataclasses.replace(place, since="last"))
    assert report.facts["rows"]["read"] < 150
    assert report.facts["skipped"] == ["total"]
    assert "8 new rows" in (report.facts.get("since") or "")
    assert "total: left as it was" in report.views()
    same_as_whole(place)
    assert tables(place, "by_shop")["by_shop"] == oracle(place)
    after = pointer(place, "by_day")
    assert after.generation > before.generation
    assert (after.boundary or 0) >= (before.boundary or 0)
    report = run(SALES, dataclasses.replace(place, since="last"))
    assert (report.facts["rows"]["read"], report.facts.get("since")) == (0, "since last: nothing new in the lake")
    same_as_whole(place)


def test_a_conflict_with_a_row_of_another_time_is_found_as_a_whole_run_finds_it(
    place: Deployment, log: SqliteLog
) -> None:
    send(log, place, 1, sale(1, 1.5), sale(2, 50.5))
    run(SALES, place)
    send(log, place, 0, sale(2, 90.5), sale(3, 90.6))  # partition 0 comes first: the row that stood is refused
    send(log, place, 1, sale(1, 70.5))
    run(SALES, dataclasses.replace(place, since="last"))
    same_as_whole(place)
    assert [row[0:2] for row in tables(place, "by_shop")["by_shop"]] == [
        ("a", START + datetime.timedelta(hours=hour)) for hour in (1, 90)
    ]


def test_another_definition_is_computed_whole(place: Deployment, log: SqliteLog) -> None:
    send(log, place, 0, sale(1, 1.5), sale(2, 50.5))
    run(SALES, place)
    other = dataclasses.replace(SALES, steps=(Check(positive="cents > 1"),))
    report = run(other, dataclasses.replace(place, since="last"))
    assert report.facts["rows"]["read"] == 2
    assert "no run of this definition" in (report.facts.get("since") or "")
    with pytest.raises(UserError, match="finds out itself what to compute"):
        run(SALES, dataclasses.replace(place, since="last", to=START))
    with pytest.raises(UserError, match="only a lake knows what is new"):
        run(SALES, dataclasses.replace(place, since="last", lake=None))


def test_a_range_of_a_lake_reads_no_more_than_it_needs(place: Deployment, log: SqliteLog) -> None:
    send(log, place, 0, *[sale(number, number / 2) for number in range(300)])
    run(SALES, place)
    days = [START + datetime.timedelta(days=day) for day in (2, 3)]
    report = run(SALES, dataclasses.replace(place, from_=days[0], to=days[1]))
    assert 48 <= report.facts["rows"]["read"] < 200
    same_as_whole(place)
    send(log, place, 0, sale(500, 3.5))
    run(SALES, dataclasses.replace(place, since="last"))
    same_as_whole(place)


def test_rows_of_the_speed_layer_leave_the_store_once_the_lake_speaks_for_them(
    place: Deployment, log: SqliteLog
) -> None:
    send(log, place, 0, *[sale(number, number) for number in range(10)])
    assert place.store
    run(SALES, beside(place))
    rows = open_table(f"{beside(place).warehouse}/sales/by_shop").dataset().to_table()
    with open_store(place.store) as store:
        store.resume("sales.by_shop", rows.schema, ("shop", "window_start"))
        store.upsert("sales.by_shop", rows, generation=LIVE, version=1)
    run(SALES, place)
    boundary = pointer(place, "by_shop").boundary
    with open_store(place.store) as store:
        left = store.scan("sales.by_shop", generation=LIVE)["window_end"].cast(pa.int64()).to_pylist()
    assert boundary is not None
    assert left == [boundary + HOUR, boundary + 2 * HOUR]


def test_runs_that_die_between_two_commits_are_made_up_for(
    place: Deployment, log: SqliteLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.io.delta import Delta
    from pipelines.io.sqlite import SqliteStore

    send(log, place, 0, *[sale(number, number) for number in range(30)])
    run(SALES, place)
    commit, flip, calls = Delta.commit, SqliteStore.flip, 0

    class Died(Exception):
        pass

    def dying(self: Any, *values: Any, **names: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise Died
        return (commit if isinstance(self, Delta) else flip)(self, *values, **names)

    for at in range(1, 7):
        send(log, place, 0, sale(100 + at, at * 3 + 0.5), sale(200 + at, 1.5))
        with monkeypatch.context() as patch:
            calls = 0
            patch.setattr(Delta, "commit", dying)
            patch.setattr(SqliteStore, "flip", dying)
            with pytest.raises(Exception, match="Died"):
                run(SALES, dataclasses.replace(place, since="last"))
        if at % 2:
            send(log, place, 0, sale(300 + at, at * 5 + 0.5))
        run(SALES, dataclasses.replace(place, since="last"))
        same_as_whole(place)


def test_a_live_run_with_a_lake_archives_what_it_follows(place: Deployment, log: SqliteLog) -> None:
    raw = [json.dumps(sale(number, number / 10), default=str).encode() for number in range(50)]
    log.append({"0": pa.table({"_raw": pa.array(raw, pa.large_binary())})})
    lived = run(SALES, dataclasses.replace(place, mode="micro-batch", until="end"))
    assert lived.facts["rows"]["kept"] == 50
    report = run(SALES, place)
    assert report.facts["rows"]["kept"] == 50
    assert tables(place, "by_shop")["by_shop"] == oracle(place)
    with open_store(place.store or "") as store:
        left = store.scan("sales.by_shop", generation=LIVE)["window_end"].cast(pa.int64()).to_pylist()
    boundary = pointer(place, "by_shop").boundary
    assert boundary is not None
    assert left
    assert min(left) > boundary
