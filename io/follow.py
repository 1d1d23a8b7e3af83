"""Following a log in any Beam pipeline: one splittable source over every Log, Arrow tables straight from the poll.

A restriction is a share of the log: some partitions, each with its Position. A bundle reads them for a moment and
defers the rest, so what an engine checkpoints is positions: offsets, and the event times that lateness depends on.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import apache_beam as beam
import fsspec
import pyarrow as pa
from apache_beam.io.iobase import RestrictionProgress, RestrictionTracker
from apache_beam.io.watermark_estimators import ManualWatermarkEstimator
from apache_beam.transforms.core import RestrictionProvider, WatermarkEstimatorProvider
from apache_beam.utils.timestamp import MIN_TIMESTAMP, Duration, Timestamp

from pipelines.io.log import Bounds, Log, open_log
from pipelines.transforms import tables  # noqa: F401  (registers the coder of pa.Table)
from pipelines.transforms.conservation import tally
from pipelines.transforms.intake import Intake, Taken
from pipelines.transforms.lateness import IDLE_AFTER, NEVER, Position

BUNDLE = 0.2
"""Seconds that a bundle reads, if there is so much: what it gives goes on, and is checkpointed, when it ends."""

POLL = 0.1
"""Seconds until a share that is read to its end is read again."""

PLACES = pa.schema([("partition", pa.string()), ("offset", pa.int64()), ("watermark", pa.int64())])
"""How far partitions were read: the next offset of each, and its watermark (µs, or NEVER)."""

LOOK = 1.0
"""Seconds until a source looks again whether it is to end."""

Until = Literal["end"] | Mapping[str, int] | int | None
"""When a source ends: "end", when it has read what the log held at first; or up to an offset of each partition; µs,
when its watermark is there; or never."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """A partition that is being read. stop: the offset at which that ends, if it does. since: when it last had rows, in
    seconds of the clock."""

    partition: str
    position: Position
    since: float
    stop: int | None = None


@dataclasses.dataclass(frozen=True)
class Share:
    """A restriction: partitions of a log. discovers: also those that nobody reads yet, as soon as they have a row.
    known: the partitions of other shares.

    A discovered partition starts at the watermark of the share that discovers it: so that never goes back, and a row
    that is too late for it is called late.
    """

    readings: tuple[Reading, ...] = ()
    discovers: bool = False
    known: tuple[str, ...] = ()

    def watermark(self, disorder: int) -> int:
        """What every row still to come is not before, µs; NEVER while there is no partition."""
        return min((reading.position.watermark(disorder) for reading in self.readings), default=NEVER)


class ShareCoder(beam.coders.Coder):  # type: ignore[misc]
    """JSON: checkpoints outlive the code."""

    def encode(self, value: Share) -> bytes:
        return json.dumps(dataclasses.asdict(value)).encode()

    def decode(self, encoded: bytes) -> Share:
        found = json.loads(encoded)
        readings = ({**reading, "position": Position(**reading["position"])} for reading in found["readings"])
        known = tuple(found["known"])
        return Share(tuple(Reading(**reading) for reading in readings), found["discovers"], known)

    def is_deterministic(self) -> bool:
        return True


@dataclasses.dataclass
class Follow(beam.PTransform):  # type: ignore[misc]
    """The rows of a log, from its first retained offset on. Outputs, all of pa.Table: ``rows`` (the intake's, of one
    partition each, in offset order), ``dead`` (DEAD_LETTERS), ``tallies`` (TALLY), ``places`` (PLACES, after every
    bundle that moved on).

    Guarantee: every message is read once, and a bundle that is tried again gives the same. Its watermark is the least
    that the Intake reports over the partitions; one without backlog moves with the clock from ``IDLE_AFTER`` on.
    until: when it ends. drain: a URI; it also ends as soon as a file is there. Raises DataRefused where the log no
    longer holds what is next.

    >>> import datetime, tempfile
    >>> from pipelines.transforms.decoder import Decoder
    >>> from pipelines.transforms.lateness import Lateness
    >>> from pipelines.transforms.messages import Messages
    >>> from pipelines.transforms.schema import RowSchema
    >>> from pipelines.transforms.windows import Tumbling
    >>> class Sale:
    ...     time: datetime.datetime
    ...     cents: int
    >>> with tempfile.TemporaryDirectory() as folder, open_log(f"{folder}/sales.db") as log:
    ...     log.append({"0": pa.table({"_raw": [b'{"time": "2024-05-01T12:00Z", "cents": 5}']})})
    ...     messages = Messages(Decoder(RowSchema.of(Sale), "sales"), "json")
    ...     intake = Intake(messages, "time", disorder=0, ahead=0, rules=(Lateness(Tumbling("1m"), allowed=0),))
    ...     with beam.Pipeline("FnApiRunner") as pipeline:
    ...         rows = (pipeline | Follow(log.uri, intake, "end")).rows
    ...         _ = rows | beam.Map(lambda table: print(table["cents"].to_pylist()))
    [5]
    """

    uri: str
    intake: Intake
    until: Until = None
    clock: Callable[[], float] = time.time
    drain: str | None = None

    def __post_init__(self) -> None:
        super().__init__()

    def expand(self, start: beam.pvalue.PBegin) -> Any:
        read = _Read(self.uri, self.intake, self.until, self.clock, self.drain)
        part = beam.ParDo(read).with_output_types(pa.Table, dead=pa.Table, tallies=pa.Table, places=pa.Table)
        return (
            start | beam.Create([None], reshuffle=False) | part.with_outputs("dead", "tallies", "places", main="rows")
        )


class _Tracker(RestrictionTracker):  # type: ignore[misc]
    """What is claimed is the share as it is after a read, what that gave, and the rows that still wait."""

    def __init__(self, share: Share) -> None:
        self._share, self._read, self._backlog, self._over = share, 0, 0, False

    def current_restriction(self) -> Share:
        return self._share

    def try_claim(self, position: tuple[Share, Taken | None, int]) -> bool:
        if self._over:
            return False
        self._share, taken, self._backlog = position
        self._read += 0 if taken is None else len(taken.rows)
        return True

    def try_split(self, fraction_of_remainder: float) -> tuple[Share, Share] | None:
        if fraction_of_remainder or self._over:
            return None  # partitions are dealt out at the start
        rest, self._share, self._over = self._share, Share(), True
        return self._share, rest

    def check_done(self) -> None:
        if self._share.readings or self._share.discovers:
            raise ValueError(f"neither read to its end nor deferred: {self._share}")

    def current_progress(self) -> RestrictionProgress:
        return RestrictionProgress(completed=self._read, remaining=self._backlog)

    def is_bounded(self) -> bool:
        return not self._share.discovers and all(reading.stop is not None for reading in self._share.readings)


class _Read(beam.DoFn, RestrictionProvider, WatermarkEstimatorProvider):  # type: ignore[misc]
    def __init__(
        self, uri: str, intake: Intake, until: Until, clock: Callable[[], float], drain: str | None = None
    ) -> None:
        self._uri, self._intake, self._until, self._clock, self._drain = uri, intake, until, clock, drain
        self._looked, self._drained = 0.0, False
        self._opened: Log | None = None
        self._stops = dict(until) if isinstance(until, Mapping) else None
        if until == "end":
            with open_log(uri) as log:
                self._stops = {name: held.end for name, held in log.bounds().items()}

    @property
    def _log(self) -> Log:
        if self._opened is None:
            self._opened = open_log(self._uri)
        return self._opened

    def teardown(self) -> None:
        if self._opened is not None:
            self._opened.close()

    # What is to be read, and by whom

    def initial_restriction(self, _: None) -> Share:
        """Every partition that has had a row; the others are discovered."""
        now = self._clock()
        readings = (
            Reading(name, Position(held.start), now)
            for name, held in self._log.bounds().items()
            if held.end and not (self._stops is not None and held.start >= self._stops.get(name, 0))
        )
        return self._limited(Share(tuple(readings), discovers=True))

    def _limited(self, share: Share) -> Share:
        """As this run is to end: it may resume one that was to end otherwise."""
        stops = self._stops
        if stops is None:
            readings = (dataclasses.replace(reading, stop=None) for reading in share.readings)
            return dataclasses.replace(share, readings=tuple(readings))
        readings = (
            dataclasses.replace(reading, stop=stops.get(reading.partition, reading.position.offset))
            for reading in share.readings
        )
        return dataclasses.replace(share, readings=tuple(readings), discovers=False)

    def split(self, _: None, share: Share) -> Iterator[Share]:
        """A share for each partition, of which the last discovers."""
        *others, last = share.readings or (None,)
        if last is None:
            yield share
            return
        for reading in others:
            yield Share((reading,))
        yield dataclasses.replace(share, readings=(last,), known=tuple(reading.partition for reading in others))

    def create_tracker(self, share: Share) -> _Tracker:
        return _Tracker(share)

    def restriction_size(self, _: None, share: Share) -> float:
        """The rows that wait: by them an engine scales, and shows how far it is."""
        return float(_backlog(share, self._log.bounds()))

    def restriction_coder(self) -> beam.coders.Coder:
        return ShareCoder()

    def initial_estimator_state(self, _: None, share: Share) -> Timestamp:
        return _timestamp(share.watermark(self._intake.disorder))

    def create_watermark_estimator(self, state: Timestamp) -> ManualWatermarkEstimator:
        return ManualWatermarkEstimator(state)

    # Reading

    @beam.DoFn.unbounded_per_element()  # type: ignore[untyped-decorator]
    def process(
        self,
        _: None,
        tracker: Any = beam.DoFn.RestrictionParam(),  # noqa: B008  (Beam's way to ask for it)
        estimator: Any = beam.DoFn.WatermarkEstimatorParam(),  # noqa: B008
    ) -> Iterator[Any]:
        share, end = self._limited(tracker.current_restriction()), time.monotonic() + BUNDLE
        before = {reading.partition: reading.position for reading in share.readings}
        places = dict(before)
        if not tracker.try_claim((share, None, 0)):
            return
        while share.readings or share.discovers:
            bounds = self._log.bounds()
            share = self._discovered(share, bounds)
            for number in range(len(share.readings)):
                share, taken = self._take(share, number, bounds)
                if not tracker.try_claim((share, taken, _backlog(share, bounds))):
                    return
                yield from _outputs(taken)
            places |= {reading.partition: reading.position for reading in share.readings}
            share = self._left(share)
            tracker.try_claim((share, None, 0))
            if share.readings:
                estimator.set_watermark(_timestamp(share.watermark(self._intake.disorder)))
            waits = _backlog(share, bounds) == 0
            if (share.readings or share.discovers) and (waits or time.monotonic() > end):
                yield from self._places(before, places)
                tracker.defer_remainder(Duration(POLL if waits else 0))
                return
        yield from self._places(before, places)
        yield beam.pvalue.TaggedOutput("tallies", tally("source", "read", 0))  # its end is told, if nothing else is

    def _places(self, before: dict[str, Position], now: dict[str, Position]) -> Iterator[Any]:
        moved = {name: position for name, position in now.items() if position != before.get(name)}
        if moved:
            columns = [
                list(moved),
                [position.offset for position in moved.values()],
                [position.watermark(self._intake.disorder) for position in moved.values()],
            ]
            yield beam.pvalue.TaggedOutput("places", pa.table(columns, schema=PLACES))

    def _discovered(self, share: Share, bounds: dict[str, Bounds]) -> Share:
        if not share.discovers:
            return share
        known = {*share.known, *(reading.partition for reading in share.readings)}
        watermark, now = share.watermark(self._intake.disorder), self._clock()
        idle = None if watermark == NEVER else watermark
        new = (
            Reading(name, Position(held.start, idle=idle), now)
            for name, held in bounds.items()
            if held.end and name not in known
        )
        return dataclasses.replace(share, readings=(*share.readings, *new))

    def _take(self, share: Share, number: int, bounds: dict[str, Bounds]) -> tuple[Share, Taken | None]:
        """Reads a partition once, up to where it ends now; the share after that."""
        reading, now, taken = share.readings[number], self._clock(), None
        stop = bounds[reading.partition].end if reading.stop is None else reading.stop
        if reading.position.offset >= stop:
            after = _idle(reading, now, self._intake.disorder)
        elif len(messages := self._log.read(reading.partition, reading.position.offset, stop)):
            taken = self._intake.take(messages, reading.position)
            after = dataclasses.replace(reading, position=taken.position, since=now)
        else:  # a gap
            after = dataclasses.replace(reading, position=dataclasses.replace(reading.position, offset=stop))
        readings = (*share.readings[:number], after, *share.readings[number + 1 :])
        return dataclasses.replace(share, readings=readings), taken

    def _left(self, share: Share) -> Share:
        """Without what is read to its end. Where that is a time, all of a share ends there."""
        if self._drain is not None and time.monotonic() - self._looked > LOOK:
            files, path = fsspec.url_to_fs(self._drain)
            self._looked, self._drained = time.monotonic(), files.exists(path)
        if self._drained:
            return Share()
        if isinstance(self._until, int) and share.watermark(self._intake.disorder) >= self._until:
            return Share()
        left = (r for r in share.readings if r.stop is None or r.position.offset < r.stop)
        return dataclasses.replace(share, readings=tuple(left))


def _outputs(taken: Taken | None) -> Iterator[Any]:
    if taken is None:
        return
    yield beam.pvalue.TaggedOutput("tallies", taken.tallies)
    if len(taken.dead):
        yield beam.pvalue.TaggedOutput("dead", taken.dead)
    if len(taken.rows):
        yield taken.rows


def _idle(reading: Reading, now: float, disorder: int) -> Reading:
    """A partition at its end: once idle, its watermark moves with the clock."""
    position, idle = reading.position, now - reading.since - IDLE_AFTER
    if idle <= 0 or position.greatest is None:
        return reading
    observed = dataclasses.replace(position, idle=None).watermark(disorder) + int(idle * 1000) * 1000
    moved = observed if position.idle is None else max(observed, position.idle)
    return dataclasses.replace(reading, position=dataclasses.replace(position, idle=moved))


def _backlog(share: Share, bounds: dict[str, Bounds]) -> int:
    ends = (bounds[r.partition].end if r.stop is None else r.stop for r in share.readings)
    return sum(max(0, end - r.position.offset) for end, r in zip(ends, share.readings, strict=True))


def _timestamp(watermark: int) -> Timestamp:
    return MIN_TIMESTAMP if watermark == NEVER else Timestamp(micros=watermark)
