"""One run, from a definition and a deployment to a report: ``python -m pipelines.run --pipeline=flights``.

Beam is imported when a graph is built and not before, so ``--help`` and every mistake in the flags answer at once.
"""

import contextlib
import dataclasses
import gc
import json
import pydoc
import re
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

from pipelines import progress, remote, runners
from pipelines.options import Deployment
from pipelines.runners import preflight
from pipelines.transforms.errors import DataRefused, UserError

if TYPE_CHECKING:
    import apache_beam as beam

    from pipelines import report
    from pipelines.definition import Pipeline
    from pipelines.report import Report

_RAISED = re.compile(r"^(pipelines(?:\.\w+)+): (.*)$", re.MULTILINE)
_RUNNING = re.compile(r" \[while running '[^']*'\]")
_FULL = ("No space left on device", "disk is full")


def run(pipeline: "Pipeline", deployment: Deployment, flags: Sequence[str] = ()) -> "Report":
    """Runs a pipeline to its end and writes ``deployment.report``. flags: Beam's own options.

    Raises UserError and DataRefused as the parts of the graph raise them, wherever they ran; then the report of an
    earlier run stays as it is. Raises runners.Detached where it goes on without this process: there is no report then.
    """
    start = time.perf_counter()
    engine = runners.named(deployment.runner)
    if deployment.runner in runners.REMOTE:
        remote.check(deployment)
    _prepare(deployment)
    from pipelines import report

    try:
        facts = (_batch if deployment.mode == "batch" else _live)(pipeline, deployment, engine, flags)
    finally:
        gc.unfreeze()
    done = report.Report(pipeline, deployment, facts, report.Usage.since(start))
    _write(deployment.report, done.json() + "\n")
    return done


def _live(pipeline: "Pipeline", deployment: Deployment, engine: runners.Engine, flags: Sequence[str]) -> "report.Facts":
    from pipelines import archive, live, report, watch

    if deployment.mode == "stream" and engine.UNBOUNDED:
        from pipelines import streaming

        with told(), archive.along(pipeline, deployment):
            return cast("report.Facts", streaming.run(pipeline, deployment, engine, flags))
    if deployment.mode == "stream":
        said = "here a stream runs as micro-batch, one bounded graph a turn"
        why = preflight.degraded(deployment.runner)
        print(f"{pipeline.name}: {deployment.runner} takes no unbounded graph; {said} ({why})", file=sys.stderr)
    title = report.title(pipeline, deployment)
    with told(), archive.along(pipeline, deployment), watch.shown(title) as tell:
        return cast("report.Facts", live.run(pipeline, deployment, engine, flags, told=tell))


def _batch(
    pipeline: "Pipeline", deployment: Deployment, engine: runners.Engine, flags: Sequence[str]
) -> "report.Facts":
    with runners.uncollected():
        from pipelines import graph, report
        from pipelines.transforms.spill import spill_folder

        prepared = graph.prepare(pipeline, deployment)

    def build(root: "beam.Pipeline") -> None:
        with runners.uncollected():
            graph.build(root, prepared, spill=spill)
        gc.freeze()  # all of that stays to the end: looking for garbage in it again and again costs another 0.2 CPU-s

    disk = contextlib.nullcontext() if engine.DISTRIBUTED else spill_folder()
    away = deployment.runner in runners.REMOTE  # where what it has read is not told
    shown = contextlib.nullcontext() if away else progress.shown(report.title(pipeline, deployment))
    with disk as spill, shown, told():
        engine.run(build, flags)
    return cast("report.Facts", json.loads(_taken(deployment.facts)))


@contextlib.contextmanager
def told() -> Iterator[None]:
    """What a worker raised for the user, raised as that."""
    try:
        yield
    except Exception as error:
        if (found := mistake(error)) is None:
            raise
        raise found from error


def dry_run(pipeline: "Pipeline", deployment: Deployment) -> None:
    """Reads every header, plans every file, looks at every table, holds the graph against what is known not to work,
    and runs nothing."""
    engine = runners.named(deployment.runner)
    if deployment.runner in runners.REMOTE:
        remote.check(deployment)
    if deployment.mode == "batch":
        from pipelines import graph

        # without the store, where building a graph begins a generation
        prepared = graph.prepare(pipeline, dataclasses.replace(deployment, store=None))
        preflight.rehearse(deployment.runner, lambda root: graph.build(root, prepared))
    else:
        from pipelines import live

        live.ready(pipeline, deployment)
        if deployment.mode == "stream" and engine.UNBOUNDED:
            from pipelines import stream, streaming

            streamed = streaming.compiled(pipeline, deployment, engine)
            preflight.rehearse(deployment.runner, lambda root: stream.build(root, streamed))


def mistake(error: BaseException) -> UserError | DataRefused | None:
    """The UserError or DataRefused that an error of a run comes from, in one line; None where the fault is ours.

    In this process Beam raises what a worker raised; from a worker elsewhere comes only the text of its traceback.

    >>> mistake(RuntimeError("Traceback\\npipelines.transforms.errors.UserError: no such file [while running 'Read']"))
    UserError('no such file')
    """
    for cause in _causes(error):
        if isinstance(cause, UserError | DataRefused):
            return type(cause)(_RUNNING.sub("", str(cause)))
        if any(sign in str(cause) for sign in _FULL):
            reason = _RUNNING.sub("", str(cause)).strip().splitlines()[-1]
            return UserError(f"the disk is full: {reason}; free some space or choose other places, then run again")
        for path, message in reversed(_RAISED.findall(str(cause))):
            kind = pydoc.locate(path)
            if isinstance(kind, type) and issubclass(kind, UserError | DataRefused):
                return kind(_RUNNING.sub("", message))
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _prepare(deployment: Deployment) -> None:
    """An earlier run's facts must not pass for this one's; and the report's folder had better exist now than later."""
    import fsspec

    try:
        files, path = fsspec.url_to_fs(deployment.facts)
        files.makedirs(files._parent(path), exist_ok=True)
        if files.isdir(path) or files.isdir(files._strip_protocol(deployment.report)):
            raise UserError(f"--report={deployment.report}: a folder; name a file in it, such as run.json")
        if files.exists(path):
            files.rm(path)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"--report={deployment.report}: cannot be written: {error}") from None


def _taken(uri: str) -> str:
    import fsspec

    files, path = fsspec.url_to_fs(uri)
    text = files.cat_file(path).decode()
    files.rm(path)
    return cast(str, text)


def _write(uri: str, text: str) -> None:
    import fsspec

    try:
        with fsspec.open(uri, "wt", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"--report={uri}: the run is done and committed, but this cannot be written: {error}") from None


if __name__ == "__main__":
    from pipelines.cli import process

    process(command="run")
