"""The unbounded graph of a speed layer: follow a log, dedupe, steps, open windows, and their answers upserted.

The parts are those of a micro-batch; the engine keeps the state and its checkpoints. Answers come early (every
trigger), when the watermark passes the end of a window, and again for rows that are late but still in time.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import apache_beam as beam
import fsspec
import pyarrow as pa
from apache_beam.pvalue import TaggedOutput

from pipelines import drift, job, report, resume
from pipelines.counting import Counted, Every, Sum
from pipelines.definition import Dimension, Pipeline
from pipelines.dimensions import whole
from pipelines.io.follow import Follow, Until
from pipelines.io.log import open_log
from pipelines.io.store import LIVE, open_store
from pipelines.io.table import Table
from pipelines.io.upsert import Deliver, epoch
from pipelines.layer import Layer, layer
from pipelines.live import _some
from pipelines.options import Deployment
from pipelines.reached import Reached
from pipelines.runners import Detached, Engine, Following, Resumable
from pipelines.transforms.buckets import split
from pipelines.transforms.deadletters import DEAD_LETTERS, unheld
from pipelines.transforms.dedupe_stream import DedupeStream
from pipelines.transforms.errors import DataRefused
from pipelines.transforms.gathered import Gathered, at_the_end
from pipelines.transforms.lateness import EXPIRES
from pipelines.transforms.open_windows import Open
from pipelines.transforms.speed import OpenView
from pipelines.transforms.windows import Session

_AGAIN = 10.0
"""Seconds in which a job that goes on from before its end tells something."""

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


def compiled(
    pipeline: Pipeline, deployment: Deployment, engine: Engine, clock: Callable[[], float] = time.time
) -> Stream:
    """The stream of a pipeline, as it would begin anew. Raises UserError; writes nothing."""
    made, at = layer(pipeline, deployment, BUCKETS), deployment.until
    given = {one.name: (one, deployment.dimensions[one.name]) for one in pipeline.dimensions}
    return Stream(
        made,
        Dimensions(given, deployment.refresh),
        deployment.store,
        f"{made.place}/{job.FACTS}",
        epoch(clock()),
        deployment.trigger or None,
        int(at.timestamp() * 1_000_000) if isinstance(at, datetime.datetime) else at,
        engine.DEALT,
        isinstance(engine, Resumable),
        clock=clock,
    )


def run(
    pipeline: Pipeline,
    deployment: Deployment,
    engine: Engine,
    flags: Sequence[str] = (),
    clock: Callable[[], float] = time.time,
) -> dict[str, Any]:
    """Streams until ``deployment.until``, or until it is stopped; answers the facts of a report.

    Where its engine is Resumable, a run goes on from what the last one with these options has kept, however that ended.
    clock: seconds, of which the job's epoch is made, and by which a partition is idle. Raises DataRefused if in the end
    the conservation law is broken, UserError where what is kept is of another definition.
    """
    stream = compiled(pipeline, deployment, engine, clock)
    with contextlib.ExitStack() as stack:
        stack.enter_context(stream.layer.turns.own())
        stack.enter_context(_stopped_by_signals())
        stack.enter_context(drift.shown(report.title(pipeline, deployment), stream.facts))
        if isinstance(engine, Resumable):
            return _resumed(stream, deployment, engine, flags)
        return _anew(stream, deployment, engine, flags)


def _anew(stream: Stream, deployment: Deployment, engine: Engine, flags: Sequence[str]) -> dict[str, Any]:
    """On an engine that keeps nothing."""
    start = resume.start(stream.layer, deployment, stream.epoch, kept=False)
    stream = dataclasses.replace(stream, epoch=start.job.epoch)
    try:
        engine.run(lambda root: build(root, stream), ["--streaming", *flags])
    except Detached as left:
        if left.job:
            at = {**left.job}
            job.write(start.place, dataclasses.replace(start.job, id=at.pop("job"), at=at))
        raise
    except KeyboardInterrupt:
        said = "stopped; what it held is gone with it: the next run reads the log again from its first offset"
        print(f"{stream.layer.pipeline}: {said}", file=sys.stderr)
        return _facts(stream)
    return _checked(stream)


def _resumed(stream: Stream, deployment: Deployment, engine: Resumable, flags: Sequence[str]) -> dict[str, Any]:
    """On an engine that can go on where it was stopped, or died."""
    start, name = resume.start(stream.layer, deployment, stream.epoch), stream.layer.pipeline
    drain = start.job.drain(start.place)
    stream = dataclasses.replace(stream, epoch=start.job.epoch, until=start.until, drain=drain)
    if start.since is not None:
        print(f"{name}: goes on from {start.since}", file=sys.stderr)
    before, begun = drift.facts(stream.facts), time.monotonic()

    def submitted(known: str, id: str, rest: str) -> None:
        nonlocal begun
        begun = time.monotonic()
        job.write(start.place, dataclasses.replace(start.job, name=known, id=id, rest=rest))

    def ended() -> bool:
        """What it goes on from may be of after the end: then it tells nothing any more."""
        if not drift.ended(stream.facts):
            return False
        return drift.facts(stream.facts) != before or time.monotonic() - begun > _AGAIN

    kept = start.job.kept(start.place)
    following = Following(start.job.name, kept, start.since, submitted, ended)
    try:
        engine.follow(lambda root: build(root, stream), ["--streaming", *flags], following)
    except KeyboardInterrupt:
        last = start.job.newest(start.place)
        where = "from its first offset" if last is None else f"from {last}"
        print(f"{name}: stopped; the next run goes on {where}", file=sys.stderr)
        return _facts(stream)
    now = job.read(start.place) or start.job
    if not drift.facts(stream.facts).ended:
        said = f"its job was stopped by somebody else; the next run goes on from {now.newest(start.place)}"
        print(f"{name}: {said}", file=sys.stderr)
        return _facts(stream)
    if now.ended is not None:  # by a drain
        return {**_checked(stream), "incomplete": now.ended}
    job.write(start.place, dataclasses.replace(now, ended="it has ended, at its --until"))
    return _checked(stream)


def _checked(stream: Stream) -> dict[str, Any]:
    """The facts of a stream that has ended."""
    name = stream.layer.pipeline
    if not _exists(stream.facts) and _any(stream.layer.log):
        raise DataRefused(f"{name}: its workers have written no counts to {stream.facts}; name a --state they share")
    if violations := drift.counted(stream.facts).violations():
        raise DataRefused(f"{name}: the law of conservation is broken: {'; '.join(violations)}")
    return _facts(stream)


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """SIGTERM stops it as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _exists(uri: str) -> bool:
    files, path = fsspec.url_to_fs(uri)
    return bool(files.exists(path))


def _any(uri: str) -> bool:
    with open_log(uri) as log:
        return any(bound.end > bound.start for bound in log.bounds().values())


def _facts(stream: Stream) -> dict[str, Any]:
    told = drift.facts(stream.facts)
    counts, reached = told.counts, told.reached or Reached()
    through, views = reached.complete_through, {}
    for view in stream.layer.views:
        rows, digest = counts.views.get(view.plan.name, (0, 0, 0))[2], 0
        if stream.store:
            with open_store(stream.store) as store:
                answers = store.scan(stream.layer.named(view), generation=LIVE)
            rows, digest = len(answers), view.plan.digested(answers)
        views[view.plan.name] = {"rows": rows, "digest": f"{digest:016x}", "complete_through": through}
    facts = {
        "rows": dict(counts.rows),
        "rejected": dict(counts.reasons),
        "dropped": _some(counts.dropped),
        "unmatched": _some(counts.unmatched),
        "views": views,
        "boundary": through,
        "first": None,
        "last": None,
        "skipped": [],
    }
    if told.reached is None:
        return facts
    with open_log(stream.layer.log) as log:
        ends = {name: held.end for name, held in log.bounds().items()}
    lag = sum(max(0, end - reached.offsets.get(name, 0)) for name, end in ends.items())
    age = None if reached.through is None else round(stream.clock() - reached.through / 1_000_000, 1)
    held = {"state": sum(counts.held.values()), "watermark_age": age}
    return {**facts, "positions": reached.offsets, "lag": lag, **held}
