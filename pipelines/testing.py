"""Try a definition on a few rows, without Beam: what a user's own tests call.

The rows are evaluated whole, and again shuffled and cut into pieces; if the answers differ, the definition is not fit
for batches and streams (an ``Apply`` that looks beyond its row, for one) and the run fails.
"""

import dataclasses
import datetime
import decimal
import math
import os
import random
import types
import typing
import zoneinfo
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import pyarrow as pa

from pipelines.definition import Pipeline
from pipelines.sql import Plan
from pipelines.transforms import conservation, query
from pipelines.transforms.chain import BOOKKEEPING
from pipelines.transforms.conform import OFFSET, SOURCE
from pipelines.transforms.deadletters import DEAD_LETTERS, refuse
from pipelines.transforms.decoder import Decoder
from pipelines.transforms.errors import UserError
from pipelines.transforms.expressions import nearest, quote
from pipelines.transforms.identity import deduplicate
from pipelines.transforms.lookup import unique
from pipelines.transforms.protect import Key
from pipelines.transforms.schema import UTC_MICROS, RowSchema
from pipelines.transforms.view import ViewPlan

Row = TypeVar("Row")

_PIECES = 4
_EPOCH = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)
_PLAIN: dict[Any, Any] = {
    str: "x",
    bytes: b"x",
    bool: False,
    int: 1,
    float: 1.0,
    decimal.Decimal: decimal.Decimal(1),
    datetime.datetime: _EPOCH,
    datetime.date: _EPOCH.date(),
}
_PYTHON: dict[pa.DataType, tuple[type, ...]] = {
    pa.string(): (str,),
    pa.binary(): (bytes,),
    pa.bool_(): (bool,),
    pa.int64(): (int,),
    pa.float64(): (float, int),
    pa.date32(): (datetime.date,),
    UTC_MICROS: (datetime.datetime,),
}


@dataclasses.dataclass(frozen=True)
class Result:
    """What a definition made of rows. views: answers by name, without states, in key order. rejected: DEAD_LETTERS, in
    the clear. rows: the cleaned rows. counts: read, kept, filtered, rejected, late, duplicate."""

    views: Mapping[str, pa.Table]
    rejected: pa.Table
    rows: pa.Table
    counts: Mapping[str, int]


def example(row: type[Row], **values: Any) -> Row:
    """An object of the row class: the given values, and plain ones for the rest (None where it may be).

    >>> class Reading:
    ...     sensor: str
    ...     celsius: float | None
    >>> vars(example(Reading, sensor="a"))
    {'sensor': 'a', 'celsius': None}
    """
    fields = typing.get_type_hints(row)
    for name in values:
        if name not in fields:
            raise UserError(f"{row.__name__} has no field {name!r}.{nearest(name, fields)} It has: {', '.join(fields)}")
    filled = {name: values[name] if name in values else _plain(hint) for name, hint in fields.items()}
    if dataclasses.is_dataclass(row) or issubclass(row, tuple | dict):
        return row(**filled)
    made = row.__new__(row)
    vars(made).update(filled)
    return made


def _plain(hint: Any) -> Any:
    if typing.get_origin(hint) is list:
        return []
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return None
    return _PLAIN[hint] if hint in _PLAIN else example(hint)


def run(
    pipeline: Pipeline, rows: Iterable[Any] | pa.Table, *, dimensions: Mapping[str, Iterable[Any] | pa.Table] = {}
) -> Result:
    """Runs a definition in batch over rows: objects or mappings with the row class's fields, or a table as files have.

    dimensions: the rows of each dimension by name; one that is not given is empty. Without a key in the environment
    pseudonyms are made with a key for tests. Raises AssertionError when the answer depends on how rows are cut or
    ordered; UserError for a row that does not fit its class; and whatever a run raises.
    """
    for name in dimensions:
        known = [dimension.name for dimension in pipeline.dimensions]
        if name not in known:
            raise UserError(f"{pipeline.name} looks up no dimension {name!r}.{nearest(name, known)}")
    tables = {d.name: _dimension(d.name, d.schema, dimensions.get(d.name, ())) for d in pipeline.dimensions}
    tables = {d.name: unique(d.name, d.key, d.valid_from, tables[d.name]) for d in pipeline.dimensions}
    given = _positioned(_table(pipeline.source.schema, rows))
    key = (lambda: Key(bytes(32))) if not {"PIPELINES_KEY", "PIPELINES_KEY_FILE"} & os.environ.keys() else Key.load
    evaluation = _Evaluation(pipeline, pipeline.plan(), tables, key)
    whole = evaluation.of([given])
    if len(given) > 1:
        _same(whole, evaluation.of(_shuffled(given)), pipeline.name)
    return whole.result()


def _shuffled(table: pa.Table) -> list[pa.Table]:
    """The rows in another order, in pieces."""
    order = random.Random(len(table)).sample(range(len(table)), len(table))
    step = math.ceil(len(table) / _PIECES)
    return [table.take(order[at : at + step]) for at in range(0, len(table), step)]


def _dimension(name: str, schema: RowSchema, rows: Iterable[Any] | pa.Table) -> pa.Table:
    decoded = Decoder(schema, name).decode(_positioned(_table(schema, rows)))
    if decoded.dead is not None:
        first = decoded.dead.slice(0, 1).to_pylist()[0]
        raise UserError(f"dimension {name}, row {first['offset']}: {first['detail']}")
    return decoded.rows.select(schema.names)


@dataclasses.dataclass(frozen=True)
class _Evaluated:
    """rows and exploded views have bookkeeping, so that they can be put in order."""

    views: Mapping[str, pa.Table]
    rejected: pa.Table
    rows: pa.Table
    counts: Mapping[str, int]

    def result(self) -> Result:
        return Result(self.views, self.rejected, self.rows.drop_columns(list(BOOKKEEPING)), self.counts)


@dataclasses.dataclass(frozen=True)
class _Evaluation:
    pipeline: Pipeline
    plan: Plan
    dimensions: Mapping[str, pa.Table]
    key: Callable[[], Key]

    def of(self, batches: Sequence[pa.Table]) -> _Evaluated:
        """What the batches give, in the order of the graph."""
        source = self.pipeline.source
        decoder = Decoder(source.schema, self.pipeline.name, source.extra, source.invalid)
        decoded = [decoder.decode(batch) for batch in batches]
        good, dead = [part.rows for part in decoded], [part.dead for part in decoded if part.dead is not None]
        tallies = [conservation.tally("source", "read", sum(map(len, batches)))]
        tallies += [conservation.tally("source", "rejected", len(part)) for part in dead]
        if source.identities:
            good, undated, missing = self._dated(good)
            good, conflicts, counted = self._first(good)
            dead, tallies = [*dead, *undated, conflicts], [*tallies, *missing, *counted]
        outcomes = [self.plan.chain.run(part, self.dimensions, None, self.key) for part in good]
        dead += [outcome.dead for outcome in outcomes]
        tallies += [outcome.tallies for outcome in outcomes]
        rows = [outcome.rows for outcome in outcomes]
        views = {view.name: self._view(view, rows, dead) for view in self.plan.views}
        counts = conservation.Conservation.of(conservation.merge(tallies))
        assert not counts.violations(), counts.violations()
        names = [*self.plan.chain.schema.names, *BOOKKEEPING]
        cleaned = [part.select(names).cast(pa.schema([*self.plan.chain.schema, SOURCE, OFFSET])) for part in rows]
        rejected = pa.concat_tables([DEAD_LETTERS.empty_table(), *dead])
        return _Evaluated(
            views,
            _ordered(rejected, ("source", "offset")),
            _ordered(pa.concat_tables(cleaned), BOOKKEEPING) if cleaned else self._empty(),
            counts.rows,
        )

    def _empty(self) -> pa.Table:
        return pa.schema([*self.plan.chain.schema, SOURCE, OFFSET]).empty_table()

    def _dated(self, batches: list[pa.Table]) -> tuple[list[pa.Table], list[pa.Table], list[pa.Table]]:
        """Every batch without the rows that have no event time; their dead letters; tallies."""
        parts = [self.plan.dating.split(batch, "json") for batch in batches]
        refused = [outcome for _, outcome in parts if outcome is not None]
        return [rows for rows, _ in parts], [one.dead for one in refused], [one.tallies for one in refused]

    def _first(self, batches: list[pa.Table]) -> tuple[list[pa.Table], pa.Table, list[pa.Table]]:
        """Every batch without the rows that are there already; conflicts; tallies."""
        source = self.pipeline.source
        if not batches:
            return [], DEAD_LETTERS.empty_table(), []
        found = deduplicate(pa.concat_tables(batches), source.identities, source.columns)
        conflicts = refuse(
            found.conflicts,
            pipeline=self.pipeline.name,
            step="dedupe",
            reason="conflict",
            detail=found.details,
            format="json",
        )
        tallies = [
            conservation.tally("source", "duplicate", found.duplicates),
            conservation.tally("source", "rejected", len(conflicts), "conflict"),
        ]
        step = max(1, len(batches[0]))
        cuts = range(0, max(1, len(found.rows)), step)
        return [found.rows.slice(at, step) for at in cuts], conflicts, tallies

    def _view(self, plan: ViewPlan, rows: list[pa.Table], dead: list[pa.Table]) -> pa.Table:
        if plan.chain is not None:
            outcomes = [plan.chain.run(part, self.dimensions, None, self.key) for part in rows]
            dead += [outcome.dead for outcome in outcomes]
            rows = [outcome.rows for outcome in outcomes]
        parts = [plan.tried(part) for part in rows]
        dead += [refused.dead for _, refused in parts if refused is not None]
        merged = plan.merged([plan.merged([states]) for states, _ in parts])
        return _ordered(plan.finished(merged).select(plan.columns), (*plan.by, "window_start"))


def _ordered(table: pa.Table, by: Sequence[str]) -> pa.Table:
    """The rows by these columns, then by all."""
    if len(table) < 2:
        return table
    every = ", ".join(f"{quote(name)} NULLS FIRST" for name in dict.fromkeys([*by, *table.column_names]))
    return query.run(f"SELECT * FROM batch ORDER BY {every}", {"batch": table}).cast(table.schema)


def _positioned(table: pa.Table) -> pa.Table:
    source = pa.array(["rows"] * len(table), pa.string()).dictionary_encode().cast(SOURCE.type)
    return table.append_column(SOURCE, source).append_column(OFFSET, pa.array(range(len(table)), OFFSET.type))


def _table(schema: RowSchema, rows: Iterable[Any] | pa.Table) -> pa.Table:
    """Rows as a source has them: each field's column under its path."""
    if isinstance(rows, pa.Table):
        return rows
    given = list(rows)
    for number, row in enumerate(given):
        for name in row if isinstance(row, Mapping) else ():
            if name not in schema.names:
                raise UserError(f"row {number}: {schema.name} has no field {name!r}.{nearest(name, schema.names)}")
    columns = {}
    for field in schema.fields:
        zone = field.column.timezone
        cells = [
            _cell(_of(row, field.name, f"row {n}"), field.type, f"row {n}, {field.name}", zone)
            for n, row in enumerate(given)
        ]
        columns[field.column.path or field.name] = pa.array(cells, field.type)
    return pa.table(columns)


def _of(row: Any, name: str, where: str) -> Any:
    if isinstance(row, Mapping):
        return row.get(name)
    try:
        return getattr(row, name)
    except AttributeError:
        raise UserError(f"{where}: no field {name!r} in {row!r}; make rows with example(Row, …)") from None


def _cell(value: Any, kind: pa.DataType, where: str, zone: str | None) -> Any:
    """The value as Arrow takes it. Raises UserError for one of another type."""
    if value is None:
        return None
    if pa.types.is_struct(kind):
        return {f.name: _cell(_of(value, f.name, where), f.type, f"{where}.{f.name}", zone) for f in kind}
    accepted = (list, tuple) if pa.types.is_list(kind) else _PYTHON.get(kind, (decimal.Decimal, int))
    # To Python a bool is an int, and a datetime a date.
    odd = any(isinstance(value, narrow) and narrow not in accepted for narrow in (bool, datetime.datetime))
    if odd or not isinstance(value, accepted):
        raise UserError(f"{where}: {value!r} is {type(value).__name__}, not {accepted[0].__name__}")
    if isinstance(value, list | tuple):
        return [_cell(item, kind.value_type, f"{where}[{n}]", zone) for n, item in enumerate(value)]
    if isinstance(value, datetime.datetime) and value.tzinfo is None:
        if zone is None:
            raise UserError(f"{where}: {value!r} has no time zone; add tzinfo=UTC")
        value = value.replace(tzinfo=zoneinfo.ZoneInfo(zone))
    try:
        pa.scalar(value, kind)
    except (pa.ArrowInvalid, OverflowError) as error:
        raise UserError(f"{where}: {value!r}: {error}") from None
    return value


def _same(whole: _Evaluated, other: _Evaluated, name: str) -> None:
    """Raises AssertionError at the first difference."""
    pairs = {f"view {name!r}": (table, other.views[name]) for name, table in whole.views.items()}
    pairs |= {"the rows": (whole.rows, other.rows), "the dead letters": (whole.rejected, other.rejected)}
    why = "so the answer depends on how rows are cut and ordered. Does an Apply look beyond its row?"
    for what, (expected, found) in pairs.items():
        difference = next(_differences(expected, found), None)
        assert difference is None, f"{name}, rows shuffled and cut: {what} {difference}: {why}"
    assert whole.counts == other.counts, f"{name}, rows shuffled and cut: {other.counts}, not {whole.counts}: {why}"


def _differences(expected: pa.Table, found: pa.Table) -> Iterator[str]:
    if len(expected) != len(found):
        yield f"has {len(found)} rows, not {len(expected)}"
    for left, right in zip(expected.to_pylist(), found.to_pylist(), strict=True):
        for name in left:
            if not _equal(left[name], right[name]):
                yield f"has {name}={right[name]!r} in {right}, not {left[name]!r}"


def _equal(left: Any, right: Any) -> bool:
    """Floats within 1e-9, and everything else exactly."""
    if isinstance(left, float) and isinstance(right, float):
        return math.isclose(left, right, rel_tol=1e-9, abs_tol=1e-9) or (math.isnan(left) and math.isnan(right))
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_equal, left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_equal(left[name], right[name]) for name in left)
    return bool(left == right)
