import datetime
import decimal

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.transforms.buckets import bucket, hashes, split
from pipelines.transforms.errors import UserError

NULL = 0x1EA59F2878E51FB5
GOLDEN = [
    (
        pa.array([0, 1, -1, 2**63 - 1, None], pa.int64()),
        [0x7D91D4C3FE86F0DE, 0x29E49B199086D8D3, 0xC81B5873BBC0192C, 0x57EF9DAC46D9BDBE, NULL],
    ),
    (pa.array([False, True]), [0x7D91D4C3FE86F0DE, 0x29E49B199086D8D3]),
    (
        pa.array([0.0, 1.5, float("nan"), float("inf")]),
        [0x7D91D4C3FE86F0DE, 0x5AAB6C90A68C02ED, 0x65B57251E1794750, 0x379E1E5A3B8D6C8A],
    ),
    (
        pa.array([decimal.Decimal("1.5"), decimal.Decimal("-12345678901234567890.1")], pa.decimal128(38, 9)),
        [0x87941901CEB3100B, 0x931523FC36BB31BD],
    ),
    (pa.array([datetime.date(2013, 1, 1)]), [0x5A0BE08BC040A84F]),
    (
        pa.array([datetime.datetime(2013, 1, 1, 10, tzinfo=datetime.UTC)], pa.timestamp("us", tz="UTC")),
        [0x14155E191A69DD22],
    ),
    (pa.array([datetime.time(1, 2, 3, 4)], pa.time64("us")), [0x79A9517A0D74A88E]),
    (
        pa.array(["", "EWR", "12345678", "123456789", "x" * 64, "x" * 65, "é"]),
        [
            0x7D91D4C3FE86F0DE,
            0x4D7649599F3A581F,
            0xAC0311E9037B7161,
            0x7A2A80F8B80A60D4,
            0x8F4405638466F77A,
            0xBB1969F5C7145B4C,
            0xCDB40E919F2B5F92,
        ],
    ),
    (pa.array([b"\x00", b"\x00\x00"]), [0xE5DD105A383644F7, 0x8D9168E38B7798C6]),
]


@pytest.mark.parametrize(("values", "expected"), GOLDEN, ids=lambda value: str(getattr(value, "type", "")))
def test_a_hash_is_what_it_was_when_the_first_state_was_written(values: pa.Array, expected: list[int]) -> None:
    assert hashes(pa.table({"x": values}), ["x"]).tolist() == expected


def test_two_keys_hash_to_what_they_did_when_the_first_state_was_written() -> None:
    assert hashes(pa.table({"x": [1], "y": ["a"]}), ["x", "y"]).tolist() == [0x167AD849586FE5AF]


def splitmix(state: int) -> int:
    mask = 2**64 - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
    return z ^ z >> 31


@given(st.integers(-(2**63), 2**63 - 1))
def test_an_integer_is_mixed_as_the_paper_says(value: int) -> None:
    found = hashes(pa.table({"x": pa.array([value], pa.int64())}), ["x"])
    assert found.tolist() == [splitmix(0x9E3779B97F4A7C15 ^ splitmix(value % 2**64))]


texts = st.lists(st.none() | st.text(max_size=20) | st.text(min_size=60, max_size=70), max_size=20)


@given(texts, st.data())
def test_a_text_hashes_the_same_however_it_is_laid_out(values: list[str | None], data: st.DataObject) -> None:
    plain = hashes(pa.table({"x": pa.array(values, pa.string())}), ["x"]).tolist()
    cut = data.draw(st.integers(0, len(values)))
    chunks = pa.chunked_array([values[:cut], values[cut:]], pa.string())
    sliced = pa.array(["before", *values, "after"], pa.string()).slice(1, len(values))
    layouts = [chunks, sliced, chunks.dictionary_encode(), sliced.dictionary_encode()]
    layouts += [chunks.cast(kind) for kind in (pa.large_string(), pa.string_view(), pa.binary(), pa.binary_view())]
    for layout in layouts:
        assert hashes(pa.table({"x": layout}), ["x"]).tolist() == plain
    assert hashes(pa.table({"x": chunks}).slice(cut), ["x"]).tolist() == plain[cut:]


@given(st.lists(st.none() | st.integers(-128, 127)))
def test_an_integers_width_does_not_matter(values: list[int | None]) -> None:
    kinds = [pa.int8(), pa.int16(), pa.int32(), pa.int64()]
    found = [hashes(pa.table({"x": pa.array(values, kind)}), ["x"]).tolist() for kind in kinds]
    assert found == [found[0]] * len(kinds)


def test_what_group_by_holds_equal_has_one_bucket() -> None:
    nans = np.array([0x7FF8000000000000, 0xFFF8000000000001], np.uint64).view(np.float64)
    equal = pa.table({"x": pa.array([*nans.tolist(), 0.0, -0.0, None, None], pa.float64())})
    first, second, third, fourth, fifth, sixth = bucket(equal, ["x"], 2**31 - 1).tolist()
    assert (first, third, fifth) == (second, fourth, sixth)
    assert len({first, third, fifth}) == 3


def test_the_order_of_keys_matters_and_so_does_where_a_null_stands() -> None:
    table = pa.table({"x": [1, 2, None, 1], "y": [2, 1, 1, None]})
    assert len(set(hashes(table, ["x", "y"]).tolist())) == 4


@pytest.mark.parametrize("kind", [pa.int64(), pa.string(), pa.timestamp("us", tz="UTC")], ids=str)
def test_buckets_are_even(kind: pa.DataType) -> None:
    counts = np.bincount(bucket(pa.table({"x": pa.array(range(64_000)).cast(kind)}), ["x"], 64), minlength=64)
    assert 800 < counts.min() <= counts.max() < 1200


@given(st.lists(st.tuples(st.none() | st.integers(0, 9), st.none() | st.sampled_from("abc"))), st.integers(1, 300))
def test_split_keeps_every_row_once_and_in_order(rows: list[tuple[int | None, str | None]], n: int) -> None:
    table = pa.table({"x": [x for x, _ in rows], "y": [y for _, y in rows], "i": list(range(len(rows)))})
    numbers = bucket(table, ["x", "y"], n).tolist()
    assert [(number, part["i"].to_pylist()) for number, part in split(table, ["x", "y"], n)] == [
        (number, [i for i, found in enumerate(numbers) if found == number]) for number in sorted(set(numbers))
    ]


def test_without_keys_all_rows_are_in_bucket_0() -> None:
    assert [number for number, _ in split(pa.table({"x": [1, 2, 3]}), [], 8)] == [0]
    assert split(pa.table({"x": pa.array([], pa.string())}), ["x"], 8) == []


def test_a_list_cannot_be_a_key() -> None:
    with pytest.raises(UserError, match=r"column .x. of type list.* cannot be a key"):
        bucket(pa.table({"x": [[1]]}), ["x"], 8)
