"""DuckDB in the worker: one SQL text over named Arrow tables, answered as an Arrow table.

A process has one in-memory database of one DuckDB thread, and each thread a cursor of it. Time zone UTC; a division by
zero and the logarithm of a negative number are errors, not infinities, as a row's fault must be seen. A call costs
about 1 ms whatever the size, so one query serves a whole chain.
"""

import os
import threading
import warnings
from collections.abc import Mapping

import duckdb
import pyarrow as pa

FEW = 10_000
"""Rows up to which a query is planned once, though its answer is copied once more: half the cost of a small one."""

RENEWED = 5_000
"""Queries after which the database is opened anew, in 20 ms: of each block of memory that a query has used DuckDB keeps
some 250 bytes, which a live run saw as 50 kB a turn."""

warnings.filterwarnings("ignore", "Arrow output on a DB-API result makes an extra copy")

_local = threading.local()
_lock = threading.Lock()
_database: duckdb.DuckDBPyConnection | None = None
_queries = _opened = 0


def cursor() -> duckdb.DuckDBPyConnection:
    """This thread's cursor of the process's database."""
    global _queries
    _queries += 1  # by several threads: about so many
    if _queries > RENEWED:
        _renew()
    if getattr(_local, "made", None) != (os.getpid(), _opened):
        database, opened = _open()
        _local.made, _local.cursor = (os.getpid(), opened), database.cursor()
        _local.cursor.execute("SET TimeZone = 'UTC'; SET ieee_floating_point_ops = false")
    return _local.cursor  # type: ignore[no-any-return]


def _open() -> tuple[duckdb.DuckDBPyConnection, int]:
    global _database
    with _lock:
        if _database is None:
            _database = duckdb.connect(":memory:", config={"threads": 1})
        return _database, _opened


def _renew() -> None:
    """The next cursors are of another database. This one is closed with the last of its cursors."""
    global _database, _queries, _opened
    with _lock:
        if _queries > RENEWED:
            _database, _queries, _opened = None, 0, _opened + 1


def run(sql: str, tables: Mapping[str, pa.Table]) -> pa.Table:
    """The answer of one query over tables by name. Raises duckdb.Error: a failing row fails the query.

    >>> run("select sum(x) as x from batch", {"batch": pa.table({"x": [1, 2]})}).to_pylist()
    [{'x': Decimal('3')}]
    """
    connection = cursor()
    for name, table in tables.items():
        connection.register(name, table)
    try:
        if sum(map(len, tables.values())) > FEW:
            return connection.sql(sql).to_arrow_table()
        return connection.execute(sql).to_arrow_table()
    finally:
        for name in tables:
            connection.unregister(name)
