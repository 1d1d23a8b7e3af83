"""FlinkRunner: Flink through a job server: the cluster that `pipelines cluster up flink` has started, or Flink itself
inside of a job server of this process (``--flink_master=[local]``, or where there is no cluster).

``--flink_job_server_jar`` names another job server than that of ``java``, ``--job_endpoint`` one that runs already:
what starts it once for many runs saves 6 s each. An unbounded graph is checkpointed, and goes on where it was stopped.
"""

import contextlib
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import apache_beam as beam
from apache_beam.options.pipeline_options import (
    FlinkRunnerOptions,
    GoogleCloudOptions,
    PipelineOptions,
    PortableOptions,
)
from apache_beam.runners.portability.flink_runner import FlinkJarJobServer

from pipelines.runners import clusters, flink_cluster, java, jobs
from pipelines.runners.flink_jobs import LIVING, Rest, location
from pipelines.transforms.errors import UserError

if TYPE_CHECKING:
    from apache_beam.runners.portability.portable_runner import PipelineResult

    from pipelines.runners import Following

DISTRIBUTED = True
UNBOUNDED = True
DEALT = False

Server = Callable[[], contextlib.AbstractContextManager[str]]

_NAMED = "--runner=FlinkRunner"
"""For preflight."""

_STREAMING = (
    "--max_bundle_time_mills=100",  # how long the engine may hold back what a bundle gives; Flink's default is a second
    "--checkpointing_interval=3000",
    "--finish_bundle_before_checkpointing",  # what a bundle still gives would be kept by the number of its output
    "--min_pause_between_checkpoints=1000",
    "--externalized_checkpoints_enabled",
    "--retain_externalized_checkpoints_on_cancellation",
    "--state_backend=filesystem",  # on the heap, checkpoints as files
)

_EMBEDDED = {
    "rest.address": "127.0.0.1",
    "rest.bind-address": "127.0.0.1",
    "taskmanager.host": "127.0.0.1",
    "jobmanager.rpc.address": "127.0.0.1",
    "restart-strategy.type": "none",  # what fails fails again, and the next run resumes
}
"""Flink inside of a job server. It listens on all interfaces otherwise."""

_TOLD = "-Dorg.slf4j.simpleLogger.log.org.apache.flink.runtime.dispatcher.DispatcherRestEndpoint=info"
_LISTENS = re.compile(r"Rest endpoint listening at (\S+:\d+)")
_OURS = re.compile(r"^pipelines\.transforms\.errors\.(?:UserError|DataRefused): ", re.MULTILINE)

_CANCELLED = "JobCancellationException"
_OTHER = "Cannot map checkpoint/savepoint state for operator"

START = 120.0
"""Seconds until a job that was submitted is known to Flink."""

ENDS = 15.0
"""Seconds that a job may take to end, once it is stopped."""

_LOOK, _OFTEN = 0.2, 25


def run(build: Callable[[beam.Pipeline], None], flags: Sequence[str]) -> None:
    """Runs the graph to its end on Flink. What a worker raises comes as the text of its traceback."""
    server, cluster = _server(flags)
    with server() as endpoint:
        jobs.run(build, endpoint, [_NAMED, *cluster, *flags])


def prepared(build: Callable[[beam.Pipeline], None], flags: Sequence[str]) -> Callable[[], None]:
    """The graph, to be run any number of times, all on one server."""
    server, cluster = _server(flags)
    return jobs.prepared(build, server, [_NAMED, *cluster, *flags])


def follow(build: Callable[[beam.Pipeline], None], flags: Sequence[str], following: "Following") -> None:
    """Runs an unbounded graph; see ``pipelines.runners.Resumable``."""
    server, cluster = _server(flags)
    with server() as endpoint, _configured(following.since) as configuration:
        ours = [*_STREAMING, f"--state_backend_storage_path={location(following.folder)}", *cluster]
        ours += flink_cluster.RESTARTS if cluster else ()
        if following.since is not None:
            ours.append(f"--savepoint_path={following.since}")
        if endpoint in jobs.LOGS:  # Flink inside of the job server: Beam does not tell it what it resumes, and its
            ours += [f"--flink_conf_dir={configuration}", "--parallelism=1"]  # workers are threads of one process
        options = PipelineOptions([*ours, *flags])
        name = options.view_as(GoogleCloudOptions).job_name or following.name
        with jobs.submitted(build, endpoint, [_NAMED, f"--job_name={name}", *ours, *flags]) as result:
            _Followed(result, name, _places(options, endpoint), following).wait()


class _Followed:
    """A job that was submitted. places: answers the addresses at which its Flink may be."""

    def __init__(
        self, result: "PipelineResult", name: str, places: Callable[[], list[str]] | None, following: "Following"
    ) -> None:
        self.result, self.name, self.places, self.following = result, name, places, following
        self.failed: BaseException | None = None
        self.rest: Rest | None = None
        self.id: str | None = None
        self.over = threading.Event()  # a thread whose join is interrupted is told to be dead by Python 3.11

    def _finish(self) -> None:
        try:
            self.result.wait_until_finish()
        except BaseException as error:
            self.failed = error
        self.over.set()

    def wait(self) -> None:
        """Until it has ended, for whatever reason. Raises what failed, and KeyboardInterrupt where it is stopped so."""
        threading.Thread(target=self._finish, daemon=True).start()
        try:
            self._find()
            for look in range(sys.maxsize):
                if self.over.wait(_LOOK):
                    break
                if self.following.ended():
                    self._stop()
                    return
                if look % _OFTEN == 0:
                    self._refuse_mistakes()
        except KeyboardInterrupt:
            self._stop()
            raise
        if self.failed is not None and _OTHER in str(self.failed):
            raise UserError(
                f"{self.following.since}: is of another graph, as another --parallelism makes one (a cluster's is "
                f"{flink_cluster.PARALLELISM}, that of Flink in this process 1); go on with that, or start again with "
                "--rebuild, which reads the log from its first offset"
            )
        if self.failed is not None and _CANCELLED not in str(self.failed):
            raise self.failed

    def _find(self) -> None:
        """Which job of which Flink it is."""
        end = time.monotonic() + START
        while self.places and self.id is None and not self.over.is_set() and time.monotonic() < end:
            for place in self.places():
                with contextlib.suppress(UserError):
                    self.id, self.rest = Rest(place).named(self.name), Rest(place)
                if self.id is not None:
                    self.following.submitted(self.name, self.id, place)
                    return
            self.over.wait(_LOOK)

    def _refuse_mistakes(self) -> None:
        """On a cluster a job is tried again for ever; what is the user's to mend, or the data's, ends it."""
        failure = None
        with contextlib.suppress(UserError):
            failure = self.rest.failure(self.id) if self.rest and self.id else None
        if failure and _OURS.search(failure):
            self._cancel()
            raise RuntimeError(failure)

    def _stop(self) -> None:
        """With a savepoint, or else what is left is the last checkpoint."""
        try:
            if self.rest is None or self.id is None:
                raise UserError(f"job {self.name}: no REST API of Flink is known")
            self.rest.stop(self.id, location(f"{self.following.folder}/savepoints"))
        except UserError as error:
            if not self.over.is_set():
                print(f"{self.name}: {error}; cancelled", file=sys.stderr)
                self._cancel()
        self.over.wait(ENDS)

    def _cancel(self) -> None:
        if self.rest is None or self.id is None:
            self.result.cancel()
            return
        with contextlib.suppress(UserError):
            self.rest.cancel(self.id)
            end = time.monotonic() + ENDS
            while self.rest.state(self.id) in LIVING and time.monotonic() < end:
                time.sleep(_LOOK)


def _places(options: PipelineOptions, endpoint: str) -> Callable[[], list[str]] | None:
    """Where the Flink behind a job server may be: as the user, the cluster or the server's log tells; None: unknown."""
    master = options.view_as(FlinkRunnerOptions).flink_master
    if re.fullmatch(r"(https?://)?[^\[\]/]+:\d+", master):
        return lambda: [master if master.startswith("http") else f"http://{master}"]
    if (log := jobs.LOGS.get(endpoint)) is not None:
        return lambda: [f"http://{at}" for at in reversed(_LISTENS.findall(log.read_text()))]
    if (cluster := clusters.found("flink")) is not None and cluster.endpoint == endpoint:
        return lambda: [cluster.facts["rest"]]
    return None


@contextlib.contextmanager
def _configured(since: str | None = None) -> Iterator[Path]:
    """A folder with the configuration of an embedded Flink. since: what its jobs resume."""
    told = dict(_EMBEDDED)
    if since is not None:
        told |= {"execution.savepoint.path": since, "execution.state-recovery.path": since}
    with tempfile.TemporaryDirectory(prefix="flink-") as folder:
        Path(folder, "config.yaml").write_text("".join(f"{key}: {value}\n" for key, value in told.items()))
        yield Path(folder)


def _server(flags: Sequence[str]) -> tuple[Server, list[str]]:
    """What starts a job server, or finds one, and what makes Beam use all of its cluster, if it is of this machine."""
    options = PipelineOptions(list(flags))
    given, master = options.view_as(PortableOptions).job_endpoint, options.view_as(FlinkRunnerOptions).flink_master
    if given:
        return lambda: contextlib.nullcontext(given), []
    if master == "[auto]" and (cluster := clusters.found("flink")) is not None:
        print(f"FlinkRunner: on the cluster at {cluster.facts['rest']}", file=sys.stderr)
        return lambda: contextlib.nullcontext(cluster.endpoint), flink_cluster.flags(cluster)
    return lambda: serving(options), []


@contextlib.contextmanager
def serving(options: PipelineOptions | None = None) -> Iterator[str]:
    """A job server, for as many runs as the block has; yields its endpoint."""
    options = options or PipelineOptions([])
    master = options.view_as(FlinkRunnerOptions).flink_master.replace("[auto]", "[local]")
    with (
        _configured() as configuration,
        server(options).serving([f"--flink-master={master}", f"--flink-conf-dir={configuration}"], [_TOLD]) as endpoint,
    ):
        yield endpoint


def server(options: PipelineOptions) -> java.JobServer:
    """Flink's job server."""
    given = options.view_as(FlinkRunnerOptions).flink_job_server_jar
    return java.JobServer("Flink", flink_cluster.MAIN, given, lambda: FlinkJarJobServer(options))
