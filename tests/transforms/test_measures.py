"""Measures one by one: what is pinned, how far sketches are off, what is refused, and the edges of types."""

import math
import random
from decimal import Decimal
from fractions import Fraction
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from pipelines.transforms import gather, query
from pipelines.transforms.errors import UserError
from pipelines.transforms.gather import collapse
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
from pipelines.transforms.sketches import LIMIT, Hashed, Ranked, stable_hash

TIMESTAMP = "TIMESTAMP WITH TIME ZONE"


def _partial(measure: Measure, kind: str, batch: pa.Table) -> pa.Table:
    made = "".join(f", {sql} AS {n}" for state in measure.states(kind) for n, sql in state.partial("t").items())
    return gather.partials(f"SELECT k, count(*) AS _rows{made} FROM batch GROUP BY k", batch, measure.states(kind))


def _merge(measure: Measure, kind: str, *parts: pa.Table) -> pa.Table:
    made = "".join(f", {sql} AS {n}" for state in measure.states(kind) for n, sql in state.merge().items())
    sql = f"SELECT k, sum(_rows)::BIGINT AS _rows{made} FROM batch GROUP BY k"
    return gather.merged(sql, pa.concat_tables(parts), measure.states(kind))


def _results(measure: Measure, kind: str, states: pa.Table) -> list[Any]:
    final = collapse(states, measure.states(kind), final=True)
    sql = f"SELECT ({measure.result(kind)})::{measure.type(kind)} AS r FROM states ORDER BY k"
    return query.run(sql, {"states": final})["r"].to_pylist()  # type: ignore[no-any-return]


def _one(measure: Measure, kind: str, values: Any, arrow: pa.DataType | None = None) -> Any:
    """The result over the values of one group, whose event times are 0, 1, …"""
    column = pa.array(values, arrow)
    times = pa.array(range(len(column)), pa.int64())
    batch = pa.table({"k": pa.array([0] * len(column), pa.int64()), "t": times, "x": column})
    (result,) = _results(measure, kind, _partial(measure, kind, batch))
    return result


# Pinned: a library's upgrade must not change what is in a state.


@pytest.mark.parametrize(
    ("kind", "sql", "expected"),
    [
        ("BIGINT", "0", 11207405572559128009),
        ("BIGINT", "1", 11410414385999190061),
        ("BIGINT", "-1", 11812382228429560158),
        ("BIGINT", "9223372036854775807", 1640313129214260496),
        ("BIGINT", "-9223372036854775808", 3096840761329300690),
        ("INTEGER", "1", 11410414385999190061),
        ("BOOLEAN", "true", 11410414385999190061),
        ("DATE", "'2013-01-01'", 2486431328211925091),
        (TIMESTAMP, "'2013-01-01 10:00:00.000001+00'", 385765385358696860),
        ("DOUBLE", "0.1", 7182030732218700145),
        ("DOUBLE", "'-0.0'", 11207405572559128009),
        ("DOUBLE", "0", 11207405572559128009),
        ("DOUBLE", "'nan'", 17600527513597412916),
        ("DOUBLE", "-'nan'::DOUBLE", 17600527513597412916),
        ("FLOAT", "0.5", 16363115737448962936),
        ("VARCHAR", "'N14228'", 7662953762178586509),
        ("VARCHAR", "''", 9098107892288553193),
        ("VARCHAR", "'Zürich'", 5889409336844001084),
        ("BLOB", "'\\x00\\xFF'", 26625818650007162),
        ("DECIMAL(18,2)", "1.5", 1775101664740673330),
        ("HUGEINT", "170141183460469231731687303715884105727", 4133986668104382690),
        ("UBIGINT", "18446744073709551615", 2441241191292648810),
        ("UUID", "'00112233-4455-6677-8899-aabbccddeeff'", 14255184605349227886),
        ("INTEGER[]", "[1, 2]", 3909511824244818429),
        ("VARCHAR", "NULL", None),
        ("BIGINT", "NULL", None),
        ("DOUBLE", "NULL", None),
    ],
)
def test_the_hash_of_a_value_never_changes(kind: str, sql: str, expected: int | None) -> None:
    (row,) = query.run(f"SELECT {stable_hash('x', kind)} AS h FROM (SELECT ({sql})::{kind} AS x)", {}).to_pylist()
    assert row["h"] == expected


def test_the_bucket_of_a_value_never_changes() -> None:
    values = np.array([-math.inf, -1e300, -1.0, -5e-324, 0.0, 5e-324, 0.1, 1.0, 1.01, 2.0, 1e300, math.inf, math.nan])
    assert Ranked("x", None, "DOUBLE", 0.01).buckets(values).tolist() == [
        -4194304,
        -1085947,
        -1048576,
        -1008301,
        0,
        1008301,
        1048451,
        1048576,
        1048576,
        1048613,
        1085947,
        4194304,
        4194305,
    ]


def test_names_of_states_never_change() -> None:
    measures = (Count("x"), Sum("x"), Min("x"), Max("x"), First("x"), Last("x"), Variance("x"), Quantile("x", 0.5))
    names = [state.name for measure in (*measures, Distinct("x")) for state in measure.states("DOUBLE")]
    assert names == [
        "count_cfb9aefd4d",
        "sum_bf157c3f3a",
        "min_49ab6ec77b",
        "max_73bf713fe8",
        "first_8544858891",
        "last_008b3d4407",
        "variance_4ab625a144",
        "quantile_b9659b9eb2",
        "distinct_eacf64c0d2",
    ]


# How far sketches are off.


@pytest.mark.parametrize(("groups", "size"), [(400, 100), (200, 1000), (20, 10_000), (2, 100_000)])
@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("BIGINT", "i"),
        ("BIGINT", "i * 1000000"),
        (TIMESTAMP, "to_timestamp(i * 3600)"),
        ("DOUBLE", "i / 7"),
        ("VARCHAR", "'N' || i"),
    ],
)
def test_distinct_is_within_its_error(kind: str, values: str, groups: int, size: int) -> None:
    sql = f"SELECT i // {size} AS k, {values} AS x FROM range({groups * size}) t(i)"
    counts = np.array(_results(Distinct("x"), kind, _partial(Distinct("x"), kind, query.run(sql, {}))))
    errors = counts / size - 1
    assert abs(errors).max() < 4 * 0.02
    assert math.sqrt((errors**2).mean()) < 0.02 * (1 + 2 / math.sqrt(2 * groups))
    assert abs(errors.mean()) < 3 * 0.02 / math.sqrt(groups) + 0.5 / size  # counts are rounded


def test_a_smaller_error_is_a_better_count() -> None:
    batch = query.run("SELECT 0 AS k, i AS x FROM range(100000) t(i)", {})
    for error in (0.003, 0.01, 0.05, 0.25):
        (count,) = _results(Distinct("x", error=error), "BIGINT", _partial(Distinct("x", error=error), "BIGINT", batch))
        assert abs(count / 100_000 - 1) < 3 * error


@pytest.mark.parametrize("error", [0.001, 0.01, 0.1])
@pytest.mark.parametrize("shape", ["lognormal", "normal", "cauchy", "uniform", "few"])
def test_a_quantile_is_within_its_error(shape: str, error: float) -> None:
    random = np.random.default_rng(7)
    values = {
        "lognormal": random.lognormal(3, 2, 5000),
        "normal": random.normal(5, 20, 5000),
        "cauchy": random.standard_cauchy(5000),
        "uniform": random.uniform(0, 1, 5000),
        "few": random.integers(-3, 3, 5000).astype(float),
    }[shape]
    for q in (0, 0.01, 0.25, 0.5, 0.75, 0.95, 0.999, 1):
        low, high = np.quantile(values, q, method="lower"), np.quantile(values, q, method="higher")
        allowed = error * max(abs(low), abs(high)) * (1 + 1e-9)
        expected = np.quantile(values, q)
        assert abs(_one(Quantile("x", q, error=error), "DOUBLE", values) - expected) <= allowed


def test_a_quantile_of_the_greatest_and_the_smallest_doubles() -> None:
    least, greatest = 2.2250738585072014e-308, 1.7976931348623157e308
    for value in (least, -least, greatest, -greatest, math.inf, -math.inf, 0.0):
        got = _one(Quantile("x", 0.5), "DOUBLE", [value] * 100)
        assert got == value or abs(got / value - 1) <= 0.01
    assert math.isnan(_one(Quantile("x", 0.5), "DOUBLE", [math.nan] * 100))
    assert _one(Quantile("x", 0.5), "DOUBLE", [1.0] * 50 + [math.inf] * 51) == math.inf
    assert _one(Quantile("x", 0.25), "DOUBLE", [1.0] * 26 + [math.inf] * 75) == pytest.approx(1, rel=0.0101)


def test_sixty_four_values_are_exact_and_one_more_is_a_sketch() -> None:
    values = [1.5 * i for i in range(LIMIT + 1)]
    for measure in (Quantile("x", 0.95), Distinct("x")):
        (state,) = measure.states("DOUBLE")
        for count, lists in ((LIMIT, ["raw"]), (LIMIT + 1, ["packed"])):
            batch = pa.table({"k": [0] * count, "t": range(count), "x": values[:count]})
            final = collapse(_partial(measure, "DOUBLE", batch), [state], final=True)
            kept = [name for name in state.columns() if final[name][0].is_valid]
            assert [name.rsplit("_", 1)[1] for name in kept] == lists
    assert _one(Quantile("x", 0.95), "DOUBLE", values[:LIMIT]) == pytest.approx(1.5 * 0.95 * 63, rel=1e-15)


def test_values_that_repeat_are_counted_once_and_stay_exact() -> None:
    assert _one(Distinct("x"), "BIGINT", [i % LIMIT for i in range(10_000)]) == LIMIT
    assert _one(Distinct("x"), "VARCHAR", ["a" * 1_000_000, "a" * 1_000_000, "b"]) == 2


# Collapsing.


@pytest.mark.parametrize("measure", [Quantile("x", 0.5), Distinct("x")])
def test_collapsing_leaves_all_else_as_it_was(measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    states = measure.states("BIGINT")
    batch = query.run("SELECT sqrt(i)::INTEGER AS k, i * i AS x FROM range(50000) t(i)", {})
    long = _partial(measure, "BIGINT", batch).sort_by("k")
    short = collapse(long, states, final=True)
    assert short.drop_columns(list(states[0].columns())) == long.drop_columns(list(states[0].columns()))
    assert short.schema == long.schema
    assert collapse(short, states, final=True).equals(short)
    monkeypatch.setattr(gather, "BLOCK", gather.GROUPS)  # a few groups at a time
    assert collapse(long, states, final=True).equals(short)
    few = long.slice(3, 4)
    assert collapse(pa.concat_tables([few, long.slice(0, 3)]), states) == pa.concat_tables([few, long.slice(0, 3)])
    assert collapse(long.slice(100, 50), states, final=True).equals(short.slice(100, 50).combine_chunks())


def test_a_sketch_is_of_the_values_whatever_was_collapsed_before() -> None:
    rng = random.Random(5)
    values = [rng.lognormvariate(0, 3) for _ in range(900)]
    for measure in (Quantile("x", 0.5), Distinct("x")):
        (state,) = measure.states("DOUBLE")
        assert isinstance(state, Ranked | Hashed)
        expected = None
        for _ in range(3):
            rng.shuffle(values)
            merged = None
            for start in range(0, 900, 150):
                part = pa.table({"k": [0] * 150, "t": [0] * 150, "x": values[start : start + 150]})
                made = collapse(_partial(measure, "DOUBLE", part), [state], final=rng.random() < 0.5)
                merged = collapse(_merge(measure, "DOUBLE", *([merged] if merged else []), made), [state])
            packed = collapse(merged, [state], final=True)[state.packed].to_pylist()
            expected = expected or packed
            assert packed == expected


# Sums.


def test_float_sums_are_exact_in_any_order_and_split() -> None:
    rng = random.Random(11)
    values = [rng.choice([-1, 1]) * rng.lognormvariate(0, 5) for _ in range(2000)]
    expected = float(sum(Fraction(round(Fraction(value) * 2**56), 2**56) for value in values))
    found = set()
    for _ in range(5):
        rng.shuffle(values)
        cut = rng.randrange(2000)
        rows = [
            pa.table({"k": [0] * len(part), "t": [0] * len(part), "x": part}) for part in (values[:cut], values[cut:])
        ]
        states = _merge(Sum("x"), "DOUBLE", *(_partial(Sum("x"), "DOUBLE", part) for part in rows))
        found.update(_results(Sum("x"), "DOUBLE", states))
    assert found == {expected}
    assert expected == pytest.approx(math.fsum(values), rel=1e-15)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.1] * 10, 1.0),
        ([1e11, 1e-18, -1e11], 0.0),
        ([1e-300, 2e-300], 3e-300),
        ([1e300, 1.0, 1e300], 2e300),
        ([-0.0], 0.0),
        ([math.inf, 1.0], math.inf),
        ([math.inf, -math.inf], math.nan),
        ([math.nan, 1.0], math.nan),
        ([None, None], None),
        ([], None),
    ],
)
def test_float_sums_at_the_edges(values: list[float | None], expected: float | None) -> None:
    batch = pa.table(
        {"k": [0] * (len(values) + 1), "t": [0] * (len(values) + 1), "x": pa.array([*values, None], pa.float64())}
    )
    states = [_partial(Sum("x"), "DOUBLE", batch.slice(row, 1)) for row in range(len(batch))]
    for parts in ([_partial(Sum("x"), "DOUBLE", batch)], [_merge(Sum("x"), "DOUBLE", *states)]):
        (total,) = _results(Sum("x"), "DOUBLE", *parts)
        assert str(total) == str(expected)


def test_a_sum_past_its_type_is_an_error_and_wider_types_hold_it() -> None:
    greatest = (1 << 63) - 1
    assert _one(Sum("x"), "BIGINT", [greatest, 1, -1]) == greatest
    with pytest.raises(duckdb.ConversionException):
        _one(Sum("x"), "BIGINT", [greatest, 1])
    assert _one(Sum("x::DECIMAL(38,0)"), "DECIMAL(38,0)", [greatest, greatest]) == 2 * greatest
    assert _one(Mean("x"), "BIGINT", [greatest, greatest]) == float(greatest)
    with pytest.raises(duckdb.OutOfRangeException):
        _one(Sum("x"), "DECIMAL(38,0)", [Decimal("9" * 38)] * 2, pa.decimal128(38, 0))


def test_the_variance_of_large_integers_near_each_other_is_exact() -> None:
    base = 1 << 44
    assert _one(Variance("x"), "BIGINT", [base, base + 1, base + 2]) == 1.0
    assert _one(Variance("x"), "BIGINT", [base] * 1000) == 0.0
    assert _one(Variance("x"), "BIGINT", [5] * 99_999 + [4]) == pytest.approx(1e-5, rel=1e-15, abs=0)
    assert _one(
        StdDev("x"), "DECIMAL(18,2)", [Decimal("10000000.01"), Decimal("10000000.03")], pa.decimal128(18, 2)
    ) == (pytest.approx(0.0141421356237, rel=1e-9))
    assert _one(Variance("x"), "BIGINT", [-(1 << 63), (1 << 63) - 1]) == pytest.approx(2.0**127)


@pytest.mark.parametrize("measure", [Min("x"), Max("x"), First("x"), Last("x"), Quantile("x", 0), Quantile("x", 1)])
def test_there_is_one_zero(measure: Measure) -> None:
    """Or which of 0.0 and -0.0 came first would show."""
    zeros = pa.table({"k": [0, 0, 1, 1], "t": [0, 0, 0, 0], "x": [0.0, -0.0, -0.0, 0.0]})
    assert list(map(str, _results(measure, "DOUBLE", _partial(measure, "DOUBLE", zeros)))) == ["0.0", "0.0"]


# Definitions.


def test_where_keeps_an_expression_from_rows_in_which_it_fails() -> None:
    assert _one(Sum("10 // x", where="x <> 0"), "BIGINT", [0, 2, 5, None]) == 7
    assert _one(Count(where="x > 1"), "BIGINT", [1, 2, None]) == 1
    assert _one(Last("x", where="x < 3"), "BIGINT", [1, 2, 3]) == 2


def test_measures_share_equal_states() -> None:
    assert Mean("x").states("DOUBLE")[0] == Sum("x").states("DOUBLE")[0]
    assert Variance("x").states("BIGINT") == StdDev("x").states("BIGINT")
    assert Quantile("x", 0.5).states("DOUBLE") == Quantile("x", 0.9).states("DOUBLE")
    assert Sum("x").states("DOUBLE") != Sum("x", where="y").states("DOUBLE")
    assert Quantile("x", 0.5).states("DOUBLE") != Quantile("x", 0.5, error=0.05).states("DOUBLE")


@pytest.mark.parametrize(
    ("measure", "kind", "text"),
    [
        (Sum("x"), "VARCHAR", "Sum needs a number, not VARCHAR"),
        (Mean("x"), TIMESTAMP, "Mean needs a number, not TIMESTAMP WITH TIME ZONE"),
        (StdDev("x"), "DATE", "StdDev needs a number, not DATE"),
        (Quantile("x", 0.5), "BOOLEAN[]", "Quantile needs a number, not BOOLEAN[]"),
        (Max("x"), "STRUCT(a INTEGER)", "Max needs one value that has an order, not STRUCT(a INTEGER)"),
        (Sum("x"), "DECIMAL(18,2)", None),
        (Mean("x"), "BOOLEAN", None),
        (Min("x"), "VARCHAR", None),
        (First("x"), "STRUCT(a INTEGER)", None),
        (Distinct("x"), "INTEGER[]", None),
    ],
)
def test_a_measure_says_what_it_cannot_aggregate(measure: Measure, kind: str, text: str | None) -> None:
    assert measure.check(kind) == text


@pytest.mark.parametrize(
    "made", [lambda: Quantile("x", 95), lambda: Quantile("x", 0.5, error=1e-9), lambda: Distinct("x", error=0.9)]
)
def test_a_measure_refuses_what_it_cannot_keep(made: Any) -> None:
    with pytest.raises(UserError, match=r"Quantile\('x', 95\): the quantile is 0 to 1|the error is 0.00[13] to 0.25"):
        made()
