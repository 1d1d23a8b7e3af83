"""What two sets of answers of one view differ in, key by key, window by window, measure by measure."""

import dataclasses
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.transforms import query
from pipelines.transforms.expressions import quote
from pipelines.transforms.view import ViewPlan

FIRST = 10
"""Differences that are told."""

CLOSE = 1e-9
"""How near two values of a measure must be that is not exact: of the greater one, or of 1."""

NONE = "no such window"


@dataclasses.dataclass(frozen=True)
class Difference:
    """One value that differs. keys: with window_start. measure: empty where one side lacks the window."""

    keys: dict[str, Any]
    measure: str
    found: Any
    expected: Any


@dataclasses.dataclass(frozen=True)
class Compared:
    """windows: those of either side. different: of them, those with any difference. first: the first of these."""

    windows: int
    different: int
    first: tuple[Difference, ...] = ()


def compared(plan: ViewPlan, found: pa.Table, expected: pa.Table) -> Compared:
    """Two tables of the plan's answers, in any order. Values are compared exactly, sketches' too; floats that depend on
    the order of their rows (``Measure.exact``) within CLOSE.

    >>> import datetime
    >>> from pipelines import Count, Pipeline, Source, View
    >>> class Sale:
    ...     time: datetime.datetime
    ...     shop: str
    >>> shops = View("shops", by="shop", sales=Count())
    >>> plan = Pipeline("sales", source=Source(Sale, event_time="time"), views=(shops,)).plan().views[0]
    >>> noon = pa.array([datetime.datetime(2024, 5, 1, 12, tzinfo=datetime.UTC)] * 2, pa.timestamp("us", "UTC"))
    >>> rows = pa.table({"shop": ["a", "a"], "event_time": noon})
    >>> one, two = (plan.finished(plan.partials(rows.slice(0, n))) for n in (1, 2))
    >>> compared(plan, one, two).first[0]
    Difference(keys={'shop': 'a', 'window_start': None}, measure='sales', found=1, expected=2)
    """
    keys = [*plan.by, "window_start"]
    values = ["window_end", *plan.measures, "_rows"]
    joined = " AND ".join(f"a.{quote(name)} IS NOT DISTINCT FROM b.{quote(name)}" for name in keys)
    cells = [f"coalesce(a.{quote(name)}, b.{quote(name)}) AS {quote(name)}" for name in keys]
    cells += ["a._here AS _found", "b._here AS _expected"]
    kinds = {field.name: field.type for field in expected.schema}
    for number, name in enumerate(values):
        left, right = f"a.{quote(name)}", f"b.{quote(name)}"
        same = f"{left} IS NOT DISTINCT FROM {right}"
        if pa.types.is_floating(kinds[name]):
            near = f"abs({left} - {right}) <= {CLOSE} * greatest(1, abs({left}), abs({right}))"
            same = f"{same} OR coalesce(NOT a._exact{number} AND {near}, false)"
        cells += [f"NOT ({same}) AS _differs{number}", f"{left} AS _left{number}", f"{right} AS _right{number}"]
    differs = " OR ".join(["_found IS NULL", "_expected IS NULL", *(f"_differs{n}" for n in range(len(values)))])
    sql = f"SELECT {', '.join(cells)} FROM found a FULL OUTER JOIN expected b ON {joined}"
    sides = {"found": _side(plan, found, keys, values), "expected": _side(plan, expected, keys, values)}
    windows = query.run(f"SELECT count(*) AS n, count(*) FILTER ({differs}) AS bad FROM ({sql})", sides).to_pylist()[0]
    if not windows["bad"]:
        return Compared(windows["n"], 0)
    order = ", ".join(f"{quote(name)} NULLS FIRST" for name in ["window_start", *plan.by])
    first = query.run(f"SELECT * FROM ({sql}) WHERE {differs} ORDER BY {order} LIMIT {FIRST}", sides)
    told = [difference for row in first.to_pylist() for difference in _differences(row, keys, values)]
    return Compared(windows["n"], windows["bad"], tuple(told[:FIRST]))


def _side(plan: ViewPlan, answers: pa.Table, keys: list[str], values: list[str]) -> pa.Table:
    """The values, and for each measure whether it is exact there."""
    side = answers.select([*keys, *values]).append_column("_here", pa.repeat(True, len(answers)))
    exact = query.run(plan.digest, {"batch": answers})
    for number, name in enumerate(values):
        known = pc.is_valid(exact[name]) if name in plan.measures else pa.repeat(True, len(answers))
        side = side.append_column(f"_exact{number}", known)
    return side


def _differences(row: dict[str, Any], keys: list[str], values: list[str]) -> list[Difference]:
    named = {name: row[name] for name in keys}
    if not (row["_found"] and row["_expected"]):
        return [Difference(named, "", *("a window" if row[side] else NONE for side in ("_found", "_expected")))]
    wrong = [(number, name) for number, name in enumerate(values) if row[f"_differs{number}"]]
    return [Difference(named, name, row[f"_left{number}"], row[f"_right{number}"]) for number, name in wrong]
