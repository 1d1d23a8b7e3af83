"""DirectRunner: the whole graph in this process, for bounded graphs that one machine can hold.

Beam's own DirectRunner tries Prism, then FnApiRunner, then an old runner, and falls back in silence; so FnApiRunner is
named here. It runs one bundle at a time (its threaded and multi-process modes are slower). What it shuffles it holds in
memory: only partial aggregates are ever shuffled. DuckDB keeps one thread here as elsewhere: on two cores a second one
cost 15 % more CPU for the benchmark's 30M rows, and saved no time while anything else ran.
"""

from collections.abc import Callable, Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

DISTRIBUTED = False
UNBOUNDED = False


def run(build: Callable[[beam.Pipeline], None], flags: Sequence[str]) -> None:
    """Runs the graph to its end in this process. What a worker raises is raised, with Beam's addition to its text."""
    pipeline = beam.Pipeline(runner=FnApiRunner(), options=_Options(list(flags)))
    build(pipeline)
    pipeline.run().wait_until_finish()


class _Options(PipelineOptions):  # type: ignore[misc]
    """Beam asks for views of its options several times a transform, and makes an argument parser for each: a tenth of
    a second for a graph of ours. The views share their values, so one of each kind serves."""

    def view_as(self, cls: type[PipelineOptions]) -> PipelineOptions:
        views = self.__dict__.setdefault("_views", {})
        if cls not in views:
            views[cls] = super().view_as(cls)
        return views[cls]
