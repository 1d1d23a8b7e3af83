"""Laws that every measure keeps: its states are a commutative monoid, and its result is what plain Python says."""

import dataclasses
import datetime
import itertools
import math
import statistics
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.transforms import gather, query
from pipelines.transforms.measures import (
    Count,
    Distinct,
    First,
    Last,
    Max,
    Mean,
    Measure,
    Min,
    Quantile,
    StdDev,
    Sum,
    Variance,
)
from pipelines.transforms.sketches import LIMIT
from pipelines.transforms.states import State
from pipelines.transforms.tables import TableCoder

Pairs = list[tuple[int, Any]]
"""(event time, value), without nulls"""

Rows = list[tuple[int, int, Any, bool | None]]
"""(key, event time in µs, value, keep)"""

ARROW = {
    "BIGINT": pa.int64(),
    "DOUBLE": pa.float64(),
    "DECIMAL(38,9)": pa.decimal128(38, 9),
    "VARCHAR": pa.string(),
    "BLOB": pa.binary(),
    "BOOLEAN": pa.bool_(),
    "DATE": pa.date32(),
    "TIMESTAMP WITH TIME ZONE": pa.timestamp("us", tz="UTC"),
}

SPECIAL = [
    0.0,
    -0.0,
    math.inf,
    -math.inf,
    math.nan,
    5e-324,
    2.0**-72,
    2.0**62,
    2.0**62 - 512,
    1e150,
    1e308,
    -1e308,
    0.1,
]
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "BIGINT": st.integers(-(1 << 63), (1 << 63) - 1) | st.integers(-9, 9) | st.sampled_from([1 << 45, (1 << 45) - 1]),
    "DOUBLE": st.floats(-1e6, 1e6) | st.floats() | st.sampled_from(SPECIAL),
    "DECIMAL(38,9)": st.decimals(Decimal("-9e27"), Decimal("9e27"), places=9) | st.decimals(-9, 9, places=9),
    "VARCHAR": st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=9),
    "BLOB": st.binary(max_size=20),
    "BOOLEAN": st.booleans(),
    "DATE": st.dates(),
    "TIMESTAMP WITH TIME ZONE": st.datetimes(timezones=st.just(datetime.UTC)),
}
FILL: dict[str, Callable[[int], Any]] = {
    "BIGINT": lambda i: i * i % 10007 - 100,
    "DOUBLE": lambda i: (i * i % 10007 - 100) / 8,
    "DECIMAL(38,9)": lambda i: Decimal(i * i % 10007 - 100) / 100,
    "VARCHAR": lambda i: f"N{i:05}",
    "BLOB": lambda i: i.to_bytes(20, "big"),
    "BOOLEAN": lambda i: i % 3 == 0,
    "DATE": lambda i: datetime.date(2013, 1, 1) + datetime.timedelta(i),
    "TIMESTAMP WITH TIME ZONE": lambda i: datetime.datetime.fromtimestamp(i * 3600, datetime.UTC),
}


# What plain Python says of the (time, value) pairs of a group, nulls left out.
def _sum(pairs: Pairs) -> Any:
    values = [value for _, value in pairs]
    if not all(map(math.isfinite, values)):
        return sum(value for value in values if not math.isfinite(value))
    return sum(map(Fraction, values)) if values else None


def _mean(pairs: Pairs) -> Any:
    total = _sum(pairs)
    return total / len(pairs) if pairs else None


def _variance(pairs: Pairs) -> Any:
    values = [value for _, value in pairs]
    if any(abs(value) >= 1e150 or value != value for value in values):
        return math.nan if len(values) > 1 else None
    return statistics.variance(map(Fraction, values)) if len(values) > 1 else None


def _deviation(pairs: Pairs) -> Any:
    variance = _variance(pairs)
    return variance if variance is None or variance != variance else Fraction(math.sqrt(variance))


def _rank(value: Any) -> Any:
    return (value != value, value) if isinstance(value, float) else value


def _least(pairs: Pairs) -> Any:
    return min((value for _, value in pairs), key=_rank, default=None)


def _greatest(pairs: Pairs) -> Any:
    return max((value for _, value in pairs), key=_rank, default=None)


def _first(pairs: Pairs) -> Any:
    return min(((t, _rank(value), value) for t, value in pairs), default=(None,))[-1]


def _last(pairs: Pairs) -> Any:
    return max(((t, _rank(value), value) for t, value in pairs), default=(None,))[-1]


def _distinct(pairs: Pairs) -> int:
    return len({"nan" if value != value else value for _, value in pairs})


def _quantile(q: float) -> Callable[[Pairs], Any]:
    def of(pairs: Pairs) -> Any:
        if not pairs:
            return None
        below, above, part = _neighbours(pairs, q)
        return below if below == above or not part else below * (1 - part) + above * part

    return of


def _neighbours(pairs: Pairs, q: float) -> tuple[float, float, float]:
    values = sorted((float(value) for _, value in pairs), key=_rank)
    rank = q * (len(values) - 1)
    return values[math.floor(rank)], values[math.ceil(rank)], rank - math.floor(rank)


# How far from that a result may be.
def _same(pairs: Pairs, expected: Any) -> Any:
    return 0


def _ulps(pairs: Pairs, expected: Any) -> Any:
    """What rounding each value to 2^-56 loses, or, out of the range of exact sums, another order of adding."""
    if 2**-20 <= _size(pairs) < 2**38:
        return len(pairs) * 2**-57 + 2 * math.ulp(expected)
    return 1e-12 * _size(pairs) * len(pairs)


def _size(pairs: Pairs) -> float:
    return max(abs(float(value)) for _, value in pairs)


def _squares(pairs: Pairs, expected: Any) -> Any:
    return 1e-12 * float(expected) + 1e-13 * _size(pairs) ** 2


def _roots(pairs: Pairs, expected: Any) -> Any:
    return 1e-12 * float(expected) + 1e-6 * _size(pairs)


def _bucket(q: float, error: float) -> Callable[[Pairs, Any], Any]:
    def of(pairs: Pairs, expected: Any) -> Any:
        below, above, part = _neighbours(pairs, q)
        away = abs(below) * (1 - part) + abs(above) * part
        return away * (error * 1.000001 if len(pairs) > LIMIT else 1e-15) + 5e-324

    return of


def _sigmas(error: float) -> Callable[[Pairs, Any], Any]:
    return lambda pairs, expected: 4 * error * expected if expected > LIMIT else 0


@dataclasses.dataclass(frozen=True)
class Law:
    """A measure over a column of a kind, what Python says it is, and how far from it a result may be."""

    measure: Measure
    kind: str
    oracle: Callable[[Pairs], Any]
    within: Callable[[Pairs, Any], Any] = _same

    def __str__(self) -> str:
        return f"{type(self.measure).__name__}-{self.kind.split('(')[0].split(' ')[0]}"


LAWS = [
    Law(Count(), "BIGINT", len),
    Law(Count("x"), "VARCHAR", len),
    Law(Sum("x"), "DOUBLE", _sum, _ulps),
    Law(Sum("x::DECIMAL(38,0)"), "BIGINT", _sum),
    Law(Sum("x"), "DECIMAL(38,9)", _sum),
    Law(Sum("x"), "BOOLEAN", _sum),
    Law(Mean("x"), "DOUBLE", _mean, _ulps),
    Law(Mean("x"), "BIGINT", _mean, _ulps),
    Law(Mean("x"), "DECIMAL(38,9)", _mean, _ulps),
    Law(Mean("x"), "BOOLEAN", _mean, _ulps),
    Law(Min("x"), "DOUBLE", _least),
    Law(Min("x"), "VARCHAR", _least),
    Law(Max("x"), "DOUBLE", _greatest),
    Law(Max("x"), "TIMESTAMP WITH TIME ZONE", _greatest),
    Law(Variance("x"), "DOUBLE", _variance, _squares),
    Law(Variance("x"), "BIGINT", _variance, _squares),
    Law(Variance("x"), "DECIMAL(38,9)", _variance, _squares),
    Law(StdDev("x"), "DOUBLE", _deviation, _roots),
    Law(First("x"), "DOUBLE", _first),
    Law(First("x"), "VARCHAR", _first),
    Law(Last("x"), "DOUBLE", _last),
    Law(Last("x"), "DECIMAL(38,9)", _last),
    Law(Quantile("x", 0.95), "DOUBLE", _quantile(0.95), _bucket(0.95, 0.01)),
    Law(Quantile("x", 0.5, error=0.05), "BIGINT", _quantile(0.5), _bucket(0.5, 0.05)),
    Law(Quantile("x", 0.25), "DECIMAL(38,9)", _quantile(0.25), _bucket(0.25, 0.01)),
    Law(Distinct("x"), "BIGINT", _distinct, _sigmas(0.02)),
    Law(Distinct("x"), "DOUBLE", _distinct, _sigmas(0.02)),
    Law(Distinct("x"), "DECIMAL(38,9)", _distinct, _sigmas(0.02)),
    Law(Distinct("x"), "BOOLEAN", _distinct),
    Law(Distinct("x"), "BLOB", _distinct, _sigmas(0.02)),
    Law(Distinct("x", error=0.1), "VARCHAR", _distinct, _sigmas(0.1)),
    Law(Distinct("x"), "DATE", _distinct, _sigmas(0.02)),
    Law(Distinct("x"), "TIMESTAMP WITH TIME ZONE", _distinct, _sigmas(0.02)),
]

# The monoid: tables of states, one row per key, of all measures of a kind as a view would have them.


@dataclasses.dataclass(frozen=True)
class View:
    kind: str
    laws: tuple[Law, ...]

    @property
    def states(self) -> tuple[State, ...]:
        every = (state for law in self.laws for state in law.measure.states(self.kind))
        return tuple({state.name: state for state in every}.values())

    def partial(self, rows: Rows) -> pa.Table:
        columns = list(zip(*rows, strict=True)) or [(), (), (), ()]
        types = {"k": pa.int64(), "t": pa.int64(), "x": ARROW[self.kind], "keep": pa.bool_()}
        batch = pa.table({n: pa.array(c, type) for (n, type), c in zip(types.items(), columns, strict=True)})
        made = {name: sql for state in self.states for name, sql in state.partial("t").items()}
        return gather.partials(_grouped("count(*)", made), batch, self.states)

    def merge(self, *tables: pa.Table) -> pa.Table:
        made = {name: sql for state in self.states for name, sql in state.merge().items()}
        return gather.merged(_grouped("sum(_rows)::BIGINT", made), pa.concat_tables(tables), self.states)

    def results(self, *tables: pa.Table) -> list[dict[tuple[int, int], tuple[Any, bool]]]:
        """Of each table: (key, index of the law) to (result, whether it is exact)."""
        numbered = [table.append_column("_table", pa.repeat(n, len(table))) for n, table in enumerate(tables)]
        final = gather.collapse(pa.concat_tables(numbered), self.states, final=True)
        made = ""
        for i, (measure, kind) in enumerate((law.measure, self.kind) for law in self.laws):
            made += f", ({measure.result(kind)})::{measure.type(kind)} AS r{i}, {measure.exact(kind)} AS e{i}"
        found: list[dict[tuple[int, int], tuple[Any, bool]]] = [{} for _ in tables]
        for row in query.run(f"SELECT _table, k{made} FROM states", {"states": final}).to_pylist():
            found[row["_table"]].update({(row["k"], i): (row[f"r{i}"], row[f"e{i}"]) for i in range(len(self.laws))})
        return found


def _grouped(count: str, columns: dict[str, str]) -> str:
    made = "".join(f", {sql} AS {name}" for name, sql in columns.items())
    return f"SELECT k, {count} AS _rows{made} FROM batch GROUP BY k"


def _assert_near(law: Law, value: Any, expected: Any, pairs: Pairs) -> None:
    if expected is None or isinstance(expected, str | bytes | datetime.date):
        assert value == expected, law
    elif not math.isfinite(expected):
        assert str(value) == str(expected), law
    else:
        assert abs(Fraction(value) - Fraction(expected)) <= law.within(pairs, expected), (law, value, expected)


def _pairs(law: Law, rows: Rows, key: int) -> Pairs:
    everything = law.measure in (Count(), Count(where="keep"))
    return [(t, x) for k, t, x, _ in rows if k == key and (x is not None or everything)]


@st.composite
def some_rows(draw: st.DrawFn, kind: str) -> Rows:
    """Rows of a few keys; some keys get so many more that their sketches are at the limit of exactness, or next to."""
    value = st.none() | VALUES[kind]
    rows = draw(
        st.lists(st.tuples(st.integers(0, 3), st.integers(-2, 2), value, st.none() | st.booleans()), max_size=12)
    )
    for key in range(2):
        more = draw(st.sampled_from([0, 0, 1, LIMIT - 1, LIMIT, LIMIT + 1, 2 * LIMIT + 1, 300]))
        rows += [(key, i % 7, FILL[kind](i), i % 2 == 0) for i in range(more)]
    return rows


def _cut(rows: Rows, random: Any, parts: int = 3) -> list[Rows]:
    places = sorted(random.randint(0, len(rows)) for _ in range(parts - 1))
    return [rows[a:b] for a, b in itertools.pairwise([0, *places, len(rows)])]


KINDS = sorted({law.kind for law in LAWS})
any_rows = given(data=st.data(), random=st.randoms(use_true_random=False))
few = settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.mark.parametrize("kind", KINDS)
@few
@any_rows
def test_states_are_a_commutative_monoid(kind: str, data: st.DataObject, random: Any) -> None:
    view = View(kind, tuple(law for law in LAWS if law.kind == kind))
    rows = data.draw(some_rows(kind))
    whole, nothing = view.partial(rows), view.partial([])
    a, b, c = (view.partial(part) for part in _cut(rows, random))
    before = TableCoder().encode(b)
    same = {
        "identity": view.merge(whole, nothing),
        "left": view.merge(view.merge(a, b), c),
        "right": view.merge(a, view.merge(b, c)),
        "permuted": view.merge(c, a, b),
        "encoded": view.merge(TableCoder().decode(TableCoder().encode(a)), TableCoder().decode(before), c),
        "shuffled rows": view.partial(random.sample(rows, len(rows))),
    }
    assert TableCoder().encode(b) == before, "merging changed its second argument"
    assert all(table.schema.equals(whole.schema) for table in same.values())
    expected, *found = view.results(whole, *same.values())
    for name, results in zip(same, found, strict=True):
        assert results.keys() == expected.keys(), name
        for (key, i), (value, exact) in results.items():
            law = view.laws[i]
            assert exact == expected[key, i][1], (name, law)
            if exact:
                assert repr(value) == repr(expected[key, i][0]), (name, law)
            else:
                _assert_near(law, value, expected[key, i][0], _pairs(law, rows, key))


@pytest.mark.parametrize("where", [None, "keep"])
@pytest.mark.parametrize("kind", KINDS)
@few
@any_rows
def test_results_are_what_python_says(kind: str, where: str | None, data: st.DataObject, random: Any) -> None:
    laws = (dataclasses.replace(law, measure=dataclasses.replace(law.measure, where=where)) for law in LAWS)
    view = View(kind, tuple(law for law in laws if law.kind == kind))
    rows = data.draw(some_rows(kind))
    (found,) = view.results(view.partial(rows))
    assert {key for key, _ in found} == {key for key, *_ in rows}
    for (key, i), (value, _) in found.items():
        pairs = _pairs(view.laws[i], [row for row in rows if where is None or row[3]], key)
        _assert_near(view.laws[i], value, view.laws[i].oracle(pairs), pairs)
