"""PrismRunner: Beam's own portable runner in one process, for small graphs that a real engine would be too much for.

Bounded graphs, and unbounded ones. Prism says nothing of rows that it loses, so a live run trusts the law of
conservation, not its exit. It is the one that `pipelines cluster up prism` has started, or one of this process.
``--prism_location`` names a binary; else ``prism`` on the PATH, else what ``go install`` made under
``.clusters/prism``, which it makes now if Go is there.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions, PortableOptions, PrismRunnerOptions, StandardOptions

from pipelines.runners import clusters, jobs, prism_cluster

DISTRIBUTED = True
UNBOUNDED = True
DEALT = True

_OURS = ("--runner=PrismRunner",)
_STREAMING = ("--experiments=prism_disable_sdf_split",)
"""For streams. Prism splits what a slow bundle has left and gives that to another at once, also what is of a key that
the first is still at: so two had the state of a key at a time, and what one put there was lost."""

Server = Callable[[], contextlib.AbstractContextManager[str]]


def run(build: Callable[[beam.Pipeline], None], flags: Sequence[str]) -> None:
    """Runs the graph to its end on Prism. What a worker raises comes as the text of its traceback."""
    server, every = _server(flags)
    with server() as endpoint:
        jobs.run(build, endpoint, every)


def prepared(build: Callable[[beam.Pipeline], None], flags: Sequence[str]) -> Callable[[], None]:
    """The graph, to be run any number of times, all on one Prism."""
    return jobs.prepared(build, *_server(flags))


def _server(flags: Sequence[str]) -> tuple[Server, list[str]]:
    """What starts a Prism, or finds one, and the flags of a job there."""
    streaming = PipelineOptions(list(flags)).view_as(StandardOptions).streaming
    every = [*_OURS, *(_STREAMING if streaming else ()), *flags]
    options = PipelineOptions(every)
    if given := options.view_as(PortableOptions).job_endpoint:
        return lambda: contextlib.nullcontext(given), every
    if not options.view_as(PrismRunnerOptions).prism_location and (cluster := clusters.found("prism")):
        print(f"PrismRunner: on the one at {cluster.endpoint}", file=sys.stderr)
        return lambda: contextlib.nullcontext(cluster.endpoint), [*cluster.flags, *every]
    return lambda: serving(options), every


@contextlib.contextmanager
def serving(options: PipelineOptions | None = None) -> Iterator[str]:
    """A Prism, for as many runs as the block has; yields its endpoint."""
    given = (options or PipelineOptions([])).view_as(PrismRunnerOptions).prism_location
    program = prism_cluster.binary(given, lambda line: print(line, file=sys.stderr))
    with jobs.serving("prism", prism_cluster.command(program, 0), prism_cluster.STARTED) as endpoint:
        yield endpoint
