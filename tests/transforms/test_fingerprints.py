import datetime
import decimal
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.transforms.errors import UserError
from pipelines.transforms.fingerprints import fingerprints

TEXT = st.text(max_size=3) | st.sampled_from(["a" * 8, "a" * 64, "a" * 65, "a" * 64 + "b", "a\0", "a", "\0"])
KIND = {
    pa.int64(): st.integers(-3, 3),
    pa.float64(): st.sampled_from([0.0, -0.0, math.nan, 0.5]),
    pa.string(): TEXT,
    pa.decimal128(38, 2): st.sampled_from([decimal.Decimal("1.00"), decimal.Decimal("-1"), decimal.Decimal(2**70)]),
    pa.list_(pa.string()): st.lists(st.none() | TEXT, max_size=3),
    pa.list_(pa.list_(pa.int64())): st.lists(st.none() | st.lists(st.integers(0, 1), max_size=2), max_size=3),
    pa.struct({"a": pa.int64(), "b": pa.list_(pa.float64())}): st.fixed_dictionaries(
        {"a": st.none() | st.integers(0, 1), "b": st.none() | st.lists(st.sampled_from([0.0, -0.0]), max_size=2)}
    ),
}


def canonical(value: Any) -> Any:
    if isinstance(value, list):
        return ("list", *map(canonical, value))
    if isinstance(value, dict):
        return ("struct", *(canonical(value[name]) for name in sorted(value)))
    return "nan" if isinstance(value, float) and math.isnan(value) else value


def prints(values: pa.Array | pa.ChunkedArray) -> list[tuple[int, ...]]:
    return [tuple(pair) for pair in fingerprints(pa.table({"x": values}), ["x"]).T.tolist()]


@pytest.mark.parametrize("kind", KIND, ids=str)
@settings(max_examples=8)
@given(st.data())
def test_equal_for_equal_values_only_in_both_lanes(kind: pa.DataType, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.none() | KIND[kind], max_size=12))
    found = prints(pa.array(values, kind))
    names = [canonical(value) for value in values]
    for lane in range(2):
        assert len({one[lane] for one in found}) == len(set(names))
    assert len(set(zip(found, names, strict=True))) == len(set(names))


@pytest.mark.parametrize(
    "values",
    [
        pa.array(["a", None, "bcd" * 30, ""]),
        pa.array([[1, 2], None, [], [3]]),
        pa.array([[1, 2], None, [4, 5], [3, None]], pa.list_(pa.int64(), 2)),
        pa.array([{"a": [1.5], "b": "x"}, None, {"a": None, "b": None}, {"a": [], "b": ""}]),
        pa.array([decimal.Decimal("1.5"), None, decimal.Decimal("-1.5"), decimal.Decimal("0")], pa.decimal128(9, 2)),
    ],
    ids=lambda values: str(values.type),
)
def test_neither_the_cut_nor_the_encoding_matters(values: pa.Array) -> None:
    found = prints(values)
    assert len(set(found)) == 4
    assert prints(pa.chunked_array([values.slice(1, 2), values.slice(3), values.slice(0, 1)])) == [
        *found[1:],
        found[0],
    ]
    assert prints(pa.concat_arrays([values] * 5000))[-8:] == found * 2  # beyond a block
    for at in range(4):
        assert prints(values.slice(at, 1)) == [found[at]]


def test_dictionaries_are_as_plain_values() -> None:
    for values in (["a", None, "b", "a"], [1, None, 2, 1], [0.0, None, -0.0, 1.5], [None, None]):
        plain = pa.array(values)
        assert prints(plain.dictionary_encode()) == prints(plain)
    null_inside = pa.DictionaryArray.from_arrays(pa.array([0, 1, 1]), pa.array(["a", None]))
    assert prints(null_inside) == prints(pa.array(["a", None, None]))


def test_they_never_change() -> None:
    """They are in state and files: if this fails, resumed state would forget what it saw."""
    at = datetime.datetime(2013, 1, 1, tzinfo=datetime.UTC)
    rows = pa.table(
        {
            "a": pa.array([1, -1], pa.int16()),
            "b": [0.5, None],
            "c": ["EWR", "x" * 100],
            "d": pa.array([at, None], pa.timestamp("us", "UTC")),
            "e": pa.array([[True], None]),
            "f": pa.array([decimal.Decimal("1.25"), None], pa.decimal128(38, 9)),
            "g": pa.array([{"x": b"\0"}, None]),
        }
    )
    assert [f"{one:016x}" for one in fingerprints(rows, rows.column_names).ravel().tolist()] == [
        "fd93fd74ca3ba2f4",
        "b914828a0c39d48f",
        "8e62cc32d505e237",
        "3857f283f48a9296",
    ]


def test_the_order_of_columns_matters() -> None:
    rows = pa.table({"a": [1, 2], "b": [2, 1]})
    assert np.all(fingerprints(rows, ["a", "b"]) != fingerprints(rows, ["b", "a"]))


def test_a_type_without_one_is_refused() -> None:
    rows = pa.table({"m": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64()))})
    with pytest.raises(UserError, match="'m' of type map"):
        fingerprints(rows, ["m"])
