"""Row classes to Arrow schemas: what a source or a dimension declares about its columns.

A row is any class with annotations (a dataclass, a NamedTuple or a plain class)::

    class Reading:
        sensor: str
        at: datetime
        celsius: Annotated[float | None, Column(unit="°C")]

| Python | Arrow |
|---|---|
| str, bytes, bool | string, binary, bool |
| int, float | int64, float64 |
| Decimal | decimal128(38, Column.scale or 9) |
| date | date32 |
| datetime | timestamp[us, UTC] |
| list[T], a row class | list<T>, struct |
| T or None | the same, nullable |
"""

import dataclasses
import datetime
import decimal
import functools
import types
import typing
import zoneinfo
from typing import Annotated, Any, Literal

import pyarrow as pa

from pipelines.transforms.errors import UserError

UTC_MICROS = pa.timestamp("us", tz="UTC")
SCALE = 9

Extra = Literal["ignore", "keep", "reject", "stop"]
Invalid = Literal["reject", "null", "stop"]
Personal = Literal["name", "email", "phone", "address", "id", "ip", "other"]

RESERVED = ("event_time", "window_start", "window_end")

_SCALARS: dict[type, pa.DataType] = {
    str: pa.string(),
    bytes: pa.binary(),
    bool: pa.bool_(),
    int: pa.int64(),
    float: pa.float64(),
    datetime.datetime: UTC_MICROS,
    datetime.date: pa.date32(),
}


class SchemaError(UserError):
    """A row class that cannot become a schema: says which field, what it has and what it may have."""


@dataclasses.dataclass(frozen=True)
class Column:
    """What a type cannot say about a column; goes into ``Annotated[type, Column(…)]``.

    unit: the unit of measure, for people. personal: the kind of personal value, which is then encrypted in dead
    letters and the lake. path: where the value is in a nested payload (``a.b``). timezone: the IANA zone of naive
    times (else a naive time is refused). scale: decimal places of a Decimal (default 9).
    """

    doc: str = ""
    _: dataclasses.KW_ONLY
    unit: str | None = None
    personal: Personal | None = None
    path: str | None = None
    timezone: str | None = None
    scale: int | None = None

    def __post_init__(self) -> None:
        if self.personal is not None and self.personal not in typing.get_args(Personal):
            raise SchemaError(f"Column(personal={self.personal!r}): one of {', '.join(typing.get_args(Personal))}")
        if self.timezone is not None and self.timezone not in zoneinfo.available_timezones():
            raise SchemaError(f"Column(timezone={self.timezone!r}): not an IANA time zone, such as Europe/Paris")
        if self.scale is not None and not 0 <= self.scale <= 37:
            raise SchemaError(f"Column(scale={self.scale}): 0 to 37 decimal places")


@dataclasses.dataclass(frozen=True)
class Field:
    """One column of a row: its name, Arrow type, whether null is allowed, and its Column."""

    name: str
    type: pa.DataType
    nullable: bool
    column: Column

    @property
    def arrow(self) -> pa.Field:
        return pa.field(self.name, self.type, nullable=self.nullable)


@dataclasses.dataclass(frozen=True)
class RowSchema:
    """The columns of a row class, in order.

    >>> class Reading:
    ...     sensor: str
    ...     celsius: float | None
    >>> RowSchema.of(Reading).arrow.names
    ['sensor', 'celsius']
    """

    name: str
    fields: tuple[Field, ...]

    @staticmethod
    @functools.cache
    def of(row: type) -> "RowSchema":
        """The schema of a row class. Raises SchemaError for a type that has no Arrow counterpart."""
        fields = tuple(_field(row, name, hint) for name, hint in _hints(row).items())
        return RowSchema(row.__name__, fields)

    @functools.cached_property
    def arrow(self) -> pa.Schema:
        return pa.schema([field.arrow for field in self.fields])

    @property
    def names(self) -> list[str]:
        return [field.name for field in self.fields]

    @property
    def personal(self) -> tuple[str, ...]:
        """Names of the columns that hold personal values."""
        return tuple(field.name for field in self.fields if field.column.personal)


def _hints(row: type) -> dict[str, Any]:
    try:
        hints = typing.get_type_hints(row, include_extras=True)
    except NameError as error:
        raise SchemaError(f"row {row.__name__}: {error}; annotations must be importable from its module") from None
    if not hints:
        raise SchemaError(f"row {row.__name__} has no annotated fields; declare them as `name: type`")
    for name in hints:
        if any(other != name and other.lower() == name.lower() for other in hints):
            raise SchemaError(
                f"row {row.__name__}: to SQL another field is {name!r} too; rename it and keep Column(path=…)"
            )
    return hints


def _field(row: type, name: str, hint: Any) -> Field:
    column, nullable = Column(), False
    while typing.get_origin(hint) in (Annotated, typing.Union, types.UnionType):
        if typing.get_origin(hint) is Annotated:
            hint, *extras = typing.get_args(hint)
            column = next((extra for extra in extras if isinstance(extra, Column)), column)
        else:
            hint, nullable = _optional(hint)
            if not nullable:
                break
    if name.startswith("_") or name in RESERVED:
        raise SchemaError(
            f"row {row.__name__}: the name {name!r} is reserved; rename the field (Column(path=…) keeps the payload's)"
        )
    return Field(name, _arrow(hint, column, f"row {row.__name__}, field {name}"), nullable, column)


def _optional(hint: Any) -> tuple[Any, bool]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(hint) if member is not type(None)]
        if len(members) == 1:
            return members[0], True
    return hint, False


def _arrow(hint: Any, column: Column, where: str) -> pa.DataType:
    if hint in _SCALARS:
        return _SCALARS[hint]
    if hint is decimal.Decimal:
        return pa.decimal128(38, SCALE if column.scale is None else column.scale)
    if typing.get_origin(hint) is list:
        item, nullable = _optional(typing.get_args(hint)[0])
        return pa.list_(pa.field("item", _arrow(item, column, where), nullable=nullable))
    if isinstance(hint, type) and typing.get_origin(hint) is None and getattr(hint, "__annotations__", None):
        return pa.struct([field.arrow for field in RowSchema.of(hint).fields])
    raise SchemaError(
        f"{where}: no Arrow type for {hint!r}. "
        "Types: str int float bool bytes Decimal date datetime, list[…], a row class, and any of them | None"
    )
