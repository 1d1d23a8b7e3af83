import datetime
import math
from typing import Any

import pyarrow as pa
import pytest

from pipelines.definition import Pipeline, Source, View
from pipelines.transforms.differences import NONE, Compared, Difference, compared
from pipelines.transforms.measures import Count, Sum, Variance
from pipelines.transforms.windows import Tumbling

START = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)


class Row:
    at: datetime.datetime
    key: str | None
    x: float


VIEW = View("v", by="key", window=Tumbling("1m"), n=Count(), total=Sum("x"), spread=Variance("x"))
PLAN = Pipeline("p", source=Source(Row, event_time="at"), views=(VIEW,)).plan().views[0]


CASES = [("total", 1e-15, True), ("spread", 1e-15, False), ("spread", 1e-6, True)]


def answers(*rows: tuple[int, str | None, float]) -> pa.Table:
    times = pa.array([START + datetime.timedelta(minutes=minute) for minute, _, _ in rows], pa.timestamp("us", "UTC"))
    columns = {"key": pa.array([key for _, key, _ in rows], pa.string()), "x": pa.array([x for _, _, x in rows])}
    return PLAN.finished(PLAN.partials(pa.table({**columns, "event_time": times})))


SOME = answers((0, "a", 0.5), (0, None, 1.0), (1, "a", 2.0), (1, "a", 3.0))


def changed(name: str, values: list[Any]) -> pa.Table:
    place = SOME.schema.get_field_index(name)
    return SOME.set_column(place, name, pa.array(values, SOME.schema.field(name).type))


def test_the_order_of_rows_is_no_difference_and_null_is_a_key() -> None:
    assert compared(PLAN, SOME.take([2, 0, 1]), SOME) == Compared(3, 0)
    assert compared(PLAN, SOME.slice(0, 0), SOME.slice(0, 0)) == Compared(0, 0)


def test_a_window_that_is_missing_or_more_is_told() -> None:
    where = next(n for n, key in enumerate(SOME["key"].to_pylist()) if key is None)
    some = SOME.take([n for n in range(3) if n != where])
    missing = Difference({"key": None, "window_start": START}, "", NONE, "a window")
    assert compared(PLAN, some, SOME) == Compared(3, 1, (missing,))
    assert compared(PLAN, SOME, some).first == (Difference(missing.keys, "", "a window", NONE),)


@pytest.mark.parametrize(
    ("name", "near", "different"), [("total", 1e-15, 1), ("spread", 1e-15, 0), ("spread", 1e-6, 1)]
)
def test_only_what_is_not_exact_may_be_a_little_off(name: str, near: float, different: int) -> None:
    values = [None if x is None else x + near for x in SOME[name].to_pylist()]
    found = compared(PLAN, changed(name, values), SOME)
    assert bool(found.different) == bool(different)


def test_values_stand_side_by_side() -> None:
    found = compared(PLAN, changed("n", [n + 1 for n in SOME["n"].to_pylist()]), SOME)
    assert (found.windows, found.different, len(found.first)) == (3, 3, 3)
    assert all(one.measure == "n" and one.found == one.expected + 1 for one in found.first)
    nan = changed("total", [math.nan] * 3)
    assert compared(PLAN, nan, nan).different == 0 and compared(PLAN, nan, SOME).different == 3
