"""A Spark cluster of this machine: a master, a worker with one executor, Beam's job server, and a pool of our workers.

The job server is the driver, and keeps one Spark application from job to job: its executor stays, warm. Master, worker
and executor are started out of the job server's own classes, so they are of one version. All listen on 127.0.0.1 alone.
Together about 1.5 GiB, and what the Python workers take.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.runners import java
from pipelines.runners.clusters import Cluster, Plan
from pipelines.runners.members import Member, workers

if TYPE_CHECKING:
    from apache_beam.runners.portability.spark_runner import SparkJarJobServer

MAIN = "org.apache.beam.runners.spark.SparkJobServerDriver"
"""The job server's class."""

CORES = 2
"""Tasks that run at once."""

DRIVER = (
    "-Dspark.ui.enabled=false",
    "-Dbeam.spark.test.reuseSparkContext=true",  # for the next job
    "-Dspark.cleaner.periodicGC.interval=1min",  # else what turns have shuffled stays on disk for half an hour
    "-Dorg.slf4j.simpleLogger.log.org.apache.beam.runners.fnexecution=off",  # a page for each worker that ends
    "-Dorg.slf4j.simpleLogger.log.org.apache.beam.sdk.fn=off",
)
"""Of a job server, also of one with Spark inside of it."""

HERE = ("-Dspark.driver.host=127.0.0.1", "-Dspark.driver.bindAddress=127.0.0.1")

LITTLE = "-XX:TieredStopAtLevel=1"
"""Little of the work is Java's: compiling it well cost 10 CPU-s at the start, 2 a turn."""

_HOST = "127.0.0.1"
_DEPLOY = "org.apache.spark.deploy"


def plan(folder: Path, port: Callable[[str], int], tell: Callable[[str], None], **options: str) -> Plan:
    """The members, and where the executor finds its classes. options: job_server_jar."""
    jobs = server(options.get("job_server_jar"))
    jar = jobs.jar()
    tell(f"with {jobs.told(jar)}")
    for name in ("tmp", "work", "artifacts", "home/jars"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    env = {
        "SPARK_HOME": f"{folder}/home",  # must have jars/; the executor's classes come as everybody's
        "SPARK_SCALA_VERSION": "2.12",  # else it looks for where Spark was built
        "SPARK_LOCAL_IP": _HOST,
        "SPARK_LOCAL_HOSTNAME": _HOST,
        "SPARK_LOCAL_DIRS": f"{folder}/tmp",
        "SPARK_WORKER_DIR": f"{folder}/work",
    }
    classes = jobs.launched(jar)
    run = (jobs.java(), *java.JAVA, f"-Djava.io.tmpdir={folder}/tmp", LITTLE)
    master = f"spark://{_HOST}:{port('master')}"
    executor = " ".join((classes[0], *java.JAVA, LITTLE, f"-Djava.io.tmpdir={folder}/tmp", *DRIVER[-2:]))
    driver = (
        *DRIVER,
        *HERE,
        f"-Dspark.executor.extraJavaOptions={executor}",
        "-Dspark.executor.memory=640m",
        "-Dspark.locality.wait=0",
        f"-Dspark.default.parallelism={CORES}",
    )
    spark = (*run, "-Xmx128m", f"-Dorg.slf4j.simpleLogger.log.{_DEPLOY}=info", *classes)
    leading = _flags(host=_HOST, port=port("master"), webui_port=port("master web"))
    working = _flags(host=_HOST, port=port("worker"), webui_port=port("worker web"), cores=CORES, memory="1g")
    leader, worker = (*spark, f"{_DEPLOY}.master.Master", *leading), (*spark, f"{_DEPLOY}.worker.Worker", *working)
    members = [
        Member("master", leader, env, port("master"), "I have been elected leader"),
        Member("worker", (*worker, master), env, port("worker"), "Successfully registered with master", waits=True),
        Member(
            "job server",
            (
                *run,
                "-Xmx512m",
                *driver,
                *classes,
                MAIN,
                f"--spark-master-url={master}",
                *java.listening(port("job server"), port("artifacts")),
                f"--artifacts-dir={folder}/artifacts",
            ),
            env,
            port("job server"),
            java.STARTED.pattern,
        ),
        workers(port("worker pool")),
    ]
    facts = {"master": master, "web": f"http://{_HOST}:{port('master web')}", "job_server": jobs.told(jar)}
    return Plan(members, f"{_HOST}:{port('job server')}", f"{_HOST}:{port('worker pool')}", facts)


def down(folder: Path) -> None:
    """Removes what the application has left."""
    for name in ("tmp", "work", "artifacts", "home"):
        shutil.rmtree(folder / name, ignore_errors=True)


def flags(cluster: Cluster) -> list[str]:
    """What makes Beam use all of a cluster."""
    return [*cluster.flags, f"--spark_master_url={cluster.facts['master']}"]


def _flags(**values: str | int) -> list[str]:
    """As Spark wants them, without an equals sign."""
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def server(given: str | None = None) -> java.JobServer:
    """Spark's job server."""

    def official() -> "SparkJarJobServer":
        from apache_beam.options.pipeline_options import PipelineOptions
        from apache_beam.runners.portability.spark_runner import SparkJarJobServer

        return SparkJarJobServer(PipelineOptions([f"--spark_job_server_jar={given}"] if given else []))

    return java.JobServer("Spark", MAIN, given, official)
