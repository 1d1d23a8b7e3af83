"""SQLite as the embedded Log: one file, no server, several producers, readable while it is written.

What one append gives a partition is one row of the file, or one for every few MB of payloads. So a message costs well
under a microsecond to write and to read, and an append costs a few milliseconds for the disk: producers append many
messages at once.
"""

import contextlib
import datetime
import os
import sqlite3
from collections.abc import Iterator, Mapping
from typing import Any, Self

import pyarrow as pa

from pipelines.io.log import Bounds, Clock, Format, Options, refuse_gone, utc_now
from pipelines.io.sqlite_file import SqliteFile
from pipelines.io.sqlite_messages import Found, empty, pack, unpack
from pipelines.transforms.errors import UserError

_APPLICATION, _FORMAT = 0x504C4F47, 1  # application_id ("PLOG") and user_version of the file

_CATALOG = (
    "CREATE TABLE log (format TEXT NOT NULL)",
    "CREATE TABLE partitions (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE,"
    ' start INTEGER NOT NULL DEFAULT 0, "end" INTEGER NOT NULL DEFAULT 0)',
    # start, last: offsets of the first and the last message. published: µs.
    "CREATE TABLE batches (partition INTEGER, last INTEGER, start INTEGER NOT NULL, published INTEGER NOT NULL,"
    " lengths BLOB NOT NULL, rows BLOB, size INTEGER NOT NULL, payloads BLOB NOT NULL, PRIMARY KEY (partition, last))",
)

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


class SqliteLog:
    """A Log in one SQLite file, made (with its folder) at the first use. Picklable; one connection a thread.

    Guarantee: see Log. An append waits up to ``timeout`` seconds for another producer's; readers never wait. With a
    retention, appends also remove what is older; the file keeps its size and reuses the space.

    >>> with SqliteLog(":memory:") as log:
    ...     log.append({"0": pa.table({"_raw": [b'{"delay": 5}', b'{"delay": 7}']})})
    ...     log.bounds(), log.read("0", 1, 2)["_raw"].to_pylist()
    ({'0': Bounds(start=0, end=2)}, [b'{"delay": 7}'])
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        options: Options | None = None,
        *,
        clock: Clock = utc_now,
        timeout: float = 60.0,
    ) -> None:
        """clock: what ``_published`` and retention go by."""
        self.path, self.options, self.timeout = os.fspath(path), options or Options(), timeout
        self._clock = clock
        self._format: Format | None = None
        self._file = SqliteFile(
            self.path,
            "log",
            application=_APPLICATION,
            format=_FORMAT,
            prepare=self._prepare,
            timeout=timeout,
            page_size=16384,  # payloads are large
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self.options, self._clock, self.timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes every thread's connection; the log opens new ones when it is used again."""
        self._file.close()
        self._format = None

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.path}{self.options.query}"

    @property
    def schemas(self) -> str | None:
        return self.options.schemas

    @property
    def format(self) -> Format:
        if self._format is None:
            self._format = self._agreed()
        return self._format

    def bounds(self) -> dict[str, Bounds]:
        with self._transaction("DEFERRED") as connection:
            found = connection.execute('SELECT name, start, "end" FROM partitions ORDER BY name').fetchall()
        return {name: Bounds(start, end) for name, start, end in found}

    def read(self, partition: str, start: int, stop: int, *, max_bytes: int = 16 << 20) -> pa.Table:
        with self._transaction("DEFERRED") as connection:
            query = 'SELECT id, start, "end" FROM partitions WHERE name = ?'
            number, *held = connection.execute(query, (partition,)).fetchone() or (None, 0, 0)
            refuse_gone(self.path, partition, start, Bounds(*held))
            found = _found(connection, (number, start, stop), max_bytes)
        return unpack(partition, found, start, stop, max_bytes) if found else empty(partition)

    def append(self, messages: Mapping[str, pa.Table]) -> None:
        format = self.format
        packed = {partition: pack(table, format) for partition, table in messages.items()}  # before others must wait
        with self._transaction("IMMEDIATE") as connection:
            now = self._clock()
            for partition, parts in packed.items():
                connection.execute("INSERT OR IGNORE INTO partitions (name) VALUES (?)", (partition,))
                query = 'SELECT id, "end" FROM partitions WHERE name = ?'
                number, end = connection.execute(query, (partition,)).fetchone()
                for part in parts:
                    row = (
                        number,
                        end + part.last,
                        end,
                        _micros(now),
                        part.lengths,
                        part.rows,
                        part.size,
                        part.payloads,
                    )
                    connection.execute("INSERT INTO batches VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
                    end += part.taken
                connection.execute('UPDATE partitions SET "end" = ? WHERE id = ?', (end, number))
            if self.options.retention:
                _trim(connection, now - self.options.retention)

    def trim(self, before: datetime.datetime) -> None:
        with self._transaction("IMMEDIATE") as connection:
            _trim(connection, before)

    @contextlib.contextmanager
    def _transaction(self, kind: str) -> Iterator[sqlite3.Connection]:
        assert self.format  # the file and the URI agree on it
        with self._file.transaction(kind) as connection:
            yield connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        for statement in _CATALOG:
            connection.execute(statement)
        connection.execute("INSERT INTO log VALUES (?)", (self.options.format or "json",))

    def _agreed(self) -> Format:
        """The file's format, once it is the URI's and the URI's partitions are there."""
        wanted = {str(number) for number in range(self.options.partitions)}
        with self._file.transaction("DEFERRED") as connection:
            (format,) = connection.execute("SELECT format FROM log").fetchone()
            missing = wanted - {name for (name,) in connection.execute("SELECT name FROM partitions")}
        if self.options.format not in (None, format):
            raise UserError(
                f"log {self.path}: holds {format} messages, its URI says format={self.options.format}; "
                f"say format={format}, or name another file"
            )
        if missing:
            with self._file.transaction("IMMEDIATE") as connection:
                names = [(name,) for name in sorted(missing, key=int)]
                connection.executemany("INSERT OR IGNORE INTO partitions (name) VALUES (?)", names)
        return format  # type: ignore[no-any-return]


def _reopen(path: str, options: Options, clock: Clock, timeout: float) -> SqliteLog:
    return SqliteLog(path, options, clock=clock, timeout=timeout)


def _micros(time: datetime.datetime) -> int:
    return (time - _EPOCH) // datetime.timedelta(microseconds=1)


def _found(connection: sqlite3.Connection, wanted: tuple[int | None, int, int], max_bytes: int) -> list[Found]:
    """The rows of the file that hold messages of a partition at [start, stop), enough for so many bytes."""
    query = (
        "SELECT start, published, lengths, rows, size, payloads FROM batches"
        " WHERE partition = ? AND last >= ? AND start < ? ORDER BY last"
    )
    found: list[Found] = []
    with contextlib.closing(connection.execute(query, wanted)) as rows:
        for row in rows:
            found.append(Found(*row))
            max_bytes -= found[-1].size
            if max_bytes < 0:
                break
    return found


def _trim(connection: sqlite3.Connection, before: datetime.datetime) -> None:
    query = "SELECT last, published FROM batches WHERE partition = ? ORDER BY last"
    for (number,) in connection.execute("SELECT id FROM partitions").fetchall():
        gone = None
        with contextlib.closing(connection.execute(query, (number,))) as rows:
            for last, published in rows:
                if published >= _micros(before):
                    break
                gone = last
        if gone is not None:
            connection.execute("DELETE FROM batches WHERE partition = ? AND last <= ?", (number, gone))
            first = "SELECT start FROM batches WHERE partition = ?1 ORDER BY last LIMIT 1"
            moved = f'UPDATE partitions SET start = coalesce(({first}), "end") WHERE id = ?1'
            connection.execute(moved, (number,))
