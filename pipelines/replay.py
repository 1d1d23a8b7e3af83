"""A pipeline's history as the messages of a log, in event-time order: a stream that can be had again, in any disorder.

The history is put in order out of core, so it may be larger than memory. What is sent, in which order and to which
partition, is a function of the definition, the history and the disorder; of the pace only when.
"""

import dataclasses
import datetime
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.io import files
from pipelines.io.log import Format
from pipelines.io.splits import bookkeeping
from pipelines.pace import Pace
from pipelines.transforms import disorder as disorders
from pipelines.transforms import progress, query
from pipelines.transforms.buckets import bucket, cut
from pipelines.transforms.chain import YEARS
from pipelines.transforms.conform import EXTRA, OFFSET, RAW, SOURCE
from pipelines.transforms.decoder import Decoder
from pipelines.transforms.disorder import (
    AGAIN,
    COPY,
    DUE,
    NEVER,
    NUMBER,
    POISON,
    ROW,
    TIME,
    WHEN,
    Disorder,
    Mask,
    Partition,
)
from pipelines.transforms.encode import encode
from pipelines.transforms.lateness import Lateness, live
from pipelines.transforms.order import ordered
from pipelines.transforms.payloads import bare
from pipelines.transforms.poison import poison
from pipelines.transforms.schema import RowSchema
from pipelines.transforms.spill import spill_folder
from pipelines.transforms.windows import Duration, Micros

if TYPE_CHECKING:
    from pipelines.definition import Pipeline

STEP = 1 << 18
"""Rows of the history that are decoded at once."""

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


@dataclasses.dataclass
class Sent:
    """What a partition got. rows: all, in the log's offsets. late: of them, late for every view. duplicates: sent a
    second time. corrupt: bad messages. undecodable: rows that are so in the history."""

    rows: int = 0
    late: int = 0
    duplicates: int = 0
    corrupt: int = 0
    undecodable: int = 0


@dataclasses.dataclass
class Counts:
    """What was sent so far, by partition. total: the rows that there are to send. first, last: the event times of what
    there is, µs; reached: how far it was sent. None before any is known."""

    partitions: dict[str, Sent] = dataclasses.field(default_factory=dict)
    total: int = 0
    first: int | None = None
    last: int | None = None
    reached: int | None = None

    @property
    def sent(self) -> Sent:
        """To all partitions together."""
        return Sent(*map(sum, zip(*map(dataclasses.astuple, self.partitions.values()), strict=True)))


def messages(
    pipeline: "Pipeline",
    history: str | pa.Table,
    disorder: Disorder | None = None,
    *,
    partitions: Sequence[str] = ("0",),
    format: Format = "json",
    start: datetime.datetime | None = None,
    stop: datetime.datetime | None = None,
    pace: Pace | None = None,
    counts: Counts | None = None,
) -> Generator[dict[str, pa.Table]]:
    """What to append to a log, piece by piece: for each partition a table of ``_raw`` and ``_rows``.

    history: files, or a table as files have it. start, stop: the event times [start, stop). counts: is kept up to date
    with what was given.

    Rows go to a partition by their identity, else by the first view's keys, else in turn. A row without an event time
    is sent at the time of the row before it; so is one that cannot be decoded, with the bytes that the history has of
    it (JSON where it has columns). Raises UserError and DataRefused as reading the history does.

    >>> from pipelines.examples.flights import Flight, flights
    >>> from pipelines.testing import example
    >>> history = pa.Table.from_pylist([vars(example(Flight, flight=number)) for number in (7, 8)])
    >>> for piece in messages(flights(), history, Disorder(duplicate=1, seed=3), partitions=["0", "1"]):
    ...     {partition: len(table) for partition, table in piece.items()}
    {'0': 2, '1': 2}
    """
    counts = Counts() if counts is None else counts
    counts.partitions = {name: Sent() for name in partitions}
    replay = _Replay(pipeline, disorder or Disorder(), list(partitions), format, pace or Pace(), counts)
    with spill_folder() as folder:
        rows = replay.rows(history, *map(_micros, (start, stop)))
        yield from replay.messages(ordered(rows, disorders.ORDER, folder))


def written(pipeline: "Pipeline") -> RowSchema:
    """The columns of the messages: those that a run reads of a history."""
    source, columns = pipeline.source, pipeline.plan().columns
    used = (field for field in source.schema.fields if field.name in columns or source.extra != "ignore")
    return dataclasses.replace(source.schema, fields=tuple(used))


@dataclasses.dataclass
class _Replay:
    pipeline: "Pipeline"
    disorder: Disorder
    partitions: list[str]
    format: Format
    pace: Pace
    counts: Counts

    def __post_init__(self) -> None:
        source = self.pipeline.source
        self._schema = written(self.pipeline)
        self._decoder = Decoder(self._schema, self.pipeline.name, source.extra, source.invalid)
        self._waits, allowed = (Duration.fixed(text, text) for text in (source.disorder, source.lateness))
        self._lateness = [Lateness(live(view.window), allowed) for view in self.pipeline.views]
        self._keys = _keys(self.pipeline, self._schema)

    def rows(self, history: str | pa.Table, start: int | None, stop: int | None) -> Iterator[pa.Table]:
        """All that is to be sent, as the history has it: its columns, RAW (the bytes of a row that cannot be decoded),
        and what ``disorder`` needs and adds."""
        first, last = NEVER if start is None else start, -NEVER if stop is None else stop
        number, before = 0, NEVER
        for table in self._tables(history):
            if self.pace.wait(0):
                return
            progress.advance(len(table))
            rows = self._decoded(table, number)
            number += len(rows)
            at = _filled(rows[TIME.name], before)
            before = int(at[-1]) if len(at) else before
            inside = (at >= first) & (at < last)
            if not inside.all():
                rows, at = rows.filter(pa.array(inside)), at[inside]
            rows = self.disorder.of(rows, at, self._waits)
            self._know(rows)
            yield rows

    def _tables(self, history: str | pa.Table) -> Iterator[pa.Table]:
        if isinstance(history, pa.Table):
            source, offset = bookkeeping("rows", 0, len(history))
            yield history.append_column(SOURCE, source).append_column(OFFSET, offset)
            return
        source = self.pipeline.source
        plan = files.plan(history, self._schema, extra=source.extra, invalid=source.invalid)
        progress.expect(plan.rows)
        for split in plan.splits:
            for table in files.read(split):
                yield from (table.slice(at, STEP) for at in range(0, len(table), STEP))

    def _decoded(self, table: pa.Table, first: int) -> pa.Table:
        """The rows of a table, in its order, with RAW, NUMBER, TIME and DUE. first: the number of the first."""
        decoded = self._decoder.decode(table)
        rows, times = decoded.rows, self._times(decoded.rows)
        known = times.is_valid().to_numpy(zero_copy_only=False)
        late = np.where(known, disorders.due(self._lateness, times.fill_null(0).to_numpy(), self._waits), -NEVER)
        offsets = table[OFFSET.name].to_numpy()
        added = {
            RAW: pa.nulls(len(rows), RAW.type),
            NUMBER: pa.array(first + np.searchsorted(offsets, rows[OFFSET.name].to_numpy())),
            TIME: times,
            DUE: pa.array(late),
        }
        rows = rows.drop_columns([name for name in (SOURCE.name, OFFSET.name, RAW.name) if name in rows.column_names])
        schema = pa.schema([*(field.with_nullable(True) for field in rows.schema), *added])
        good = pa.Table.from_arrays([*rows.columns, *added.values()], schema=schema)
        return good if decoded.dead is None else _with(good, decoded.dead, first, offsets)

    def _times(self, rows: pa.Table) -> pa.ChunkedArray:
        """The event times, µs; null where there is none or none that windows take."""
        time = f"TRY(({self.pipeline.plan().event_time})::TIMESTAMPTZ)"
        sql = f"SELECT CASE WHEN year(t) BETWEEN {YEARS[0]} AND {YEARS[1]} THEN epoch_us(t) END AS t"
        return query.run(f"{sql} FROM (SELECT {time} AS t FROM batch)", {"batch": rows})["t"]

    def _know(self, rows: pa.Table) -> None:
        counts, times = self.counts, pc.min_max(rows[TIME.name]).as_py()
        counts.total += len(rows)
        if times["min"] is not None:
            counts.first = times["min"] if counts.first is None else min(counts.first, times["min"])
            counts.last = times["max"] if counts.last is None else max(counts.last, times["max"])

    def messages(self, rows: Iterable[pa.Table]) -> Iterator[dict[str, pa.Table]]:
        """rows: all, in the order of sending. Before the first of them is there, all times are known."""
        partitions: list[Partition] = []
        for piece in self.pace.of(map(self._within, rows)):
            if not partitions:
                last = NEVER if self.counts.last is None else self.counts.last
                partitions = [Partition(last) for _ in self.partitions]
            taken = {part: partitions[part].take(of) for part, of in self._routed(piece)}
            self.counts.reached = piece[WHEN.name][-1].as_py()
            if given := self._given(taken):
                yield given
        if not self.pace.wait(0):
            left = ((part, of.rest()) for part, of in enumerate(partitions))
            rest = {part: (rows, np.zeros(len(rows), np.bool_)) for part, rows in left if rows is not None}
            if given := self._given(rest):
                yield given

    def _within(self, rows: pa.Table) -> pa.Table:
        """WHEN within the known times: nobody waits for what lies outside."""
        first, last = self.counts.first or 0, self.counts.last or 0
        when = np.clip(rows[WHEN.name].to_numpy(), first, last)
        return rows.set_column(rows.schema.get_field_index(WHEN.name), WHEN, pa.array(when))

    def _routed(self, rows: pa.Table) -> list[tuple[int, pa.Table]]:
        n = len(self.partitions)
        numbers = rows[NUMBER.name].to_numpy() % n
        if self._keys:
            decoded = rows[RAW.name].is_null().to_numpy(zero_copy_only=False)
            numbers = np.where(decoded, bucket(rows, self._keys, n), numbers)
        return cut(rows, numbers, n)

    def _given(self, taken: Mapping[int, tuple[pa.Table, Mask]]) -> dict[str, pa.Table]:
        """The messages of each partition's rows. Counts them."""
        given = {}
        for part, (rows, late) in taken.items():
            if len(rows):
                name, copies = self.partitions[part], rows[COPY.name].to_numpy()
                own = rows[RAW.name].is_valid().to_numpy(zero_copy_only=False)
                sent = self.counts.partitions[name]
                sent.rows += len(rows)
                sent.late += int(late.sum())
                sent.duplicates += int((copies == AGAIN).sum())
                sent.corrupt += int((copies >= POISON).sum())
                sent.undecodable += int((own & (copies == ROW)).sum())
                given[name] = self._messages(rows, own, copies)
        return given

    def _messages(self, rows: pa.Table, own: Mask, copies: Micros) -> pa.Table:
        """One message a row, in order; in format arrow many rows, and behind them what must stand alone."""
        bad = copies >= POISON
        if self.format == "arrow":
            alone = np.flatnonzero(own | bad)
            some = self._encoded(rows.filter(pa.array(~(own | bad)))) if len(alone) else self._encoded(rows)
            others = [self._alone(rows.slice(row, 1), own[row : row + 1], copies[row : row + 1]) for row in alone]
            return pa.concat_tables([some, *others])
        if not own.any():
            encoded = self._encoded(rows)
        else:
            encoded = self._encoded(rows.filter(pa.array(~own)))
            order = np.empty(len(rows), np.int64)
            order[~own], order[own] = np.arange(len(encoded)), np.arange(len(encoded), len(rows))
            encoded = pa.concat_tables([encoded, _messages(rows[RAW.name].drop_null())]).take(pa.array(order))
        if not bad.any():
            return encoded
        return self._poisoned(encoded, bad, copies)

    def _alone(self, row: pa.Table, own: Mask, copies: Micros) -> pa.Table:
        message = _messages(row[RAW.name]) if own[0] else self._encoded(row)
        return self._poisoned(message, copies >= POISON, copies) if copies[0] >= POISON else message

    def _poisoned(self, messages: pa.Table, bad: Mask, copies: Micros) -> pa.Table:
        raw = messages[RAW.name].combine_chunks()
        pairs = zip(raw.filter(pa.array(bad)).to_pylist(), copies[bad] - POISON, strict=True)
        values = [poison(message, int(kind), self._schema, self.format) for message, kind in pairs]
        return _messages(pc.replace_with_mask(raw, pa.array(bad), pa.array(values, RAW.type)))

    def _encoded(self, rows: pa.Table) -> pa.Table:
        found = encode(rows.select(self._schema.names).cast(self._schema.arrow), self._schema, self.format)
        if self.format != "json" or EXTRA.name not in rows.column_names or rows[EXTRA.name].null_count == len(rows):
            return found
        sql = "SELECT CASE WHEN e IS NULL THEN r ELSE r[:-2] || ',' || e[2:] END AS r FROM batch"
        texts = pa.table({"r": found[RAW.name].cast(pa.large_string()), "e": rows[EXTRA.name]})
        return _messages(query.run(sql, {"batch": texts})["r"].cast(RAW.type))


def _with(good: pa.Table, dead: pa.Table, first: int, offsets: Micros) -> pa.Table:
    """The rows and the dead letters of one table, in its order."""
    places = first + np.searchsorted(offsets, dead["offset"].to_numpy())
    given = {
        RAW.name: bare(dead["payload"].cast(RAW.type)),
        NUMBER.name: pa.array(places),
        DUE.name: pa.array(np.full(len(dead), -NEVER)),
    }
    columns = [given.get(field.name, pa.nulls(len(dead), field.type)) for field in good.schema]
    every = pa.concat_tables([good, pa.Table.from_arrays(columns, schema=good.schema)])
    return every.take(pa.array(np.argsort(every[NUMBER.name].to_numpy())))


def _filled(times: pa.ChunkedArray, before: int) -> Micros:
    """The times, and for a row without one that of the row before it. before: of the row before the first."""
    if not times.null_count:
        return times.to_numpy()  # type: ignore[no-any-return]
    known = times.is_valid().to_numpy(zero_copy_only=False)
    places = np.maximum.accumulate(np.where(known, np.arange(1, len(times) + 1), 0))
    found: Micros = np.concatenate([[before], times.fill_null(0).to_numpy()])[places]
    return found


def _messages(raw: pa.Array | pa.ChunkedArray) -> pa.Table:
    return pa.table({RAW.name: raw, "_rows": pa.array(np.ones(len(raw), np.int32))})


def _keys(pipeline: "Pipeline", schema: RowSchema) -> list[str]:
    """The columns whose values choose a partition."""
    single = [field.name for field in schema.fields if not pa.types.is_nested(field.type)]
    named = (pipeline.source.identities, *(view.by for view in pipeline.views[:1]))
    found = ([name for name in names if name in single] for names in named)
    return next(filter(None, found), [])


def _micros(time: datetime.datetime | None) -> int | None:
    return None if time is None else (time - _EPOCH) // datetime.timedelta(microseconds=1)
