"""What definitions compile to: views whose expressions fail in some rows, and text of every shape."""

import datetime
from typing import Any

import pyarrow as pa
import pytest

from pipelines import (
    Count,
    Derive,
    Distinct,
    Explode,
    Filter,
    First,
    Last,
    Max,
    Mean,
    Pipeline,
    Session,
    Sliding,
    Source,
    StdDev,
    Sum,
    Tumbling,
    View,
)
from pipelines.testing import Result, example, run
from pipelines.transforms.measures import Measure

NOON = datetime.datetime(2026, 6, 1, 12, tzinfo=datetime.UTC)


class Item:
    n: int


class Row:
    id: int
    at: datetime.datetime
    text: str | None
    items: list[Item]


def result(rows: list[dict[str, Any]], *steps: Any, **view: Any) -> Result:
    made = Pipeline("p", source=Source(Row, event_time="at"), steps=steps, views=(View("v", **view),))
    return run(made, [example(Row, at=row.pop("at", NOON), **row) for row in map(dict, rows)])


def answers(found: Result, *names: str) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in names) for row in found.views["v"].to_pylist()]


TEXTS = [{"text": text} for text in ("1", "x", None, "3")]


@pytest.mark.parametrize(
    ("measures", "values"),
    [
        ({"a": Sum("text::BIGINT")}, (4,)),
        ({"a": Count(where="text::BIGINT > 1")}, (1,)),
        ({"a": Last("text::BIGINT")}, (3,)),
        (
            {"a": StdDev("text::BIGINT"), "b": Count(), "c": "a * a / b"},
            (pytest.approx(2**0.5), 3, pytest.approx(2 / 3)),
        ),
        ({"a": Distinct("text::BIGINT"), "b": Mean("12 // text::BIGINT")}, (2, 8.0)),
    ],
)
def test_a_measure_that_fails_in_a_row_refuses_it_for_the_view(measures: dict[str, Measure | str], values: Any) -> None:
    found = result(TEXTS, **measures)
    assert answers(found, *measures) == [values]
    assert [(row["offset"], row["step"], row["reason"]) for row in found.rejected.to_pylist()] == [
        (1, "view 'v'", "a failed")
    ]
    assert len(found.rows) == 4
    assert found.counts["rejected"] == 0


def test_a_value_is_not_computed_where_the_measure_does_not_look() -> None:
    found = result(TEXTS, a=Sum("text::BIGINT", where="text <> 'x'"), n=Count())
    assert (answers(found, "a", "n"), len(found.rejected)) == ([(4, 4)], 0)


def test_rows_that_fail_are_refused_behind_a_views_own_steps() -> None:
    rows = [{"id": n, "items": [{"n": n}, {"n": 0}]} for n in range(3)]
    found = result(rows, steps=(Explode("items"), Filter("n > 0 or id = 2")), by="id", a=Sum("12 // n"))
    assert answers(found, "id", "a") == [(1, 12), (2, 6)]
    assert [(row["offset"], row["reason"]) for row in found.rejected.to_pylist()] == [(2, "a failed")]


def test_an_answer_that_cannot_be_is_null() -> None:
    found = result(TEXTS, n=Count(), none=Count(where="false"), share="n // none", next="share + 1")
    assert answers(found, "share", "next") == [(None, None)]


@pytest.mark.parametrize(
    ("sql", "value"),
    [
        ("{'a': id}.a", 7),
        ("id -- the number (of it", 7),
        ("id /* ) */", 7),
        ("'{0}' || '{' || id", "{0}{7"),
        ("length('it''s -- not')", 11),
        ("list_sum(list_transform(items, lambda i: i.n)) + id", 10),
    ],
)
def test_text_of_every_shape_is_a_column_a_measure_and_an_answer(sql: str, value: Any) -> None:
    measures = {"a": Max(sql), "b": First("made", where="id > 0 -- yes"), "id": Max("id"), "items": Last("items")}
    found = result([{"id": 7, "items": [{"n": 1}, {"n": 2}]}], Derive(made=sql), **measures, c=sql)
    assert found.rows["made"].to_pylist() == [value]
    assert answers(found, "a", "b", "c") == [(value, value, value)]


@pytest.mark.parametrize("window", [Tumbling("1h"), Sliding("2h", every="1h"), Session("1h"), Tumbling("1mo")])
@pytest.mark.parametrize("by", [(), "text", ("id", "text")])
def test_null_keys_are_a_group_and_no_key_is_one(window: Any, by: Any) -> None:
    rows = [{"id": 1, "text": text} for text in ("a", None, None, "")]
    found = result(rows, by=by, window=window, n=Count())
    windows = 2 if isinstance(window, Sliding) else 1
    assert sorted(found.views["v"]["n"].to_pylist()) == sorted([1, 2, 1] * windows if by else [4] * windows)


def test_float_keys_group_as_numbers_do() -> None:
    values = ("nan", "NaN", "-0.0", "0.0", "1.5", None)
    found = result([{"text": text} for text in values], Derive(key="text::DOUBLE"), by="key", n=Count())
    assert sorted(found.views["v"]["n"].to_pylist()) == [1, 1, 2, 2]


def test_a_view_may_replace_what_another_sees() -> None:
    made = Pipeline(
        "p",
        source=Source(Row, event_time="at"),
        views=(
            View("one", steps=(Derive(id="id * 10"), Filter("id > 10")), total=Sum("id")),
            View("two", total=Sum("id")),
        ),
    )
    found = run(made, [example(Row, id=id) for id in (1, 2, 3)])
    assert [found.views[name]["total"].to_pylist() for name in ("one", "two")] == [[50], [6]]
    assert found.rows["id"].to_pylist() == [1, 2, 3]


def test_equal_states_are_kept_once() -> None:
    measures: dict[str, Any] = {"a": Sum("id"), "b": Mean("id"), "c": Sum("id", where="text = 'a'"), "n": Count()}
    plan = Pipeline("p", source=Source(Row, event_time="at"), views=(View("v", **measures),)).plan().views[0]
    assert len(plan.states) == 3
    assert plan.columns == ["window_start", "window_end", "a", "b", "c", "n"]
    assert [field.type for field in plan.schema][2:6] == [pa.int64(), pa.float64(), pa.int64(), pa.int64()]
