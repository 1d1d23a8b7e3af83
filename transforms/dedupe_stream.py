"""De-duplication of an unbounded PCollection of row tables: what was seen is Beam state that expires by event time."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import apache_beam as beam
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from apache_beam.pvalue import TaggedOutput
from apache_beam.transforms.timeutil import TimeDomain
from apache_beam.transforms.userstate import BagStateSpec, TimerSpec, on_timer
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.timestamp import Timestamp

from pipelines.transforms.buckets import split
from pipelines.transforms.conservation import tally
from pipelines.transforms.dedupe import Repeated
from pipelines.transforms.gathered import Gathered, at_the_end
from pipelines.transforms.protect import Cipher
from pipelines.transforms.seen import Seen, compacted, merged
from pipelines.transforms.tables import TableCoder

_TIER = 4
"""Pieces of a tier that become one of the next: an identity is rewritten once a tier, and not with every batch."""

_NEWEST = beam.DoFn.StateParam(BagStateSpec("newest", TableCoder()))
_NEWER = beam.DoFn.StateParam(BagStateSpec("newer", TableCoder()))
_OLDEST = beam.DoFn.StateParam(BagStateSpec("oldest", TableCoder()))
_FORGET = TimerSpec("forget", TimeDomain.WATERMARK)
_TIMER = beam.DoFn.TimerParam(_FORGET)

_LAST = GlobalWindow().max_timestamp().micros
"""The latest time of a timer."""


@dataclasses.dataclass
class DedupeStream(beam.PTransform):  # type: ignore[misc]
    """Row tables with `_watermark` and `_expires` (int64 µs) to row tables in which no identity is there again while
    it is known: its `_expires` is after the `_watermark` of the row that repeats it. Outputs, all of pa.Table:
    ``rows``, ``dead`` (DEAD_LETTERS, reason "conflict") and ``tallies`` (TALLY: source duplicate, and rejected by
    conflict).

    The first row of an identity wins, in the order in which the runner gives the tables, which is that of offsets as
    long as a partition's tables are read one after the other; within a table, by (_source, _offset). Rows are compared
    by Seen, whose state is about 52 bytes an identity and at most twice what has not expired. State is exactly once
    as the engine's is. In the global window; nothing is held back.

    Needs of the source: a table's timestamp is not later than the least `_watermark` in it, so that the engine's
    watermark, by which state is dropped, cannot pass a row's own.

    >>> rows = pa.table({"id": [1, 1, 1], "_source": ["log"] * 3, "_offset": [0, 1, 2], "_watermark": [10, 20, 90]})
    >>> rows = rows.append_column("_expires", pa.array([50, 60, 130]))
    >>> dedupe = DedupeStream(("id",), ("id",), pipeline="calls", format="json", buckets=1)
    >>> with beam.Pipeline("FnApiRunner") as pipeline:
    ...     once = pipeline | beam.Create([rows]) | dedupe
    ...     _ = once.rows | beam.Map(lambda table: print(table["_offset"].to_pylist()))
    [0, 2]
    """

    identity: tuple[str, ...]
    columns: tuple[str, ...]
    _: dataclasses.KW_ONLY
    pipeline: str
    format: str
    buckets: int = 16
    cipher: Cipher | None = None

    def __post_init__(self) -> None:
        super().__init__()

    def expand(self, rows: beam.PCollection) -> Any:
        repeated = Repeated(self.pipeline, self.format, self.cipher)
        once = beam.ParDo(Once(Seen(self.identity, self.columns), repeated))
        once = once.with_output_types(pa.Table, dead=pa.Table, tallies=pa.Table)
        shares = rows | "split" >> beam.ParDo(_Split(self.identity, self.buckets))
        return shares | "once" >> once.with_outputs("dead", "tallies", main="rows")


@beam.typehints.with_input_types(pa.Table)
@beam.typehints.with_output_types(tuple[int, pa.Table])
class _Split(beam.DoFn):  # type: ignore[misc]
    """Row tables to (bucket, its rows), by a stable hash of the identity: those of a bundle together."""

    def __init__(self, identity: tuple[str, ...], buckets: int) -> None:
        self._identity, self._buckets = identity, buckets

    def start_bundle(self) -> None:
        self._rows = Gathered()

    def process(self, rows: pa.Table) -> Iterator[Any]:
        if (gathered := self._rows.add(rows)) is not None:
            yield from split(gathered, self._identity, self._buckets)

    def finish_bundle(self) -> Iterator[Any]:
        if (gathered := self._rows.take()) is not None:
            yield from map(at_the_end, split(gathered, self._identity, self._buckets))


@beam.typehints.with_input_types(tuple[int, pa.Table])
class Once(beam.DoFn):  # type: ignore[misc]
    """The state of a bucket is pieces in three tiers, and a timer at the median of their expiries: when it fires, half
    of what was held has expired, so dropping it costs an identity O(1)."""

    def __init__(self, seen: Seen, repeated: Repeated) -> None:
        self._seen, self._repeated = seen, repeated

    def process(
        self,
        element: tuple[int, pa.Table],
        newest: Any = _NEWEST,
        newer: Any = _NEWER,
        oldest: Any = _OLDEST,
        forget: Any = _TIMER,
    ) -> Iterator[pa.Table]:
        bags = [newest, newer, oldest]
        tiers = [list(bag.read()) for bag in bags]
        held = [piece for tier in reversed(tiers) for piece in tier]
        rows = element[1]
        found = self._seen.advance(held, rows, rows["_expires"].to_numpy())
        if found.piece is not None:
            _add(found.piece, tiers, bags)
            yield _held(len(found.piece))
            if not held:
                _set(forget, found.piece["expires"].to_numpy())
        yield from self._repeated.outputs(found.duplicates, found.conflicts, found.details)
        if len(found.rows):
            yield found.rows

    @on_timer(_FORGET)  # type: ignore[untyped-decorator]
    def drop(
        self,
        passed: Timestamp = beam.DoFn.TimestampParam,
        newest: Any = _NEWEST,
        newer: Any = _NEWER,
        oldest: Any = _OLDEST,
        forget: Any = _TIMER,
    ) -> Iterator[TaggedOutput]:
        """Drops most of what expired by the time that the watermark has passed."""
        left, dropped = [], 0
        for bag in (newest, newer, oldest):
            pieces = list(bag.read())
            kept = compacted(pieces, passed.micros)
            _replace(bag, pieces, kept)
            left += [piece["expires"].to_numpy() for piece in kept]
            dropped += sum(map(len, pieces)) - sum(map(len, kept))
        yield _held(-dropped)
        if left:
            _set(forget, np.concatenate(left))  # later than passed: most of every piece is


def _held(more: int) -> TaggedOutput:
    return TaggedOutput("tallies", tally("state:identities", "held", more))


def _add(piece: pa.Table, tiers: list[list[pa.Table]], bags: list[Any]) -> None:
    """One more piece of the newest tier. A tier that is full becomes a piece of the next; the last is compacted."""
    *lower, last = zip(tiers, bags, strict=True)
    for tier, bag in lower:
        if len(tier) + 1 < _TIER:
            bag.add(piece)
            return
        bag.clear()
        piece = merged([*tier, piece])
    tier, bag = last
    _replace(bag, tier, compacted([*tier, piece], None))


def _replace(bag: Any, held: list[pa.Table], pieces: list[pa.Table]) -> None:
    """Makes a bag hold other pieces; only added to, where those that it holds stay."""
    same = len(held) <= len(pieces) and all(one is other for one, other in zip(held, pieces, strict=False))
    if not same:
        bag.clear()
    for piece in pieces[len(held) :] if same else pieces:
        bag.add(piece)


def _set(forget: Any, expires: npt.NDArray[np.int64]) -> None:
    """Sets the timer to the median of the expiries."""
    middle = int(np.partition(expires, len(expires) // 2)[len(expires) // 2])
    if middle < _LAST:
        forget.set(Timestamp(micros=-(-middle // 1000) * 1000))  # engines count in milliseconds
