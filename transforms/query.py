"""DuckDB in the worker: one SQL text over named Arrow tables, answered as an Arrow table.

A process has one in-memory database, and each thread a cursor of it. Time zone UTC; a division by zero and the
logarithm of a negative number are errors, not infinities, as a row's fault must be seen. A call costs about 1 ms
whatever the size, so one query serves a whole chain.
"""

import dataclasses
import os
import threading
from collections.abc import Mapping

import duckdb
import pyarrow as pa

_local = threading.local()
_lock = threading.Lock()
_database: duckdb.DuckDBPyConnection | None = None
_settings: dict[str, str] = {"threads": "1"}


def configure(*, threads: int | None = None, memory: str | None = None, temp: str | None = None) -> None:
    """Settings of this process's database: DuckDB threads, memory limit (``1GB``), folder to spill to.

    Engines that run many workers keep one thread each; FnApiRunner runs one bundle at a time and may use every core.
    """
    wanted = {"threads": threads and str(threads), "memory_limit": memory, "temp_directory": temp}
    with _lock:
        _settings.update({name: value for name, value in wanted.items() if value})
        if _database is not None:
            _apply(_database)


def cursor() -> duckdb.DuckDBPyConnection:
    """This thread's cursor of the process's database."""
    if getattr(_local, "pid", None) != os.getpid():
        _local.pid, _local.cursor = os.getpid(), _open().cursor()
        _local.cursor.execute("SET TimeZone = 'UTC'; SET ieee_floating_point_ops = false")
    return _local.cursor  # type: ignore[no-any-return]


def _open() -> duckdb.DuckDBPyConnection:
    global _database
    with _lock:
        if _database is None:
            _database = duckdb.connect(":memory:")
            _apply(_database)
        return _database


def _apply(database: duckdb.DuckDBPyConnection) -> None:
    for name, value in _settings.items():
        database.execute(f"SET {name} = '{value}'")


@dataclasses.dataclass(frozen=True)
class Query:
    """A SQL text over tables that are given by name.

    >>> Query("select sum(x) as x from batch").run(batch=pa.table({"x": [1, 2]})).to_pylist()
    [{'x': Decimal('3')}]
    """

    sql: str

    def run(self, **tables: pa.Table) -> pa.Table:
        """The answer as a table. Raises duckdb.Error as DuckDB does: a failing row fails the query."""
        return run(self.sql, tables)


def run(sql: str, tables: Mapping[str, pa.Table]) -> pa.Table:
    """The answer of one query over tables by name. Raises duckdb.Error."""
    connection = cursor()
    for name, table in tables.items():
        connection.register(name, table)
    try:
        return connection.sql(sql).to_arrow_table()
    finally:
        for name in tables:
            connection.unregister(name)
