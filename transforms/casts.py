"""One column's values in another type, value by value only where a batch fails; null where a value does not convert.

A value converts when nothing is lost: text that reads as the type, a whole float to an int, an int of any width, times
of any unit to µs UTC (digits past µs are cut). A time without offset needs ``Column(timezone=)``: there the hour that
occurs twice is taken the first time, and one that does not occur is no time. Numbers never become times, nor text.
"""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.transforms.payloads import salvage
from pipelines.transforms.schema import UTC_MICROS, Field

Converter = Callable[[pa.Array], pa.Array]

_EXACT = 2.0**53 - 1
"""Every int from minus here to below is a float of its own."""


def is_text(kind: pa.DataType) -> bool:
    """Whether values are text, however it is laid out."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def is_bytes(kind: pa.DataType) -> bool:
    """Whether values are bytes, however they are laid out."""
    fixed = pa.types.is_fixed_size_binary(kind) or pa.types.is_binary_view(kind)
    return bool(fixed or pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def is_list(kind: pa.DataType) -> bool:
    """Whether values are lists, however they are laid out."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


_NAMES: tuple[tuple[Callable[[pa.DataType], bool], str], ...] = (
    (pa.types.is_boolean, "bool"),
    (pa.types.is_integer, "int"),
    (pa.types.is_floating, "float"),
    (pa.types.is_decimal, "Decimal"),
    (pa.types.is_timestamp, "datetime"),
    (pa.types.is_date, "date"),
    (is_text, "str"),
    (is_bytes, "bytes"),
    (is_list, "list"),
)


def type_name(kind: pa.DataType) -> str:
    """The type as the user wrote it in the row class."""
    return next((name for test, name in _NAMES if test(kind)), "object")


def convertible(source: pa.DataType, field: Field) -> bool:
    """Whether values of a source type may become the field's at all."""
    to = field.type
    if is_list(source) and is_list(to):
        return convertible(source.value_type, _child(field, to.value_field))
    if pa.types.is_struct(source) and pa.types.is_struct(to):
        inner = ((source.field(child.name), child) for child in to if source.get_field_index(child.name) >= 0)
        return all(convertible(found.type, _child(field, child)) for found, child in inner)
    return bool(source == to) or _converter(source, field) is not None


def _child(field: Field, child: pa.Field) -> Field:
    return Field(f"{field.name}.{child.name}", child.type, child.nullable, field.column)


def cast(values: pa.Array, field: Field) -> pa.Array:
    """The values in the field's type (not nested), null where one does not convert."""
    if values.type == field.type:
        return values
    converter = _converter(values.type, field)
    if converter is None:
        return pa.nulls(len(values), field.type)
    try:
        return converter(values)
    except (pa.ArrowInvalid, OverflowError):
        return _rescue(values, converter, field)


def _converter(source: pa.DataType, field: Field) -> Converter | None:
    """How a whole array converts, raising ArrowInvalid when a value does not; None when no value could."""
    to = field.type
    if pa.types.is_dictionary(source):
        inner = source.value_type
        converter = (lambda values: values) if inner == to else _converter(inner, field)
        return converter and (lambda values: converter(values.cast(inner)))
    if pa.types.is_null(source):
        return lambda values: values.cast(to)
    if pa.types.is_nested(to):
        return None
    if is_text(source):
        return _from_text(field)
    if pa.types.is_timestamp(to):
        return _from_time(source, field)
    same = (
        (_is_number(source) and _is_number(to))
        or (is_bytes(source) and (is_bytes(to) or is_text(to)))
        or (pa.types.is_temporal(source) and pa.types.is_date(to) and not pa.types.is_time(source))
    )
    return (lambda values: values.cast(to)) if same else None


def _from_time(source: pa.DataType, field: Field) -> Converter | None:
    zone = field.column.timezone
    if pa.types.is_date(source):
        return None if zone is None else lambda values: _zoned(values.cast(pa.timestamp("us")), field)
    if not pa.types.is_timestamp(source):
        return None
    if source.tz is None:
        return None if zone is None else lambda values: _zoned(_micros(values, None), field)
    return lambda values: _micros(values, "UTC")


def _micros(values: pa.Array, zone: str | None) -> pa.Array:
    # Only nanoseconds lose digits, and only those past µs; any other unit must not overflow in silence.
    return values.cast(pa.timestamp("us", zone), safe=values.type.unit != "ns")


def _zoned(values: pa.Array, field: Field) -> pa.Array:
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


def readable(text: pa.Array) -> pa.Array:
    """Text (Arrow string) with null where it is not UTF-8, which no reader of typed files checks; else the same array.

    Plain ASCII is told by its greatest byte: 0.2 ms for 1M rows of 12 characters, 2 to 4 ms when it is not.
    """
    offsets = np.frombuffer(text.buffers()[1] or b"", np.int32)[text.offset : text.offset + len(text) + 1]
    data = text.buffers()[2]
    if data is None or not len(text) or offsets[-1] == offsets[0]:
        return text
    if np.frombuffer(data, np.uint8)[offsets[0] : offsets[-1]].max() < 128:
        return text
    found = salvage(text.view(pa.binary()), lambda some: some.cast(pa.string()), pa.string())
    return text if found.null_count == text.null_count else found


def _rescue(values: pa.Array, converter: Converter, field: Field) -> pa.Array:
    """As much of the array as converts. Bad values repeat (``-``, ``unknown``), so each distinct one is tried once."""
    encoded = values if pa.types.is_dictionary(values.type) else values.dictionary_encode()
    distinct = encoded.dictionary
    if pa.types.is_dictionary(values.type):
        converter = _converter(distinct.type, field) or converter
    if is_text(distinct.type) and not (is_text(field.type) or is_bytes(field.type)):
        found = _rescue_text(readable(distinct.cast(pa.string())), converter, field)
    elif pa.types.is_floating(distinct.type) and pa.types.is_integer(field.type):
        found = _integral(distinct, 2.0**63)
    else:
        found = salvage(distinct, converter, field.type)
    return found.take(encoded.indices)


_FLOAT = r"(?i)^[-+]?((\d+\.?\d*|\.\d+)(e[-+]?\d+)?|inf(inity)?|nan(\(.*\))?)$"
_NAIVE = r"\d{4}-\d{2}-\d{2}([ T]\d{2}(:?\d{2}(:?\d{2}(\.\d{1,6})?)?)?)?"
_LIKELY: tuple[tuple[Callable[[pa.DataType], bool], str], ...] = (
    (pa.types.is_integer, r"(?i)^-?(0*\d{1,19}|0x[0-9a-f]{1,16})$"),
    (pa.types.is_floating, _FLOAT),
    (pa.types.is_decimal, _FLOAT),
    (pa.types.is_boolean, r"(?i)^(true|false|0|1)$"),
    (pa.types.is_date, r"^\d{4}-\d{2}-\d{2}$"),
    (pa.types.is_timestamp, f"^{_NAIVE} ?(Z|[-+]\\d{{2}}(:?\\d{{2}})?)$"),
)
"""What Arrow's own casts take, and little else: where each row has a bad value of its own, trying them all is slow."""


def _rescue_text(distinct: pa.Array, converter: Converter, field: Field) -> pa.Array:
    tidy = _tidy(distinct)
    likely = next(pattern for test, pattern in _LIKELY if test(field.type))
    if pa.types.is_timestamp(field.type):
        found = _tried(tidy, likely, lambda some: some.cast(UTC_MICROS), UTC_MICROS)
        if field.column.timezone is not None:
            found = pc.coalesce(found, _tried(tidy, f"^{_NAIVE}$", converter, UTC_MICROS))
        return found
    found = _tried(tidy, likely, converter, field.type)
    if pa.types.is_integer(field.type):
        found = pc.coalesce(found, _integral(_tried(tidy, _FLOAT, _float, pa.float64()), _EXACT))
    return found


def _tidy(values: pa.Array) -> pa.Array:
    """Text without what no value needs: space around it, a plus sign, digits of a second past µs."""
    plain = pc.replace_substring_regex(pc.utf8_trim_whitespace(values), r"^\+([\d.])", r"\1")
    return pc.replace_substring_regex(plain, r"(:\d{2}\.\d{6})\d+", r"\1")


def _tried(values: pa.Array, likely: str, converter: Converter, to: pa.DataType) -> pa.Array:
    fits = pc.match_substring_regex(values, likely)
    return salvage(pc.if_else(fits, values, pa.scalar(None, values.type)), converter, to)


def _integral(numbers: pa.Array, bound: float) -> pa.Array:
    """Whole floats (``517.0``) from -bound to below bound as ints; null for others."""
    inside = pc.and_(pc.greater_equal(numbers, -bound), pc.less(numbers, bound))
    whole = pc.and_(pc.equal(pc.floor(numbers), numbers), inside)
    return pc.if_else(whole, numbers, pa.scalar(None, numbers.type)).cast(pa.int64())


def lacks_offset(values: pa.Array, field: Field) -> pa.BooleanArray:
    """Which values are times that only lack an offset, for a field that names no zone."""
    if field.column.timezone is None and is_text(values.type):
        micros = pa.timestamp("us")
        return _tried(
            _tidy(readable(values.cast(pa.string()))), f"^{_NAIVE}$", lambda some: some.cast(micros), micros
        ).is_valid()
    naive = pa.types.is_date(values.type) or (pa.types.is_timestamp(values.type) and values.type.tz is None)
    return pa.repeat(pa.scalar(naive and field.column.timezone is None), len(values))
