import datetime
import decimal
import json
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines import warehouse
from pipelines.io.table import open_table
from pipelines.transforms.errors import UserError

HOURS = [datetime.datetime(2024, 1, 1, hour, tzinfo=datetime.UTC) for hour in (0, 1)]
ROWS = pa.table(
    {
        "sensor": ["a", "b"],
        "window_start": pa.array(HOURS, pa.timestamp("us", "UTC")),
        "n": [1, 2_000],
        "price": pa.array([decimal.Decimal("1.50"), None], pa.decimal128(9, 2)),
        "_count_ab": [1, 2],
    }
)


@pytest.fixture
def place(tmp_path: Path) -> str:
    table = open_table(f"{tmp_path}/w/readings/by_hour", ROWS.schema)
    stage = table.stage("all", token="t", version=1)
    stage.add(ROWS)
    table.commit(stage.finish(), token="t", version=1, replace="everything")
    return f"{tmp_path}/w"


def test_a_view_is_a_table_without_its_state(place: str) -> None:
    answer = warehouse.ask("select * from readings.by_hour order by n", place)
    assert answer.equals(ROWS.drop_columns("_count_ab"))


def test_any_select_may_be_asked(place: str) -> None:
    sql = """with hours as (from readings.by_hour)
             select a.n + b.n as n from hours a join "readings"."by_hour" b on a.n < b.n where a.n in (select 1)"""
    assert warehouse.ask(sql, place).to_pylist() == [{"n": 2_001}]
    assert warehouse.ask("describe readings.by_hour", place)["column_name"].to_pylist() == ROWS.column_names[:-1]


@pytest.mark.parametrize(
    ("sql", "told"),
    [
        ("select * from readings.by_hours", "no table readings.by_hours in .*Nearest: readings.by_hour"),
        ("select * from zzz.qqq", "no table zzz.qqq in .*Tables: readings.by_hour"),
        ("select * from by_hour", "by_hour does not exist.*Tables in .*: readings.by_hour"),
        ("select m from readings.by_hour", 'column "m" not found'),
        ("selec 1", "syntax error"),
        ("copy (select 1) to 'x.csv'", "one SELECT"),
        ("drop table readings.by_hour", "one SELECT"),
        ("select 1; create table t as select 1", "one SELECT"),
        ("select * from read_csv('/etc/hosts')", "disabled"),
        ("select * from '/etc/hosts'", "disabled|not exist"),
        ("set enable_external_access = true", "one SELECT"),
    ],
)
def test_what_cannot_be_asked_is_refused(place: str, sql: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        warehouse.ask(sql, place)


def test_an_empty_place_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Tables: none yet"):
        warehouse.ask("select * from a.b", str(tmp_path / "nowhere"))


def test_answers_as_json(place: str) -> None:
    told = json.loads(warehouse.as_json(warehouse.ask("select * from readings.by_hour order by n", place)))
    assert told == [
        {"sensor": "a", "window_start": "2024-01-01T00:00:00+00:00", "n": 1, "price": "1.50"},
        {"sensor": "b", "window_start": "2024-01-01T01:00:00+00:00", "n": 2000, "price": None},
    ]
    assert json.loads(warehouse.as_json(ROWS.slice(0, 0))) == []


def test_answers_as_text_end_with_how_many_more_there_are() -> None:
    assert warehouse.as_text(pa.table({"n": [1, 20]})) == " n\n 1\n20"
    assert warehouse.as_text(pa.table({"n": range(1_500)})).endswith("99\n… 1,400 rows more (--json prints all)")
