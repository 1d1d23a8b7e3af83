"""DirectRunner: the whole graph in this process, for bounded graphs that one machine can hold.

Beam's own DirectRunner tries Prism, then FnApiRunner, then an old runner, and falls back in silence; so FnApiRunner is
named here. It runs one bundle at a time (its threaded and multi-process modes are slower). What it shuffles it holds in
memory: only partial aggregates are ever shuffled. DuckDB keeps one thread here as elsewhere: on two cores a second one
cost 15 % more CPU for the benchmark's 30M rows, and saved no time while anything else ran. Arrow's memory comes from
jemalloc where there is one: it keeps less of what was given back than mimalloc (50 to 130 MiB less at the peak).
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

DISTRIBUTED = False
UNBOUNDED = False
DEALT = False


def run(build: Callable[[beam.Pipeline], None], flags: Sequence[str]) -> None:
    """Runs the graph to its end in this process. What a worker raises is raised, with Beam's addition to its text."""
    prepared(build, flags)()


def prepared(build: Callable[[beam.Pipeline], None], flags: Sequence[str]) -> Callable[[], None]:
    """The graph, to be run any number of times: making and encoding it costs a third of what a small run costs."""
    if "jemalloc" in pa.supported_memory_backends() and "ARROW_DEFAULT_MEMORY_POOL" not in os.environ:
        pa.set_memory_pool(pa.jemalloc_memory_pool())
    runner = _Runner()
    pipeline = beam.Pipeline(runner=runner, options=_Options(list(flags)))
    build(pipeline)

    def again() -> None:
        if runner.proto is None:
            pipeline.run().wait_until_finish()
        else:
            runner.run_via_runner_api(runner.proto, pipeline.options).wait_until_finish()

    return again


class _Runner(FnApiRunner):  # type: ignore[misc]
    """Keeps the graph that it is given to run, encoded. proto: None before the first run."""

    proto: beam_runner_api_pb2.Pipeline | None = None

    def run_via_runner_api(self, pipeline_proto: beam_runner_api_pb2.Pipeline, options: PipelineOptions) -> Any:
        if self.proto is None:
            self.proto = beam_runner_api_pb2.Pipeline()
            self.proto.CopyFrom(pipeline_proto)
        fresh = beam_runner_api_pb2.Pipeline()  # a run adds to it
        fresh.CopyFrom(self.proto)
        return super().run_via_runner_api(fresh, options)


class _Options(PipelineOptions):  # type: ignore[misc]
    """Beam asks for views of its options several times a transform, and makes an argument parser for each: a tenth of
    a second for a graph of ours. The views share their values, so one of each kind serves."""

    def view_as(self, cls: type[PipelineOptions]) -> PipelineOptions:
        views = self.__dict__.setdefault("_views", {})
        if cls not in views:
            views[cls] = super().view_as(cls)
        return views[cls]
