"""Files as a bounded source: Parquet, CSV, JSON Lines, Avro, each also gzip or zip, local or remote, by path or glob.

``plan`` looks at the files once and cuts them into splits; ``read`` gives a split's tables. Nothing here imports Beam;
``pipelines.io.read.ReadFiles`` is the Beam side. Reading is repeatable: the same split gives the same rows, each with
its source and position, so a retry reads nothing twice and nothing less as long as the files do not change.
"""

import dataclasses
import difflib
from collections.abc import Iterator
from typing import Protocol

import pyarrow as pa

from pipelines.io import blocks, rowgroups, text
from pipelines.io.places import File, aside, find
from pipelines.io.splits import Split
from pipelines.transforms.casts import convertible, type_name
from pipelines.transforms.errors import DataRefused, UserError
from pipelines.transforms.payloads import path
from pipelines.transforms.schema import Extra, Field, Invalid, RowSchema

SPLIT = 64 << 20
"""Stored bytes of a split, about."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What there is to read: a History. rows: where every file tells them (Parquet), else None. bytes: of the files, as
    stored."""

    splits: tuple[Split, ...]
    rows: int | None
    bytes: int

    @property
    def format(self) -> str:
        """How the bytes of a refused row are read, one way for all. Raises UserError for files of several formats."""
        formats = {split.format: split.file.source for split in self.splits}
        if len(formats) > 1:
            (one, first), (other, second), *_ = formats.items()
            raise UserError(
                f"{first} is {one}, {second} is {other}; a history has one format: name fewer files or convert some"
            )
        return next(iter(formats), "json")

    def read(self, split: Split) -> Iterator[pa.Table]:
        return read(split)


class Opened(Protocol):
    """A file whose header or footer was read. columns: name to type, None where only the rows know."""

    @property
    def file(self) -> File: ...
    @property
    def columns(self) -> dict[str, pa.DataType] | None: ...
    def splits(self, wanted: tuple[str, ...], step: int) -> list[Split]: ...


def plan(
    uri: str, schema: RowSchema, *, extra: Extra = "ignore", invalid: Invalid = "reject", split_bytes: int = SPLIT
) -> Plan:
    """The splits of a URI's files (``data/*.parquet``, ``s3://b/p/*.csv.gz``, ``flights.csv.zip?null=NA``).

    Raises UserError for what the user can mend: a path that is missing, unreadable or empty, a glob without a match,
    bytes of another format, a damaged file, a column that a file lacks or has in a type that cannot become the declared
    one. A nullable column may lack in some files, not in all. Raises DataRefused for an unknown column with
    ``extra="stop"``.
    """
    files = aside(lambda file: _open(file, schema), find(uri))
    known = [opened.columns for opened in files if opened.columns is not None]
    for opened in files:
        if opened.columns is not None:
            _check(opened.file, opened.columns, known, schema, extra, invalid)
    splits = [split for opened in files for split in opened.splits(_wanted(opened, schema, extra), split_bytes)]
    rows = [split.rows for split in splits]
    total = None if None in rows else sum(row for row in rows if row is not None)
    return Plan(tuple(splits), total, sum(split.bytes for split in splits))


def read(split: Split) -> Iterator[pa.Table]:
    """The tables of a split: raw (`_source`, `_offset`, `_raw`) for text, else typed columns, `_source`, `_offset`."""
    if split.format == "parquet":
        return rowgroups.read(split)
    return blocks.read(split) if split.format == "avro" else text.read(split)


def _open(file: File, schema: RowSchema) -> Opened:
    if file.format == "parquet":
        return rowgroups.RowGroups.of(file)
    return blocks.Blocks.of(file) if file.format == "avro" else text.Text.of(file, schema)


def _wanted(opened: Opened, schema: RowSchema, extra: Extra) -> tuple[str, ...]:
    if opened.columns is None:
        return ()
    if extra != "ignore":
        return tuple(opened.columns)
    return tuple(path(field) for field in schema.fields if _type(opened.columns, field) is not None)


def _type(columns: dict[str, pa.DataType], field: Field) -> pa.DataType | None:
    """The type a file has for the field, by name or step by step into structs."""
    where = path(field)
    if where in columns:
        return columns[where]
    first, *rest = where.split(".")
    kind = columns.get(first)
    for name in rest:
        if kind is None or not pa.types.is_struct(kind) or kind.get_field_index(name) < 0:
            return None
        kind = kind.field(name).type
    return kind if rest else None


def _check(
    file: File,
    columns: dict[str, pa.DataType],
    known: list[dict[str, pa.DataType]],
    schema: RowSchema,
    extra: Extra,
    invalid: Invalid,
) -> None:
    for field in schema.fields:
        kind = _type(columns, field)
        if kind is None:
            if not field.nullable or all(_type(other, field) is None for other in known):
                raise _missing(file, columns, schema, field)
        elif not convertible(kind, field) and invalid != "null":
            declared = f"{schema.name} declares {type_name(field.type)}{_hint(kind, field)}"
            raise UserError(f"{file.source}: column {path(field)} is {kind}, {declared}")
    unknown = [name for name in columns if name not in {path(field).partition(".")[0] for field in schema.fields}]
    if extra == "stop" and unknown:
        raise DataRefused(f"{file.source}: column {unknown[0]} is not in {schema.name} (Source(extra='stop'))")


def _hint(kind: pa.DataType, field: Field) -> str:
    if pa.types.is_temporal(kind) and pa.types.is_timestamp(field.type):
        return " with an offset: name the zone of its times, Column(timezone='UTC')"
    return ""


def _missing(file: File, columns: dict[str, pa.DataType], schema: RowSchema, field: Field) -> UserError:
    names = {name.lower(): name for name in columns}
    nearest = difflib.get_close_matches(path(field).lower(), names, 1)
    hint = f" Nearest: {names[nearest[0]]}." if nearest else ""
    return UserError(
        f"{file.source}: no column {path(field)!r}, which {schema.name} declares.{hint} Columns: {', '.join(columns)}"
    )
