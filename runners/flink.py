"""FlinkRunner: Flink through a job server on this machine, with Flink itself inside of it (``[local]``).

``--flink_job_server_jar`` names another job server than that of ``java``, ``--job_endpoint`` one that runs already:
what starts it once for many runs saves 6 s each.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import FlinkRunnerOptions, PipelineOptions, PortableOptions, StandardOptions
from apache_beam.runners.portability.flink_runner import FlinkJarJobServer

from pipelines.runners import java, jobs

DISTRIBUTED = True
UNBOUNDED = True
DEALT = False

_STREAMING = ("--max_bundle_time_mills=100",)
"""For streams: how long the engine may hold back what a bundle gives. Flink's default is a second."""


def run(build: Callable[[beam.Pipeline], None], flags: Sequence[str]) -> None:
    """Runs the graph to its end on Flink. What a worker raises comes as the text of its traceback."""
    options = PipelineOptions(list(flags))
    given = options.view_as(PortableOptions).job_endpoint
    ours = _STREAMING if options.view_as(StandardOptions).streaming else ()
    with contextlib.nullcontext(given) if given else serving(options) as endpoint:
        jobs.run(build, endpoint, [*ours, *flags])


def prepared(build: Callable[[beam.Pipeline], None], flags: Sequence[str]) -> Callable[[], None]:
    """The graph, to be run any number of times, as jobs of their own."""
    return lambda: run(build, flags)


@contextlib.contextmanager
def serving(options: PipelineOptions | None = None) -> Iterator[str]:
    """A job server, for as many runs as the block has; yields its endpoint."""
    options = options or PipelineOptions([])
    master = options.view_as(FlinkRunnerOptions).flink_master.replace("[auto]", "[local]")
    with server(options).serving([f"--flink-master={master}"]) as endpoint:
        yield endpoint


def server(options: PipelineOptions) -> java.JobServer:
    """Flink's job server."""
    given = options.view_as(FlinkRunnerOptions).flink_job_server_jar
    return java.JobServer(
        "Flink", "org.apache.beam.runners.flink.FlinkJobServerDriver", given, lambda: FlinkJarJobServer(options)
    )
