"""The unbounded graph of a speed layer: follow a log, dedupe, steps, open windows, and their answers upserted.

The parts are those of a micro-batch; the engine keeps the state and its checkpoints. Answers come early (every
trigger), when the watermark passes the end of a window, and again for rows that are late but still in time.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import apache_beam as beam
import fsspec
import pyarrow as pa
from apache_beam.metrics import Metrics
from apache_beam.pvalue import TaggedOutput
from apache_beam.transforms import trigger
from apache_beam.transforms.userstate import BagStateSpec
from apache_beam.transforms.window import GlobalWindows

from pipelines import drift, report
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
from pipelines.runners import Engine
from pipelines.transforms import tables
from pipelines.transforms.buckets import split
from pipelines.transforms.conservation import merge
from pipelines.transforms.deadletters import DEAD_LETTERS, unheld
from pipelines.transforms.dedupe_stream import DedupeStream
from pipelines.transforms.errors import DataRefused
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
    source. clock: seconds, by which a partition is idle."""

    layer: Layer
    dimensions: Dimensions
    store: str | None
    facts: str
    epoch: int = 0
    trigger: int | None = None
    until: Until = None
    dealt: bool = False
    clock: Callable[[], float] = time.time


def build(root: beam.Pipeline, stream: Stream) -> None:
    """Puts the graph on an empty Beam pipeline."""
    layer = stream.layer
    followed = root | "follow" >> Follow(layer.log, layer.intake, stream.until, stream.clock)
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
    letters = dead | "dead letters" >> beam.Flatten() | "some letters" >> _Every(stream.trigger)
    _ = letters | "commit" >> beam.ParDo(_Letters(layer.dead_letters))
    counted = tallies | "tallies" >> beam.Flatten() | "sum" >> beam.ParDo(_Sum())
    _ = counted | "some tallies" >> _Every(stream.trigger) | "count" >> beam.ParDo(_Count(stream.facts))


def _deliver(moved: Any, view: OpenView, stream: Stream) -> None:
    if not stream.store:
        return
    name, keys = stream.layer.named(view), (*view.plan.by, "window_start")
    _ = moved.answers | f"{name} upsert" >> beam.ParDo(Deliver(stream.store, name, keys, stream.epoch))
    if isinstance(view.plan.window, Session):
        _ = moved.gone | f"{name} delete" >> beam.ParDo(Deliver(stream.store, name, keys, stream.epoch, gone=True))


@beam.typehints.with_input_types(pa.Table)
@beam.typehints.with_output_types(pa.Table, dead=pa.Table, tallies=pa.Table)
class _Clean(beam.DoFn):  # type: ignore[misc]
    """The steps that all views share."""

    def __init__(self, layer: Layer, dimensions: Dimensions) -> None:
        self.chain = dataclasses.replace(layer.plan.chain, format=layer.format)
        self.dimensions, self.cipher = dimensions, layer.cipher

    def process(self, rows: pa.Table) -> Iterator[Any]:
        rows = rows.drop_columns([EXPIRES.name])
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


@dataclasses.dataclass
class _Every(beam.PTransform):  # type: ignore[misc]
    """Tables to some of them together, in one place, every so many µs (None: each by itself)."""

    micros: int | None

    def __post_init__(self) -> None:
        super().__init__()

    def expand(self, given: beam.PCollection) -> beam.PCollection:
        keyed = given | "key" >> beam.Map(lambda table: (0, table)).with_output_types(tuple[int, pa.Table])
        seconds = trigger.AfterProcessingTime(max(1, (self.micros or 0) // 1_000_000))
        fired = trigger.Repeatedly(trigger.AfterCount(1) if self.micros is None else seconds)
        discarding = trigger.AccumulationMode.DISCARDING
        return keyed | beam.WindowInto(GlobalWindows(), trigger=fired, accumulation_mode=discarding) | beam.GroupByKey()


@beam.typehints.with_input_types(pa.Table)
@beam.typehints.with_output_types(pa.Table)
class _Sum(beam.DoFn):  # type: ignore[misc]
    """The tallies of a bundle as one, and as counters of the engine."""

    def start_bundle(self) -> None:
        self._tallies: list[pa.Table] = []

    def process(self, counted: pa.Table) -> None:
        self._tallies.append(counted)

    def finish_bundle(self) -> Iterator[Any]:
        counted = merge(self._tallies)
        for row in counted.to_pylist():
            Metrics.counter("pipelines", f"{row['part']} {row['counter']} {row['reason']}".strip()).inc(row["n"])
        if len(counted):
            yield GlobalWindows.windowed_value(counted)


_COUNTS = beam.DoFn.StateParam(BagStateSpec("counts", tables.TableCoder()))


@beam.typehints.with_input_types(tuple[int, Iterable[pa.Table]])
class _Count(beam.DoFn):  # type: ignore[misc]
    """All that was counted so far, as JSON: what was read and is nowhere else is on its way, or lost."""

    def __init__(self, facts: str) -> None:
        self.facts = facts

    def process(self, element: tuple[int, Iterable[pa.Table]], counts: Any = _COUNTS) -> None:
        all_ = merge([*counts.read(), *element[1]])
        counts.clear()
        counts.add(all_)
        with fsspec.open(self.facts, "wt", encoding="utf-8") as file:
            json.dump({"tallies": all_.to_pylist()}, file)


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


def run(
    pipeline: Pipeline,
    deployment: Deployment,
    engine: Engine,
    flags: Sequence[str] = (),
    clock: Callable[[], float] = time.time,
) -> dict[str, Any]:
    """Streams until ``deployment.until``, or until it is stopped; answers the facts of a report.

    clock: seconds, of which the job's epoch is made, and by which a partition is idle. Raises DataRefused if in the end
    the conservation law is broken.
    """
    at = deployment.until
    until: Until = int(at.timestamp() * 1_000_000) if isinstance(at, datetime.datetime) else at
    given = {one.name: (one, deployment.dimensions[one.name]) for one in pipeline.dimensions}
    stream = Stream(
        layer(pipeline, deployment, BUCKETS),
        Dimensions(given, deployment.refresh),
        deployment.store,
        f"{deployment.state}/{pipeline.name}/stream.json",
        epoch(clock()),
        deployment.trigger or None,
        until,
        engine.DEALT,
        clock,
    )
    for view in stream.layer.views if deployment.store else ():
        with open_store(deployment.store or "") as store:
            store.resume(stream.layer.named(view), view.plan.schema, (*view.plan.by, "window_start"))
    _forget(stream.facts)
    try:
        with drift.shown(report.title(pipeline, deployment), stream.facts), _stopped_by_signals():
            engine.run(lambda root: build(root, stream), ["--streaming", *flags])
    except KeyboardInterrupt:
        said = "stopped; what it held is gone with it: the next run reads the log again from its first offset"
        print(f"{pipeline.name}: {said}", file=sys.stderr)
        return _facts(stream)
    if not _exists(stream.facts) and _any(stream.layer.log):
        raise DataRefused(
            f"{pipeline.name}: its workers have written no counts to {stream.facts}; name a --state they share"
        )
    if violations := drift.counted(stream.facts).violations():
        raise DataRefused(f"{pipeline.name}: the law of conservation is broken: {'; '.join(violations)}")
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


def _forget(facts: str) -> None:
    """An earlier run's counts must not pass for this one's."""
    files, path = fsspec.url_to_fs(facts)
    if _exists(facts):
        files.rm(path)


def _exists(uri: str) -> bool:
    files, path = fsspec.url_to_fs(uri)
    return bool(files.exists(path))


def _any(uri: str) -> bool:
    with open_log(uri) as log:
        return any(bound.end > bound.start for bound in log.bounds().values())


def _facts(stream: Stream) -> dict[str, Any]:
    counts = drift.counted(stream.facts)
    views = {}
    for view in stream.layer.views:
        rows, digest = counts.views.get(view.plan.name, (0, 0, 0))[2], 0
        if stream.store:
            with open_store(stream.store) as store:
                answers = store.scan(stream.layer.named(view), generation=LIVE)
            rows, digest = len(answers), view.plan.digested(answers)
        views[view.plan.name] = {"rows": rows, "digest": f"{digest:016x}", "complete_through": None}
    return {
        "rows": dict(counts.rows),
        "rejected": dict(counts.reasons),
        "dropped": _some(counts.dropped),
        "unmatched": _some(counts.unmatched),
        "views": views,
        "boundary": None,
        "first": None,
        "last": None,
        "skipped": [],
    }
