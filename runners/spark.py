"""SparkRunner: Spark through a job server on this machine, with Spark itself inside of it (``local[*]``).

Bounded graphs, as Beam has no unbounded ones there: a live run takes turns. They share one server, and a Spark that it
keeps between them, so that a turn costs a second or two and not twenty. ``--spark_job_server_jar`` names another job
server than that of ``java``, ``--job_endpoint`` one that runs already, ``--spark_master_url`` a cluster.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions, PortableOptions, SparkRunnerOptions
from apache_beam.runners.portability.spark_runner import SparkJarJobServer

from pipelines.runners import java, jobs

DISTRIBUTED = True
UNBOUNDED = False
DEALT = False

_OURS = (
    "--runner=SparkRunner",
    "--spark_master_url=local[*]",  # Beam's default has four cores, whatever the machine has
    "--environment_cache_millis=2000",  # else every task of every stage starts a worker of its own
)
_SPARK = (
    "-XX:TieredStopAtLevel=1",  # little of the work is Java's: compiling it well cost 10 CPU-s at the start, 2 a turn
    "-Dspark.ui.enabled=false",
    "-Dbeam.spark.test.reuseSparkContext=true",  # for the next turn
    "-Dspark.cleaner.periodicGC.interval=1min",  # else what turns have shuffled stays on disk for half an hour
    "-Dorg.slf4j.simpleLogger.log.org.apache.beam.runners.fnexecution=off",  # a page for each worker that ends
    "-Dorg.slf4j.simpleLogger.log.org.apache.beam.sdk.fn=off",
)
_HERE = ("-Dspark.driver.host=127.0.0.1", "-Dspark.driver.bindAddress=127.0.0.1")


def run(build: Callable[[beam.Pipeline], None], flags: Sequence[str]) -> None:
    """Runs the graph to its end on Spark. What a worker raises comes as the text of its traceback."""
    with _server([*_OURS, *flags]) as endpoint:
        jobs.run(build, endpoint, [*_OURS, *flags])


def prepared(build: Callable[[beam.Pipeline], None], flags: Sequence[str]) -> Callable[[], None]:
    """The graph, to be run any number of times, all on one server."""
    return jobs.prepared(build, lambda: _server([*_OURS, *flags]), [*_OURS, *flags])


def _server(flags: Sequence[str]) -> contextlib.AbstractContextManager[str]:
    options = PipelineOptions(flags)
    given = options.view_as(PortableOptions).job_endpoint
    return contextlib.nullcontext(given) if given else serving(options)


@contextlib.contextmanager
def serving(options: PipelineOptions | None = None) -> Iterator[str]:
    """A job server, for as many runs as the block has; yields its endpoint."""
    options = options or PipelineOptions(list(_OURS))
    master = options.view_as(SparkRunnerOptions).spark_master_url
    here = _HERE if master.startswith("local") else ()
    with server(options).serving([f"--spark-master-url={master}"], [*_SPARK, *here]) as endpoint:
        yield endpoint


def server(options: PipelineOptions) -> java.JobServer:
    """Spark's job server."""
    given = options.view_as(SparkRunnerOptions).spark_job_server_jar
    main = "org.apache.beam.runners.spark.SparkJobServerDriver"
    return java.JobServer("Spark", main, given, lambda: SparkJarJobServer(options))
