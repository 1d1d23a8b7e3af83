"""SQLite as the embedded Store: one file, no server, readable while it is written.

A generation of a view is one table named ``view#generation``, clustered by its key, so that removing a generation or
giving a view other columns touches no other rows. Write-ahead log; commits are on disk when they return. Writers of
any number of processes take turns (one waits up to a minute for another); readers never wait and see one snapshot.
A key's null is kept as an empty blob (empty text in a binary column), as a primary key has no null.
"""

import contextlib
import dataclasses
import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import pyarrow as pa

from pipelines.io import cells
from pipelines.io.store import EVERYTHING, LIVE, Pointer, Range, StoreConflict
from pipelines.transforms.errors import UserError

_FORMAT = 1  # user_version of the file
_CHUNK = 16_384  # rows fetched at a time: bounds the Python objects in memory
_WINDOW = "window_start"

_CATALOG = (
    "CREATE TABLE pointers (view TEXT PRIMARY KEY, boundary INTEGER, generation INTEGER, begun INTEGER NOT NULL)"
    " STRICT",
    "CREATE TABLE generations (view TEXT, generation INTEGER, keys TEXT NOT NULL, columns BLOB NOT NULL,"
    " PRIMARY KEY (view, generation)) STRICT",
)

_FAULTS = {
    "SQLITE_NOTADB": "not a SQLite database; name another file",
    "SQLITE_CANTOPEN": "cannot be opened; check that its folder exists and may be written",
    "SQLITE_READONLY": "cannot be written; check its permissions and that it was not moved",
    "SQLITE_FULL": "no space left; free some and run again",
    "SQLITE_IOERR": "cannot be read or written; check the disk's space and health",
    "SQLITE_BUSY": "locked by another process for too long; let it finish and run again",
    "SQLITE_CORRUPT": "damaged; remove it and run again to rebuild it",
    "SQLITE_TOOBIG": "a value of more than 1 GB does not fit; leave it out of the view",
}


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How one generation of a view lies in its table."""

    table: str
    keys: tuple[str, ...]
    schema: pa.Schema

    @property
    def values(self) -> list[str]:
        return [name for name in self.schema.names if name not in self.keys]

    def null(self, key: str) -> str:
        return "''" if _is_binary(self.schema.field(key).type) else "x''"

    def create(self) -> str:
        columns = [f"{_quote(name)} ANY" for name in (*self.keys, *self.values)]
        bookkeeping = ["_version INTEGER NOT NULL", "_deleted INTEGER NOT NULL"]
        primary = f"PRIMARY KEY ({_names(self.keys)})"
        return (
            f"CREATE TABLE {_quote(self.table)} ({', '.join([*columns, *bookkeeping, primary])}) STRICT, WITHOUT ROWID"
        )

    def write(self, values: Sequence[str], version: int, deleted: bool) -> str:
        given = (*self.keys, *values)
        replaced = ", ".join(
            f"{_quote(name)} = excluded.{_quote(name)}" for name in (*self.values, "_version", "_deleted")
        )
        return (
            f"INSERT INTO {_quote(self.table)} ({_names((*given, '_version', '_deleted'))})"
            f" VALUES ({', '.join('?' * len(given))}, {int(version)}, {int(deleted)})"
            f" ON CONFLICT ({_names(self.keys)}) DO UPDATE SET {replaced} WHERE excluded._version > _version"
        )

    def read(self, where: str) -> str:
        named = [
            f"nullif({_quote(name)}, {self.null(name)})" if name in self.keys else _quote(name)
            for name in self.schema.names
        ]
        return f"SELECT {', '.join(named)} FROM {_quote(self.table)} WHERE NOT _deleted AND {where}"

    def within(self, within: Range) -> str:
        """SQL: does the row's window start in the range?"""
        if within.everything or _WINDOW not in self.schema.names:
            return "true"
        limits = [f"{_WINDOW} >= {within.start:d}"] if within.start is not None else []
        limits += [f"{_WINDOW} < {within.stop:d}"] if within.stop is not None else []
        return f"(typeof({_WINDOW}) <> 'integer' OR ({' AND '.join(limits)}))"

    def key_cells(self, rows: pa.Table) -> list[list[Any]]:
        return [_key(rows.column(name), self.schema.field(name).type) for name in self.keys]


class SqliteStore:
    """A Store in one SQLite file, made (with its folder) at the first use. Picklable; one connection a thread.

    >>> starts = pa.array([0, 0], pa.timestamp("us", "UTC"))
    >>> rows = pa.table({"sensor": ["a", "b"], "window_start": starts, "readings": [1, 2]})
    >>> with SqliteStore("/tmp/pipelines-doctest/store.db") as store:
    ...     generation = store.begin("by_hour", rows.schema, ("sensor", "window_start"))
    ...     written = store.upsert("by_hour", rows, generation=generation)
    ...     store.flip({"by_hour": Pointer(generation, boundary=3_600_000_000)})
    ...     store.get("by_hour", rows.slice(1))["readings"].to_pylist()
    [2]
    """

    def __init__(self, path: str | os.PathLike[str], *, timeout: float = 60.0) -> None:
        """timeout: seconds to wait for another writer."""
        self.path, self.timeout = os.fspath(path), timeout
        self._local = threading.local()
        self._connections: list[sqlite3.Connection] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self.timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections of this process; the store opens new ones when it is used again."""
        for connection in self._connections:
            connection.close()
        self._connections, self._local = [], threading.local()

    def begin(self, view: str, schema: pa.Schema, keys: Sequence[str], replace: Range = EVERYTHING) -> int:
        with self._transaction("IMMEDIATE") as connection:
            pointer = _pointer(connection, view)
            for dead in _generations(connection, view) - {LIVE, pointer.generation if pointer else LIVE}:
                _drop(connection, view, dead)
            generation = _number(connection, view)
            layout = _create(connection, view, generation, schema, keys)
            if pointer and not replace.everything:
                former = _layout(connection, view, pointer.generation)
                _same(view, former, layout, "run it whole, without --from and --to, to rebuild it")
                names = _names((*layout.keys, *layout.values))
                # Version -1: a row of this run wins over the one carried over.
                connection.execute(
                    f"INSERT INTO {_quote(layout.table)} SELECT {names}, -1, 0 FROM {_quote(former.table)}"
                    f" WHERE NOT _deleted AND NOT {former.within(replace)} ORDER BY {_names(layout.keys)}"
                )
            return generation

    def resume(self, view: str, schema: pa.Schema, keys: Sequence[str]) -> None:
        with self._transaction("IMMEDIATE") as connection:
            if LIVE not in _generations(connection, view):
                _create(connection, view, LIVE, schema, keys)
                return
            wanted = _Layout(_table(view, LIVE), tuple(keys), _plain(schema))
            _same(view, _layout(connection, view, LIVE), wanted, "drop its live rows and rebuild them from the log")

    def upsert(self, view: str, rows: pa.Table, *, generation: int, version: int = 0) -> int:
        return self._write(view, rows, generation, version, deleted=False)

    def delete(self, view: str, keys: pa.Table, *, generation: int, version: int) -> int:
        return self._write(view, keys, generation, version, deleted=True)

    def _write(self, view: str, rows: pa.Table, generation: int, version: int, deleted: bool) -> int:
        with self._transaction("DEFERRED") as connection:
            layout = _layout(connection, view, generation)
        # Cells are made before the write lock is taken, and in key order: neighbours share a page.
        values = [] if deleted else layout.values
        rows = _conform(rows, layout, (*layout.keys, *values)).sort_by([(name, "ascending") for name in layout.keys])
        columns = layout.key_cells(rows) + [cells.encode(_whole(rows.column(name))) for name in values]
        with self._transaction("IMMEDIATE") as connection:
            _writable(connection, view, generation)
            before = connection.total_changes
            connection.executemany(layout.write(values, version, deleted), zip(*columns, strict=True))
            return connection.total_changes - before

    def get(self, view: str, keys: pa.Table, *, generation: int | None = None) -> pa.Table:
        with self._transaction("DEFERRED") as connection:
            layout = _read_layout(connection, view, generation)
            wanted = zip(*layout.key_cells(_conform(keys, layout, layout.keys)), strict=True)
            query = layout.read(" AND ".join(f"{_quote(key)} = ?" for key in layout.keys))
            found = [row for key in wanted for row in connection.execute(query, key)]
            return _table_of([found], layout.schema)

    def scan(self, view: str, within: Range = EVERYTHING, *, generation: int | None = None) -> pa.Table:
        with self._transaction("DEFERRED") as connection:
            layout = _read_layout(connection, view, generation)
            rows = connection.execute(f"{layout.read(layout.within(within))} ORDER BY {_names(layout.keys)}")
            return _table_of(iter(lambda: rows.fetchmany(_CHUNK), []), layout.schema)

    def pointer(self, view: str) -> Pointer | None:
        with self._transaction("DEFERRED") as connection:
            return _pointer(connection, view)

    def flip(self, pointers: Mapping[str, Pointer]) -> None:
        with self._transaction("IMMEDIATE") as connection:
            for view, pointer in pointers.items():
                former = _pointer(connection, view)
                if former == pointer:
                    continue
                if pointer.generation == LIVE or pointer.generation not in _generations(connection, view):
                    raise _gone(view, pointer.generation)
                if former and former.generation != pointer.generation:
                    _drop(connection, view, former.generation)
                moved = "UPDATE pointers SET boundary = ?, generation = ? WHERE view = ?"
                connection.execute(moved, (pointer.boundary, pointer.generation, view))

    def drop(self, view: str, generation: int) -> None:
        with self._transaction("IMMEDIATE") as connection:
            pointer = _pointer(connection, view)
            if pointer and pointer.generation == generation:
                raise ValueError(f"view {view}: generation {generation} is being read")
            _drop(connection, view, generation)

    @contextlib.contextmanager
    def _transaction(self, kind: str) -> Iterator[sqlite3.Connection]:
        """All or nothing; SQLite's complaints about the place become one line for the user."""
        try:
            connection = self._connection()
            connection.execute(f"BEGIN {kind}")
            try:
                yield connection
                connection.execute("COMMIT")
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
        except sqlite3.Error as error:
            name = getattr(error, "sqlite_errorname", "")
            advice = next((text for prefix, text in _FAULTS.items() if name.startswith(prefix)), None)
            if advice is None:
                raise
            raise UserError(f"store {self.path}: {advice}") from error

    def _connection(self) -> sqlite3.Connection:
        # After a fork the parent's connection must be neither used nor closed: it stays in the list.
        if getattr(self._local, "process", None) != os.getpid():
            self._local.connection, self._local.process = self._open(), os.getpid()
            self._connections.append(self._local.connection)
        return self._local.connection  # type: ignore[no-any-return]

    def _open(self) -> sqlite3.Connection:
        with contextlib.suppress(OSError):  # SQLite says why it cannot open the file
            Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self.path, timeout=self.timeout, isolation_level=None, check_same_thread=False)
        for setting in ("journal_mode = WAL", "synchronous = FULL", "secure_delete = OFF", "cache_size = -32768"):
            connection.execute(f"PRAGMA {setting}")
        _prepare(connection, self.path)
        return connection


def _reopen(path: str, timeout: float) -> SqliteStore:
    return SqliteStore(path, timeout=timeout)


def _prepare(connection: sqlite3.Connection, path: str) -> None:
    def version() -> int:
        return connection.execute("PRAGMA user_version").fetchone()[0]  # type: ignore[no-any-return]

    if version() == 0:
        connection.execute("BEGIN IMMEDIATE")
        if version() == 0:
            for statement in (*_CATALOG, f"PRAGMA user_version = {_FORMAT}"):
                connection.execute(statement)
        connection.execute("COMMIT")
    if version() != _FORMAT:
        raise UserError(f"store {path}: of format {version()}, this release reads {_FORMAT}; name another file")


def _pointer(connection: sqlite3.Connection, view: str) -> Pointer | None:
    query = "SELECT generation, boundary FROM pointers WHERE view = ? AND generation IS NOT NULL"
    row = connection.execute(query, (view,)).fetchone()
    return Pointer(*row) if row else None


def _number(connection: sqlite3.Connection, view: str) -> int:
    """The view's next generation: never one that was given before."""
    counted = "INSERT INTO pointers (view, begun) VALUES (?, 1) ON CONFLICT DO UPDATE SET begun = begun + 1"
    return connection.execute(f"{counted} RETURNING begun", (view,)).fetchall()[0][0]  # type: ignore[no-any-return]


def _generations(connection: sqlite3.Connection, view: str) -> set[int]:
    return {row[0] for row in connection.execute("SELECT generation FROM generations WHERE view = ?", (view,))}


def _layout(connection: sqlite3.Connection, view: str, generation: int) -> _Layout:
    query = "SELECT keys, columns FROM generations WHERE view = ? AND generation = ?"
    row = connection.execute(query, (view, generation)).fetchone()
    if row is None:
        raise _gone(view, generation)
    return _Layout(_table(view, generation), tuple(json.loads(row[0])), pa.ipc.read_schema(pa.py_buffer(row[1])))


def _read_layout(connection: sqlite3.Connection, view: str, generation: int | None) -> _Layout:
    if generation is None:
        pointer = _pointer(connection, view)
        if pointer is None:
            raise UserError(f"view {view}: no batch run has finished yet; run the pipeline first")
        generation = pointer.generation
    return _layout(connection, view, generation)


def _writable(connection: sqlite3.Connection, view: str, generation: int) -> None:
    pointer = _pointer(connection, view)
    written = pointer is not None and pointer.generation == generation
    if written or generation not in _generations(connection, view):
        raise _gone(view, generation)


def _create(
    connection: sqlite3.Connection, view: str, generation: int, schema: pa.Schema, keys: Sequence[str]
) -> _Layout:
    layout = _Layout(_table(view, generation), tuple(keys), _plain(schema))
    for key in keys:
        if pa.types.is_nested(layout.schema.field(key).type):
            raise UserError(f"view {view}: key {key} is a {layout.schema.field(key).type}; group by its parts instead")
    connection.execute(layout.create())
    named = (view, generation, json.dumps(layout.keys), layout.schema.serialize().to_pybytes())
    connection.execute("INSERT INTO generations VALUES (?, ?, ?, ?)", named)
    return layout


def _drop(connection: sqlite3.Connection, view: str, generation: int) -> None:
    connection.execute("DELETE FROM generations WHERE view = ? AND generation = ?", (view, generation))
    connection.execute(f"DROP TABLE IF EXISTS {_quote(_table(view, generation))}")


def _same(view: str, there: _Layout, wanted: _Layout, fix: str) -> None:
    """Refuses rows of another definition, naming the first difference."""
    was = {name: str(kind) for name, kind in zip(there.schema.names, there.schema.types, strict=True)}
    now = {name: str(kind) for name, kind in zip(wanted.schema.names, wanted.schema.types, strict=True)}
    for name in [*was, *now]:
        if was.get(name) != now.get(name):
            raise StoreConflict(
                f"view {view}: column {name} is {now.get(name, 'gone')}, stored as {was.get(name, 'nothing')}; {fix}"
            )
    if there.keys != wanted.keys:
        raise StoreConflict(
            f"view {view}: its keys are {', '.join(wanted.keys)}, stored by {', '.join(there.keys)}; {fix}"
        )


def _gone(view: str, generation: int) -> StoreConflict:
    return StoreConflict(
        f"view {view}: generation {generation} was finished or replaced by another run; run one at a time, again"
    )


def _plain(schema: pa.Schema) -> pa.Schema:
    """The schema that is stored: values instead of dictionaries, no metadata."""
    return pa.schema([(field.name, _value_type(field.type)) for field in schema])


def _value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _conform(rows: pa.Table, layout: _Layout, names: Iterable[str]) -> pa.Table:
    """Exactly these columns in the stored types. Raises for a missing column or a type that would change a value."""
    return rows.select(list(names)).cast(pa.schema([layout.schema.field(name) for name in names]))


def _key(column: pa.ChunkedArray, kind: pa.DataType) -> list[Any]:
    null: Any = "" if _is_binary(kind) else b""
    values = cells.encode(cells.canonical(_whole(column)))
    return [null if value is None else value for value in values] if column.null_count else values


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)  # type: ignore[no-any-return]


def _table_of(chunks: Iterable[list[tuple[Any, ...]]], schema: pa.Schema) -> pa.Table:
    batches = []
    for rows in chunks:
        columns = zip(*rows, strict=True) if rows else [()] * len(schema)
        arrays = [cells.decode(values, kind) for values, kind in zip(columns, schema.types, strict=True)]
        batches.append(pa.record_batch(arrays, schema=schema))
    return pa.Table.from_batches(batches, schema)


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


def _table(view: str, generation: int) -> str:
    return f"{view}#{generation}"


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(_quote, names))


def _quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
