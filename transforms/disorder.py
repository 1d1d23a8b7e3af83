"""Seeded disorder: which rows of a history are sent late, twice or out of order, and what is sent between them.

Each is a function of the seed and the number of the row alone, so it does not depend on how rows are cut, and two
replays of one seed are the same. Disorder is only another time to sort by, so it holds for histories past memory.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.transforms.buckets import hashes
from pipelines.transforms.errors import UserError
from pipelines.transforms.lateness import Lateness
from pipelines.transforms.windows import Duration, Micros

NUMBER, COPY = pa.field("_number", pa.int64()), pa.field("_copy", pa.int64())
"""A row's number in its history; and 0 for the row, AGAIN for its repetition, POISON + kind for a bad message."""

TIME, DUE = pa.field("_time", pa.int64()), pa.field("_due", pa.int64())
"""A row's own event time, µs, null where it has none; and the greatest event time from which on it is late."""

WHEN, TARDY = pa.field("_when", pa.int64()), pa.field("_tardy", pa.bool_())
"""The event time that a row is sent at, µs, in which rows are ordered; and whether it is sent to be late."""

ORDER = (WHEN.name, NUMBER.name, COPY.name)
ROW, AGAIN, POISON = 0, 1, 2
KINDS = 4
"""Kinds of bad messages."""

NEVER = -(2**62)
"""Before every event time."""

Mask = npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class Disorder:
    """How a replay differs from the history. shuffle: rows are displaced by up to so much event time. late: the share
    of rows that are sent once they are late for every view. duplicate: the share that is sent twice. corrupt: bad
    messages, as a share of rows. seed: another one disorders other rows. Raises UserError.

    >>> Disorder(shuffle="10m", duplicate=0.05)
    Disorder(shuffle='10m', late=0.0, duplicate=0.05, corrupt=0.0, seed=0)
    """

    shuffle: str = "0s"
    late: float = 0.0
    duplicate: float = 0.0
    corrupt: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        Duration.fixed(self.shuffle, "--shuffle")
        for name, most in (("late", 0.5), ("duplicate", 1.0), ("corrupt", 1.0)):
            share = getattr(self, name)
            if not 0 <= share <= most:
                why = ", as rows are late only after others" if name == "late" else ""
                raise UserError(f"--{name}={share:g}: a share of the rows, from 0 to {most:g}{why}")
        if not -(2**63) <= self.seed < 2**63:
            raise UserError(f"--seed={self.seed}: a whole number of 64 bits")

    def of(self, rows: pa.Table, at: Micros, disorder: int) -> pa.Table:
        """The rows with WHEN, TARDY and COPY, and after them what else is sent. at: each row's place in event time, µs.
        disorder: µs, the source's own: no repetition is later than that for it.

        rows: NUMBER, TIME and DUE, and what is sent.
        """
        numbers = rows[NUMBER.name].to_numpy()
        shuffle = Duration.fixed(self.shuffle, "--shuffle")
        when, due = at + self._some(shuffle, numbers, "shuffle"), rows[DUE.name].to_numpy()
        tardy = self._chosen(self.late, numbers, "late") & rows[TIME.name].is_valid().to_numpy(zero_copy_only=False)
        if tardy.any():
            more = self._draws(numbers[tardy], "delay") * (due[tardy] - at[tardy])
            when[tardy] = due[tardy] + more.astype(np.int64)
        sent = [_sent(rows, when, tardy, np.full(len(rows), ROW))]
        twice = np.flatnonzero(self._chosen(self.duplicate, numbers, "duplicate"))
        if len(twice):
            later = when[twice] + self._some(max(disorder - shuffle, 0), numbers[twice], "repetition")
            sent.append(_sent(rows.take(pa.array(twice)), later, tardy[twice], np.full(len(twice), AGAIN)))
        bad = np.flatnonzero(self._chosen(self.corrupt, numbers, "corrupt"))
        if len(bad):
            kinds = POISON + (self._draws(numbers[bad], "kind") * KINDS).astype(np.int64)
            sent.append(_sent(rows.take(pa.array(bad)), when[bad], np.zeros(len(bad), np.bool_), kinds))
        return pa.concat_tables(sent)

    def _chosen(self, share: float, numbers: Micros, what: str) -> Mask:
        return self._draws(numbers, what) < share if share else np.zeros(len(numbers), np.bool_)

    def _some(self, most: int, numbers: Micros, what: str) -> Micros:
        """Up to so many µs for each row."""
        if not most:
            return np.zeros(len(numbers), np.int64)
        found: Micros = (self._draws(numbers, what) * most).astype(np.int64)
        return found

    def _draws(self, numbers: Micros, what: str) -> npt.NDArray[np.float64]:
        """A number from 0 to 1, exclusive, for each row."""
        constant = pa.table({"seed": [self.seed], "what": [what]})
        start = hashes(constant, ["seed", "what"]).view(np.int64)[0]
        bits = hashes(pa.table({"row": numbers ^ start}), ["row"]) >> np.uint64(11)
        return bits.astype(np.float64) * 2.0**-53


def due(lateness: Sequence[Lateness], times: Micros, disorder: int) -> Micros:
    """The greatest event time of earlier rows from which on a row of each time is late for every view, µs."""
    expires = [rule.expires(times) for rule in lateness]
    last: Micros = np.maximum.reduce(expires) if expires else times
    return -(-last // 1000) * 1000 + disorder  # watermarks are whole ms


class Partition:
    """The rows of one partition in the order they are sent: where those that are to be late have become so.

    last: the greatest event time of all; a row that is not late by then goes where it comes.
    """

    def __init__(self, last: int) -> None:
        self._last, self._greatest = last, NEVER
        self._held: pa.Table | None = None

    def take(self, rows: pa.Table) -> tuple[pa.Table, Mask]:
        """The rows that are sent now, with those held before that are late by now; and which of them are late."""
        held = 0 if self._held is None else len(self._held)
        every = rows if self._held is None else pa.concat_tables([self._held, rows])
        tardy, due = every[TARDY.name].to_numpy(), every[DUE.name].to_numpy()
        tardy = tardy & (due <= self._last)
        if tardy.any():
            greatest = np.maximum(np.maximum.accumulate(np.where(tardy, NEVER, _times(every))), self._greatest)
            at = np.arange(len(every)) * 2
            # Behind the first row that makes it late; where none does yet, it is held.
            at[tardy] = np.maximum(at[tardy], np.searchsorted(greatest, due[tardy]) * 2 + 1)
            waits = at >= 2 * len(every)
            waiting, order = np.flatnonzero(waits), np.argsort(at, kind="stable")
            self._held = every.take(pa.array(waiting)) if len(waiting) else None
            every = every.take(pa.array(order[: len(every) - len(waiting)]))
        else:
            assert not held
        return every, self._late(every)

    def rest(self) -> pa.Table | None:
        """The rows that are held still: nothing came that made them late."""
        rest, self._held = self._held, None
        return rest

    def _late(self, rows: pa.Table) -> Mask:
        if not len(rows):
            return np.zeros(0, np.bool_)
        times = _times(rows)
        greatest = np.maximum.accumulate(np.concatenate([[self._greatest], times]))
        self._greatest = int(greatest[-1])
        late: Mask = (times != NEVER) & (greatest[:-1] >= rows[DUE.name].to_numpy())
        return late


def _times(rows: pa.Table) -> Micros:
    """What each row brings the greatest event time to. A bad message brings nothing."""
    times: Micros = rows[TIME.name].fill_null(NEVER).to_numpy()
    copies = rows[COPY.name].to_numpy()
    return np.where(copies < POISON, times, NEVER) if copies.max(initial=ROW) >= POISON else times


def _sent(rows: pa.Table, when: Micros, tardy: Mask, copies: Micros) -> pa.Table:
    fields = ((WHEN, when), (TARDY, tardy), (COPY, copies))
    for field, values in fields:
        rows = rows.append_column(field, pa.array(values, field.type))
    return rows
