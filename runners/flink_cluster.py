"""A Flink cluster of this machine: ZooKeeper, a JobManager, a TaskManager, Beam's job server, and a worker pool.

ZooKeeper (Flink's own, out of its classes) is what a JobManager finds its jobs and their last checkpoints in after it
was killed. All listen on 127.0.0.1 alone. Together about 2 GiB, and what the Python workers take.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.runners import java
from pipelines.runners.clusters import Cluster, Plan
from pipelines.runners.members import Member, scratch, workers

if TYPE_CHECKING:
    from apache_beam.runners.portability.flink_runner import FlinkJarJobServer

MAIN = "org.apache.beam.runners.flink.FlinkJobServerDriver"
"""The job server's class."""

PARALLELISM = 2
"""Parts of a graph that run at once: as many as there are cores on a small machine."""

SLOTS = 4
"""Places for such parts: a batch can run beside a stream."""

RESTARTS = ("--number_of_execution_retries=2147483647", "--execution_retry_delay=1000")
"""A stream is tried again for ever, a second later. Flink's own delays grow to a minute, for an hour."""

_HOST = "127.0.0.1"
_RUNTIME = "org.apache.flink.runtime"
_SIZES = {
    "taskmanager.memory.task.heap.size": "640m",
    "taskmanager.memory.task.off-heap.size": "128m",
    "taskmanager.memory.framework.heap.size": "128m",
    "taskmanager.memory.framework.off-heap.size": "128m",
    "taskmanager.memory.network.min": "256m",
    "taskmanager.memory.network.max": "256m",
    "taskmanager.memory.managed.size": "2g",  # what batch sorts in, and RocksDB's share
    "taskmanager.memory.jvm-metaspace.size": "192m",
    "taskmanager.memory.jvm-overhead.min": "128m",
    "taskmanager.memory.jvm-overhead.max": "128m",
}
"""A TaskManager that no script of Flink starts must be told each of them."""

_LITTLE = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")
"""Little of the work is Java's: compiling it well doubled the CPU of a TaskManager, and garbage is little too."""

_ZOOKEEPER = (*_LITTLE, "-Xmx64m", "-Dzookeeper.preAllocSize=1024")
_MANAGER = (*_LITTLE, "-Xmx448m")
_TASKS = (*_LITTLE, "-Xmx768m", "-XX:MaxDirectMemorySize=512m")
_SERVER = (*_LITTLE, "-Xmx512m")

_LOGS = (
    "-Dorg.slf4j.simpleLogger.showDateTime=true",
    "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd'T'HH:mm:ss.SSSXXX",
    "-Dorg.slf4j.simpleLogger.showThreadName=false",
    f"-Dorg.slf4j.simpleLogger.log.{_RUNTIME}=info",
)


def plan(folder: Path, port: Callable[[str], int], tell: Callable[[str], None], **options: str) -> Plan:
    """The members, and their configuration under ``folder``. options: job_server_jar."""
    jobs = server(options.get("job_server_jar"))
    jar = jobs.jar()
    tell(f"with {jobs.told(jar)}")
    settings = _settings(folder, port)
    _configure(folder, settings, port("zookeeper"))
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=4).hexdigest()  # members of other ones are replaced
    run = (jobs.java(), *java.JAVA, *_LOGS, f"-Dsettings={digest}", *jobs.launched(jar))
    conf, rest, endpoint = f"{folder}/conf", f"{_HOST}:{port('rest')}", f"{_HOST}:{port('job server')}"
    ports = java.listening(port("job server"), port("artifacts"))
    submitting = (f"--flink-master={rest}", *ports, f"--artifacts-dir={folder}/artifacts")

    def member(name: str, of: str, memory: Sequence[str], *program: str, ready: str | None = None) -> Member:
        own = f"-Djava.io.tmpdir={scratch(folder, name)}"
        return Member(name, (*run, *memory, own, *program), port=port(of), ready=ready)

    quorum = f"{_RUNTIME}.zookeeper.FlinkZooKeeperQuorumPeer"
    manager = f"{_RUNTIME}.entrypoint.StandaloneSessionClusterEntrypoint"
    runner = f"{_RUNTIME}.taskexecutor.TaskManagerRunner"
    registered = "Successful registration at resource manager"
    members = [
        member("zookeeper", "zookeeper", _ZOOKEEPER, quorum, "--zkConfigFile", f"{conf}/zoo.cfg", "--peerId", "1"),
        member("jobmanager", "rest", _MANAGER, manager, f"--configDir={conf}", ready="granted leadership"),
        member("taskmanager", "taskmanager", _TASKS, runner, f"--configDir={conf}", ready=registered),
        member("job server", "job server", _SERVER, MAIN, *submitting, ready=java.STARTED.pattern),
        workers(port("worker pool")),
    ]
    facts = {
        "rest": f"http://{rest}",
        "parallelism": PARALLELISM,
        "slots": SLOTS,
        "checkpoints": settings["state.checkpoints.dir"],
        "savepoints": settings["state.savepoints.dir"],
        "job_server": jobs.told(jar),
    }
    return Plan(members, endpoint, f"{_HOST}:{port('worker pool')}", facts)


def down(folder: Path) -> None:
    """Forgets the jobs: the next cluster does not go on with them."""
    for name in ("zookeeper", "ha", "tmp", "artifacts"):
        shutil.rmtree(folder / name, ignore_errors=True)


def flags(cluster: Cluster) -> list[str]:
    """What makes Beam use all of a cluster."""
    return [*cluster.flags, f"--parallelism={cluster.facts['parallelism']}"]


def server(given: str | None = None) -> java.JobServer:
    """The cluster's. given: --job_server_jar."""

    def official() -> "FlinkJarJobServer":
        from apache_beam.options.pipeline_options import PipelineOptions
        from apache_beam.runners.portability.flink_runner import FlinkJarJobServer

        return FlinkJarJobServer(PipelineOptions([f"--flink_job_server_jar={given}"] if given else []))

    return java.JobServer("Flink", MAIN, given, official)


def _settings(folder: Path, port: Callable[[str], int]) -> dict[str, str | float]:
    """Flink's options. A restart strategy is none of them: streams bring their own (RESTARTS), and a batch is not tried
    again, since what failed it once would again."""
    return {
        "jobmanager.rpc.address": _HOST,
        "jobmanager.bind-host": _HOST,
        "rest.address": _HOST,
        "rest.bind-address": _HOST,
        "rest.port": port("rest"),
        "blob.server.port": port("blobs"),
        "web.submit.enable": False,
        "taskmanager.host": _HOST,
        "taskmanager.bind-host": _HOST,
        "taskmanager.rpc.port": 0,  # a new one each time: at a known one a peer may take it for who died, for ever
        "taskmanager.data.port": port("taskmanager"),
        "taskmanager.numberOfTaskSlots": SLOTS,
        "taskmanager.cpu.cores": float(PARALLELISM),
        "taskmanager.resource-id": "taskmanager",  # one that comes back takes the place of the dead one at once
        **_SIZES,
        "taskmanager.network.sort-shuffle.min-buffers": 64,  # of each exchange of a batch, 32 KiB each; else 512
        "high-availability.type": "zookeeper",
        "high-availability.zookeeper.quorum": f"{_HOST}:{port('zookeeper')}",
        "high-availability.storageDir": f"file://{folder}/ha",
        "high-availability.cluster-id": "/local",
        "high-availability.jobmanager.port": 0,  # as ZooKeeper tells
        "high-availability.zookeeper.client.session-timeout": 6000,  # a dead JobManager leads as long as that
        "high-availability.zookeeper.client.tolerate-suspended-connections": True,
        "zookeeper.sasl.disable": True,
        "heartbeat.interval": 2000,
        "heartbeat.timeout": 10_000,
        "pekko.ask.timeout": "60 s",
        "state.checkpoints.dir": f"file://{folder}/checkpoints",
        "state.savepoints.dir": f"file://{folder}/savepoints",
        "state.backend.incremental": True,
        "classloader.resolve-order": "parent-first",
    }


def _configure(folder: Path, settings: Mapping[str, str | float], port: int) -> None:
    for name in ("conf", "ha", "zookeeper", "checkpoints", "savepoints", "artifacts"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    lines = [f"{key}: {json.dumps(value)}\n" for key, value in settings.items()]
    (folder / "conf" / "config.yaml").write_text("".join(lines))
    told = {
        "dataDir": folder / "zookeeper",
        "clientPort": port,
        "clientPortAddress": _HOST,
        "tickTime": 1000,
        "admin.enableServer": "false",
    }
    (folder / "conf" / "zoo.cfg").write_text("".join(f"{key}={value}\n" for key, value in told.items()))
