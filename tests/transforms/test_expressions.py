"""Expressions: what they are of, what type they have, and that each is a function of its row alone."""

import datetime
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.transforms import query
from pipelines.transforms.expressions import DefinitionError, arrow_types, check, literal, nearest, quote

COLUMNS = {
    "id": "BIGINT",
    "x": "DOUBLE",
    "text": "VARCHAR",
    "at": "TIMESTAMP WITH TIME ZONE",
    "price": "DECIMAL(38,2)",
    "items": "STRUCT(sku VARCHAR, n BIGINT)[]",
    "place": "STRUCT(lat DOUBLE, lon DOUBLE)",
    "Mixed": "INTEGER",
    "order": "BOOLEAN",
    "a b": "BIGINT",
}


@pytest.mark.parametrize(
    ("sql", "kind", "columns"),
    [
        ("1", "INTEGER", set()),
        ("id", "BIGINT", {"id"}),
        ("ID + Id", "BIGINT", {"id"}),
        ("id / 2", "DOUBLE", {"id"}),
        ("id // 2", "BIGINT", {"id"}),
        ("id * price", "DECIMAL(38,2)", {"id", "price"}),
        ("id > 1 and x is not null", "BOOLEAN", {"id", "x"}),
        ("text || '-' || id", "VARCHAR", {"text", "id"}),
        ("at - INTERVAL 1 DAY", "TIMESTAMP WITH TIME ZONE", {"at"}),
        ("extract(hour from at at time zone 'Europe/Paris')", "BIGINT", {"at"}),
        ("at", "TIMESTAMP WITH TIME ZONE", {"at"}),
        ("place.lat - place.lon", "DOUBLE", {"place"}),
        ("items[1].sku", "VARCHAR", {"items"}),
        ("list_transform(items, lambda i: i.n + id)", "BIGINT[]", {"items", "id"}),
        ("[i.n for i in items if i.n > id]", "BIGINT[]", {"items", "id"}),
        ("list_sum(list_transform(items, lambda row: row.n))", "HUGEINT", {"items"}),
        ("{'lat': x, 'name': text}", 'STRUCT(lat DOUBLE, "name" VARCHAR)', {"x", "text"}),
        ("CASE WHEN x > 0 THEN id ELSE NULL END", "BIGINT", {"x", "id"}),
        ("mixed", "INTEGER", {"Mixed"}),
        ("if(order, 1, 2)", "INTEGER", {"order"}),
        ('"order" or order', "BOOLEAN", {"order"}),
        ('"a b" + 1', "BIGINT", {"a b"}),
        ("text like 'order by at'", "BOOLEAN", {"text"}),
        ("id -- the number", "BIGINT", {"id"}),
        ("id /* at */ + 1", "BIGINT", {"id"}),
        ("  id\n  + 1 ", "BIGINT", {"id"}),
        ("TRY_CAST(text AS DATE)", "DATE", {"text"}),
        ("hash(text)", "UBIGINT", {"text"}),
    ],
)
def test_an_expression_has_a_type_and_columns(sql: str, kind: str, columns: set[str]) -> None:
    found = check(sql, COLUMNS, "here")
    assert (found.type, set(found.columns)) == (kind, columns)


ROW: dict[str, Any] = {
    "id": 7,
    "x": 0.5,
    "text": "a",
    "at": datetime.datetime(2026, 6, 1, 12, tzinfo=datetime.UTC),
    "order": True,
    "end": 3,
}
KEYWORDS = {**{name: COLUMNS[name] for name in ("id", "x", "text", "at", "order")}, "end": "BIGINT"}


@pytest.mark.parametrize(
    ("sql", "value"),
    [
        ("at = at", True),
        ("date_trunc('day', at)", datetime.datetime(2026, 6, 1, tzinfo=datetime.UTC)),
        ("'at' || text", "ata"),
        ("case when order then end else id end", 3),
        ("CASE WHEN END > 3 THEN 1 ELSE END END", 3),
        ('"end" + end', 6),
        ("not order -- and at", False),
        ("id -- )", 7),
    ],
)
def test_a_column_that_is_named_as_a_keyword_is_meant_where_it_can_be(sql: str, value: object) -> None:
    found = check(sql, KEYWORDS, "here")
    answer = query.run(f"SELECT ({found.sql}) AS value FROM b", {"b": pa.Table.from_pylist([ROW])})
    assert answer["value"].to_pylist() == [value]


def test_the_same_text_is_other_columns_elsewhere() -> None:
    assert check("x + 1", {"x": "BIGINT"}, "here").type == "BIGINT"
    assert check("x + 1", {"x": "DOUBLE"}, "here").type == "DOUBLE"
    with pytest.raises(DefinitionError, match=r"^there:"):
        check("x + 1", {"y": "DOUBLE"}, "there")


def test_a_lambdas_parameter_is_no_column_outside_of_it() -> None:
    with pytest.raises(DefinitionError, match="no column 'i'"):
        check("list_transform(items, lambda i: i.n)[1] + i", COLUMNS, "here")


LETTERS = st.sampled_from(["id", "x", "2", "0.5", "price"])
NUMBERS = st.recursive(
    LETTERS,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*"), inner).map(lambda parts: f"({' '.join(parts)})"),
        inner.map(lambda value: f"abs({value})"),
        inner.map(lambda value: f"coalesce({value}, 0)"),
        st.tuples(inner, inner, inner).map(lambda p: f"CASE WHEN {p[0]} > {p[1]} THEN {p[2]} END"),
    ),
    max_leaves=6,
)
ROWS = pa.table(
    {
        "id": pa.array([1, 2, None]),
        "x": pa.array([0.25, None, 4.0]),
        "price": pa.array([Decimal(1), Decimal("2.50"), None], pa.decimal128(10, 2)),
    }
)
TYPES = {"id": "BIGINT", "x": "DOUBLE", "price": "DECIMAL(10,2)"}


@settings(max_examples=20, deadline=None)
@given(NUMBERS)
def test_columns_and_type_are_what_duckdb_says_and_rows_stand_alone(sql: str) -> None:
    found = check(sql, TYPES, "here")
    assert found.columns == {name for name in TYPES if name in sql}
    whole = query.run(f"SELECT ({found.sql}) AS value FROM b", {"b": ROWS})
    assert arrow_types(whole.schema) == {"value": found.type}
    single = [query.run(f"SELECT ({found.sql}) AS value FROM b", {"b": ROWS.slice(row, 1)}) for row in range(3)]
    assert pa.concat_tables(single).equals(whole)


@pytest.mark.parametrize("name", ["plain", "two words", 'a"b', "order", "é", ""])
def test_quoted_names_and_literals_are_themselves(name: str) -> None:
    if name:
        assert query.run(f"SELECT 1 AS {quote(name)}", {}).column_names == [name]
    text = name + "'--\n"
    assert query.run(f"SELECT {literal(text)} AS x", {})["x"].to_pylist() == [text]


@pytest.mark.parametrize(
    ("name", "told"),
    [("dep_dealy", " Nearest: dep_delay."), ("DEP_DELAY", ""), ("zzz", ""), ("arrdelay", " Nearest: arr_delay.")],
)
def test_the_nearest_name(name: str, told: str) -> None:
    assert nearest(name, ["dep_delay", "arr_delay"]) == told


def test_types_of_arrow_columns() -> None:
    schema = pa.schema([("a", pa.int64()), ("b c", pa.list_(pa.string())), ("t", pa.timestamp("us", tz="UTC"))])
    assert arrow_types(schema) == {"a": "BIGINT", "b c": "VARCHAR[]", "t": "TIMESTAMP WITH TIME ZONE"}
