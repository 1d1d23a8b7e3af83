import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.transforms import fingerprints as prints
from pipelines.transforms import seen as module
from pipelines.transforms.fingerprints import fingerprints
from pipelines.transforms.seen import SEEN, Fresh, Seen, compacted

IDENTITY = ("id", "part")
COLUMNS = ("id", "part", "x", "tags", "place")
SCHEMA = pa.schema(
    {
        "id": pa.float64(),
        "part": pa.string(),
        "x": pa.float64(),
        "tags": pa.list_(pa.float64()),
        "place": pa.struct({"city": pa.string(), "lat": pa.float64()}),
        "_source": pa.dictionary(pa.int32(), pa.string()),
        "_offset": pa.int64(),
        "_watermark": pa.int64(),
    }
)
NUMBERS = st.sampled_from([0.0, -0.0, 1.0, math.nan, None])
ROW = st.fixed_dictionaries(
    {
        "id": NUMBERS,
        "part": st.sampled_from(["a", "", None]),
        "x": st.sampled_from([0.0, -0.0, None]),
        "tags": st.sampled_from([None, [], [0.0], [-0.0], [None], [math.nan]]),
        "place": st.sampled_from([None, {"city": "Rome", "lat": None}, {"city": None, "lat": None}]),
        "_source": st.sampled_from("ab"),
        "step": st.integers(0, 3),  # what the partition's watermark moves by
        "life": st.integers(-1, 8),  # from the watermark to the expiry
    }
)
Row = dict[str, Any]
Position = tuple[str, int]


def stream(rows: list[Row]) -> list[Row]:
    """The rows with their offsets and watermarks: none at first, then growing in each partition."""
    marks: dict[str, int] = {}
    found = []
    for offset, row in enumerate(rows):
        watermark = marks.get(row["_source"])
        marks[row["_source"]] = (watermark or 0) + row["step"]
        found.append(
            {**row, "_offset": offset, "_watermark": watermark, "expires": marks[row["_source"]] + row["life"]}
        )
    return found


def canonical(value: Any) -> Any:
    if isinstance(value, list):
        return ("list", *map(canonical, value))
    if isinstance(value, dict):
        return ("struct", *map(canonical, value.values()))
    return "nan" if isinstance(value, float) and math.isnan(value) else value


def oracle(batches: list[list[Row]]) -> tuple[list[Position], int, list[Position]]:
    """Positions of the kept rows, number of duplicates, positions of the conflicts: one row after the other, nothing
    ever dropped."""
    known: dict[Any, list[tuple[Any, int]]] = {}
    kept, conflicts, duplicates = [], [], 0
    for batch in batches:
        for row in sorted(batch, key=lambda row: (row["_source"], row["_offset"])):
            position = (row["_source"], row["_offset"])
            records = known.setdefault(tuple(canonical(row[name]) for name in IDENTITY), [])
            content = tuple(canonical(row[name]) for name in COLUMNS)
            watermark = -math.inf if row["_watermark"] is None else row["_watermark"]
            first = next((first for first, expires in records if expires > watermark), None)
            if first is None:
                records.append((content, row["expires"]))
                kept.append(position)
            elif first == content:
                duplicates += 1
            else:
                conflicts.append(position)
    return sorted(kept), duplicates, sorted(conflicts)


def positions(tables: Sequence[pa.Table]) -> list[Position]:
    rows = [row for table in tables for row in table.select(["_source", "_offset"]).to_pylist()]
    return sorted((row["_source"], row["_offset"]) for row in rows)


def cut(rows: list[Row], data: st.DataObject) -> list[list[Row]]:
    bounds = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=4)))
    return [rows[start:stop] for start, stop in zip([0, *bounds], [*bounds, len(rows)], strict=True)]


def least(batches: list[list[Row]]) -> int | None:
    """The watermark that no row to come is below."""
    marks = [row["_watermark"] for batch in batches for row in batch]
    return None if None in marks else min(marks, default=1000)


def run(batches: list[list[Row]], compact: list[bool], shuffler: random.Random) -> list[Fresh]:
    pieces: list[pa.Table] = []
    found = []
    for at, batch in enumerate(batches):
        rows = list(batch)
        shuffler.shuffle(rows)
        table = pa.Table.from_pylist(rows, SCHEMA)
        expires = np.array([row["expires"] for row in rows], np.int64)
        found.append(Seen(IDENTITY, COLUMNS).advance(pieces, table, expires))
        piece = found[-1].piece
        pieces = pieces if piece is None else [*pieces, piece]
        pieces = compacted(pieces, least(batches[at + 1 :])) if compact[at] else pieces
    return found


def totals(found: list[Fresh]) -> tuple[list[Position], int, list[Position]]:
    return (
        positions([one.rows for one in found]),
        sum(one.duplicates for one in found),
        positions([one.conflicts for one in found]),
    )


@settings(max_examples=25)
@given(st.lists(ROW, max_size=25), st.randoms(use_true_random=False), st.data())
def test_any_batches_and_compactions_agree_with_one_row_after_the_other(
    rows: list[Row], shuffler: random.Random, data: st.DataObject
) -> None:
    batches = cut(stream(rows), data)
    compact = data.draw(st.lists(st.booleans(), min_size=len(batches), max_size=len(batches)))
    found = run(batches, compact, shuffler)
    assert totals(found) == oracle(batches)
    for one in found:
        assert one.rows.schema == one.conflicts.schema == SCHEMA
        assert len(one.details) == len(one.conflicts) and one.details.null_count == 0
        assert (0 if one.piece is None else len(one.piece)) == len(one.rows)
        if one.piece is not None:
            ids = [tuple(pair.values()) for pair in one.piece.select(["id_hi", "id_lo"]).to_pylist()]
            assert one.piece.schema == SEEN and ids == sorted(ids)


@settings(max_examples=10)
@given(st.lists(ROW, max_size=25), st.randoms(use_true_random=False), st.data())
def test_any_cut_of_a_partition_is_as_one_batch(rows: list[Row], shuffler: random.Random, data: st.DataObject) -> None:
    whole = stream([{**row, "_source": "a"} for row in rows])
    batches = cut(whole, data)
    assert totals(run(batches, [True] * len(batches), shuffler)) == totals(run([whole], [False], shuffler))


def table(ids: Sequence[Any], start: int = 0, watermark: int | None = 0, **columns: Any) -> pa.Table:
    size = len(ids)
    offsets, watermarks = pa.array(range(start, start + size), pa.int64()), pa.array([watermark] * size, pa.int64())
    return pa.table({"id": ids, **columns, "_source": ["p0"] * size, "_offset": offsets, "_watermark": watermarks})


def test_expiry_over_many_tiles_keeps_what_is_held_bounded() -> None:
    """Three hundred tiles of 10 identities, each sent again in the next tile and forgotten after the one after that."""
    seen, kept, duplicates, most = Seen(("id",), ("id",)), 0, 0, 0
    pieces: list[pa.Table] = []
    for tile in range(300):
        rows = table([*range(10 * tile - 10, 10 * tile), *range(10 * tile, 10 * tile + 10)], 20 * tile, tile)
        found = seen.advance(pieces, rows, np.full(20, tile + 2))
        kept, duplicates = kept + len(found.rows), duplicates + found.duplicates
        assert found.piece is not None
        pieces = compacted([*pieces, found.piece], tile)
        most = max(most, sum(map(len, pieces)))
    assert (kept, duplicates) == (3_010, 2_990)
    assert most <= 2 * 20
    assert compacted(pieces, 302) == []


def test_a_forgotten_identity_starts_anew_and_is_known_again() -> None:
    seen = Seen(("id",), ("id", "x"))
    first = seen.advance([], table([1], 0, 0, x=["a"]), np.array([10]))
    again = seen.advance([first.piece], table([1], 1, 10, x=["b"]), np.array([20]))
    assert (len(again.rows), len(again.conflicts)) == (1, 0)
    for pieces in ([first.piece, again.piece], compacted([first.piece, again.piece], None)):
        last = seen.advance(pieces, table([1, 1], 2, 15, x=["b", "a"]), np.array([30, 30]))
        assert (last.duplicates, last.details.to_pylist()) == (1, ["differs from p0:1 of an earlier batch"])
        slower = seen.advance(pieces, table([1], 4, 5, x=["a"]), np.array([30]))  # of a partition that is behind
        assert slower.duplicates == 1


def test_an_identity_is_forgotten_when_its_expiry_is_reached() -> None:
    seen, expires = Seen(("id",), ("id",)), np.array([10, 11])
    rows = pa.concat_tables([table([1, 2], 0, 0), table([1, 2], 2, 10)])
    found = seen.advance([], rows, np.array([10, 11, 20, 20]))
    assert (found.rows["_offset"].to_pylist(), found.duplicates) == ([0, 1, 2], 1)
    pieces = [seen.advance([], table([1, 2]), expires).piece]
    for held in (pieces, compacted(pieces, 10), compacted([*pieces, *pieces], 10)):
        assert seen.advance(held, table([1, 2], 2, 10), np.array([20, 20])).rows["id"].to_pylist() == [1]
    assert [piece["expires"].to_pylist() for piece in compacted([*pieces, *pieces], 10)] == [[11, 11]]


def test_without_a_watermark_nothing_is_forgotten() -> None:
    seen = Seen(("id",), ("id",))
    before_1970 = seen.advance([], table([1, 1], 0, None), np.array([-5, -5]))
    assert before_1970.duplicates == 1
    assert seen.advance([before_1970.piece], table([1], 2, None), np.array([-5])).duplicates == 1


def test_conflicts_come_in_the_order_of_the_rows_with_their_details() -> None:
    seen = Seen(("id",), ("id", "x"))
    known = seen.advance([], table(list(range(20)), 0, 0, x=["a"] * 20), np.full(20, 9))
    ids = [20, 7, 20, 3, 21, 12, 21, 1]
    found = seen.advance([known.piece], table(ids, 50, 0, x=list("abbbabbb")), np.full(8, 9))
    assert found.conflicts["_offset"].to_pylist() == [51, 52, 53, 55, 56, 57]
    assert found.details.to_pylist() == [
        "differs from p0:7 of an earlier batch",
        "x differs from p0:50",
        "differs from p0:3 of an earlier batch",
        "differs from p0:12 of an earlier batch",
        "x differs from p0:54",
        "differs from p0:1 of an earlier batch",
    ]


def test_a_conflict_in_a_batch_names_columns_and_across_batches_the_first_row() -> None:
    seen = Seen(("id",), ("id", "x", "n"))
    rows = table([1, 1, 2, 1], 5, 0, x=["secret", "other", "c", "other"], n=[1, 1, 3, None])
    found = seen.advance([], rows, np.full(4, 9))
    assert found.details.to_pylist() == ["x differs from p0:5", "x, n differ from p0:5"]
    later = seen.advance([found.piece], rows, np.full(4, 9))
    assert later.details.to_pylist() == ["differs from p0:5 of an earlier batch"] * 2
    assert (later.duplicates, len(later.rows), later.piece) == (2, 0, None)


def test_pieces_are_merged_geometrically_and_others_left_as_they_are() -> None:
    seen, written = Seen(("id",), ("id",)), 0
    pieces: list[pa.Table] = []
    for at in range(64):
        found = seen.advance(pieces, table(list(range(16 * at, 16 * at + 16))), np.full(16, 9))
        assert found.piece is not None
        before = [*pieces, found.piece]
        pieces = compacted(before, None)
        written += sum(len(piece) for piece in pieces if all(piece is not one for one in before))
        sizes = [len(piece) for piece in pieces]
        assert all(size > sum(sizes[place + 1 :]) for place, size in enumerate(sizes))
        assert sum(sizes) == 16 * (at + 1)
    assert written <= 64 * 16 * 6
    ids = pieces[0].select(["id_hi", "id_lo"]).to_pylist()
    assert ids == sorted(ids, key=lambda one: (one["id_hi"], one["id_lo"]))


def test_half_a_fingerprint_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    def high_alike(rows: pa.Table, columns: Sequence[str]) -> prints.Lanes:
        found = fingerprints(rows, columns)
        found[0] = 7
        return found

    monkeypatch.setattr(module, "fingerprints", high_alike)
    seen = Seen(("id",), ("id", "x"))
    first = seen.advance([], table([3, 1, 2, 3, 3], x=list("aaaab")), np.full(5, 9))
    second = seen.advance([first.piece], table([2, 9, 3, 4, 2, 2], 5, x=list("aaaaab")), np.full(6, 9))
    assert (len(first.conflicts), len(second.conflicts)) == (1, 1)
    assert (first.duplicates, second.duplicates, second.rows["id"].to_pylist()) == (1, 3, [9, 4])
    assert first.piece is not None and second.piece is not None
    third = seen.advance(
        compacted([first.piece, second.piece], None), table([1, 4, 5], 11, x=list("aaa")), np.full(3, 9)
    )
    assert (third.duplicates, third.rows["id"].to_pylist()) == (2, [5])


def test_without_repetitions_the_very_rows_come_back() -> None:
    rows = table([3, 1, 2])
    found = Seen(("id",), ("id",)).advance([], rows, np.full(3, 9))
    assert found.rows is rows and found.rows["id"].to_pylist() == [3, 1, 2]


def test_no_rows() -> None:
    found = Seen(("id",), ("id",)).advance([SEEN.empty_table()], table([1]).slice(0, 0), np.empty(0, np.int64))
    assert (len(found.rows), found.duplicates, len(found.conflicts), found.piece) == (0, 0, 0, None)
