"""Any pipeline over any rows: the whole graph, from Parquet to the warehouse, against one DuckDB query over the rows.

Schemas, rows, steps and views are drawn at random. The oracle is written from what the words mean in SQL, over whole
rows and with DuckDB's own aggregates; it shares no code with the product.
"""

import dataclasses
import datetime
import decimal
import math
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings

from pipelines import (
    Check,
    Count,
    Derive,
    Distinct,
    Filter,
    First,
    Last,
    Max,
    Mean,
    Min,
    Pipeline,
    Quantile,
    Session,
    Sliding,
    Source,
    StdDev,
    Sum,
    Tumbling,
    View,
    Whole,
    testing,
)
from pipelines.io.table import open_table
from pipelines.options import Deployment
from pipelines.run import run

MINUTE = 60_000_000
START = datetime.datetime(2024, 3, 30, 20, tzinfo=datetime.UTC)  # Paris goes to summer time in these hours


class Pick(NamedTuple):
    """Something of a definition, and what it means in the oracle's SQL."""

    ours: Any
    sql: str


COLUMNS: dict[str, tuple[Any, st.SearchStrategy[Any]]] = {
    "k": (str | None, st.sampled_from(["a", "b", "ä", "", None])),
    "g": (int | None, st.sampled_from([0, 1, -1, 2**62, None])),
    "flag": (bool | None, st.sampled_from([True, False, None])),
    "n": (int | None, st.one_of(st.none(), st.integers(-(10**6), 10**6))),
    "x": (
        float | None,
        st.one_of(st.none(), st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: x if abs(x) > 1e-6 else 0.0)),
    ),
    "d": (decimal.Decimal | None, st.one_of(st.none(), st.decimals(-1000, 1000, places=2))),
}
STEPS = [
    Pick(Check(small="n < 900000"), "SELECT * FROM {} WHERE coalesce(n < 900000, true)"),
    Pick(
        Check(some="x is not null", word="k <> 'b'"),
        "SELECT * FROM {} WHERE x IS NOT NULL AND coalesce(k <> 'b', true)",
    ),
    Pick(Filter("n % 2 = 0"), "SELECT * FROM {} WHERE n % 2 = 0"),
    Pick(Filter("flag"), "SELECT * FROM {} WHERE flag"),
    Pick(Derive(n="n + 1"), "SELECT * REPLACE (n + 1 AS n) FROM {}"),
    Pick(
        Derive(x="coalesce(x, 0) / 2", flag="not flag"),
        "SELECT * REPLACE (coalesce(x, 0) / 2 AS x, NOT flag AS flag) FROM {}",
    ),
    Pick(Derive(n="100 // n"), "SELECT * REPLACE (100 // n AS n) FROM {} WHERE n IS NULL OR n <> 0"),
]
MEASURES = {
    "rows": Pick(Count(), "count(*)"),
    "values": Pick(Count("x"), "count(x)"),
    "flagged": Pick(Count(where="flag"), "count(*) FILTER (flag)"),
    "total": Pick(Sum("n"), "sum(n)"),
    "amount": Pick(Sum("d"), "sum(d)"),
    "weight": Pick(Sum("x"), "fsum(x)"),
    "mean": Pick(Mean("n"), "avg(n)"),
    "share": Pick(Mean("flag"), "avg(flag::INT)"),
    "least": Pick(Min("x"), "min(x)"),
    "most": Pick(Max("k"), "max(k)"),
    "spread": Pick(StdDev("n"), "stddev_samp(n)"),
    "median": Pick(Quantile("n", 0.5), "quantile_cont(n, 0.5)"),
    "p95": Pick(Quantile("x", 0.95, where="flag"), "quantile_cont(x, 0.95) FILTER (flag)"),
    "kinds": Pick(Distinct("k"), "count(DISTINCT k)"),
    "numbers": Pick(Distinct("n"), "count(DISTINCT n)"),
    "first": Pick(First("n"), "min({'t': t, 'v': n}) FILTER (n IS NOT NULL)"),
    "last": Pick(Last("k"), "max({'t': t, 'v': k}) FILTER (k IS NOT NULL)"),
}
_BUCKET = "time_bucket(INTERVAL {0}, t AT TIME ZONE '{1}', TIMESTAMP '1970-01-05') AT TIME ZONE '{1}'"
_AFTER = "(time_bucket(INTERVAL {0}, t AT TIME ZONE '{1}', TIMESTAMP '1970-01-05') + INTERVAL {0}) AT TIME ZONE '{1}'"


def _tumbling(every: str, interval: str, zone: str) -> Pick:
    start, end = _BUCKET.format(interval, zone), _AFTER.format(interval, zone)
    return Pick(Tumbling(every, timezone=zone), f"SELECT *, {start} AS window_start, {end} AS window_end FROM {{}}")


WINDOWS = [
    Pick(Whole(), "SELECT *, NULL::TIMESTAMPTZ AS window_start, NULL::TIMESTAMPTZ AS window_end FROM {}"),
    _tumbling("15m", "15 MINUTE", "UTC"),
    _tumbling("1d", "1 DAY", "Europe/Paris"),
    _tumbling("1w", "7 DAY", "UTC"),
    _tumbling("1d", "1 DAY", "Asia/Kathmandu"),
    Pick(
        Sliding("1h", every="25m"),
        "SELECT *, window_start + INTERVAL 1 HOUR AS window_end FROM (SELECT *, unnest(generate_series("
        "time_bucket(INTERVAL 25 MINUTE, t, TIMESTAMPTZ '1970-01-01 00:00:00+00') - INTERVAL 75 MINUTE, "
        "t, INTERVAL 25 MINUTE)) "
        "AS window_start FROM {}) WHERE window_start <= t AND t < window_start + INTERVAL 1 HOUR",
    ),
    Pick(
        Session("20m"),
        "SELECT *, min(t) OVER s AS window_start, max(t) OVER s + INTERVAL 20 MINUTE AS window_end FROM ("
        "SELECT *, sum(opens) OVER (PARTITION BY {keys} ORDER BY t) AS session FROM ("
        "SELECT *, coalesce(t - lag(t) OVER (PARTITION BY {keys} ORDER BY t) >= INTERVAL 20 MINUTE, true)::INT "
        "AS opens FROM {})) WINDOW s AS (PARTITION BY {keys}, session)",
    ),
]


@dataclasses.dataclass(frozen=True)
class Case:
    pipeline: Pipeline
    rows: pa.Table
    steps: tuple[Pick, ...]
    by: tuple[str, ...]
    window: Pick
    measures: dict[str, Pick]

    def expected(self) -> list[dict[str, Any]]:
        """The oracle's answer."""
        sql = "given"
        for step in self.steps:
            sql = f"({step.sql.format(sql)})"
        keys = ", ".join(self.by) or "NULL::INT"
        windowed = self.window.sql.replace("{keys}", keys).format(sql)
        picked = ", ".join(f"{measure.sql} AS {name}" for name, measure in self.measures.items())
        group = [*self.by, "window_start", "window_end"]
        with duckdb.connect() as connection:
            connection.execute("SET TimeZone = 'UTC'")
            connection.register("given", self.rows)
            sql = f"SELECT {', '.join(group)}, {picked} FROM ({windowed}) GROUP BY {', '.join(group)}"
            answers = connection.sql(sql).to_arrow_table().to_pylist()
        return [
            {name: value["v"] if isinstance(value, dict) else value for name, value in row.items()} for row in answers
        ]


@st.composite
def cases(draw: st.DrawFn, least: int = 0) -> Case:
    """least: rows."""
    minutes = st.integers(0, 12 * 60).map(lambda m: START + datetime.timedelta(minutes=m))
    record = st.fixed_dictionaries({"t": minutes, **{name: values for name, (_, values) in COLUMNS.items()}})
    rows = draw(st.lists(record, min_size=least, max_size=40))
    row = type(
        "Row", (), {"__annotations__": {"t": datetime.datetime, **{name: kind for name, (kind, _) in COLUMNS.items()}}}
    )
    source = Source(row, event_time="t")
    steps = tuple(draw(st.lists(st.sampled_from(STEPS), max_size=3)))
    by = tuple(draw(st.lists(st.sampled_from(["k", "g", "flag"]), unique=True, max_size=2)))
    window = draw(st.sampled_from(WINDOWS))
    names = draw(st.lists(st.sampled_from(sorted(MEASURES)), min_size=1, max_size=6, unique=True))
    measures = {name: MEASURES[name] for name in names}
    view = View("answers", by=by, window=window.ours, **{name: pick.ours for name, pick in measures.items()})
    pipeline = Pipeline("anything", source=source, steps=tuple(step.ours for step in steps), views=(view,))
    return Case(pipeline, pa.Table.from_pylist(rows, schema=source.schema.arrow), steps, by, window, measures)


def same(found: list[dict[str, Any]], expected: list[dict[str, Any]], by: tuple[str, ...]) -> None:
    def key(row: dict[str, Any]) -> str:
        return repr([(row[name] is None, row[name]) for name in (*by, "window_start")])

    assert len(found) == len(expected)
    for ours, theirs in zip(sorted(found, key=key), sorted(expected, key=key), strict=True):
        for name, value in theirs.items():
            equal = ours[name] == value
            if isinstance(value, float) and ours[name] is not None:
                equal = math.isclose(ours[name], value, rel_tol=1e-9, abs_tol=1e-9)
            assert equal, f"{name}: {ours[name]!r}, expected {value!r} in {theirs}"


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(cases())
def test_a_definition_means_what_its_sql_says(case: Case) -> None:
    found = testing.run(case.pipeline, case.rows).views["answers"].to_pylist()
    same(found, case.expected(), case.by)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases(), group=st.integers(1, 20), buckets=st.integers(1, 4))
def test_the_graph_computes_it_from_files_to_the_warehouse(
    case: Case, group: int, buckets: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("graph")
    middle = len(case.rows) // 2
    for number, part in enumerate((case.rows.slice(0, middle), case.rows.slice(middle))):
        pq.write_table(part, place / f"rows-{number}.parquet", row_group_size=group)
    run(case.pipeline, deployment(place, buckets))
    found = open_table(str(place / "warehouse/anything/answers")).dataset().to_table().to_pylist()
    same(found, case.expected(), case.by)


def deployment(place: Path, buckets: int) -> Deployment:
    return Deployment(
        history=str(place / "rows-*.parquet"),
        warehouse=str(place / "warehouse"),
        store=str(place / "store.db"),
        dead_letters=str(place / "dead"),
        report=str(place / "run.json"),
        buckets=buckets,
    )
