"""What every Store keeps: one line per implementation in STORES."""

import datetime
import decimal
import math
import pickle
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.io.sqlite import SqliteStore
from pipelines.io.store import LIVE, Pointer, Store, StoreConflict
from pipelines.transforms.errors import UserError
from pipelines.transforms.ranges import Range, Ranges

STORES: dict[str, Callable[[Path], Store]] = {
    "sqlite": lambda folder: SqliteStore(folder / "store.db"),
}

UTC_MICROS = pa.timestamp("us", "UTC")
HOUR = 3_600_000_000
KEYS = ("sensor", "window_start")
SCHEMA = pa.schema([("sensor", pa.string()), ("window_start", UTC_MICROS), ("n", pa.int64())])


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    with STORES[request.param](tmp_path) as opened:
        yield opened


def table(*rows: tuple[str | None, int | None, int]) -> pa.Table:
    """Rows of (sensor, hour of the window, n)."""
    sensors, hours, numbers = zip(*rows, strict=True) if rows else ((), (), ())
    starts = pa.array([None if hour is None else hour * HOUR for hour in hours], UTC_MICROS)
    return pa.table([pa.array(sensors, pa.string()), starts, pa.array(numbers, pa.int64())], schema=SCHEMA)


def finished(store: Store, rows: pa.Table, view: str = "v", keys: tuple[str, ...] = KEYS) -> int:
    """A whole batch run."""
    generation = store.begin(view, rows.schema, keys)
    store.upsert(view, rows, generation=generation)
    store.flip({view: Pointer(generation, 0)})
    return generation


def content(rows: pa.Table) -> set[tuple[Any, ...]]:
    found = [tuple(row.values()) for row in rows.to_pylist()]
    assert len(set(found)) == len(found)
    return set(found)


def test_rows_are_read_only_once_their_generation_is_flipped(store: Store) -> None:
    old = table(("a", 0, 1), ("b", 0, 2))
    assert store.pointer("v") is None
    first = finished(store, old)
    generation = store.begin("v", SCHEMA, KEYS)
    store.upsert("v", table(("a", 0, 10)), generation=generation)
    assert content(store.scan("v")) == content(old)
    assert store.pointer("v") == Pointer(first, 0)
    store.flip({"v": Pointer(generation, 5, "offset 7")})
    assert content(store.scan("v")) == content(table(("a", 0, 10)))
    assert store.pointer("v") == Pointer(generation, 5, "offset 7")
    with pytest.raises(StoreConflict, match="generation"):
        store.scan("v", generation=first)


def test_get_answers_the_keys_that_exist_in_the_order_asked(store: Store) -> None:
    finished(store, table(("a", 0, 1), ("b", 0, 2), ("a", 1, 3)))
    got = store.get("v", table(("b", 0, -1), ("x", 0, -1), ("a", 0, -1)))
    assert got.equals(table(("b", 0, 2), ("a", 0, 1)))


def test_a_write_counts_only_if_newer(store: Store) -> None:
    store.resume("v", SCHEMA, KEYS)
    assert store.upsert("v", table(("a", 0, 1), ("b", 0, 1)), generation=LIVE, version=5) == 2
    assert store.upsert("v", table(("a", 0, 2), ("c", 0, 2)), generation=LIVE, version=4) == 1
    assert store.upsert("v", table(("a", 0, 3)), generation=LIVE, version=5) == 0
    assert store.upsert("v", table(("b", 0, 4)), generation=LIVE, version=6) == 1
    assert content(store.scan("v", generation=LIVE)) == content(table(("a", 0, 1), ("b", 0, 4), ("c", 0, 2)))


def test_every_row_may_have_a_version_of_its_own(store: Store) -> None:
    store.resume("v", SCHEMA, KEYS)
    versions = (pa.chunked_array([pa.array(some, pa.int64())]) for some in ([5, 7], [6, 6]))
    assert store.upsert("v", table(("b", 0, 1), ("a", 0, 1)), generation=LIVE, version=next(versions)) == 2
    assert store.upsert("v", table(("b", 0, 2), ("a", 0, 2)), generation=LIVE, version=next(versions)) == 1
    assert content(store.scan("v", generation=LIVE)) == content(table(("a", 0, 1), ("b", 0, 2)))


def test_a_deleted_row_stays_deleted_when_an_older_write_arrives(store: Store) -> None:
    store.resume("v", SCHEMA, KEYS)
    store.upsert("v", table(("a", 0, 1), ("b", 0, 1)), generation=LIVE, version=1)
    assert store.delete("v", table(("a", 0, 0), ("z", 0, 0)), generation=LIVE, version=3) == 2
    assert store.delete("v", table(("b", 0, 0)), generation=LIVE, version=1) == 0
    store.upsert("v", table(("a", 0, 2), ("z", 0, 2)), generation=LIVE, version=2)
    assert content(store.scan("v", generation=LIVE)) == content(table(("b", 0, 1)))
    assert store.get("v", table(("a", 0, 0)), generation=LIVE).num_rows == 0
    store.upsert("v", table(("a", 0, 4)), generation=LIVE, version=4)
    assert content(store.scan("v", generation=LIVE)) == content(table(("b", 0, 1), ("a", 0, 4)))


def test_live_rows_outlive_batch_runs_and_another_definition_is_refused(store: Store) -> None:
    store.resume("v", SCHEMA, KEYS)
    store.upsert("v", table(("a", 9, 1)), generation=LIVE, version=1)
    finished(store, table(("a", 0, 1)))
    finished(store, table(("a", 0, 2)))
    store.resume("v", SCHEMA, KEYS)
    assert content(store.scan("v", generation=LIVE)) == content(table(("a", 9, 1)))
    with pytest.raises(UserError, match="column n is double, stored as int64"):
        store.resume("v", SCHEMA.set(2, pa.field("n", pa.float64())), KEYS)


def test_a_range_replaces_its_windows_and_carries_the_others_over(store: Store) -> None:
    finished(store, table(("a", 0, 1), ("a", 1, 1), ("a", 2, 1), ("b", 3, 1), (None, 0, 1)))
    generation = store.begin("v", SCHEMA, KEYS, (Range(1 * HOUR, 3 * HOUR),))
    store.upsert("v", table(("a", 2, 7), ("c", 1, 7)), generation=generation)
    assert store.scan("v").num_rows == 5
    store.flip({"v": Pointer(generation, 0)})
    after = table(("a", 0, 1), ("a", 2, 7), ("b", 3, 1), ("c", 1, 7), (None, 0, 1))
    assert content(store.scan("v")) == content(after)


def test_several_ranges_replace_their_windows_and_those_between_are_carried_over(store: Store) -> None:
    finished(store, table(*[("a", hour, 1) for hour in range(8)], (None, None, 1)))
    generation = store.begin("v", SCHEMA, KEYS, (Range(1 * HOUR, 2 * HOUR), Range(4 * HOUR, 6 * HOUR), Range(7 * HOUR)))
    store.upsert("v", table(("a", 1, 7), ("a", 5, 7)), generation=generation)
    store.flip({"v": Pointer(generation, 0)})
    expected = table(("a", 0, 1), ("a", 1, 7), ("a", 2, 1), ("a", 3, 1), ("a", 5, 7), ("a", 6, 1))
    assert content(store.scan("v")) == content(expected)


def ended(*rows: tuple[str | None, int | None, int, int | None]) -> pa.Table:
    """Rows of (sensor, hour of the window, n, hour of its end)."""
    ends = pa.array([None if end is None else end * HOUR for *_, end in rows], UTC_MICROS)
    return table(*[(sensor, hour, n) for sensor, hour, n, _ in rows]).append_column("window_end", ends)


def test_live_rows_that_the_batch_layer_speaks_for_are_pruned(store: Store) -> None:
    rows = ended(("a", 0, 1, 1), ("a", 1, 1, 2), (None, 1, 1, 3), ("b", 0, 1, None))
    assert store.prune("v", 9 * HOUR) == 0
    store.resume("v", rows.schema, KEYS)
    store.upsert("v", rows, generation=LIVE, version=1)
    finished(store, rows)
    assert store.prune("v", 2 * HOUR) == 2
    assert content(store.scan("v", generation=LIVE)) == content(rows.slice(2))
    assert content(store.scan("v")) == content(rows)
    assert store.prune("v", 2 * HOUR) == 0


def test_a_deleted_row_holds_off_older_writes_for_a_day(store: Store) -> None:
    rows = ended(("a", 0, 1, 1))
    store.resume("v", rows.schema, KEYS)
    store.delete("v", rows, generation=LIVE, version=2)
    assert store.prune("v", 24 * HOUR) == 0
    assert store.upsert("v", rows, generation=LIVE, version=1) == 0
    assert store.prune("v", 24 * HOUR + 1) == 1


def test_a_pruned_row_comes_back_with_a_later_write(store: Store) -> None:
    rows = ended(("a", 0, 1, 1))
    store.resume("v", rows.schema, KEYS)
    store.upsert("v", rows, generation=LIVE, version=1)
    store.prune("v", HOUR)
    assert store.upsert("v", rows, generation=LIVE, version=2) == 1
    assert content(store.scan("v", generation=LIVE)) == content(rows)


def test_a_row_of_the_run_wins_over_one_carried_over(store: Store) -> None:
    finished(store, table(("a", 0, 1), ("b", 0, 1)))
    generation = store.begin("v", SCHEMA, KEYS, (Range(5 * HOUR, 6 * HOUR),))
    store.upsert("v", table(("a", 0, 2)), generation=generation)
    store.flip({"v": Pointer(generation, 0)})
    assert content(store.scan("v")) == content(table(("a", 0, 2), ("b", 0, 1)))


def test_a_row_deleted_in_a_batch_generation_is_not_carried_over(store: Store) -> None:
    generation = store.begin("v", SCHEMA, KEYS)
    store.upsert("v", table(("a", 0, 1), ("b", 0, 1)), generation=generation)
    store.delete("v", table(("a", 0, 0)), generation=generation, version=1)
    store.flip({"v": Pointer(generation, 0)})
    generation = store.begin("v", SCHEMA, KEYS, (Range(5 * HOUR, None),))
    store.flip({"v": Pointer(generation, 0)})
    assert content(store.scan("v")) == content(table(("b", 0, 1)))


def test_a_range_needs_the_definition_of_the_rows_it_keeps_and_a_whole_run_does_not(store: Store) -> None:
    finished(store, table(("1", 0, 1)))
    numbers = pa.table({"sensor": [1], "window_start": pa.array([HOUR], UTC_MICROS), "n": [5]})
    with pytest.raises(UserError, match="column sensor is int64, stored as string; run it whole"):
        store.begin("v", numbers.schema, KEYS, (Range(0, HOUR),))
    with pytest.raises(UserError, match="its keys are sensor, stored by sensor, window_start"):
        store.begin("v", SCHEMA, ("sensor",), (Range(0, HOUR),))
    finished(store, numbers)
    assert store.scan("v").equals(numbers)


@pytest.mark.parametrize(
    ("within", "hours"),
    [
        (Range(), {0, 1, 2, None}),
        (Range(HOUR), {1, 2, None}),
        (Range(None, HOUR), {0, None}),
        (Range(HOUR, 2 * HOUR), {1, None}),
    ],
)
def test_scan_by_range_of_window_starts(store: Store, within: Range, hours: set[int | None]) -> None:
    rows = table(("a", 0, 0), ("a", 1, 1), ("a", 2, 2), ("a", None, 9))
    finished(store, rows)
    expected = {number for number, hour in ((0, 0), (1, 1), (2, 2), (9, None)) if hour in hours}
    assert set(store.scan("v", within)["n"].to_pylist()) == expected


def test_a_dead_run_leaves_no_trace_and_its_writer_is_refused(store: Store) -> None:
    finished(store, table(("a", 0, 1)))
    dead = store.begin("v", SCHEMA, KEYS)
    store.upsert("v", table(("dead", 0, 1)), generation=dead)
    generation = store.begin("v", SCHEMA, KEYS)
    with pytest.raises(StoreConflict, match="another run"):
        store.upsert("v", table(("dead", 1, 1)), generation=dead)
    with pytest.raises(StoreConflict, match="another run"):
        store.flip({"v": Pointer(dead, 0)})
    store.upsert("v", table(("a", 0, 2)), generation=generation)
    store.flip({"v": Pointer(generation, 0)})
    assert content(store.scan("v")) == content(table(("a", 0, 2)))
    with pytest.raises(StoreConflict, match="another run"):
        store.upsert("v", table(("late", 1, 1)), generation=generation)


def test_views_flip_together_or_not_at_all_and_a_repeated_flip_is_harmless(store: Store) -> None:
    one, two = store.begin("one", SCHEMA, KEYS), store.begin("two", SCHEMA, KEYS)
    with pytest.raises(StoreConflict):
        store.flip({"one": Pointer(one, 0), "two": Pointer(two + 1, 0)})
    assert store.pointer("one") is None
    for _ in range(2):
        store.flip({"one": Pointer(one, 0), "two": Pointer(two, None)})
    assert (store.pointer("one"), store.pointer("two")) == (Pointer(one, 0), Pointer(two, None))


def test_a_given_up_generation_can_be_dropped_and_the_read_one_cannot(store: Store) -> None:
    read = finished(store, table(("a", 0, 1)))
    generation = store.begin("v", SCHEMA, KEYS)
    store.drop("v", generation)
    with pytest.raises(StoreConflict):
        store.flip({"v": Pointer(generation, 0)})
    with pytest.raises(ValueError, match="being read"):
        store.drop("v", read)
    assert store.scan("v").num_rows == 1


def test_an_empty_view_is_an_answer_and_an_unknown_one_is_the_users_mistake(store: Store) -> None:
    finished(store, table())
    assert store.scan("v").equals(table())
    assert store.get("v", table(("a", 0, 0))).equals(table())
    with pytest.raises(UserError, match="view w: no batch run has finished yet"):
        store.scan("w")


def test_null_equals_null_and_nan_equals_nan_in_a_key(store: Store) -> None:
    keys: dict[str, tuple[pa.DataType, list[Any]]] = {
        "text": (pa.string(), [None, "", "a"]),
        "bytes": (pa.binary(), [None, b"", b"a"]),
        "whole": (pa.int64(), [None, 0, -(2**63)]),
        "real": (pa.float64(), [None, math.nan, 0.0]),
        "flag": (pa.bool_(), [None, False, True]),
        "day": (pa.date32(), [None, datetime.date(1969, 12, 31), datetime.date(2013, 1, 1)]),
        "money": (pa.decimal128(38, 2), [None, decimal.Decimal("0.00"), decimal.Decimal("-1.50")]),
        "unsigned": (pa.uint64(), [None, 2**64 - 1, 0]),
    }
    rows = pa.table({name: pa.array(values, kind) for name, (kind, values) in keys.items()} | {"n": [1, 2, 3]})
    for name in keys:
        by = pa.table({name: rows[name], "n": rows["n"]})
        generation = store.begin(name, by.schema, (name,))
        assert store.upsert(name, by, generation=generation, version=1) == 3
        assert store.upsert(name, by.set_column(1, "n", [[4, 5, 6]]), generation=generation, version=2) == 3
        found = store.get(name, by.select([name]), generation=generation)
        assert found.equals(by.set_column(1, "n", [[4, 5, 6]])) or name == "real"
        assert found["n"].to_pylist() == [4, 5, 6]


def _float(bits: int) -> float:
    return struct.unpack("<d", struct.pack("<Q", bits))[0]  # type: ignore[no-any-return]


_FLOATS = st.floats() | st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan, 5e-324, _float(0x7FF8000000000001)])
_LONG = st.integers(-(2**63), 2**63 - 1)
_HUGE = st.integers(-(10**38) + 1, 10**38 - 1).map(
    lambda number: decimal.Decimal(number).scaleb(-9, decimal.Context(prec=60))
)
_TIMES = st.datetimes(timezones=st.just(datetime.UTC))
_POINT = pa.struct([("v", pa.float64()), ("n", pa.int64())])
_LAST = pa.struct([("t", pa.int64()), ("v", pa.string())])
_FLAG = pa.struct([("t", pa.int64()), ("v", pa.bool_())])
_WIDE = pa.struct([("x", pa.float64()), ("y", pa.list_(pa.float64()))])
_VALUES: dict[str, tuple[pa.DataType, st.SearchStrategy[Any]]] = {
    "text": (pa.string(), st.text()),
    "long_text": (pa.large_string(), st.text()),
    "raw": (pa.binary(), st.binary()),
    "fixed": (pa.binary(4), st.binary(min_size=4, max_size=4)),
    "flag": (pa.bool_(), st.booleans()),
    "tiny": (pa.int8(), st.integers(-128, 127)),
    "whole": (pa.int64(), _LONG),
    "unsigned": (pa.uint64(), st.integers(0, 2**64 - 1)),
    "real": (pa.float64(), _FLOATS),
    "single": (pa.float32(), st.floats(width=32)),
    "money": (pa.decimal128(38, 9), _HUGE),
    "day": (pa.date32(), st.dates()),
    "at": (UTC_MICROS, _TIMES),
    "naive": (pa.timestamp("ms"), st.datetimes().map(lambda at: at.replace(microsecond=0))),
    "span": (pa.duration("us"), st.integers(-(10**14), 10**14)),
    "clock": (pa.time64("us"), st.times()),
    "nothing": (pa.null(), st.none()),
    "_reals": (pa.list_(pa.float64()), st.lists(st.none() | _FLOATS, max_size=4)),
    "_longs": (pa.large_list(pa.int64()), st.lists(_LONG, max_size=4)),
    "_bytes": (pa.list_(pa.uint8()), st.lists(st.integers(0, 255), max_size=4)),
    "_sums": (pa.list_(pa.decimal128(38, 0)), st.lists(_HUGE.map(lambda d: d.to_integral_value()), max_size=2)),
    "_first": (_POINT, st.fixed_dictionaries({"v": st.none() | _FLOATS, "n": _LONG})),
    "_points": (pa.list_(_POINT), st.lists(st.fixed_dictionaries({"v": _FLOATS, "n": _LONG}), max_size=3)),
    "_last": (_LAST, st.fixed_dictionaries({"t": _LONG, "v": st.none() | st.text() | st.binary().map(str)})),
    "_raws": (pa.list_(pa.binary()), st.lists(st.none() | st.binary(), max_size=3)),
    "_flag": (_FLAG, st.fixed_dictionaries({"t": _LONG, "v": st.booleans()})),
    "_texts": (pa.list_(pa.string()), st.lists(st.none() | st.text(), max_size=3)),
    "_flags": (pa.list_(pa.bool_()), st.lists(st.booleans(), max_size=3)),
    "_counter": (pa.decimal128(38, 0), _LONG.map(decimal.Decimal)),
    "_huge": (pa.decimal128(38, 0), _HUGE.map(lambda number: number.to_integral_value())),
    "_wide": (_WIDE, st.fixed_dictionaries({"x": st.none() | _FLOATS, "y": st.lists(_FLOATS | st.none(), max_size=2)})),
    "_deep": (pa.list_(pa.list_(pa.int64())), st.lists(st.none() | st.lists(_LONG, max_size=2), max_size=2)),
}


def _bits(rows: pa.Table) -> bytes:
    """The exact content: Arrow IPC of one chunk, so that NaN equals itself and 0.0 is not -0.0."""
    return bytes(pa.RecordBatch.from_pylist(rows.to_pylist(), rows.schema).serialize())


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_every_type_comes_back_exactly(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    chosen = data.draw(st.lists(st.sampled_from(sorted(_VALUES)), min_size=1, max_size=5, unique=True))
    count = data.draw(st.integers(0, 5))
    columns = {"window_start": pa.array(range(count), UTC_MICROS)}
    for name in chosen:
        kind, values = _VALUES[name]
        drawn = data.draw(st.lists(st.none() | values, min_size=count, max_size=count))
        columns[name] = pa.array(drawn, kind, from_pandas=False)
    rows = pa.table(columns)
    for make in STORES.values():
        with make(tmp_path_factory.mktemp("types")) as store:
            finished(store, rows, keys=("window_start",))
            back = store.scan("v")
            assert back.schema == rows.schema
            assert _bits(back) == _bits(rows)


_SENSOR = st.sampled_from([None, "", "a", "b"])
_HOUR = st.none() | st.integers(0, 3)
_ROWS = st.dictionaries(st.tuples(_SENSOR, _HOUR), st.integers(0, 99), max_size=4)
_RANGE = st.builds(Range, *[st.none() | st.integers(0, 4).map(lambda hour: hour * HOUR)] * 2)
_STEP = st.one_of(
    st.tuples(st.just("upsert"), _ROWS, st.booleans(), st.integers(0, 4)),
    st.tuples(st.just("delete"), _ROWS, st.booleans(), st.integers(0, 4)),
    st.tuples(st.just("begin"), st.lists(_RANGE, min_size=1, max_size=3).map(tuple)),
    st.tuples(st.just("flip"), st.integers(0, 9)),
    st.tuples(st.just("drop")),
)


class Model:
    """The contract over dicts: key → (version, n or None where deleted)."""

    def __init__(self) -> None:
        self.live: dict[Any, tuple[int, int | None]] = {}
        self.next: dict[Any, tuple[int, int | None]] | None = None
        self.read: dict[Any, tuple[int, int | None]] = {}

    def write(self, rows: dict[Any, int], live: bool, version: int, deleted: bool) -> int | None:
        target = self.live if live else self.next
        if target is None:
            return None
        newer = {
            key: (version, None if deleted else n)
            for key, n in rows.items()
            if key not in target or target[key][0] < version
        }
        target.update(newer)
        return len(newer)

    def begin(self, replace: Ranges) -> None:
        self.next = {
            key: (-1, n)
            for key, (_, n) in self.read.items()
            if n is not None and not any(inside(part, key[1]) for part in replace)
        }


def inside(within: Range, hour: int | None) -> bool:
    if hour is None:
        return True
    start = -math.inf if within.start is None else within.start
    stop = math.inf if within.stop is None else within.stop
    return start <= hour * HOUR < stop


def rows_of(model: dict[Any, tuple[int, int | None]]) -> set[tuple[Any, ...]]:
    return content(table(*[(*key, n) for key, (_, n) in model.items() if n is not None]))


@settings(max_examples=20, deadline=None)
@given(steps=st.lists(_STEP, max_size=12), within=_RANGE, asked=_ROWS)
def test_any_sequence_equals_the_model(
    steps: list[Any], within: Range, asked: dict[Any, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    for make in STORES.values():
        with make(tmp_path_factory.mktemp("model")) as store:
            agrees_with_the_model(store, steps, within, asked)


def agrees_with_the_model(store: Store, steps: list[Any], within: Range, asked: dict[Any, int]) -> None:
    model, pointer, begun = Model(), None, 0
    store.resume("v", SCHEMA, KEYS)
    for step in steps:
        match step:
            case "upsert" | "delete" as verb, rows, live, version:
                given_rows = table(*[(*key, n) for key, n in rows.items()])
                expected = model.write(rows, live, version, verb == "delete")
                write = store.upsert if verb == "upsert" else store.delete
                generation = LIVE if live else begun
                if expected is None:
                    with pytest.raises(StoreConflict):
                        write("v", given_rows, generation=generation or 1, version=version)
                else:
                    assert write("v", given_rows, generation=generation, version=version) == expected
            case "begin", replace:
                begun = store.begin("v", SCHEMA, KEYS, replace)
                model.begin(replace)
            case "flip", boundary:
                if model.next is not None:
                    pointer = Pointer(begun, boundary)
                    store.flip({"v": pointer})
                    model.read, model.next = model.next, None
            case ("drop",):
                if model.next is not None:
                    store.drop("v", begun)
                    model.next = None
        assert store.pointer("v") == pointer
        assert content(store.scan("v", generation=LIVE)) == rows_of(model.live)
        if pointer:
            assert content(store.scan("v")) == rows_of(model.read)
    matching = {key: cell for key, cell in model.live.items() if inside(within, key[1])}
    assert content(store.scan("v", within, generation=LIVE)) == rows_of(matching)
    known = {key: model.live[key] for key in asked if key in model.live}
    got = store.get("v", table(*[(*key, n) for key, n in asked.items()]), generation=LIVE)
    assert [tuple(row.values())[-1] for row in got.to_pylist()] == [n for _, n in known.values() if n is not None]


def test_a_store_travels_to_workers(store: Store) -> None:
    finished(store, table(("a", 0, 1)))
    with pickle.loads(pickle.dumps(store)) as copy:
        assert copy.scan("v").equals(table(("a", 0, 1)))
