"""Running a graph through a job server: Flink's, Spark's, Prism's. The workers are threads of this process (LOOPBACK).

A server is a process of our own on ports that it chose itself, stopped by its pid when its block ends; with ``setpriv``
(Linux) also when this process is killed. Its log is under ``.clusters/`` (or PIPELINES_CLUSTERS) while it runs, and
stays there if it ended by itself.
"""

import contextlib
import functools
import logging
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import apache_beam as beam
import grpc
from apache_beam.options.pipeline_options import PipelineOptions, PortableOptions, StandardOptions
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.runners.portability.portable_runner import JobServiceHandle, PipelineResult, PortableRunner
from apache_beam.runners.worker import data_plane, sdk_worker

from pipelines.runners import preflight, workers
from pipelines.runners.clusters import folder
from pipelines.transforms.errors import UserError

START = 120.0
"""Seconds that a server may take to start."""

LOGS: dict[str, Path] = {}
"""Where the servers of this process log, by endpoint."""


@contextlib.contextmanager
def serving(engine: str, command: Sequence[str | Path], started: re.Pattern[str]) -> Iterator[str]:
    """Starts a job server and yields its endpoint. started: what it logs when it is ready; the group is its port.

    Raises UserError, with the last of what it said, where it does not start.
    """
    folder(engine).mkdir(parents=True, exist_ok=True)
    bound = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
    descriptor, name = tempfile.mkstemp(".log", "job-server-", folder(engine))
    log = Path(name)
    with os.fdopen(descriptor, "wb") as file:
        # A group of its own: Ctrl-C is for us, who then cancel the job and stop the server.
        process = subprocess.Popen(
            [*bound, *command], stdin=subprocess.DEVNULL, stdout=file, stderr=file, process_group=0
        )
    endpoint = None
    try:
        endpoint = f"127.0.0.1:{_port(process, log, started)}"
        LOGS[endpoint] = log
        yield endpoint
    finally:
        LOGS.pop(endpoint or "", None)
        if process.poll() is None:
            _stop(process)
            log.unlink(missing_ok=True)


def _port(process: subprocess.Popen[bytes], log: Path, started: re.Pattern[str]) -> str:
    """The port is the server's own: it tells it only once it listens there."""
    end = time.monotonic() + START
    while not (found := started.search(log.read_text(errors="replace"))):
        if process.poll() is not None or time.monotonic() > end:
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            raise UserError(f"the job server does not start: {' '.join(last) or 'it says nothing'} (all of it: {log})")
        time.sleep(0.05)
    return found[1]


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def run(build: Callable[[beam.Pipeline], None], endpoint: str, flags: Sequence[str]) -> None:
    """Runs a graph to its end on the server at an endpoint; interrupted, it cancels the job. Raises what failed.

    flags: of Beam; what is known not to work on the --runner among them is refused first."""
    with _connected(endpoint, flags) as options:
        _finish(_encoded(build, options)())


@contextlib.contextmanager
def submitted(build: Callable[[beam.Pipeline], None], endpoint: str, flags: Sequence[str]) -> Iterator[PipelineResult]:
    """A graph that runs on the server at an endpoint. Its workers here, if any, end with the block."""
    with _connected(endpoint, flags) as options:
        yield _encoded(build, options)()


def prepared(
    build: Callable[[beam.Pipeline], None],
    start: Callable[[], contextlib.AbstractContextManager[str]],
    flags: Sequence[str],
) -> Callable[[], None]:
    """The graph, to be run any number of times, each as ``run``, all on one server and encoded once.

    start: the server. It starts with the first run, and ends when what this answers is held no more.
    """
    kept = contextlib.ExitStack()
    submit: Callable[[], PipelineResult] | None = None

    def again() -> None:
        nonlocal submit, build
        if submit is None:
            options = kept.enter_context(_connected(kept.enter_context(start()), flags))
            submit = _encoded(build, options)
            del build  # it may hold who holds this
        _finish(submit())

    weakref.finalize(again, kept.close)
    return again


@contextlib.contextmanager
def _connected(endpoint: str, flags: Sequence[str]) -> Iterator[PipelineOptions]:
    """What runs a job at an endpoint, and who starts its workers."""
    _quiet()
    options = PipelineOptions([f"--job_endpoint={endpoint}", "--environment_type=LOOPBACK", *flags])
    environment = options.view_as(PortableOptions)
    if environment.environment_type != "LOOPBACK":
        yield options
        return
    with workers.serving(options) as address:
        environment.environment_type, environment.environment_config = "EXTERNAL", address
        yield options


def _encoded(build: Callable[[beam.Pipeline], None], options: PipelineOptions) -> Callable[[], PipelineResult]:
    """What starts the graph as a job."""
    pipeline = beam.Pipeline(runner=PortableRunner(), options=options)
    build(pipeline)
    graph = PortableRunner.get_proto_pipeline(pipeline, options)
    preflight.guard(options.view_as(StandardOptions).runner, graph)
    return functools.partial(_submit, graph, PortableRunner().create_job_service(options))


def _submit(graph: beam_runner_api_pb2.Pipeline, service: JobServiceHandle) -> PipelineResult:
    return PipelineResult(service.job_service, *service.submit(graph))


def _finish(result: PipelineResult) -> None:
    try:
        result.wait_until_finish()
    except KeyboardInterrupt:
        result.cancel()
        raise


@functools.cache
def _quiet() -> None:
    """What a worker raises is raised here too, so it need not be printed; nor that a server at its end hangs up."""
    logging.getLogger().addFilter(lambda record: not record.pathname.endswith("portable_runner.py"))
    logging.getLogger(data_plane.__name__).addFilter(lambda record: not _hung_up(record))
    sdk_worker.print = lambda *_, **__: None
    before = threading.excepthook
    threading.excepthook = lambda args: None if isinstance(args.exc_value, grpc.RpcError) else before(args)


def _hung_up(record: logging.LogRecord) -> bool:
    return record.exc_info is not None and isinstance(record.exc_info[1], grpc.RpcError)
