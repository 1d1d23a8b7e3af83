"""SparkRunner: Spark through a job server: the cluster that `pipelines cluster up spark` has started, or Spark itself
inside of a job server of this process (``--spark_master_url=local[*]``, or where there is no cluster).

Bounded graphs, as Beam has no unbounded ones there: a live run takes turns. They share one server, and a Spark that it
keeps between them, so that a turn costs a second or two and not twenty. ``--spark_job_server_jar`` names another job
server than that of ``java``, ``--job_endpoint`` one that runs already.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions, PortableOptions, SparkRunnerOptions
from apache_beam.runners.portability.spark_runner import SparkJarJobServer

from pipelines.runners import clusters, java, jobs, spark_cluster

DISTRIBUTED = True
UNBOUNDED = False
DEALT = False

_OURS = (
    "--runner=SparkRunner",
    "--spark_master_url=local[*]",  # Beam's default has four cores, whatever the machine has
    "--environment_cache_millis=2000",  # else every task of every stage starts a worker of its own
)

Server = Callable[[], contextlib.AbstractContextManager[str]]


def run(build: Callable[[beam.Pipeline], None], flags: Sequence[str]) -> None:
    """Runs the graph to its end on Spark. What a worker raises comes as the text of its traceback."""
    server, every = _server(flags)
    with server() as endpoint:
        jobs.run(build, endpoint, every)


def prepared(build: Callable[[beam.Pipeline], None], flags: Sequence[str]) -> Callable[[], None]:
    """The graph, to be run any number of times, all on one server."""
    return jobs.prepared(build, *_server(flags))


def _server(flags: Sequence[str]) -> tuple[Server, list[str]]:
    """What starts a job server, or finds one, and the flags of a job there."""
    every = [*_OURS, *flags]
    options = PipelineOptions(every)
    if given := options.view_as(PortableOptions).job_endpoint:
        return lambda: contextlib.nullcontext(given), every
    named = any(flag.partition("=")[0] == "--spark_master_url" for flag in flags)
    if not named and (cluster := clusters.found("spark")):
        print(f"SparkRunner: on the cluster at {cluster.facts['master']}", file=sys.stderr)
        return lambda: contextlib.nullcontext(cluster.endpoint), [*_OURS, *spark_cluster.flags(cluster), *flags]
    return lambda: serving(options), every


@contextlib.contextmanager
def serving(options: PipelineOptions | None = None) -> Iterator[str]:
    """A job server, for as many runs as the block has; yields its endpoint."""
    options = options or PipelineOptions(list(_OURS))
    master = options.view_as(SparkRunnerOptions).spark_master_url
    here = spark_cluster.HERE if master.startswith("local") else ()
    properties = (spark_cluster.LITTLE, *spark_cluster.DRIVER, *here)
    with server(options).serving([f"--spark-master-url={master}"], properties) as endpoint:
        yield endpoint


def server(options: PipelineOptions) -> java.JobServer:
    """Spark's job server."""
    given = options.view_as(SparkRunnerOptions).spark_job_server_jar
    return java.JobServer("Spark", spark_cluster.MAIN, given, lambda: SparkJarJobServer(options))
