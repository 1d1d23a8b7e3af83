import contextlib
import os
import resource
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines.io.sqlite import SqliteStore
from pipelines.io.store import LIVE, Pointer, open_store
from pipelines.transforms.errors import UserError
from pipelines.transforms.ranges import Range

HOUR = 3_600_000_000
KEYS = ("sensor", "window_start")
SCHEMA = pa.schema([("sensor", pa.string()), ("window_start", pa.timestamp("us", "UTC")), ("n", pa.int64())])
ROOT = Path(__file__).parents[2]


def table(*rows: tuple[str, int, int]) -> pa.Table:
    return pa.Table.from_pylist([dict(zip(SCHEMA.names, row, strict=True)) for row in rows], schema=SCHEMA)


def finished(store: SqliteStore, rows: pa.Table) -> None:
    generation = store.begin("v", rows.schema, KEYS)
    store.upsert("v", rows, generation=generation)
    store.flip({"v": Pointer(generation, 0)})


def writers(*arguments: object) -> "subprocess.Popen[str]":
    script = Path(__file__).with_name("store_writers.py")
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)


def expected(inside: int) -> list[tuple[int, int]]:
    """(hour, n) of the killed writers' rows, n of hours 1 and 2 given."""
    return [(hour, inside if hour in (1, 2) else 1) for hour in range(4) for _ in range(20)]


def hours(rows: pa.Table) -> list[tuple[int, int]]:
    starts = rows["window_start"].cast(pa.int64()).to_pylist()
    return sorted((start // HOUR, n) for start, n in zip(starts, rows["n"].to_pylist(), strict=True))


def again(store: SqliteStore, views: tuple[str, ...]) -> None:
    """The killed run's rerun: hours 1 and 2 anew."""
    generations = {view: store.begin(view, SCHEMA, KEYS, (Range(1 * HOUR, 3 * HOUR),)) for view in views}
    every = table(*[(f"s{number}", hour * HOUR, 2) for hour in (1, 2) for number in range(20)])
    for view, generation in generations.items():
        store.upsert(view, every, generation=generation)
    store.flip({view: Pointer(generation, 1) for view, generation in generations.items()})


@pytest.mark.slow
def test_a_killed_run_leaves_the_old_answer_and_its_rerun_no_trace_of_it(tmp_path: Path) -> None:
    count = 30
    out, _ = writers("killed", tmp_path, 17, count).communicate()
    kills = [tuple(map(int, line.split())) for line in out.splitlines()]
    assert len(kills) == count
    assert {signal for *_, signal in kills} == {9}
    assert len({point for point, *_ in kills}) > count * 0.7
    with SqliteStore(tmp_path / "whole.db") as store:
        assert [hours(store.scan(view)) for view in ("one", "two")] == [expected(2)] * 2
    for number in range(len(kills)):
        with SqliteStore(tmp_path / f"{number}.db") as store:
            for view in ("one", "two"):
                assert hours(store.scan(view)) == expected(1)
                assert store.pointer(view) == Pointer(1, 4 * HOUR)
            again(store, ("one", "two"))
            pointers = {view: store.pointer(view) for view in ("one", "two")}
            for view, pointer in pointers.items():
                assert pointer is not None
                assert hours(store.scan(view)) == expected(2)
            tables = store._file.connection().execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall()
            read = {f"{view}#{pointer.generation}" for view, pointer in pointers.items() if pointer}
            assert {name for (name,) in tables} == {"pointers", "generations", *read}
            assert store._file.connection().execute("PRAGMA integrity_check").fetchall() == [("ok",)]


@pytest.mark.slow
def test_writers_of_several_processes_take_turns_and_readers_see_whole_versions(tmp_path: Path) -> None:
    count, turns = 3, 10
    path = tmp_path / "new" / "store.db"
    process = writers("competing", path, count, turns)
    seen = [-1]
    with SqliteStore(path) as store:
        store.resume("v", SCHEMA, KEYS)
        while process.poll() is None:
            versions = set(store.scan("v", generation=LIVE)["n"].to_pylist())
            assert len(versions) <= 1
            seen += versions
        process.communicate()
        assert process.returncode == 0
        assert seen == sorted(seen)
        rows = store.scan("v", generation=LIVE)
        assert (len(rows), set(rows["n"].to_pylist())) == (60, {count * turns - 1})


def test_a_reader_keeps_its_snapshot_while_a_run_replaces_what_it_reads(tmp_path: Path) -> None:
    many = table(*[("a", hour * HOUR, hour) for hour in range(40_000)])
    with SqliteStore(tmp_path / "store.db") as reader, SqliteStore(tmp_path / "store.db", timeout=0) as writer:
        finished(writer, many)
        with reader._file.transaction("DEFERRED") as connection:
            cursor = connection.execute('SELECT n FROM "v#1"')
            begun = cursor.fetchmany(10)
            finished(writer, table(("b", 0, 0)))
            assert len(begun) + len(cursor.fetchall()) == len(many)
        assert reader.scan("v").num_rows == 1


def test_threads_share_a_store(tmp_path: Path) -> None:
    found: list[int] = []
    with SqliteStore(tmp_path / "store.db") as store:
        finished(store, table(("a", 0, 7)))
        threads = [threading.Thread(target=lambda: found.extend(store.scan("v")["n"].to_pylist())) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [7] * 4


def test_a_look_up_and_a_write_use_the_key(tmp_path: Path) -> None:
    with SqliteStore(tmp_path / "store.db") as store:
        finished(store, table(("a", 0, 1)))
        plan = 'EXPLAIN QUERY PLAN SELECT n FROM "v#1" WHERE NOT _deleted AND "sensor" = ? AND "window_start" = ?'
        [(*_, detail)] = store._file.connection().execute(plan, ("a", 0)).fetchall()
        assert detail == "SEARCH v#1 USING PRIMARY KEY (sensor=? AND window_start=?)"


def test_rows_of_many_slices_are_all_written_and_read(tmp_path: Path) -> None:
    many = table(*[("a", hour * HOUR, hour) for hour in range(40_000)])
    with SqliteStore(tmp_path / "store.db") as store:
        finished(store, many)
        assert store.scan("v").equals(many)
        assert store.get("v", many.slice(39_999)).equals(many.slice(39_999))


@pytest.mark.parametrize(
    ("uri", "path"),
    [("data/store.db", "data/store.db"), ("sqlite:///data/store.db", "data/store.db"), ("sqlite:////s.db", "/s.db")],
)
def test_uris(uri: str, path: str) -> None:
    store = open_store(uri)
    assert isinstance(store, SqliteStore)
    assert store.path == path


@pytest.mark.parametrize("uri", ["redis://host:6379", "sqlite://", "sqlite://host/store.db", "sqlite:///"])
def test_a_uri_of_no_store_is_refused(uri: str) -> None:
    with pytest.raises(UserError, match="no such store; give a path"):
        open_store(uri)


def complaint(store: SqliteStore, rows: pa.Table | None = None) -> str:
    """The one line that the user gets."""
    with store, pytest.raises(UserError) as raised:
        finished(store, table(("a", 0, 1)) if rows is None else rows)
    message = str(raised.value)
    assert "\n" not in message
    return message.removeprefix(f"store {store.path}: ")


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a database, but a text of some length" * 100)
    assert complaint(SqliteStore(tmp_path / "notes.txt")) == "not a SQLite database; name another file"


def test_a_place_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    told = "cannot be opened; check that its folder exists and may be written"
    assert complaint(SqliteStore(tmp_path / "file" / "store.db")) == told
    assert complaint(SqliteStore(tmp_path)) == told


def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "store.db")
    store._file.connection().execute("PRAGMA query_only = true")
    assert complaint(store) == "cannot be written; check its permissions and that it was not moved"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_file_without_permission(tmp_path: Path) -> None:
    finished(store := SqliteStore(tmp_path / "store.db"), table())
    store.close()
    (tmp_path / "store.db").chmod(0o444)
    assert complaint(store) == "cannot be written; check its permissions and that it was not moved"


def test_a_store_that_another_process_holds(tmp_path: Path) -> None:
    with SqliteStore(tmp_path / "store.db") as other, other._file.transaction("IMMEDIATE"):
        told = complaint(SqliteStore(tmp_path / "store.db", timeout=0))
    assert told == "locked by another process for too long; let it finish and run again"


def test_a_damaged_store(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with SqliteStore(path) as store:
        finished(store, table(*[("a", hour * HOUR, hour) for hour in range(2_000)]))
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (path.stat().st_size - 4096))
    assert complaint(SqliteStore(path)) == "damaged; remove it and run again to rebuild it"


def test_a_store_from_before_there_were_notes_is_read_and_written(tmp_path: Path) -> None:
    rows = table(("a", 0, 1))
    with SqliteStore(tmp_path / "store.db") as store:
        finished(store, rows)
        store._file.connection().execute("ALTER TABLE pointers DROP COLUMN note")
        before = store.pointer("v")
        assert before is not None
        generation = store.begin("v", rows.schema, KEYS, (Range(HOUR),))
        store.flip({"v": Pointer(generation, 7, "offset 5")})
        assert (before.note, store.pointer("v")) == (None, Pointer(generation, 7, "offset 5"))
        assert store.scan("v").equals(rows)


def test_a_store_of_another_format(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "store.db")) as connection:
        connection.execute("PRAGMA user_version = 7")
    assert complaint(SqliteStore(tmp_path / "store.db")) == "of format 7, this release reads 1; name another file"


@contextlib.contextmanager
def disk_of(size: int) -> Iterator[None]:
    """No file of this process may grow past a size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_old_answer(tmp_path: Path) -> None:
    many = table(*[("a", hour * HOUR, hour) for hour in range(20_000)])
    with SqliteStore(tmp_path / "store.db") as store:
        finished(store, table(("old", 0, 1)))
        for limit in ("disk", "pages"):
            if limit == "pages":
                store._file.connection().execute("PRAGMA max_page_count = 20")
            with disk_of(200_000 if limit == "disk" else 2**40), pytest.raises(UserError) as raised:
                finished(store, many)
            assert str(raised.value).startswith(f"store {store.path}: ")
            assert "space" in str(raised.value)
            assert store.scan("v").equals(table(("old", 0, 1)))
        store._file.connection().execute("PRAGMA max_page_count = 100000")
        finished(store, many)
        assert store.scan("v").equals(many)


@pytest.mark.parametrize(
    ("column", "kind", "told"),
    [
        ("n", pa.map_(pa.string(), pa.int64()), "column n is a map<string, int64>, which a store cannot hold"),
        ("sensor", pa.list_(pa.string()), "key sensor is a list<element: string>; group by its parts instead"),
        ("SENSOR", pa.int64(), "two columns are named sensor but for case; rename one"),
    ],
)
def test_a_view_that_cannot_be_stored(column: str, kind: pa.DataType, told: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"sensor": pa.string(), "window_start": pa.timestamp("us", "UTC"), "n": pa.int64()}
    with SqliteStore(tmp_path / "store.db") as store, pytest.raises(UserError, match="view v: ") as raised:
        store.begin("v", pa.schema(list({**fields, column: kind}.items())), KEYS)
    assert str(raised.value).replace("item:", "element:") == f"view v: {told}"


def test_rows_of_another_type_are_not_converted_in_silence(tmp_path: Path) -> None:
    with SqliteStore(tmp_path / "store.db") as store:
        generation = store.begin("v", SCHEMA, KEYS)
        with pytest.raises(TypeError, match="column sensor is int64, the generation's is string"):
            store.upsert("v", table().set_column(0, "sensor", pa.array([], pa.int64())), generation=generation)
        dictionary = table(("a", 0, 1)).set_column(0, "sensor", pa.array(["a"]).dictionary_encode())
        assert store.upsert("v", dictionary, generation=generation) == 1
        assert store.scan("v", generation=generation).equals(table(("a", 0, 1)))
