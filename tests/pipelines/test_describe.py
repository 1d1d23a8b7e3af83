import datetime
import json
import re
from typing import Annotated

import duckdb
import pyarrow as pa
import pytest

from pipelines import (
    Apply,
    Check,
    Column,
    Count,
    Derive,
    Dimension,
    Lookup,
    Mean,
    Pipeline,
    Quantile,
    Source,
    Tumbling,
    View,
    load,
)
from pipelines.describe import describe, facts, laid_out
from pipelines.transforms.chain import SqlStage


class Reading:
    sensor: Annotated[str, Column("its label", personal="id")]
    seen: datetime.datetime
    celsius: Annotated[float | None, Column(unit="°C")]
    volts: float


class Room:
    sensor: str
    room: str


rooms = Dimension("rooms", Room, key="sensor")


def twice(rows: pa.Table) -> pa.Table:
    return rows.append_column("double", rows["volts"])


READINGS = Pipeline(
    "readings",
    doc="what the sensors say",
    source=Source(Reading, event_time="seen", identity=("sensor", "seen")),
    steps=(
        Check(in_range="celsius between -40 and 125"),
        Derive(kelvin="celsius + 273.15"),
        Lookup(rooms, on="sensor", take={"where": "room"}),
        Apply(twice, adds={"double": float}),
    ),
    views=(
        View(
            "by_room",
            by="where",
            window=Tumbling("1h"),
            steps=(Derive(warm="kelvin > 300"),),
            n=Count(where="warm"),
            mean=Mean("kelvin"),
            p95=Quantile("double", 0.95),
            share="n / nullif(mean, 0)",
        ),
    ),
)


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return [re.sub(r" +", " ", line).strip() for line in describe(READINGS).splitlines()]


def test_it_tells_what_is_declared(lines: list[str]) -> None:
    assert lines[0] == "readings: what the sensors say"
    assert any(line.startswith("source events: event time seen, identity sensor, seen,") for line in lines)
    assert "sensor string not null personal: id its label" in lines
    assert "celsius double °C" in lines
    assert "dimension rooms: key sensor" in lines
    assert "1 Check in_range=celsius between -40 and 125 on_fail: reject" in lines
    assert "3 Lookup rooms on: sensor take: where=room missing: null" in lines
    assert "4 Apply function: twice adds: double=float" in lines
    assert "view readings.by_room: by where, Tumbling('1h')" in lines


def test_every_column_names_the_source_columns_it_comes_from(lines: list[str]) -> None:
    assert "kelvin double celsius" in lines
    assert "where string rooms.room" in lines
    assert "n int64 Count(where='warm') celsius" in lines
    assert "mean double Mean('kelvin') celsius" in lines
    assert "window_end timestamp[us, tz=UTC] seen" in lines
    assert "share double n / nullif(mean, 0) celsius" in lines
    (p95,) = (line for line in lines if line.startswith("p95 "))
    assert p95.startswith("p95 double Quantile('double', 0.95) ")
    assert "volts" in p95


@pytest.mark.parametrize(
    "part",
    [
        "steps, SQL",
        "view by_room, steps, SQL",
        *(f"view by_room, SQL, {name}" for name in ("partial", "merge", "result")),
    ],
)
def test_the_sql_is_whole(part: str) -> None:
    (sql,) = re.findall(rf"^{part}\n((?:  .*\n)+)", describe(READINGS) + "\n", flags=re.MULTILINE)
    ((parsed,),) = duckdb.connect().execute("SELECT json_serialize_sql($1)", [sql]).fetchall()
    assert json.loads(parsed)["error"] is False


def test_a_function_is_a_part_of_its_own(lines: list[str]) -> None:
    assert "steps, a function: step 4 (Apply)" in lines


def test_the_facts_are_json_with_the_same_sql_and_lineage() -> None:
    told = json.loads(json.dumps(facts(READINGS)))
    plan = READINGS.plan()
    assert (told["pipeline"], told["source"]["identity"], told["source"]["extra"]) == (
        "readings",
        ["sensor", "seen"],
        "ignore",
    )
    assert told["source"]["columns"]["celsius"]["unit"] == "°C"
    assert told["source"]["columns"]["sensor"]["personal"] == "id"
    assert told["dimensions"]["rooms"]["key"] == ["sensor"]
    assert told["sql"] == [getattr(stage, "sql", "step 4 (Apply)") for stage in plan.chain.stages]
    assert told["events"]["kelvin"] == {"type": "double", "from": ["celsius"]}
    view = told["views"]["by_room"]
    assert view["columns"]["where"] == {"type": "string", "from": ["rooms.room"]}
    assert view["measures"]["p95"] == "Quantile('double', 0.95)"
    assert view["sql"]["merge"] == plan.views[0].merge


@pytest.mark.parametrize("name", ["flights", "calls", "orders", "sensors"])
def test_sql_that_is_laid_out_is_the_same_sql(name: str) -> None:
    plan = load(name).plan()
    chains = [plan.chain, *(view.chain for view in plan.views if view.chain)]
    texts = [stage.sql for chain in chains for stage in chain.stages if isinstance(stage, SqlStage)]
    texts += [text for view in plan.views for text in (view.partial, view.merge, view.windowed, view.result)]
    for text in texts:
        laid = laid_out(text)
        assert "".join(laid.split()) == "".join(text.split())
        assert not any(" FROM " in line.strip() for line in laid.splitlines())


def test_literals_names_and_comments_are_left_as_they_are() -> None:
    sql = (
        """SELECT 'a  FROM (SELECT', "b  ,  c" FROM (SELECT x -- , FROM\n) ASOF LEFT JOIN y WHERE z IN ('('  ,  ')')"""
    )
    assert laid_out(sql).split("\n") == [
        """SELECT 'a  FROM (SELECT', "b  ,  c\"""",
        "FROM (",
        "  SELECT x -- , FROM",
        "  )",
        "ASOF LEFT JOIN y",
        "WHERE z IN ('(' , ')')",
    ]
