"""Columns as a source has them to the columns a schema declares, value by value only where a batch fails.

A value converts when nothing is lost: text that reads as the type, a whole float to an int, any width of int, times of
any unit to µs UTC (digits past µs are cut). A time without offset needs ``Column(timezone=)``. Years run 1 to 9999.
"""

import dataclasses
import datetime
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.transforms.payloads import Rows, positions, salvage
from pipelines.transforms.schema import UTC_MICROS, Field

SOURCE = pa.field("_source", pa.dictionary(pa.int32(), pa.string()))
OFFSET = pa.field("_offset", pa.int64())
RAW = pa.field("_raw", pa.large_binary())
EXTRA = pa.field("_extra", pa.string())

_FIRST = int(datetime.datetime(1, 1, 1, tzinfo=datetime.UTC).timestamp()) * 1_000_000
_LAST = (int(datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC).timestamp()) + 1) * 1_000_000 - 1
_DAY = 86_400_000_000
_EXACT = 2.0**53


@dataclasses.dataclass(frozen=True)
class Fault:
    """Rows whose value of one column cannot be taken, and why: "invalid int in n", "naive time in at" …"""

    rows: Rows
    reason: str


def conform(values: pa.ChunkedArray, field: Field) -> tuple[pa.ChunkedArray, list[Fault]]:
    """The column in the field's type, null where a value cannot be taken; zero-copy when the type is right already.

    >>> from pipelines.transforms.schema import RowSchema
    >>> class Row:
    ...     n: int
    >>> column, faults = conform(pa.chunked_array([["1", "x"]]), RowSchema.of(Row).fields[0])
    >>> column.to_pylist(), faults[0].reason, faults[0].rows.tolist()
    ([1, None], 'invalid int in n', [1])
    """
    faults: list[Fault] = []
    if values.type != field.type:
        converter = _converter(values.type, field)
        column = _convert(values, converter, field)
        faults += _lost(values, column, field)
    else:
        column = values
    if pa.types.is_temporal(field.type):
        column, far = _in_years(column, field)
        faults += far
    return column, faults


def convertible(source: pa.DataType, field: Field) -> bool:
    """Whether values of a source type may become the field's at all."""
    return source == field.type or _converter(source, field) is not None


def type_name(kind: pa.DataType) -> str:
    """The type as the user wrote it in the row class."""
    for test, name in _NAMES:
        if test(kind):
            return name
    return str(kind)


_NAMES: tuple[tuple[Callable[[pa.DataType], bool], str], ...] = (
    (pa.types.is_boolean, "bool"),
    (pa.types.is_integer, "int"),
    (pa.types.is_floating, "float"),
    (pa.types.is_decimal, "Decimal"),
    (pa.types.is_timestamp, "datetime"),
    (pa.types.is_date, "date"),
    (lambda kind: _is_text(kind), "str"),
    (lambda kind: _is_bytes(kind), "bytes"),
    (pa.types.is_struct, "object"),
    (lambda kind: pa.types.is_list(kind) or pa.types.is_large_list(kind), "list"),
)

Converter = Callable[[pa.Array], pa.Array]


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or pa.types.is_binary_view(kind)
    )


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _converter(source: pa.DataType, field: Field) -> Converter | None:
    """How a whole array converts, raising ArrowInvalid when a value does not; None when no value could."""
    to = field.type
    if pa.types.is_dictionary(source):
        inner = source.value_type
        if inner == to:
            return lambda values: values.cast(to)
        converter = _converter(inner, field)
        return converter and (lambda values: converter(values.cast(inner)))
    if pa.types.is_null(source):
        return lambda values: values.cast(to)
    if _is_text(source):
        return None if pa.types.is_nested(to) else _from_text(field)
    if pa.types.is_timestamp(to):
        return _from_time(source, field)
    allowed = (
        (_is_number(source) and _is_number(to))
        or ((_is_bytes(source) or _is_text(source)) and (_is_bytes(to) or _is_text(to)))
        or (pa.types.is_temporal(source) and pa.types.is_date(to))
        or (pa.types.is_nested(source) and pa.types.is_nested(to))
    )
    if not allowed:
        return None
    if pa.types.is_floating(source) and pa.types.is_decimal(to):
        return lambda values: values.cast(pa.decimal128(38, to.scale))
    return lambda values: values.cast(to)


def _from_time(source: pa.DataType, field: Field) -> Converter | None:
    if pa.types.is_date(source):
        return None if field.column.timezone is None else lambda values: _zoned(values.cast(pa.timestamp("us")), field)
    if not pa.types.is_timestamp(source):
        return None
    if source.tz is None:
        return None if field.column.timezone is None else lambda values: _zoned(_micros(values, None), field)
    return lambda values: _micros(values, "UTC")


def _micros(values: pa.Array, zone: str | None) -> pa.Array:
    # Only nanoseconds lose digits, and only those past µs; any other unit must not overflow in silence.
    return values.cast(pa.timestamp("us", zone), safe=values.type.unit != "ns")


def _zoned(values: pa.Array, field: Field) -> pa.Array:
    """Local times to UTC. The hour that occurs twice is taken the first time; one that does not occur is an error."""
    return pc.assume_timezone(values, field.column.timezone, ambiguous="earliest", nonexistent="raise").cast(UTC_MICROS)


def _from_text(field: Field) -> Converter:
    to = field.type
    if pa.types.is_timestamp(to) and field.column.timezone is not None:
        return lambda values: _zoned(values.cast(pa.timestamp("us")), field)
    if pa.types.is_floating(to):
        return _float
    return lambda values: values.cast(to)


def _float(values: pa.Array) -> pa.Array:
    numbers = values.cast(pa.float64())
    infinite = pc.is_inf(numbers)
    if pc.any(infinite).as_py():
        spelt = pc.match_substring(values, "inf", ignore_case=True)
        if not pc.all(pc.or_(pc.invert(infinite), spelt)).as_py():
            raise pa.ArrowInvalid("a number too large for a float")
    return numbers


def _convert(values: pa.ChunkedArray, converter: Converter | None, field: Field) -> pa.ChunkedArray:
    if converter is None:
        return pa.chunked_array([pa.nulls(len(values), field.type)])
    chunks = []
    for chunk in values.chunks:
        try:
            chunks.append(converter(chunk))
        except (pa.ArrowInvalid, OverflowError):
            chunks.append(_rescue(chunk, converter, field))
    return pa.chunked_array(chunks, field.type)


def _rescue(values: pa.Array, converter: Converter, field: Field) -> pa.Array:
    """As much of the array as converts. Bad values repeat (``-``, ``unknown``), so each distinct one is tried once."""
    if pa.types.is_nested(values.type):
        return salvage(values, converter, field.type)
    encoded = values if pa.types.is_dictionary(values.type) else values.dictionary_encode()
    distinct = encoded.dictionary
    if _is_text(distinct.type) and not (_is_text(field.type) or _is_bytes(field.type)):
        found = _rescue_text(distinct, converter, field)
    else:
        found = salvage(distinct, converter, field.type)
    return found.take(encoded.indices)


def _rescue_text(distinct: pa.Array, converter: Converter, field: Field) -> pa.Array:
    tidy = pc.replace_substring_regex(pc.utf8_trim_whitespace(distinct), r"^\+([\d.])", r"\1")
    if pa.types.is_timestamp(field.type):
        tidy = pc.replace_substring_regex(tidy, r"(\.\d{6})\d+", r"\1")
    found = salvage(tidy, converter, field.type)
    if pa.types.is_integer(field.type):
        found = pc.coalesce(found, salvage(tidy, _whole, field.type))
    if pa.types.is_timestamp(field.type) and field.column.timezone is not None:
        found = pc.coalesce(found, salvage(tidy, lambda values: values.cast(UTC_MICROS), field.type))
    return found


def _whole(values: pa.Array) -> pa.Array:
    """Whole numbers written as floats (``517.0``), as far as a float holds every int."""
    numbers = _float(values)
    if pc.any(pc.greater(pc.abs(numbers), _EXACT)).as_py():
        raise pa.ArrowInvalid("past the integers a float holds")
    return numbers.cast(pa.int64())


def _lost(values: pa.ChunkedArray, column: pa.ChunkedArray, field: Field) -> list[Fault]:
    if column.null_count == values.null_count and not pa.types.is_dictionary(values.type):
        return []
    rows = positions(pc.and_(column.is_null(), values.is_valid()))
    if not len(rows):
        return []
    if pa.types.is_timestamp(field.type):
        naive = _naive(values.take(pa.array(rows)), field)
        parts = ((rows[naive], f"naive time in {field.name}"), (rows[~naive], f"invalid datetime in {field.name}"))
        return [Fault(some, reason) for some, reason in parts if len(some)]
    return [Fault(rows, f"invalid {type_name(field.type)} in {field.name}")]


def _naive(values: pa.ChunkedArray, field: Field) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which of the refused values are times that only lack an offset."""
    if field.column.timezone is not None or not _is_text(values.type):
        return np.full(len(values), pa.types.is_temporal(values.type) and field.column.timezone is None)
    plain = salvage(values.combine_chunks(), lambda array: array.cast(pa.timestamp("us")), pa.timestamp("us"))
    return np.asarray(plain.is_valid())


def _in_years(column: pa.ChunkedArray, field: Field) -> tuple[pa.ChunkedArray, list[Fault]]:
    """Times that Python, Delta and SQLite can all hold: the years 1 to 9999."""
    days = pa.types.is_date(field.type)
    numbers = column.cast(pa.int32() if days else pa.int64())  # no copy
    first, last = (_FIRST // _DAY, _LAST // _DAY) if days else (_FIRST, _LAST)
    span = pc.min_max(numbers)
    if span["min"].as_py() is None or (span["min"].as_py() >= first and span["max"].as_py() <= last):
        return column, []
    far = pc.fill_null(pc.or_(pc.less(numbers, first), pc.greater(numbers, last)), False)
    cleared = pc.if_else(far, pa.scalar(None, field.type), column)
    return cleared, [Fault(positions(far), f"time out of range in {field.name}")]
