"""DirectRunner: the whole graph in this process, for bounded graphs that one machine can hold.

Beam's own DirectRunner tries Prism, then FnApiRunner, then an old runner, and falls back in silence; so FnApiRunner is
named here, and ``preflight`` refuses what that cannot run. It runs one bundle at a time (its threaded and multi-process
modes are slower). What it shuffles it holds in memory: only partial aggregates are ever shuffled. DuckDB keeps one
thread here as elsewhere: on two cores a second one cost 15 % more CPU for the benchmark's 30M rows, and saved no time
while anything else ran. Arrow's memory comes from jemalloc where there is one: it keeps less of what was given back
than mimalloc (50 to 130 MiB less at the peak).
"""

import contextvars
import os
from collections.abc import Callable, Sequence
from typing import Any, Self

import apache_beam as beam
import pyarrow as pa
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.portability import python_urns
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.runners.portability.fn_api_runner.worker_handlers import (
    EmbeddedWorkerHandler,
    WorkerHandler,
    WorkerHandlerManager,
)

from pipelines.runners import preflight

DISTRIBUTED = False
UNBOUNDED = False
DEALT = False


def run(build: Callable[[beam.Pipeline], None], flags: Sequence[str]) -> None:
    """Runs the graph to its end in this process. What a worker raises is raised, with Beam's addition to its text."""
    _memory()
    _pipeline(_Checked(), build, flags).run().wait_until_finish()


def prepared(build: Callable[[beam.Pipeline], None], flags: Sequence[str]) -> Callable[[], None]:
    """The graph, to be run any number of times: making and encoding it costs a third of what a small run costs, and so
    does making its parts in the worker. They are kept, so their teardown is never called. Not for a graph with side
    inputs or state.
    """
    _memory()
    runner = _Runner()
    pipeline = _pipeline(runner, build, flags)

    def again() -> None:
        if runner.proto is None:
            pipeline.run().wait_until_finish()
        else:
            runner.run_via_runner_api(runner.proto, pipeline.options).wait_until_finish()

    return again


def _pipeline(runner: FnApiRunner, build: Callable[[beam.Pipeline], None], flags: Sequence[str]) -> beam.Pipeline:
    pipeline = beam.Pipeline(runner=runner, options=_Options(list(flags)))
    build(pipeline)
    return pipeline


def _memory() -> None:
    if "jemalloc" in pa.supported_memory_backends() and "ARROW_DEFAULT_MEMORY_POOL" not in os.environ:
        pa.set_memory_pool(pa.jemalloc_memory_pool())


class _Worker(EmbeddedWorkerHandler):  # type: ignore[misc]
    """The worker of one graph, for any number of runs: it knows the bundles of another run by their transforms."""

    def begin(self, manager: WorkerHandlerManager) -> Self:
        """A run has numbers of its own for its bundles."""
        self._numbered = manager._process_bundle_descriptors
        return self

    def push(self, request: Any) -> Any:
        if request.WhichOneof("request") == "process_bundle":
            bundle = self._numbered[request.process_bundle.process_bundle_descriptor_id]
            name = "\n".join(sorted(bundle.transforms))
            self.bundle_processor_cache.fns.setdefault(name, bundle)
            request.process_bundle.process_bundle_descriptor_id = name
        return super().push(request)

    def stop_worker(self) -> None:
        """Not yet: there will be another run."""


class _Checked(FnApiRunner):  # type: ignore[misc]
    """Runs no graph that it cannot run."""

    def run_via_runner_api(self, pipeline_proto: beam_runner_api_pb2.Pipeline, options: PipelineOptions) -> Any:
        preflight.guard("DirectRunner", pipeline_proto)
        return super().run_via_runner_api(pipeline_proto, options)


class _Runner(FnApiRunner):  # type: ignore[misc]
    """Keeps the graph that it is given to run, encoded, and its worker. proto: None before the first run."""

    proto: beam_runner_api_pb2.Pipeline | None = None
    worker: _Worker | None = None

    def run_via_runner_api(self, pipeline_proto: beam_runner_api_pb2.Pipeline, options: PipelineOptions) -> Any:
        if self.proto is None:
            preflight.guard("DirectRunner", pipeline_proto)
            self.proto = beam_runner_api_pb2.Pipeline()
            self.proto.CopyFrom(pipeline_proto)
        fresh = beam_runner_api_pb2.Pipeline()  # a run adds to it
        fresh.CopyFrom(self.proto)
        token = _running.set(self)
        try:
            return super().run_via_runner_api(fresh, options)
        except BaseException:
            self.worker = None  # what a failure leaves in it belongs to no other run
            raise
        finally:
            _running.reset(token)


_running: contextvars.ContextVar[_Runner | None] = contextvars.ContextVar("running", default=None)


@WorkerHandler.register_environment(python_urns.EMBEDDED_PYTHON, None)  # type: ignore[untyped-decorator]
def _worker(payload: None, state: Any, provision: Any, manager: WorkerHandlerManager) -> EmbeddedWorkerHandler:
    """The worker of the graph that this thread runs: a new one, unless it is kept."""
    runner = _running.get()
    if runner is None:
        return EmbeddedWorkerHandler(payload, state, provision, manager)
    runner.worker = runner.worker or _Worker(payload, state, provision, manager)
    return runner.worker.begin(manager)


class _Options(PipelineOptions):  # type: ignore[misc]
    """Beam asks for views of its options several times a transform, and makes an argument parser for each: a tenth of
    a second for a graph of ours. The views share their values, so one of each kind serves."""

    def view_as(self, cls: type[PipelineOptions]) -> PipelineOptions:
        views = self.__dict__.setdefault("_views", {})
        if cls not in views:
            views[cls] = super().view_as(cls)
        return views[cls]
