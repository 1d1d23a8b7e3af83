"""How one generation of a view lies in a SQLite table: its SQL, and Arrow rows to records and back.

The table is clustered by key. A key's null is kept as an empty blob (empty text in a binary column), as a primary key
has no null. Two columns are added: ``_version``, and ``_deleted`` (a deleted row keeps its key and version).
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from pipelines.io import cells
from pipelines.io.store import StoreConflict
from pipelines.transforms.errors import UserError
from pipelines.transforms.expressions import quote
from pipelines.transforms.ranges import EVERYTHING, Range, Ranges, sql

SLICE = 16_384
"""Rows that are Python objects at a time."""

_WINDOW, _END = "window_start", "window_end"
VERSION = "_version"
_BOOKKEEPING = (VERSION, "_deleted")


@dataclasses.dataclass(frozen=True)
class Layout:
    """One generation of a view: its number, the key's columns, and all columns as stored."""

    view: str
    generation: int
    keys: tuple[str, ...]
    schema: pa.Schema

    @classmethod
    def of(cls, view: str, generation: int, keys: Sequence[str], schema: pa.Schema) -> "Layout":
        """Raises UserError for a type or a name that cannot be stored."""
        plain = pa.schema([(field.name, _value_type(field.type)) for field in schema])
        for field in plain:
            if not cells.storable(field.type):
                raise UserError(f"view {view}: column {field.name} is a {field.type}, which a store cannot hold")
            if field.name in keys and pa.types.is_nested(field.type):
                raise UserError(f"view {view}: key {field.name} is a {field.type}; group by its parts instead")
            if sum(name.lower() == field.name.lower() for name in plain.names) > 1:
                raise UserError(f"view {view}: two columns are named {field.name} but for case; rename one")
        return cls(view, generation, tuple(keys), plain)

    @property
    def table(self) -> str:
        return quote(f"{self.view}#{self.generation}")

    @property
    def values(self) -> tuple[str, ...]:
        return tuple(name for name in self.schema.names if name not in self.keys)

    def refuse_other(self, wanted: "Layout", fix: str) -> None:
        """Raises StoreConflict, naming the first difference, where ``wanted`` is of another definition."""
        was = dict(zip(self.schema.names, map(str, self.schema.types), strict=True))
        now = dict(zip(wanted.schema.names, map(str, wanted.schema.types), strict=True))
        for name in [*was, *now]:
            if was.get(name) != now.get(name):
                stored = f"stored as {was[name]}" if name in was else "not stored"
                raise StoreConflict(f"view {self.view}: column {name} is {now.get(name, 'gone')}, {stored}; {fix}")
        if self.keys != wanted.keys:
            now_by, was_by = ", ".join(wanted.keys), ", ".join(self.keys)
            raise StoreConflict(f"view {self.view}: its keys are {now_by}, stored by {was_by}; {fix}")

    def create(self) -> str:
        # Columns without a declared type: SQLite then keeps every value as it was given.
        columns = [quote(name) for name in (*self.keys, *self.values)]
        columns += [f"{name} INTEGER NOT NULL" for name in _BOOKKEEPING]
        return f"CREATE TABLE {self.table} ({', '.join(columns)}, PRIMARY KEY ({_list(self.keys)})) WITHOUT ROWID"

    def upsert(self, version: int | None, deleted: bool) -> str:
        """version: of every row; None: a record ends with its own."""
        given = self.keys if deleted else (*self.keys, *self.values)
        replaced = (f"{quote(name)} = excluded.{quote(name)}" for name in (*self.values, *_BOOKKEEPING))
        return (
            f"INSERT INTO {self.table} ({_list((*given, *_BOOKKEEPING))})"
            f" VALUES ({'?, ' * len(given)}{'?' if version is None else version}, {deleted:d})"
            f" ON CONFLICT ({_list(self.keys)}) DO UPDATE SET {', '.join(replaced)} WHERE excluded._version > _version"
        )

    def carry_over(self, former: "Layout", replaced: Ranges) -> str:
        """The former generation's rows outside the ranges, at version -1: a row that is written wins over them."""
        names = _list((*self.keys, *self.values))
        return (
            f"INSERT INTO {self.table} SELECT {names}, -1, 0 FROM {former.table}"
            f" WHERE NOT _deleted AND NOT {self._within(replaced)}"
        )

    def prune(self) -> list[str]:
        """What removes the rows of windows that have ended by a time, and deleted ones, without an end, a day later."""
        day = 86_400_000_000
        gone = [f"_deleted AND typeof({_WINDOW}) = 'integer' AND {_WINDOW} < ? - {day}"] if _WINDOW in self.keys else []
        gone += [f"NOT _deleted AND typeof({_END}) = 'integer' AND {_END} <= ?"] if _END in self.schema.names else []
        return [f"DELETE FROM {self.table} WHERE {where}" for where in gone]

    def get(self) -> str:
        return self._select(" AND ".join(f"{quote(key)} = ?" for key in self.keys))

    def scan(self, within: Range) -> str:
        return f"{self._select(self._within((within,)))} ORDER BY {_list(self.keys)}"

    def _select(self, where: str) -> str:
        columns = ", ".join(self._column(name) for name in self.schema.names)
        return f"SELECT {columns} FROM {self.table} WHERE NOT _deleted AND {where}"

    def _column(self, name: str) -> str:
        null = "''" if _is_binary(self.schema.field(name).type) else "x''"
        return f"nullif({quote(name)}, {null})" if name in self.keys else quote(name)

    def _within(self, within: Ranges) -> str:
        if EVERYTHING in within or _WINDOW not in self.keys:
            return "true"
        return f"(typeof({_WINDOW}) <> 'integer' OR {sql(within, _WINDOW)})"

    def records(self, rows: pa.Table, deleted: bool = False) -> Iterator[tuple[Any, ...]]:
        """Rows as records for ``upsert``, in key order: neighbours share a page. Rows may have a ``_version`` each."""
        plain = self._plain(rows, self.keys if deleted else (*self.keys, *self.values))
        if VERSION in rows.column_names:
            plain = plain.append_column(VERSION, rows[VERSION])
        rows = plain.sort_by([(key, "ascending") for key in self.keys])
        for start in range(0, len(rows), SLICE):
            part = rows.slice(start, SLICE)
            yield from zip(*(self._cells(part, name) for name in part.column_names), strict=True)

    def wanted(self, keys: pa.Table) -> Iterator[tuple[Any, ...]]:
        """Keys as records for ``get``, in their order."""
        keys = self._plain(keys, self.keys)
        return zip(*(self._cells(keys, key) for key in self.keys), strict=True)

    def rows(self, slices: Iterable[list[tuple[Any, ...]]]) -> pa.Table:
        """Records of ``get`` or ``scan`` as a table of the schema."""
        batches = []
        for records in slices:
            columns = zip(*records, strict=True) if records else ((),) * len(self.schema)
            arrays = [cells.decode(found, kind) for found, kind in zip(columns, self.schema.types, strict=True)]
            batches.append(pa.record_batch(arrays, schema=self.schema))
        return pa.Table.from_batches(batches, self.schema)

    def _plain(self, rows: pa.Table, names: tuple[str, ...]) -> pa.Table:
        """Exactly these columns. Raises for another type, as a conversion might change a value in silence."""
        rows = rows.select(list(names))
        for field in rows.schema:
            stored = self.schema.field(field.name).type
            if _value_type(field.type) != stored:
                raise TypeError(f"view {self.view}: column {field.name} is {field.type}, the generation's is {stored}")
        return rows.cast(pa.schema([self.schema.field(name) for name in names]))

    def _cells(self, rows: pa.Table, name: str) -> list[Any]:
        column = rows.column(name)
        whole = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        if name not in self.keys:
            return cells.encode(whole)
        found = cells.encode(cells.canonical(whole))
        null: Any = "" if _is_binary(whole.type) else b""
        return [null if cell is None else cell for cell in found] if whole.null_count else found


def _list(names: Iterable[str]) -> str:
    return ", ".join(map(quote, names))


def _value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))
