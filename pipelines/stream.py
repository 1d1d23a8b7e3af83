"""The unbounded graph of a speed layer: follow a log, dedupe, steps, open windows, and their answers upserted.

The parts are those of a micro-batch; the engine keeps the state and its checkpoints. Answers come early (every
trigger), when the watermark passes the end of a window, and again for rows that are late but still in time.
"""

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.pvalue import TaggedOutput

from pipelines.counting import Counted, Every, Sum
from pipelines.definition import Dimension
from pipelines.dimensions import whole
from pipelines.io.follow import Follow, Until
from pipelines.io.table import Table
from pipelines.io.upsert import Deliver
from pipelines.layer import Layer
from pipelines.transforms.buckets import split
from pipelines.transforms.deadletters import DEAD_LETTERS, unheld
from pipelines.transforms.dedupe_stream import DedupeStream
from pipelines.transforms.gathered import Gathered, at_the_end
from pipelines.transforms.lateness import EXPIRES
from pipelines.transforms.open_windows import Open
from pipelines.transforms.speed import OpenView
from pipelines.transforms.windows import Session

BUCKETS = 4
"""Parts of the state of a view, or of the identities: as many workers can share it."""


@dataclasses.dataclass(frozen=True)
class Dimensions:
    """Whole tables, by name, that a worker reads for itself, and again when they are older than ``refresh`` (µs).
    given: each dimension and its URI."""

    given: dict[str, tuple[Dimension, str]]
    refresh: int
    clock: Callable[[], float] = time.monotonic

    def now(self, names: Iterable[str]) -> dict[str, pa.Table]:
        found = {}
        for name in names:
            of, uri = self.given[name]
            if (of, uri) not in _held or self.clock() - _held[of, uri][0] >= self.refresh / 1_000_000:
                _held[of, uri] = self.clock(), whole(of, uri)
            found[name] = _held[of, uri][1]
        return found


_held: dict[tuple[Dimension, str], tuple[float, pa.Table]] = {}
"""When a process has read its dimensions."""


@dataclasses.dataclass(frozen=True)
class Stream:
    """How a speed layer is streamed. facts: where what was counted is written, as JSON. epoch: of the job. trigger: µs
    between early answers; None: there are none. until: when it ends. dealt: rows go through a Reshuffle behind the
    source. watched: it tells how far it is with its counts. drain: a URI; its input ends when a file is there. clock:
    seconds, by which a partition is idle."""

    layer: Layer
    dimensions: Dimensions
    store: str | None
    facts: str
    epoch: int = 0
    trigger: int | None = None
    until: Until = None
    dealt: bool = False
    watched: bool = False
    drain: str | None = None
    clock: Callable[[], float] = time.time

    @property
    def often(self) -> int | None:
        """µs between what is written of counts and dead letters; None: each by itself."""
        return self.trigger or (1_000_000 if self.watched else None)


def build(root: beam.Pipeline, stream: Stream) -> None:
    """Puts the graph on an empty Beam pipeline."""
    layer = stream.layer
    followed = root | "follow" >> Follow(layer.log, layer.intake, stream.until, stream.clock, stream.drain)
    rows, dead, tallies = followed.rows, [followed.dead], [followed.tallies]
    if stream.dealt:
        rows = rows | beam.Reshuffle()
    if layer.seen is not None:
        once = rows | "dedupe" >> DedupeStream(
            layer.seen.identity,
            layer.seen.columns,
            pipeline=layer.pipeline,
            format=layer.format,
            buckets=layer.buckets,
            cipher=layer.cipher,
        )
        rows = once.rows
        dead.append(once.dead)
        tallies.append(once.tallies)
    clean = rows | "clean" >> beam.ParDo(_Clean(layer, stream.dimensions)).with_outputs("dead", "tallies", main="rows")
    dead.append(clean.dead)
    tallies.append(clean.tallies)
    for view in layer.views:
        partial = beam.ParDo(_Partial(layer, view, stream.dimensions)).with_outputs("dead", "tallies", main="states")
        parts = clean.rows | f"{view.plan.name} partial" >> partial
        moved = parts.states | Open(view, stream.trigger)
        dead.append(parts.dead)
        tallies += [parts.tallies, moved.tallies]
        _deliver(moved, view, stream)
    letters = dead | "dead letters" >> beam.Flatten() | "some letters" >> Every(stream.often)
    _ = letters | "commit" >> beam.ParDo(_Letters(layer.dead_letters))
    counted = [tallies | "tallies" >> beam.Flatten() | "sum" >> beam.ParDo(Sum())]
    if stream.watched:
        counted.append(followed.places)
    _ = counted | "facts" >> beam.Flatten() | Counted(stream.often, stream.facts, stream.clock)


def _deliver(moved: Any, view: OpenView, stream: Stream) -> None:
    if not stream.store:
        return
    name, keys = stream.layer.named(view), (*view.plan.by, "window_start")
    sessions = isinstance(view.plan.window, Session)
    answers = Deliver(stream.store, name, keys, stream.epoch, sessions=sessions)
    _ = moved.answers | f"{name} upsert" >> beam.ParDo(answers)
    if sessions:
        _ = moved.gone | f"{name} delete" >> beam.ParDo(Deliver(stream.store, name, keys, stream.epoch, gone=True))


@beam.typehints.with_input_types(pa.Table)
@beam.typehints.with_output_types(pa.Table, dead=pa.Table, tallies=pa.Table)
class _Clean(beam.DoFn):  # type: ignore[misc]
    """The steps that all views share, on the rows of a bundle together: a query costs a millisecond however few."""

    def __init__(self, layer: Layer, dimensions: Dimensions) -> None:
        self.chain = dataclasses.replace(layer.plan.chain, format=layer.format)
        self.dimensions, self.cipher = dimensions, layer.cipher

    def start_bundle(self) -> None:
        self._rows = Gathered()

    def process(self, rows: pa.Table) -> Iterator[Any]:
        if (gathered := self._rows.add(rows.drop_columns([EXPIRES.name]))) is not None:
            yield from self._cleaned(gathered)

    def finish_bundle(self) -> Iterator[Any]:
        if (gathered := self._rows.take()) is not None:
            yield from map(at_the_end, self._cleaned(gathered))

    def _cleaned(self, rows: pa.Table) -> Iterator[Any]:
        outcome = self.chain.run(rows, self.dimensions.now(self.chain.dimensions), self.cipher)
        yield from _counted(outcome.dead, outcome.tallies)
        if len(outcome.rows):
            yield outcome.rows


@beam.typehints.with_input_types(pa.Table)
@beam.typehints.with_output_types(tuple[int, pa.Table], dead=pa.Table, tallies=pa.Table)
class _Partial(beam.DoFn):  # type: ignore[misc]
    """Cleaned rows to a view's partial states, by bucket."""

    def __init__(self, layer: Layer, view: OpenView, dimensions: Dimensions) -> None:
        self.view, self.dimensions = view, dimensions
        self.used = () if view.plan.chain is None else view.plan.chain.dimensions
        self.buckets, self.cipher, self.format = layer.buckets, layer.cipher, layer.format

    def process(self, rows: pa.Table) -> Iterator[Any]:
        states, dead, tallies = self.view.partial(rows, self.dimensions.now(self.used), self.cipher, self.format)
        yield from _counted(dead, tallies)
        yield from split(states, self.view.plan.by, self.buckets)


def _counted(dead: pa.Table, tallies: pa.Table) -> Iterator[TaggedOutput]:
    yield TaggedOutput("tallies", tallies)
    if len(dead):
        yield TaggedOutput("dead", dead)


@beam.typehints.with_input_types(tuple[int, Iterable[pa.Table]])
class _Letters(beam.DoFn):  # type: ignore[misc]
    """Dead letters into their table, in one place, without those that it has: trying again adds nothing."""

    def __init__(self, table: Table) -> None:
        self.table = table

    def process(self, element: tuple[int, Iterable[pa.Table]]) -> None:
        letters = pa.concat_tables([DEAD_LETTERS.empty_table(), *element[1]])  # a last pane may be empty
        version = self.table.next_version()
        if version > 1:
            letters = unheld(letters, self.table.dataset())
        if not len(letters):
            return
        token = hashlib.blake2b(repr(letters.to_pylist()).encode(), digest_size=8).hexdigest()
        stage = self.table.stage("stream", token=token, version=version)
        stage.add(letters)
        self.table.commit(stage.finish(), token=token, version=version, replace="nothing")
