"""Rows made up from a schema and a seed: for definitions that have no history yet."""

import datetime
import decimal

import numpy as np
import pyarrow as pa

from pipelines.definition import Dimension, Pipeline
from pipelines.transforms.schema import Field, RowSchema
from pipelines.transforms.windows import Duration, Micros

ROWS = 20_000
"""Of a history."""

TEXTS = ("A", "B", "FR", "+33123", "+33456", "x", "É")
"""What texts are drawn from: few, so that keys meet; in upper case mostly and some like telephone numbers, as checks
like these."""

NULLS = 0.1
"""The share of nulls, where they may be."""

_MIDDLE = datetime.datetime(2024, 3, 31, 1, tzinfo=datetime.UTC)  # Europe goes to summer time
_JITTER = 300_000_000
_DAY = 86_400_000_000
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


def history(pipeline: Pipeline, seed: int, n: int | None = None) -> pa.Table:
    """Events as files have them, over a span of time that is long for the pipeline's windows and lateness."""
    source = pipeline.source
    waits = sum(Duration.fixed(text, "Source") for text in (source.disorder, source.lateness))
    spans = [getattr(view.window, "micros", view.window.longest) or 0 for view in pipeline.views]
    span = max(3_600_000_000, 4 * (waits + max(spans, default=0)))
    middle = (_MIDDLE - _EPOCH) // datetime.timedelta(microseconds=1)
    chance = np.random.default_rng(seed % 2**64)
    times = np.sort(chance.integers(middle - span // 2, middle + span // 2, ROWS if n is None else n))
    return _table(source.schema, times, chance, _naming(source.schema, source.identities))


def dimension(of: Dimension, seed: int) -> pa.Table:
    """A dimension of every text but one; where it keeps history, of two versions each."""
    chance = np.random.default_rng(seed % 2**64)
    middle = (_MIDDLE - _EPOCH) // datetime.timedelta(microseconds=1)
    versions = [middle - 100 * 365 * _DAY, middle][: 2 if of.valid_from else 1]
    known = TEXTS[:-1]
    times = np.repeat(versions, len(known))
    rows = _table(of.schema, times, chance, None)
    keys = np.tile(np.arange(len(known)), len(versions))
    for field in of.schema.fields:
        if field.name in of.key:
            place = rows.schema.get_field_index(_path(field))
            rows = rows.set_column(place, _path(field), _key(field, keys))
        elif field.name == of.valid_from:
            place = rows.schema.get_field_index(_path(field))
            rows = rows.set_column(place, _path(field), pa.array(times).cast(field.type))
    return rows


def _key(field: Field, numbers: Micros) -> pa.Array:
    if pa.types.is_string(field.type):
        return pa.array([TEXTS[number] for number in numbers])
    return pa.array(numbers).cast(field.type)


def _naming(schema: RowSchema, identity: tuple[str, ...]) -> Field | None:
    """The column of an identity that tells its rows apart: a number, or else, where there is no time, a text."""
    fields = [field for field in schema.fields if field.name in identity]
    numbers = [field for field in fields if pa.types.is_integer(field.type)]
    if numbers or any(pa.types.is_timestamp(field.type) for field in fields):
        return next(iter(numbers), None)
    return next((field for field in fields if pa.types.is_string(field.type)), None)


def _table(schema: RowSchema, times: Micros, chance: np.random.Generator, naming: Field | None) -> pa.Table:
    columns = {}
    for field in schema.fields:
        if field == naming:
            numbers = np.arange(len(times))
            texts = pa.types.is_string(field.type)
            columns[_path(field)] = pa.array([f"n{n}" for n in numbers]) if texts else pa.array(numbers)
        else:
            columns[_path(field)] = _values(field.type, field.nullable, times, chance)
    return pa.table(columns)


def _path(field: Field) -> str:
    return field.column.path or field.name


def _values(kind: pa.DataType, nullable: bool, times: Micros, chance: np.random.Generator) -> pa.Array:
    """A value for each time: times are near it, everything else is drawn from little."""
    n = len(times)
    mask = chance.random(n) < NULLS if nullable else None
    nulls = None if mask is None else pa.array(mask)
    if pa.types.is_struct(kind):
        parts = [_values(field.type, field.nullable, times, chance) for field in kind]
        return pa.StructArray.from_arrays(parts, fields=list(kind), mask=nulls)
    if pa.types.is_list(kind):
        lengths = chance.integers(0, 4, n)
        items = _values(kind.value_type, kind.value_field.nullable, np.repeat(times, lengths), chance)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        return pa.ListArray.from_arrays(
            pa.array(offsets), items, type=kind, mask=None if mask is None else pa.array(mask)
        )
    if pa.types.is_timestamp(kind):
        return pa.array(times + chance.integers(0, _JITTER, n), mask=mask).cast(kind)
    if pa.types.is_date(kind):
        return pa.array((times // _DAY).astype(np.int32), pa.int32(), mask=mask).cast(kind)
    if pa.types.is_boolean(kind):
        return pa.array(chance.random(n) < 0.5, kind, mask=mask)
    if pa.types.is_floating(kind):
        return pa.array(np.round(chance.uniform(-50, 150, n), 2), kind, mask=mask)
    if pa.types.is_decimal(kind):
        cents = chance.integers(-1_000, 20_000, n).tolist()
        return pa.array([decimal.Decimal(cent).scaleb(-min(kind.scale, 2)) for cent in cents], kind, mask=mask)
    if pa.types.is_integer(kind):
        return pa.array(chance.integers(-5, 120, n), mask=mask).cast(kind)
    return pa.array(np.array(TEXTS)[chance.integers(0, len(TEXTS), n)], pa.string(), mask=mask).cast(kind)
