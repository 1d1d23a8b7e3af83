import datetime
import math
import random
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.transforms.identity import deduplicate

IDENTITY, COLUMNS = ("id", "part"), ("id", "part", "x", "lines")
SCHEMA = pa.schema(
    {
        "id": pa.int64(),
        "part": pa.float64(),
        "x": pa.string(),
        "lines": pa.list_(pa.struct({"n": pa.float64()})),
        "_source": pa.dictionary(pa.int32(), pa.string()),
        "_offset": pa.int64(),
    }
)

numbers = st.sampled_from([None, 0.0, -0.0, 1.5, math.nan, math.inf])
row = st.fixed_dictionaries(
    {
        "id": st.none() | st.integers(0, 2),
        "part": numbers,
        "x": st.sampled_from([None, "a", "b"]),
        "lines": st.none() | st.lists(st.fixed_dictionaries({"n": numbers}), max_size=1),
    }
)


def canonical(value: Any) -> Any:
    """What SQL holds for the same value, as one hashable thing."""
    if isinstance(value, list):
        return tuple(canonical(item) for item in value)
    if isinstance(value, dict):
        return tuple(canonical(item) for item in value.values())
    return "nan" if isinstance(value, float) and math.isnan(value) else value


def oracle(rows: list[dict[str, Any]]) -> tuple[list[tuple[str, int]], int, list[tuple[str, int]]]:
    """Positions of the kept rows, number of duplicates, positions of the conflicts: one row after the other."""
    seen: dict[Any, Any] = {}
    kept, conflicts, duplicates = [], [], 0
    for one in sorted(rows, key=lambda one: (one["_source"], one["_offset"])):
        position = (one["_source"], one["_offset"])
        identity = tuple(canonical(one[name]) for name in IDENTITY)
        content = tuple(canonical(one[name]) for name in COLUMNS)
        if identity not in seen:
            seen[identity] = content
            kept.append(position)
        elif seen[identity] == content:
            duplicates += 1
        else:
            conflicts.append(position)
    return kept, duplicates, conflicts


def positions(table: pa.Table) -> list[tuple[str, int]]:
    return sorted(zip(table["_source"].to_pylist(), table["_offset"].to_pylist(), strict=True))


@settings(max_examples=25)
@given(st.lists(row, max_size=12), st.randoms(use_true_random=False), st.data())
def test_any_order_and_cut_agrees_with_one_row_after_the_other(
    rows: list[dict[str, Any]], shuffler: random.Random, data: st.DataObject
) -> None:
    rows = [{**one, "_source": data.draw(st.sampled_from("ab")), "_offset": at} for at, one in enumerate(rows)]
    shuffler.shuffle(rows)
    cut = data.draw(st.integers(0, len(rows)))
    table = pa.concat_tables([pa.Table.from_pylist(part, SCHEMA) for part in (rows[:cut], rows[cut:])])
    found = deduplicate(table, IDENTITY, COLUMNS)
    kept, duplicates, conflicts = oracle(rows)
    assert (positions(found.rows), found.duplicates, positions(found.conflicts)) == (
        sorted(kept),
        duplicates,
        sorted(conflicts),
    )
    assert found.rows.schema == found.conflicts.schema == SCHEMA
    assert len(found.details) == len(conflicts)


def table(**columns: Any) -> pa.Table:
    size = len(next(iter(columns.values())))
    return pa.table({**columns, "_source": ["a.csv"] * size, "_offset": pa.array(range(size), pa.int64())})


def test_without_repetitions_the_very_table_comes_back() -> None:
    rows = table(id=[3, 1, 2])
    assert deduplicate(rows, ("id",), ("id",)).rows is rows


def test_a_conflict_tells_the_columns_that_differ_and_never_their_values() -> None:
    rows = table(id=["p"] * 4, **{"it's": ["secret", "other", "secret", "other"], 'a"b': [1, 1, 1, None]})
    found = deduplicate(rows, ("id",), tuple(rows.column_names[:3]))
    assert found.details.to_pylist() == ["it's differs from a.csv:0", "it's, a\"b differ from a.csv:0"]
    assert found.conflicts["_offset"].to_pylist() == [1, 3]
    assert found.duplicates == 1


def test_an_identity_of_every_column_has_no_conflicts() -> None:
    rows = table(id=[1, 1, None, None], at=pa.array([datetime.date(2013, 1, 1)] * 4))
    found = deduplicate(rows, ("id", "at"), ("id", "at"))
    assert (found.rows["_offset"].to_pylist(), found.duplicates, len(found.conflicts)) == ([0, 2], 2, 0)


def test_equal_hashes_of_other_identities_are_no_repetition(monkeypatch: Any) -> None:
    rows = table(id=[1, 2, 1, 3])
    monkeypatch.setattr("pipelines.transforms.identity.identity_hashes", lambda rows, _: np.zeros(len(rows), np.uint64))
    found = deduplicate(rows, ("id",), ("id",))
    assert (found.rows["_offset"].to_pylist(), found.duplicates) == ([0, 1, 3], 1)
