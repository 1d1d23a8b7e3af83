"""Columns as a source has them to the columns a schema declares, nested ones part by part, with the faults of each row.

What converts is told in ``pipelines.transforms.casts``. Times and dates lie in the years 1 to 9999, which Python, Delta
and SQLite can all hold.
"""

import dataclasses
import datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.transforms.casts import cast, is_list, lacks_offset, readable, type_name
from pipelines.transforms.payloads import Fault, positions
from pipelines.transforms.schema import UTC_MICROS, Field

SOURCE = pa.field("_source", pa.dictionary(pa.int32(), pa.string()))
OFFSET = pa.field("_offset", pa.int64())
RAW = pa.field("_raw", pa.large_binary())
EXTRA = pa.field("_extra", pa.string())
PUBLISHED = pa.field("_published", UTC_MICROS)

_EPOCH = datetime.date(1970, 1, 1)
_FIRST_DAY = (datetime.date.min - _EPOCH).days
_LAST_DAY = (datetime.date.max - _EPOCH).days
_MICROS = 86_400_000_000


CODES = pa.dictionary(pa.int32(), pa.string())
"""Text as codes: a column of few values in a fraction of the memory."""


def conform(values: pa.ChunkedArray, field: Field, coded: bool = False) -> tuple[pa.ChunkedArray, list[Fault]]:
    """The column in the field's type, null where a value cannot be taken; zero-copy when the type is right already.

    coded: text that comes as CODES stays so.

    >>> from pipelines.transforms.schema import RowSchema
    >>> class Row:
    ...     n: int | None
    >>> column, faults = conform(pa.chunked_array([["1", "x"]]), RowSchema.of(Row).fields[0])
    >>> column.to_pylist(), faults[0].reason, faults[0].rows.tolist()
    ([1, None], 'invalid int in n', [1])
    """
    chunks, faults, at = [], [], 0
    if values.type == CODES and pa.types.is_string(field.type):
        if coded and all(readable(chunk.dictionary).null_count == 0 for chunk in values.chunks):
            missing = Fault(positions(values.is_null()), f"null in {field.name}", missing=True)
            return values, [] if field.nullable or not values.null_count else [missing]
        values = values.cast(field.type)
    for chunk in values.chunks:
        array, found = _conform(chunk, field)
        faults += [dataclasses.replace(fault, rows=fault.rows + at) for fault in found]
        chunks.append(array)
        at += len(chunk)
    return pa.chunked_array(chunks, field.type), faults


def _conform(values: pa.Array, field: Field) -> tuple[pa.Array, list[Fault]]:
    to = field.type
    if is_list(to) and is_list(values.type):
        column, faults = _list(values, field)
    elif pa.types.is_struct(to) and pa.types.is_struct(values.type):
        column, faults = _struct(values, field)
    else:
        column = cast(values, field)
        if pa.types.is_string(to):
            column = readable(column)
        faults = _lost(values, column, field)
    if pa.types.is_timestamp(to) or pa.types.is_date(to):
        column, far = _in_years(column, field)
        faults += far
    if not field.nullable and column.null_count:
        faults.append(Fault(positions(column.is_null()), f"null in {field.name}", missing=True))
    return column, faults


def _list(values: pa.Array, field: Field) -> tuple[pa.Array, list[Fault]]:
    item = field.type.value_field
    inner, faults = _conform(values.flatten(), Field(field.name, item.type, item.nullable, field.column))
    parents = np.asarray(pc.list_parent_indices(values)).astype(np.int64)
    lengths = np.asarray(pc.fill_null(pc.list_value_length(values), 0))
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    mask = values.is_null() if values.null_count else None
    column = pa.ListArray.from_arrays(offsets, inner, type=field.type, mask=mask)
    return column, [dataclasses.replace(fault, rows=np.unique(parents[fault.rows])) for fault in faults]


def _struct(values: pa.Array, field: Field) -> tuple[pa.Array, list[Fault]]:
    parts, faults = [], []
    given = values.flatten()
    there = np.asarray(values.is_valid())
    for child in field.type:
        at = values.type.get_field_index(child.name)
        part = given[at] if at >= 0 else pa.nulls(len(values), child.type)
        inner = Field(f"{field.name}.{child.name}", child.type, child.nullable, field.column)
        array, found = _conform(part, inner)
        parts.append(array)
        for fault in found:
            rows = fault.rows[there[fault.rows]]
            faults += [dataclasses.replace(fault, rows=rows)] if len(rows) else []
    mask = values.is_null() if values.null_count else None
    return pa.StructArray.from_arrays(parts, fields=list(field.type), mask=mask), faults


def _lost(values: pa.Array, column: pa.Array, field: Field) -> list[Fault]:
    if column is values or (column.null_count == values.null_count and not pa.types.is_dictionary(values.type)):
        return []
    valid = values.cast(values.type.value_type).is_valid() if pa.types.is_dictionary(values.type) else values.is_valid()
    rows = positions(pc.and_(column.is_null(), valid))
    if not len(rows):
        return []
    if not pa.types.is_timestamp(field.type):
        return [Fault(rows, f"invalid {type_name(field.type)} in {field.name}")]
    naive = np.asarray(lacks_offset(values.take(pa.array(rows)), field))
    parts = ((rows[naive], f"naive time in {field.name}"), (rows[~naive], f"invalid datetime in {field.name}"))
    return [Fault(some, reason) for some, reason in parts if len(some)]


def _in_years(column: pa.Array, field: Field) -> tuple[pa.Array, list[Fault]]:
    days = pa.types.is_date(field.type)
    numbers = column.cast(pa.int32() if days else pa.int64())  # a view
    first, last = _FIRST_DAY, _LAST_DAY
    if not days:
        first, last = first * _MICROS, (last + 1) * _MICROS - 1
    span = pc.min_max(numbers).as_py()
    if span["min"] is None or (span["min"] >= first and span["max"] <= last):
        return column, []
    far = pc.fill_null(pc.or_(pc.less(numbers, first), pc.greater(numbers, last)), False)
    cleared = pc.if_else(far, pa.scalar(None, field.type), column)
    return cleared, [Fault(positions(far), f"time out of range in {field.name}")]
