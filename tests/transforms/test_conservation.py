import itertools

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.transforms.conservation import TALLY, Conservation, merge, tally

counts = st.builds(
    tally,
    st.sampled_from(["source", "view:x"]),
    st.sampled_from(["rows_in", "rows_out", "results"]),
    st.integers(0, 2**40),
    st.sampled_from(["", "cast"]),
)


@given(st.lists(counts), st.data())
def test_any_cut_and_order_of_tallies_has_the_same_sums(tallies: list[pa.Table], data: st.DataObject) -> None:
    whole = merge(tallies)
    cut = data.draw(st.integers(0, len(tallies)))
    assert merge([merge(tallies[cut:]), merge(tallies[:cut])]) == whole
    assert whole.schema == TALLY
    expected: dict[tuple[str, str, str], int] = {}
    for row in itertools.chain.from_iterable(table.to_pylist() for table in tallies):
        key = (row["part"], row["counter"], row["reason"])
        expected[key] = expected.get(key, 0) + row["n"]
    assert [tuple(row.values()) for row in whole.to_pylist()] == [(*key, n) for key, n in sorted(expected.items())]


KEPT = [
    tally("source", "read", 100),
    tally("source", "kept", 80),
    tally("source", "filtered", 5),
    tally("source", "rejected", 3, "speed"),
    tally("source", "rejected", 2, "cast"),
    tally("source", "late", 4),
    tally("source", "duplicate", 6),
    tally("view:hours", "rows_in", 90),
    tally("view:hours", "rows_out", 90),
    tally("view:hours", "results", 7),
    tally("dimension:weather", "unmatched", 9, "older than 3h"),
    tally("dimension:weather", "unmatched", 1),
]


def test_a_run_that_keeps_the_law() -> None:
    kept = Conservation.of(merge(KEPT))
    assert kept.violations() == []
    assert kept.rows == {"read": 100, "kept": 80, "filtered": 5, "rejected": 5, "late": 4, "duplicate": 6}
    assert kept.reasons == {"cast": 2, "speed": 3}
    assert kept.views == {"hours": (90, 90, 7)}
    assert kept.unmatched == {"weather": {"": 1, "older than 3h": 9}}


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (tally("source", "read", 2), "is off by 2: rows were lost"),
        (tally("source", "duplicate", 1), "is off by 1: rows were counted twice"),
        (tally("view:hours", "rows_in", 1), "view hours: rows in 91 = rows out 90 is off by 1: rows were lost"),
        (
            tally("view:hours", "rows_out", 1),
            "view hours: rows in 90 = rows out 91 is off by 1: rows were counted twice",
        ),
    ],
)
def test_one_row_too_many_or_too_few_is_named(extra: pa.Table, said: str) -> None:
    [violation] = Conservation.of(merge([*KEPT, extra])).violations()
    assert violation.endswith(said)


def test_no_tallies_is_a_run_over_nothing() -> None:
    assert Conservation.of(merge([])).violations() == []
