"""What every Table promises. A new implementation is one line in TABLES."""

import datetime
import decimal
import pickle
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import strategies as st

from pipelines.io.delta import Delta
from pipelines.io.table import STAGED, Between, Commit, Files, Replace, Table, TableConflict, open_table
from pipelines.transforms import query
from pipelines.transforms.errors import UserError
from pipelines.transforms.ranges import Range, joined

TABLES: dict[str, Callable[[Path, pa.Schema], Table]] = {
    "delta": lambda folder, schema: Delta.open(str(folder / "table"), schema),
}

UTC = pa.timestamp("us", tz="UTC")
SCHEMA = pa.schema([pa.field("t", UTC), pa.field("v", pa.int64(), nullable=False)])
Rows = Sequence[tuple[int | None, int]]


@pytest.fixture(params=TABLES)
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Table]:
    def make(schema: pa.Schema = SCHEMA) -> Table:
        return TABLES[request.param](tmp_path, schema)

    return make


def rows(values: Rows) -> pa.Table:
    return pa.table([[t for t, _ in values], [v for _, v in values]], schema=SCHEMA)


def stage(table: Table, data: pa.Table, unit: str = "u", token: str = "run", version: int | None = None) -> pa.Table:
    staging = table.stage(unit, token=token, version=table.next_version() if version is None else version)
    staging.add(data)
    return staging.finish()


def put(table: Table, data: pa.Table, replace: Replace = "everything", token: str = "run") -> Commit:
    version = table.next_version()
    return table.commit(stage(table, data, token=token), token=token, version=version, replace=replace)


def content(table: Table) -> list[tuple[Any, ...]]:
    found = table.dataset().to_table().to_pydict()
    return sorted(zip(*found.values(), strict=True), key=repr)


def values(table: Table) -> list[int]:
    return sorted(table.dataset().to_table()["v"].to_pylist())


def test_a_table_begins_with_its_first_commit(make: Callable[..., Table]) -> None:
    table = make()
    with pytest.raises(UserError, match=r"there is none"):
        table.dataset()
    assert (table.next_version(), table.history()) == (1, [])

    commit = put(table, rows([(0, 1)]), token="first")

    assert (commit.version, commit.token, commit.rows, commit.files) == (1, "first", 1, 1)
    assert (table.next_version(), table.history()) == (2, [commit])


def test_an_empty_commit_makes_an_empty_table_with_its_columns(make: Callable[..., Table]) -> None:
    table = make()
    table.commit(STAGED.empty_table(), token="run", version=1, replace="everything")
    assert table.dataset().to_table() == SCHEMA.empty_table()
    assert open_table(table.uri).schema == SCHEMA


def test_what_is_staged_is_not_seen_before_the_commit(make: Callable[..., Table]) -> None:
    table = make()
    put(table, rows([(0, 1)]))
    stage(table, rows([(0, 2)]))
    assert values(table) == [1]


MICROS = st.integers(0, 12)
OPERATIONS = st.lists(
    st.tuples(
        st.one_of(
            st.sampled_from(["nothing", "everything"]),
            st.lists(st.tuples(st.none() | MICROS, st.none() | MICROS), min_size=1, max_size=3),
        ),
        st.lists(st.lists(st.none() | MICROS, max_size=4), max_size=3),
    ),
    max_size=5,
)


@pytest.mark.parametrize("name", TABLES)
@hypothesis.given(operations=OPERATIONS)
@hypothesis.settings(max_examples=12, deadline=None)
@pytest.mark.slow
def test_any_commits_leave_what_a_list_would_hold(name: str, operations: list[Any]) -> None:
    expected: list[tuple[int | None, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        table = TABLES[name](Path(folder), SCHEMA)
        for version, (what, units) in enumerate(operations, start=1):
            replace = what
            if isinstance(what, list):
                what = [(low, high) for low, high in what if low is None or high is None or low < high]
                if not what:
                    continue
                replace = Between("t", joined(Range(low, high) for low, high in what))

            def inside(t: int | None, what: Any = what) -> bool:
                if isinstance(what, str):
                    return what == "everything"
                return t is not None and any(
                    (low is None or t >= low) and (high is None or t < high) for low, high in what
                )

            new = [[(t, version * 100 + i) for t in unit] for i, unit in enumerate(units)]
            if isinstance(replace, Between):
                new = [[row for row in unit if inside(row[0])] for unit in new]
            staged = [stage(table, rows(unit), f"unit-{i}") for i, unit in enumerate(new)]
            table.commit(
                pa.concat_tables([STAGED.empty_table(), *staged]),
                token="run",
                version=table.next_version(),
                replace=replace,
            )
            expected = [row for row in expected if not inside(row[0])] + [row for unit in new for row in unit]
            found = table.dataset().to_table().set_column(0, "t", pc.cast(table.dataset().to_table()["t"], pa.int64()))
            assert sorted(zip(*found.to_pydict().values(), strict=True), key=repr) == sorted(expected, key=repr)
            assert table.dataset().count_rows(filter=pc.field("v") >= version * 100) == sum(map(len, new))


def test_the_same_commit_again_writes_nothing(make: Callable[..., Table], tmp_path: Path) -> None:
    table = make()
    version, staged = table.next_version(), stage(table, rows([(0, 1)]))
    first = table.commit(staged, token="run", version=version, replace="nothing")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}

    assert table.commit(staged, token="run", version=version, replace="nothing") == first
    assert make().commit(staged, token="run", version=version, replace="nothing") == first

    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before
    assert values(table) == [1]


def test_an_earlier_commit_is_known_after_later_ones(make: Callable[..., Table]) -> None:
    table = make()
    staged = stage(table, rows([(0, 1)]))
    first = table.commit(staged, token="run", version=1, replace="nothing")
    put(table, rows([(0, 2)]), "nothing")
    assert table.commit(staged, token="run", version=1, replace="nothing") == first
    assert values(table) == [1, 2]


def test_of_two_runs_with_one_version_the_second_is_refused(make: Callable[..., Table]) -> None:
    table = make()
    mine, theirs = (stage(table, rows([(0, v)]), token=token) for v, token in ((1, "mine"), (2, "theirs")))
    table.commit(theirs, token="theirs", version=1, replace="nothing")
    with pytest.raises(UserError, match=r"another run committed version 1 meanwhile. Run again$"):
        table.commit(mine, token="mine", version=1, replace="nothing")
    assert values(table) == [2]


@pytest.mark.parametrize("tokens", [["same"] * 4, ["a", "b", "c", "d"]])
@pytest.mark.parametrize("replace", ["nothing", "everything", Between("t", (Range(0, 9),))])
def test_of_concurrent_commits_of_a_version_one_is_made(
    make: Callable[..., Table], tokens: list[str], replace: Replace
) -> None:
    put(make(), rows([(20, 0)]))
    staged = [stage(make(), rows([(1, 1)]), token=token, version=2) for token in tokens]
    gate, outcomes = threading.Barrier(len(tokens)), []

    def commit(index: int) -> None:
        gate.wait()
        try:
            made = make().commit(staged[index], token=tokens[index], version=2, replace=replace)
            outcomes.append((made.token, tokens[index]))
        except UserError:
            outcomes.append(("refused", tokens[index]))

    threads = [threading.Thread(target=commit, args=(index,)) for index in range(len(tokens))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    made = [outcome for outcome in outcomes if outcome[0] != "refused"]
    assert all(commit == token for commit, token in made)
    assert len(made) == (4 if len(set(tokens)) == 1 else 1)
    assert values(make()) == ([1] if replace == "everything" else [0, 1])
    assert make().history()[0].version == 2


def test_a_second_attempt_leaves_the_first_ones_file_alone_and_uncommitted(
    make: Callable[..., Table], tmp_path: Path
) -> None:
    table = make()
    first, second = (stage(table, rows(order)) for order in ([(0, 1), (0, 2)], [(0, 2), (0, 1)]))
    assert first["path"] != second["path"]
    table.commit(second, token="run", version=1, replace="nothing")
    assert values(table) == [1, 2]
    assert [path.name for path in tmp_path.rglob("*part-*")] == second["path"].to_pylist()


def test_the_same_attempt_twice_is_the_same_file(make: Callable[..., Table]) -> None:
    table = make()
    assert stage(table, rows([(0, 1)])) == stage(table, rows([(0, 1)]))


def test_a_dead_run_leaves_the_old_answer_and_its_rerun_no_trace_of_it(
    make: Callable[..., Table], tmp_path: Path
) -> None:
    table = make()
    put(table, rows([(0, 1)]))
    stage(table, rows([(0, 2)]), unit="lost", token="dead")
    half = table.stage("half", token="dead", version=2)
    half.add(rows([(0, v) for v in range(200_000)]))
    assert values(table) == [1]

    put(table, rows([(0, 3)]), token="again")

    assert values(table) == [3]
    assert not [path for path in tmp_path.rglob("*") if "dead" in path.name]


def test_many_small_tables_of_a_unit_are_one_file_and_one_row_group(make: Callable[..., Table]) -> None:
    table = make()
    staging = table.stage("u", token="run", version=1)
    for v in range(300):
        staging.add(rows([(v, v)]))
    staged = staging.finish()
    assert (staged.schema, staged.num_rows, staged["rows"].to_pylist()) == (STAGED, 1, [300])
    table.commit(staged, token="run", version=1, replace="everything")
    assert values(table) == list(range(300))
    assert sum(len(fragment.row_groups) for fragment in table.dataset().get_fragments()) == 1


def test_no_rows_are_no_file(make: Callable[..., Table]) -> None:
    assert stage(make(), rows([])) == STAGED.empty_table()


def test_a_file_given_twice_is_refused(make: Callable[..., Table]) -> None:
    table = make()
    staged = stage(table, rows([(0, 1)]))
    with pytest.raises(ValueError, match="twice"):
        table.commit(pa.concat_tables([staged, staged]), token="run", version=1, replace="nothing")
    assert table.history() == []


@pytest.mark.parametrize("moment", [-1, 10, None])
def test_rows_outside_the_replaced_range_are_refused(make: Callable[..., Table], moment: int | None) -> None:
    table = make()
    staged = stage(table, rows([(5, 1), (moment, 2)] if moment is not None else [(None, 2)]))
    with pytest.raises(ValueError, match="not within"):
        table.commit(staged, token="run", version=1, replace=Between("t", (Range(0, 10),)))
    assert table.history() == []


WIDER = SCHEMA.append(pa.field("w", pa.string()))
OTHER = SCHEMA.set(1, pa.field("v", pa.float64(), nullable=False))
LOOSE = SCHEMA.set(1, pa.field("v", pa.int64()))


@pytest.mark.parametrize(
    ("there", "here", "change"),
    [
        (SCHEMA, WIDER, r"column 'w' \(string\) is new"),
        (WIDER, SCHEMA, r"column 'w' \(string\) is no longer written"),
        (SCHEMA, OTHER, r"column 'v' is int64 not null there and double not null here"),
        (LOOSE, SCHEMA, r"column 'v' is int64 there and int64 not null here"),
    ],
)
def test_only_a_whole_replacement_changes_columns(
    make: Callable[..., Table], there: pa.Schema, here: pa.Schema, change: str
) -> None:
    def some(schema: pa.Schema) -> pa.Table:
        return pa.table({"t": [1], "v": [1], "w": ["x"]}).select(schema.names).cast(schema)

    put(make(there), some(there))
    table = make(here)
    partial: list[Replace] = ["nothing", Between("t", (Range(0, 9),))]
    for replace in partial:
        with pytest.raises(UserError, match=change) as told:
            table.check(replace)
        assert "\n" not in str(told.value)
        with pytest.raises(UserError, match=change):
            put(table, some(here), replace)
    assert make(there).dataset().to_table() == some(there)

    table.check("everything")
    put(table, some(here), "everything")
    assert table.dataset().to_table() == some(here)
    assert open_table(table.uri).schema == here


def test_columns_may_come_in_another_order_and_beside_others(make: Callable[..., Table]) -> None:
    table = make()
    put(table, pa.table({"_offset": [9], "v": pa.array([1], pa.int32()), "t": pa.array([0], UTC)}))
    assert table.dataset().to_table() == rows([(0, 1)])


@pytest.mark.parametrize(
    "wrong", [pa.table({"t": [0]}), pa.table({"t": [0], "v": [1.5]}), pa.table({"t": [0], "v": [None]})]
)
def test_rows_that_do_not_fit_are_refused(make: Callable[..., Table], wrong: pa.Table) -> None:
    with pytest.raises((KeyError, ValueError)):
        stage(make(), wrong)


AT = datetime.datetime(2013, 1, 1, 12, 30, 0, 123_457, datetime.UTC)
INNER = pa.list_(pa.field("element", pa.float64()))
NESTED = pa.list_(pa.field("element", pa.struct([("a", pa.int64()), ("b", INNER)])))
EVERY = pa.table(
    {
        "text": ["a", None, "ü" * 40, "\U0010ffff" * 40, ""],
        "bytes": pa.array([b"\0\xff", None, b"", b"x" * 5000, b"y"], pa.binary()),
        "whole": [2**63 - 1, None, -(2**63), 0, 1],
        "wide": pa.array([decimal.Decimal(10**38 - 1), None, decimal.Decimal(-(10**38) + 1), 0, 1], pa.decimal128(38)),
        "exact": pa.array([decimal.Decimal("0.1"), None, decimal.Decimal("-0.1"), 0, 1], pa.decimal128(38, 9)),
        "real": [float("nan"), None, float("inf"), float("-inf"), -0.0],
        "truth": [True, None, False, True, False],
        "day": pa.array([datetime.date(1, 1, 1), None, datetime.date(9999, 12, 31), AT.date(), AT.date()]),
        "at": pa.array([AT, None, AT + datetime.timedelta(microseconds=1), AT, AT], UTC),
        "texts": pa.array([["a", None], None, [], [""], ["b"]], pa.list_(pa.field("element", pa.string()))),
        "rows": pa.array([[{"a": 1, "b": [0.5]}], None, [], [None], [{"a": None, "b": None}]]).cast(NESTED),
    }
)  # fmt: skip


def test_every_type_comes_back_as_it_went(make: Callable[..., Table]) -> None:
    table = make(EVERY.schema)
    assert table.schema == EVERY.schema
    put(table, EVERY)
    assert open_table(table.uri).schema == EVERY.schema
    assert str(table.dataset().to_table().to_pylist()) == str(EVERY.to_pylist())


def asked(sql: str, **given: Any) -> pa.Table:
    """DuckDB's answer over tables or datasets by name, filters pushed down."""
    with query.cursor().cursor() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        for name, one in given.items():
            connection.register(name, one)
        return connection.sql(sql).to_arrow_table()


def test_every_value_is_found_by_a_filter_in_sql(make: Callable[..., Table]) -> None:
    """Each row is a file of its own, so a wrong statistic would hide it."""
    table = make(EVERY.schema)
    staged = [stage(table, EVERY.slice(i, 1), f"row-{i}") for i in range(EVERY.num_rows)]
    table.commit(pa.concat_tables(staged), token="run", version=1, replace="everything")
    tests = ("a.{0} >= b.{0}", "a.{0} > b.{0}", "a.{0} is null")
    counts = [
        f"(select count(*) from there as a, here as b where {test.format(name)})"
        for name in EVERY.column_names
        for test in tests
    ]
    sql = f"select unnest([{', '.join(counts)}]) as n"
    dataset = table.dataset()
    for row in range(EVERY.num_rows):
        here = EVERY.slice(row, 1)
        assert asked(sql, there=dataset, here=here) == asked(sql, there=EVERY, here=here)


LITERALS = """
v = 3; v in (3, 4); v > 3; v is null; w = 2.5; w > 3; w = 'NaN'::double; s = 'text 3'; s >= 'text'; s > 'text 4';
s is null; s = 'text 5' || repeat(' and more', 9); t >= '1970-01-01 00:00:00.000003+00';
t < '1970-01-01 00:00:00.000002+00'
"""


@pytest.mark.parametrize("literal", [literal.strip() for literal in LITERALS.split(";")])
def test_filters_that_duckdb_pushes_down_find_their_rows(make: Callable[..., Table], literal: str) -> None:
    data = pa.table(
        {
            "v": [None, *range(6)],
            "w": [None, 0.5, 1.5, 2.5, float("nan"), float("inf"), -0.0],
            "s": [None] + [f"text {i}" + " and more" * 9 * (i % 2) for i in range(6)],
            "t": pa.array([None, *range(6)], UTC),
        }
    )
    table = make(data.schema)
    staged = [stage(table, data.slice(i, 2), f"row-{i}") for i in range(0, 7, 2)]
    table.commit(pa.concat_tables(staged), token="run", version=1, replace="everything")
    sql = f"select * from there where {literal} order by v"
    assert repr(asked(sql, there=table.dataset()).to_pylist()) == repr(asked(sql, there=data).to_pylist())


def test_readers_skip_files_by_time_and_key(make: Callable[..., Table]) -> None:
    table = make(WIDER)
    data = [pa.table({"t": [t, t + 9], "v": [t, t], "w": [f"k{t}", f"k{t}"]}).cast(WIDER) for t in range(0, 100, 10)]
    staged = [stage(table, part, f"part-{i}") for i, part in enumerate(data)]
    table.commit(pa.concat_tables(staged), token="run", version=1, replace="everything")
    moment = pa.scalar(42, UTC)
    for expression in (pc.field("t") == moment, pc.field("v") == 40, pc.field("w") == "k40"):
        assert len(list(table.dataset().get_fragments(filter=expression))) == 1


def test_a_commit_tells_what_was_noted_with_it(make: Callable[..., Table]) -> None:
    table = make()
    assert table.last() is None
    note = {"offsets": {"0": 7}, "greatest": {"0": None}}
    made = table.commit(stage(table, rows([(0, 1)])), token="run", version=1, replace="nothing", note=note)
    assert (made.note, table.last(), make().last()) == (note, made, made)
    put(table, rows([(0, 2)]), "nothing")
    last = table.last()
    assert last is not None
    assert (last.version, last.note) == (2, {})


def test_files_are_rewritten_in_one_commit_and_one_that_is_gone_is_told(make: Callable[..., Table]) -> None:
    table = make()
    for v in range(4):
        put(table, rows([(v, v)]), "nothing")
    parts = table.parts()
    assert [(part.rows, part.least["v"], part.greatest["v"]) for part in parts] == [(1, v, v) for v in range(4)]
    old = table.dataset()
    some = Files(frozenset(part.name for part in parts[:3]))
    put(table, rows([(v, v) for v in range(3)]), some, token="rewrite")
    assert [part.rows for part in table.parts()] == [1, 3]
    assert values(table) == [0, 1, 2, 3]
    assert sorted(old.to_table()["v"].to_pylist()) == [0, 1, 2, 3]
    with pytest.raises(TableConflict, match="another run has replaced a file"):
        put(table, rows([(0, 0)]), some, token="late")
    assert values(table) == [0, 1, 2, 3]


def test_a_reader_keeps_its_snapshot(make: Callable[..., Table]) -> None:
    table = make()
    put(table, rows([(0, 1), (5, 2)]))
    old = table.dataset()
    put(table, rows([(5, 3)]), Between("t", (Range(5, 9),)))
    put(table, rows([(0, 4)]))
    assert old.to_table() == rows([(0, 1), (5, 2)])


def test_the_files_are_what_the_dataset_reads(make: Callable[..., Table]) -> None:
    table = make()
    put(table, rows([(0, 1), (5, 2)]))
    put(table, rows([(5, 3)]), Between("t", (Range(5, 9),)))
    found = query.run(f"select v from read_parquet({table.files()}) order by v", {})
    assert found["v"].to_pylist() == values(table) == [1, 3]


def test_a_table_travels_to_workers(make: Callable[..., Table]) -> None:
    table: Table = pickle.loads(pickle.dumps(make()))
    put(table, rows([(0, 1)]))
    assert values(pickle.loads(pickle.dumps(table))) == [1]


@pytest.mark.parametrize("unit", ["a/b", "../x", "a b", "ü:"])
def test_a_unit_that_is_no_name_is_refused(make: Callable[..., Table], unit: str) -> None:
    with pytest.raises(ValueError, match="letters, digits"):
        make().stage(unit, token="run", version=1)


def test_an_empty_range_is_refused() -> None:
    with pytest.raises(ValueError, match="empty ranges"):
        Between("t", (Range(5, 5),))
