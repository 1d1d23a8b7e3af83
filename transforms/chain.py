"""Running the steps: a chain of stages over batches of rows; each stage is one DuckDB query or one Python function.

A stage's query gives every row back with a status, so one pass finds what is kept, filtered and refused. An expression
that fails (a cast, an overflow, a division by zero) fails the query; only then the batch runs again with ``TRY`` around
every expression, and the rows that failed are refused.
"""

import dataclasses
import datetime
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.transforms import conservation, query
from pipelines.transforms.conform import RAW
from pipelines.transforms.deadletters import DEAD_LETTERS, refuse
from pipelines.transforms.errors import DataRefused, UserError
from pipelines.transforms.lateness import EXPIRES, WATERMARK
from pipelines.transforms.protect import KEYS, Cipher, Key, pseudonym_keys

FILTERED = -1
"""The status of a filtered row; null: kept; 0 and more: the index of the reason that refused it."""

BOOKKEEPING = ("_source", "_offset")
"""What every row carries along; of a log also WATERMARK."""

ROW = "_row"
"""What a row carries through the stages instead: its number in the batch. From it come position and payload."""

FAILURES = (duckdb.ConversionException, duckdb.OutOfRangeException, duckdb.InvalidInputException, duckdb.DataError)
"""What DuckDB raises when an expression fails in a row."""


YEARS = (100, 9899)
"""The years of event times, so that their windows lie within the years 1 to 9999, which every place can hold."""

_EPOCH, _DAY = datetime.date(1970, 1, 1), 86_400_000_000
FIRST, _PAST = ((datetime.date(year, 1, 1) - _EPOCH).days * _DAY for year in (YEARS[0], YEARS[1] + 1))


@dataclasses.dataclass(frozen=True)
class Reason:
    """Why a stage refuses a row. detail: the rule, for a person. stop: such a row ends the run."""

    step: str
    reason: str
    detail: str
    stop: bool = False


@dataclasses.dataclass(frozen=True)
class Miss:
    """A boolean column that a query adds: true where a look-up found nothing."""

    column: str
    dimension: str
    reason: str


@dataclasses.dataclass(frozen=True)
class SqlStage:
    """SQL steps in a row, as one query.

    sql: from ``batch`` and tables ``dim_<name>`` to the stage's columns, ``_row``, ``_status`` and miss columns.
    safe: the same with TRY. part: whose tallies these are: "source", "exploded" once an Explode made other rows of
    them, or "view:<name>". alias: the stage only adds event_time, equal to this column, where every value of that is
    one. dimensions: whose tables it joins. keyed: it makes pseudonyms.
    """

    sql: str
    safe: str
    reasons: tuple[Reason, ...] = ()
    misses: tuple[Miss, ...] = ()
    part: str = "source"
    alias: str | None = None
    dimensions: tuple[str, ...] = ()
    keyed: bool = False


@dataclasses.dataclass(frozen=True)
class PythonStage:
    """A function of the whole batch: as many rows, in the same order, with exactly the columns of ``schema``."""

    function: Callable[[pa.Table], pa.Table]
    schema: pa.Schema
    label: str


Stage = SqlStage | PythonStage


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a chain made of a batch. dead: DEAD_LETTERS. tallies: TALLY."""

    rows: pa.Table
    dead: pa.Table
    tallies: pa.Table


@dataclasses.dataclass(frozen=True)
class Chain:
    """The stages of a pipeline's shared steps, or of one view's own.

    schema: the columns of the rows that come out, without bookkeeping. pipeline and format: for dead letters. shared:
    these are the steps of all views, so the source rows that they keep are counted (before an Explode multiplies them).
    """

    stages: tuple[Stage, ...]
    schema: pa.Schema
    pipeline: str
    format: str = "json"
    shared: bool = True

    @property
    def dimensions(self) -> tuple[str, ...]:
        """The names of the dimensions that these steps look up."""
        stages = (stage for stage in self.stages if isinstance(stage, SqlStage))
        return tuple(dict.fromkeys(name for stage in stages for name in stage.dimensions))

    @property
    def keyed(self) -> bool:
        """Whether these steps make pseudonyms."""
        return any(isinstance(stage, SqlStage) and stage.keyed for stage in self.stages)

    def run(
        self,
        batch: pa.Table,
        dimensions: Mapping[str, pa.Table],
        cipher: Cipher | None = None,
        key: Callable[[], Key] = Key.load,
    ) -> Outcome:
        """cipher: encrypts the payloads of dead letters. key: where pseudonyms have theirs from.

        Raises DataRefused for a row that a rule says must stop the run.
        """
        carried = [name for name in (*BOOKKEEPING, WATERMARK.name) if name in batch.column_names]
        columns = [name for name in batch.column_names if name not in (*carried, RAW.name, EXPIRES.name)]
        rows = batch.select(columns).append_column(ROW, pa.array(np.arange(len(batch), dtype=np.int32)))
        dead, tallies, kept, same = [DEAD_LETTERS.empty_table()], [], None, True
        for stage in self.stages:
            if kept is None and isinstance(stage, SqlStage) and stage.part != "source":
                kept = len(rows)
            if isinstance(stage, PythonStage):
                rows = _call(stage, rows, shown=cipher is None)
                continue
            if stage.alias and timely(rows[stage.alias]):
                rows = _aliased(rows, stage.alias)
                continue
            keys = {KEYS: pseudonym_keys(key())} if stage.keyed else {}
            same = False
            answer = _query(stage, rows, {**{f"dim_{name}": dimensions[name] for name in stage.dimensions}, **keys})
            status = answer["_status"]
            if status.null_count < len(answer):
                dead.append(self._refuse(stage, answer, batch, cipher))
                tallies += _counts(stage, status)
                answer = answer.filter(pc.is_null(status))
            tallies += _misses(stage, answer)
            rows = answer.drop_columns(["_status", *(miss.column for miss in stage.misses)])
        if self.shared:
            tallies.append(conservation.tally("source", "kept", len(rows) if kept is None else kept))
        places = batch.select(carried) if same else batch.select(carried).take(rows[ROW])
        names = self.schema.names
        rows = pa.table([*rows.select(names).columns, *places.columns], [*names, *carried])
        return Outcome(rows, pa.concat_tables(dead), conservation.merge(tallies))

    def tried(self) -> "Chain":
        """The same steps with every expression in TRY from the start: for rows of which some are known to fail."""
        safe = (dataclasses.replace(s, sql=s.safe) if isinstance(s, SqlStage) else s for s in self.stages)
        return dataclasses.replace(self, stages=tuple(safe))

    def _refuse(self, stage: SqlStage, answer: pa.Table, batch: pa.Table, cipher: Cipher | None) -> pa.Table:
        bad = answer.select([ROW, "_status"]).filter(pc.greater_equal(answer["_status"], 0))
        if not len(bad):
            return DEAD_LETTERS.empty_table()
        reasons = [stage.reasons[code] for code in bad["_status"].to_pylist()]
        refused = batch.take(bad[ROW])
        for row, reason in enumerate(reasons):
            if reason.stop:
                where = f"{refused['_source'][row]} at {refused['_offset'][row]}"
                rule = f"{reason.reason.removesuffix(' failed')} ({reason.detail})"
                ends = "Check(on_fail='stop') ends the run"
                raise DataRefused(f"{self.pipeline}, {reason.step}: {rule} failed for {where}; {ends}")
        return refuse(
            refused,
            pipeline=self.pipeline,
            step=pa.array([reason.step for reason in reasons]),
            reason=pa.array([reason.reason for reason in reasons]),
            detail=pa.array([reason.detail for reason in reasons]),
            format=self.format,
            cipher=cipher,
        )


def _query(stage: SqlStage, batch: pa.Table, others: Mapping[str, pa.Table]) -> pa.Table:
    tables = {"batch": batch, **others}
    try:
        try:
            return query.run(stage.sql, tables)
        except FAILURES:
            return query.run(stage.safe, tables)
    except duckdb.NotImplementedException as error:  # what TRY does not catch: an unknown time zone
        said = str(error).split("\n")[0].removeprefix("Not implemented Error: ")
        steps = ", ".join(dict.fromkeys(reason.step for reason in stage.reasons))
        raise DataRefused(f"{steps}: {said} Refuse such a row by a Check in a step before") from None


def timely(times: pa.ChunkedArray) -> bool:
    """Whether each can be an event time: not null, and within YEARS."""
    ends = pc.min_max(times.cast(pa.int64()))  # a view
    return not times.null_count and (not len(times) or FIRST <= ends["min"].as_py() <= ends["max"].as_py() < _PAST)


def _aliased(rows: pa.Table, column: str) -> pa.Table:
    return rows.append_column("event_time", rows[column])


def _counts(stage: SqlStage, status: pa.ChunkedArray) -> list[pa.Table]:
    counts = {pair["values"]: pair["counts"] for pair in status.drop_null().value_counts().to_pylist()}
    tallies = []
    for code, n in counts.items():
        if code == FILTERED:
            tallies.append(conservation.tally(stage.part, "filtered", n))
        else:
            tallies.append(conservation.tally(stage.part, "rejected", n, stage.reasons[code].reason))
    return tallies


def _misses(stage: SqlStage, rows: pa.Table) -> list[pa.Table]:
    counts = ((miss, pc.sum(rows[miss.column]).as_py() or 0) for miss in stage.misses)
    return [conservation.tally(f"dimension:{miss.dimension}", "unmatched", n, miss.reason) for miss, n in counts]


def _call(stage: PythonStage, rows: pa.Table, *, shown: bool) -> pa.Table:
    """shown: whether errors may show values: not those of a source with personal columns."""
    try:
        answer = stage.function(rows.drop_columns(ROW))
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[1:2]
        where = "".join(f" at {Path(at.filename).name}:{at.lineno}" for at in frame)
        said = f": {' '.join(str(error).split())}" if shown else ""
        raise UserError(f"{stage.label}: its function failed{where}: {type(error).__name__}{said}") from error
    if not isinstance(answer, pa.Table) or len(answer) != len(rows):
        what = f"{len(answer)} rows for {len(rows)}" if isinstance(answer, pa.Table) else f"a {type(answer).__name__}"
        raise UserError(f"{stage.label}: its function returned {what}; give a pyarrow.Table of the same rows")
    columns = [_column(stage, answer, field, shown=shown) for field in stage.schema]
    return pa.table([*columns, rows[ROW]], [*stage.schema.names, ROW])


def _column(stage: PythonStage, answer: pa.Table, field: pa.Field, *, shown: bool) -> pa.ChunkedArray:
    if field.name not in answer.column_names:
        raise UserError(f"{stage.label}: its function returned no column {field.name!r}, only {answer.column_names}")
    try:
        return answer[field.name].cast(field.type)
    except pa.ArrowException as error:
        said = f": {error}" if shown else f" but {answer[field.name].type}"
        raise UserError(f"{stage.label}: its column {field.name} is not {field.type}{said}") from None
