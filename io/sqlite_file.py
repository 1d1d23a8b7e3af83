"""One SQLite file that many processes share: settings, a connection a thread, transactions, what can go wrong."""

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pipelines.transforms.errors import UserError

_SETTINGS = (
    "synchronous = FULL",  # a commit survives a power cut
    "secure_delete = OFF",  # removing rows writes no zeros
    "cache_size = -32768",  # KiB
    "journal_size_limit = 67108864",  # the log shrinks to this after a large commit
)

_PATIENCE = 3
"""ms within which SQLite looks twice whether a writer is done."""

_FAULTS = {
    "SQLITE_NOTADB": "not a SQLite database; name another file",
    "SQLITE_CANTOPEN": "cannot be opened; check that its folder exists and may be written",
    "SQLITE_READONLY": "cannot be written; check its permissions and that it was not moved",
    "SQLITE_PERM": "cannot be opened; check its permissions",
    "SQLITE_FULL": "no space left; free some and run again",
    "SQLITE_IOERR": "cannot be read or written; check the disk's space and health",
    "SQLITE_BUSY": "locked by another process for too long; let it finish and run again",
    "SQLITE_CORRUPT": "damaged; remove it and run again to rebuild it",
    "SQLITE_TOOBIG": "a value of 1 GB or more does not fit; leave it out",
}


class SqliteFile:
    """A file of one kind, made (with its folder) at the first use, in write-ahead mode.

    kind: what the user calls it, for messages. application: tells the kinds' files apart, format: a kind's releases.
    prepare: fills a new file, in a transaction. timeout: seconds to wait for another writer. page_size: of a new file.
    A commit is on disk when it returns. Safe with threads and forks.
    """

    def __init__(
        self,
        path: str,
        kind: str,
        *,
        application: int,
        format: int,
        prepare: Callable[[sqlite3.Connection], None],
        timeout: float,
        page_size: int = 4096,
    ) -> None:
        self.path, self.kind, self.application, self.format = path, kind, application, format
        self._prepare, self.timeout, self._page_size = prepare, timeout, page_size
        self._local = threading.local()
        self._connections: list[sqlite3.Connection] = []

    def close(self) -> None:
        """Closes every thread's connection; new ones are opened when the file is used again."""
        for connection in self._connections:
            connection.close()
        self._connections, self._local = [], threading.local()

    @contextlib.contextmanager
    def transaction(self, kind: str) -> Iterator[sqlite3.Connection]:
        """All or nothing; what SQLite finds wrong with the place becomes one line for the user."""
        try:
            connection = self.connection()
            self._begin(connection, kind)
            try:
                yield connection
                connection.execute("COMMIT")
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
        except sqlite3.Error as error:
            name = getattr(error, "sqlite_errorname", None) or ""
            advice = next((text for prefix, text in _FAULTS.items() if name.startswith(prefix)), None)
            if advice is None:
                raise
            raise UserError(f"{self.kind} {self.path}: {advice}") from error

    def _begin(self, connection: sqlite3.Connection, kind: str) -> None:
        """SQLite by itself looks again ever more seldom, so that one of several busy writers waits for seconds."""
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                connection.execute(f"PRAGMA busy_timeout = {_PATIENCE}")
                connection.execute(f"BEGIN {kind}")
                connection.execute(f"PRAGMA busy_timeout = {int(self.timeout * 1000)}")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise

    def connection(self) -> sqlite3.Connection:
        """This thread's."""
        # After a fork the parent's connection must be neither used nor closed: it stays in the list.
        if getattr(self._local, "process", None) != os.getpid():
            self._local.connection, self._local.process = self._open(), os.getpid()
            self._connections.append(self._local.connection)
        return self._local.connection  # type: ignore[no-any-return]

    def _open(self) -> sqlite3.Connection:
        with contextlib.suppress(OSError):  # SQLite says why it cannot open the file
            Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self.path, timeout=self.timeout, isolation_level=None, check_same_thread=False)
        try:
            for setting in (f"page_size = {self._page_size}", *_SETTINGS):
                connection.execute(f"PRAGMA {setting}")
            self._make(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _make(self, connection: sqlite3.Connection) -> None:
        """Makes a new file one of this kind, once, whoever comes first."""
        if _pragma(connection, "user_version") == 0:
            _log_ahead(connection, time.monotonic() + self.timeout)
            connection.execute("BEGIN IMMEDIATE")
            if _pragma(connection, "user_version") == 0:
                connection.execute(f"PRAGMA user_version = {self.format}")
                connection.execute(f"PRAGMA application_id = {self.application}")
                self._prepare(connection)
            connection.execute("COMMIT")
        if _pragma(connection, "application_id") != self.application:
            raise UserError(f"{self.kind} {self.path}: a SQLite file, but not a {self.kind}; name another file")
        if (found := _pragma(connection, "user_version")) != self.format:
            raise UserError(
                f"{self.kind} {self.path}: of format {found}, this release reads {self.format}; name another file"
            )


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return connection.execute(f"PRAGMA {name}").fetchone()[0]  # type: ignore[no-any-return]


def _log_ahead(connection: sqlite3.Connection, deadline: float) -> None:
    """Sets the journal mode. Of several processes at a new file, this statement alone fails instead of waiting."""
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
