"""SQL over the warehouse: its tables under the names ``<pipeline>.<view>`` and ``<pipeline>.events``, read only.

DuckDB reads the tables as Arrow datasets, so only the columns and row groups a query needs are read. The database is in
memory and closed to files and networks: a query can read what it names and write nothing.
"""

import decimal
import difflib
import json
from collections.abc import Iterator
from typing import Any

import duckdb
import fsspec
import pyarrow as pa

from pipelines.definition import Pipeline
from pipelines.io.table import open_table
from pipelines.report import cell, grid, indent
from pipelines.transforms.conform import EXTRA
from pipelines.transforms.errors import UserError
from pipelines.transforms.expressions import quote

SHOWN = 100
SAMPLED = 3


def ask(sql: str, warehouse: str) -> pa.Table:
    """The answer to one SELECT over the warehouse at a URI; times are UTC. Raises UserError for SQL that cannot run."""
    with duckdb.connect(":memory:") as database:
        database.execute("SET TimeZone = 'UTC'")
        for pipeline, view in sorted(_named(database, sql)):
            _open(database, warehouse, pipeline, view)
        database.execute("SET enable_external_access = false")
        database.execute("SET lock_configuration = true")
        try:
            return database.sql(sql).to_arrow_table()
        except duckdb.CatalogException as error:
            known = ", ".join(_tables(warehouse)) or "none yet"
            raise UserError(f"query: {_first(error)} Tables in {warehouse}: {known}") from None
        except duckdb.Error as error:
            raise UserError(f"query: {error}") from None


def as_text(answer: pa.Table) -> str:
    """The first rows as a table for people, and how many more there are."""
    rows = [[cell(value) for value in row.values()] for row in answer.slice(0, SHOWN).to_pylist()]
    text = grid(answer.column_names, rows)
    more = answer.num_rows - SHOWN
    return f"{text}\n… {more:,} rows more (--json prints all)" if more > 0 else text


def as_json(answer: pa.Table) -> str:
    """A JSON array with one object per row. Times as ISO 8601, decimals and bytes as text."""
    return "[" + ",\n ".join(json.dumps(row, default=_plain, ensure_ascii=False) for row in answer.to_pylist()) + "]"


def sample(pipeline: Pipeline, warehouse: str) -> Iterator[str]:
    """The first rows of the pipeline's first view with rows, as lines for the report."""
    for view in pipeline.views:
        keys = ", ".join(["window_start", *map(quote, view.by)])
        name = f"{pipeline.name}.{view.name}"
        answer = ask(f"SELECT * FROM {name} ORDER BY {keys} LIMIT {SAMPLED}", warehouse)
        if answer.num_rows:
            yield f"\n  {name}, first rows\n{indent(as_text(answer))}\n"
            return


def _named(database: duckdb.DuckDBPyConnection, sql: str) -> set[tuple[str, str]]:
    """The tables that a SELECT names with a schema."""
    ((text,),) = database.execute("SELECT json_serialize_sql($1)", [sql]).fetchall()
    tree = json.loads(text)
    if tree["error"]:
        only = "one SELECT, please: " if tree.get("error_type") == "not implemented" else ""
        raise UserError(f"query: {only}{tree['error_message']}")
    tables = (node for node in _nodes(tree) if node.get("type") == "BASE_TABLE" and node["schema_name"])
    return {(table["schema_name"], table["table_name"]) for table in tables}


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    if isinstance(tree, dict):
        yield tree
    for child in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _nodes(child)


def _open(database: duckdb.DuckDBPyConnection, warehouse: str, pipeline: str, view: str) -> None:
    """Registers one table under its name, without the columns of its mergeable state."""
    known = _tables(warehouse)
    if f"{pipeline}.{view}" not in known:
        close = difflib.get_close_matches(f"{pipeline}.{view}", known, n=1, cutoff=0.4)
        there = f"Nearest: {close[0]}" if close else f"Tables: {', '.join(known) or 'none yet'}"
        raise UserError(f"query: no table {pipeline}.{view} in {warehouse}. {there}")
    dataset = open_table(f"{warehouse.rstrip('/')}/{pipeline}/{view}").dataset()
    hidden = f"_{pipeline}_{view}"
    database.register(hidden, dataset)
    columns = ", ".join(quote(name) for name in dataset.schema.names if name == EXTRA.name or not name.startswith("_"))
    database.execute(f"CREATE SCHEMA IF NOT EXISTS {quote(pipeline)}")
    database.execute(f"CREATE VIEW {quote(pipeline)}.{quote(view)} AS SELECT {columns} FROM {quote(hidden)}")


def _tables(warehouse: str) -> list[str]:
    files, path = fsspec.url_to_fs(warehouse)
    found = files.glob(f"{path.rstrip('/')}/*/*/_delta_log")
    return sorted(".".join(folder.rstrip("/").split("/")[-3:-1]) for folder in found)


def _first(error: Exception) -> str:
    return str(error).split("\n")[0].rstrip(".!") + "."


def _plain(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="backslashreplace")
    return str(value) if isinstance(value, decimal.Decimal) else str(value.isoformat())
