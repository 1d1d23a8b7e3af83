"""A stream, run: its graph submitted to an engine, gone on with where it was, watched, stopped, and its facts told."""

import contextlib
import dataclasses
import datetime
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import fsspec
from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions

from pipelines import drift, job, report, resume
from pipelines.definition import Pipeline
from pipelines.io.log import open_log
from pipelines.io.store import LIVE, open_store
from pipelines.io.upsert import epoch
from pipelines.layer import layer
from pipelines.options import Deployment
from pipelines.reached import Reached
from pipelines.runners import Detached, Engine, Following, Resumable
from pipelines.stream import BUCKETS, Dimensions, Stream, build
from pipelines.transforms.errors import DataRefused

_AGAIN = 10.0
"""Seconds in which a job that goes on from before its end tells something."""


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
        if PipelineOptions(list(flags)).view_as(GoogleCloudOptions).template_location:
            _staged(stream, engine, flags)
            return _facts(stream)
        return _anew(stream, deployment, engine, flags)


def _staged(stream: Stream, engine: Engine, flags: Sequence[str]) -> None:
    """As a template: nothing runs yet, so nothing of before goes."""
    if stream.store:
        stream.layer.resume(stream.store, anew=True)
    engine.run(lambda root: build(root, stream), ["--streaming", *flags])


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
        **report.counted(counts),
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
