"""From the messages of one partition to rows with the watermark before each of them. No Beam in here.

The same call serves every engine: a splittable source, the turn of a micro-batch run, and a bounded run over a log.
"""

import dataclasses

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.transforms import query
from pipelines.transforms.chain import FIRST, Chain
from pipelines.transforms.conform import PUBLISHED
from pipelines.transforms.conservation import merge, tally
from pipelines.transforms.deadletters import DEAD_LETTERS, refuse
from pipelines.transforms.lateness import EXPIRES, NEVER, WATERMARK, Lateness, Position, watermarks
from pipelines.transforms.messages import Messages
from pipelines.transforms.protect import Cipher


@dataclasses.dataclass(frozen=True)
class Taken:
    """rows: the row table with WATERMARK and EXPIRES, without the rows that are late for every view. dead:
    DEAD_LETTERS. tallies: TALLY, of source rows read, rejected and late. position: where the partition is read next."""

    rows: pa.Table
    dead: pa.Table
    tallies: pa.Table
    position: Position


@dataclasses.dataclass(frozen=True)
class Dated:
    """rows: the row table. times: their event times (µs), where ``known``: the chain refuses the others. dead:
    DEAD_LETTERS. tallies: TALLY, of source rows read and rejected."""

    rows: pa.Table
    times: npt.NDArray[np.int64]
    known: npt.NDArray[np.bool_]
    dead: pa.Table
    tallies: pa.Table


@dataclasses.dataclass(frozen=True)
class Intake:
    """How a log's messages become rows. event_time: SQL over the source's columns. disorder: µs that the watermark
    waits. ahead: µs that an event time may be past the time at which the log took its message: a later one is refused,
    "event time in the future", and moves no watermark. That rule, too, depends on nothing but the log. rules: of every
    view; a row that is late for all of them is counted as late, and goes no further. guard: refuses the rows without an
    event time (``Dating``); None: they go on, and whoever is to refuse them does.
    """

    messages: Messages
    event_time: str
    disorder: int
    ahead: int
    rules: tuple[Lateness, ...] = ()
    cipher: Cipher | None = None
    guard: Chain | None = None

    def take(self, messages: pa.Table, position: Position) -> Taken:
        """messages: of one partition, in offset order, from ``position`` on."""
        if not len(messages):
            return Taken(messages, DEAD_LETTERS.empty_table(), merge([]), position)
        dated = self.dated(messages)
        rows, dead, tallies = dated.rows, dated.dead, dated.tallies
        times, known = dated.times, dated.known & (dated.times >= FIRST)
        before, greatest = watermarks(times, known, position, self.disorder)
        rows = rows.append_column(WATERMARK, pa.array(before))
        if self.guard is not None and not known.all():
            refused = self.guard.run(rows.filter(pa.array(~known)), {}, self.cipher)
            dead, tallies = pa.concat_tables([dead, refused.dead]), merge([tallies, refused.tallies])
            rows, times, before, known = rows.filter(pa.array(known)), times[known], before[known], known[known]
        expires = np.max([rule.expires(times) for rule in self.rules], axis=0)
        expires[~known] = NEVER
        late = known & (expires <= before)
        rows = rows.append_column(EXPIRES, pa.array(expires))
        return Taken(
            rows.filter(pa.array(~late)) if late.any() else rows,
            dead,
            merge([tallies, tally("source", "late", int(late.sum()))]),
            dataclasses.replace(position, offset=next_offset(messages), greatest=greatest),
        )

    def dated(self, messages: pa.Table) -> Dated:
        """The rows of some messages of one partition that can be read and are not of the future, late or not."""
        decoded = self.messages.decode(messages)
        rows, dead = decoded.rows, [] if decoded.dead is None else [decoded.dead]
        tallies = [tally("source", "read", len(rows) + sum(map(len, dead)))]
        times, known = self._times(rows)
        published = rows[PUBLISHED.name].cast(pa.int64()).to_numpy()
        future = known & (times > published + self.ahead)
        if future.any():
            dead.append(self._refused(rows.filter(pa.array(future))))
            rows, times, known = rows.filter(pa.array(~future)), times[~future], known[~future]
        for letters in dead:
            for count in pc.value_counts(letters["reason"]).to_pylist():
                tallies.append(tally("source", "rejected", count["counts"], count["values"]))
        rows = rows.drop_columns([PUBLISHED.name])
        return Dated(rows, times, known, pa.concat_tables([DEAD_LETTERS.empty_table(), *dead]), merge(tallies))

    def _times(self, rows: pa.Table) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """The event times (µs), and which rows have one; the chain refuses the others."""
        if self.event_time in rows.column_names and pa.types.is_timestamp(rows.schema.field(self.event_time).type):
            times = rows[self.event_time].cast(pa.int64())
        else:
            sql = f"SELECT epoch_us(TRY(({self.event_time})::TIMESTAMPTZ)) AS t FROM batch"
            times = query.run(sql, {"batch": rows})["t"]
        return times.fill_null(0).to_numpy(), times.is_valid().to_numpy(zero_copy_only=False)

    def _refused(self, rows: pa.Table) -> pa.Table:
        return refuse(
            rows,
            pipeline=self.messages.decoder.pipeline,
            step="event time",
            reason="event time in the future",
            detail=f"more than {self.ahead / 1e6:,.0f} s after the log took it (--ahead)",
            format=self.messages.format,
            cipher=self.cipher,
        )


def next_offset(messages: pa.Table) -> int:
    """One past the last row of some messages in order."""
    last = messages.slice(len(messages) - 1)
    return int(last["_offset"][0].as_py() + last["_rows"][0].as_py())
