"""SQLite as the embedded Store: one file, no server, readable while it is written.

A generation of a view is one table named ``view#generation``, so removing a generation, or giving a view other
columns, touches no other rows. Write-ahead log; a commit is on disk when it returns. Writers of any number of
processes take turns (one waits up to a minute for another); readers never wait and see one snapshot.
"""

import json
import os
import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any, Self

import pyarrow as pa

from pipelines.io.sqlite_file import SqliteFile
from pipelines.io.sqlite_rows import SLICE, VERSION, Layout
from pipelines.io.store import LIVE, Pointer, StoreConflict
from pipelines.transforms.errors import UserError
from pipelines.transforms.ranges import EVERYTHING, Range, Ranges

_APPLICATION, _FORMAT = 0, 1  # application_id and user_version of the file

_CATALOG = (
    "CREATE TABLE pointers (view TEXT PRIMARY KEY, boundary INTEGER, generation INTEGER, begun INTEGER NOT NULL,"
    " note TEXT)",
    "CREATE TABLE generations (view TEXT, generation INTEGER, keys TEXT NOT NULL, columns BLOB NOT NULL,"
    " PRIMARY KEY (view, generation))",
)


class SqliteStore:
    """A Store in one SQLite file, made (with its folder) at the first use. Picklable; one connection a thread.

    >>> starts = pa.array([0, 0], pa.timestamp("us", "UTC"))
    >>> rows = pa.table({"sensor": ["a", "b"], "window_start": starts, "readings": [1, 2]})
    >>> with SqliteStore(":memory:") as store:
    ...     generation = store.begin("by_hour", rows.schema, ("sensor", "window_start"))
    ...     written = store.upsert("by_hour", rows, generation=generation)
    ...     store.flip({"by_hour": Pointer(generation, boundary=3_600_000_000)})
    ...     store.get("by_hour", rows.slice(1))["readings"].to_pylist()
    [2]
    """

    def __init__(self, path: str | os.PathLike[str], *, timeout: float = 60.0) -> None:
        """timeout: seconds to wait for another writer."""
        self.path, self.timeout = os.fspath(path), timeout
        self._file = SqliteFile(
            self.path, "store", application=_APPLICATION, format=_FORMAT, prepare=_prepare, timeout=timeout
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self.timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes every thread's connection; the store opens new ones when it is used again."""
        self._file.close()

    def begin(self, view: str, schema: pa.Schema, keys: Sequence[str], replace: Ranges = (EVERYTHING,)) -> int:
        with self._file.transaction("IMMEDIATE") as connection:
            pointer = _pointer(connection, view)
            for dead in _generations(connection, view) - {LIVE, pointer.generation if pointer else LIVE}:
                _drop(connection, view, dead)
            layout = Layout.of(view, _number(connection, view), keys, schema)
            _create(connection, layout)
            if pointer and EVERYTHING not in replace:
                former = _layout(connection, view, pointer.generation)
                former.refuse_other(layout, "run it whole, without --from, --to and --since, to rebuild it")
                connection.execute(layout.carry_over(former, replace))
            return layout.generation

    def resume(self, view: str, schema: pa.Schema, keys: Sequence[str]) -> None:
        layout = Layout.of(view, LIVE, keys, schema)
        with self._file.transaction("IMMEDIATE") as connection:
            if LIVE in _generations(connection, view):
                there = _layout(connection, view, LIVE)
                there.refuse_other(layout, "drop its live rows and rebuild them from the log")
            else:
                _create(connection, layout)

    def upsert(self, view: str, rows: pa.Table, *, generation: int, version: int | pa.ChunkedArray = 0) -> int:
        if not isinstance(version, int):
            return self._write(view, rows.append_column(VERSION, version), generation, None, deleted=False)
        return self._write(view, rows, generation, version, deleted=False)

    def delete(self, view: str, keys: pa.Table, *, generation: int, version: int) -> int:
        return self._write(view, keys, generation, version, deleted=True)

    def _write(self, view: str, rows: pa.Table, generation: int, version: int | None, deleted: bool) -> int:
        with self._file.transaction("IMMEDIATE") as connection:
            pointer = _pointer(connection, view)
            if pointer and pointer.generation == generation:
                raise _overtaken(view, generation)
            layout, before = _layout(connection, view, generation), connection.total_changes
            connection.executemany(layout.upsert(version, deleted), layout.records(rows, deleted))
            return connection.total_changes - before

    def get(self, view: str, keys: pa.Table, *, generation: int | None = None) -> pa.Table:
        with self._file.transaction("DEFERRED") as connection:
            layout = _layout(connection, view, _read_generation(connection, view, generation))
            query = layout.get()
            return layout.rows([[row for key in layout.wanted(keys) for row in connection.execute(query, key)]])

    def scan(self, view: str, within: Range = EVERYTHING, *, generation: int | None = None) -> pa.Table:
        with self._file.transaction("DEFERRED") as connection:
            layout = _layout(connection, view, _read_generation(connection, view, generation))
            found = connection.execute(layout.scan(within))
            return layout.rows(iter(lambda: found.fetchmany(SLICE), []))

    def pointer(self, view: str) -> Pointer | None:
        with self._file.transaction("DEFERRED") as connection:
            return _pointer(connection, view)

    def flip(self, pointers: Mapping[str, Pointer]) -> None:
        with self._file.transaction("IMMEDIATE") as connection:
            if "note" not in [name for _, name, *_ in connection.execute("PRAGMA table_info(pointers)")]:
                connection.execute("ALTER TABLE pointers ADD COLUMN note TEXT")  # a file from before there were notes
            for view, pointer in pointers.items():
                former = _pointer(connection, view)
                if pointer.generation == LIVE or pointer.generation not in _generations(connection, view):
                    raise _overtaken(view, pointer.generation)
                if former and former.generation != pointer.generation:
                    _drop(connection, view, former.generation)
                moved = "UPDATE pointers SET boundary = ?, generation = ?, note = ? WHERE view = ?"
                connection.execute(moved, (pointer.boundary, pointer.generation, pointer.note, view))

    def prune(self, view: str, boundary: int) -> int:
        with self._file.transaction("IMMEDIATE") as connection:
            if LIVE not in _generations(connection, view):
                return 0
            statements = _layout(connection, view, LIVE).prune()
            return sum(connection.execute(statement, (boundary,)).rowcount for statement in statements)

    def drop(self, view: str, generation: int) -> None:
        with self._file.transaction("IMMEDIATE") as connection:
            pointer = _pointer(connection, view)
            if pointer and pointer.generation == generation:
                raise ValueError(f"view {view}: generation {generation} is being read")
            _drop(connection, view, generation)


def _reopen(path: str, timeout: float) -> SqliteStore:
    return SqliteStore(path, timeout=timeout)


def _prepare(connection: sqlite3.Connection) -> None:
    for statement in _CATALOG:
        connection.execute(statement)


def _pointer(connection: sqlite3.Connection, view: str) -> Pointer | None:
    found = connection.execute("SELECT * FROM pointers WHERE view = ? AND generation IS NOT NULL", (view,))
    row = dict(zip((name for name, *_ in found.description), found.fetchone() or (), strict=False))
    return Pointer(row["generation"], row["boundary"], row.get("note")) if row else None


def _number(connection: sqlite3.Connection, view: str) -> int:
    """The view's next generation: never one that was given before."""
    counted = "INSERT INTO pointers (view, begun) VALUES (?, 1) ON CONFLICT (view) DO UPDATE SET begun = begun + 1"
    connection.execute(counted, (view,))
    return connection.execute("SELECT begun FROM pointers WHERE view = ?", (view,)).fetchone()[0]  # type: ignore[no-any-return]


def _generations(connection: sqlite3.Connection, view: str) -> set[int]:
    return {row[0] for row in connection.execute("SELECT generation FROM generations WHERE view = ?", (view,))}


def _read_generation(connection: sqlite3.Connection, view: str, generation: int | None) -> int:
    if generation is not None:
        return generation
    pointer = _pointer(connection, view)
    if pointer is None:
        raise UserError(f"view {view}: no batch run has finished yet; run the pipeline first")
    return pointer.generation


def _layout(connection: sqlite3.Connection, view: str, generation: int) -> Layout:
    query = "SELECT keys, columns FROM generations WHERE view = ? AND generation = ?"
    row = connection.execute(query, (view, generation)).fetchone()
    if row is None:
        raise _overtaken(view, generation)
    return Layout(view, generation, tuple(json.loads(row[0])), pa.ipc.read_schema(pa.py_buffer(row[1])))


def _create(connection: sqlite3.Connection, layout: Layout) -> None:
    connection.execute(layout.create())
    described = (json.dumps(layout.keys), layout.schema.serialize().to_pybytes())
    connection.execute("INSERT INTO generations VALUES (?, ?, ?, ?)", (layout.view, layout.generation, *described))


def _drop(connection: sqlite3.Connection, view: str, generation: int) -> None:
    if generation in _generations(connection, view):
        connection.execute(f"DROP TABLE {_layout(connection, view, generation).table}")
        connection.execute("DELETE FROM generations WHERE view = ? AND generation = ?", (view, generation))


def _overtaken(view: str, generation: int) -> StoreConflict:
    return StoreConflict(
        f"view {view}: generation {generation} was finished or replaced by another run; run one at a time, then again"
    )
