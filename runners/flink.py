"""FlinkRunner: Flink through a job server on this machine, with Flink itself inside of it (``[local]``).

The job server of this Beam version is downloaded, as Beam does; where that cannot be had, Maven composes one out of
libraries (``flink.pom.xml``), of an older release that knows all that our graphs use. ``--flink_job_server_jar`` names
another one, ``--job_endpoint`` one that runs already: what starts it once for many runs saves 6 s each.
"""

import contextlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

import apache_beam as beam
from apache_beam.options.pipeline_options import FlinkRunnerOptions, PipelineOptions, PortableOptions, StandardOptions
from apache_beam.runners.portability.flink_runner import FlinkJarJobServer

from pipelines.runners import jobs
from pipelines.transforms.errors import UserError

DISTRIBUTED = True
UNBOUNDED = True
DEALT = False

_STREAMING = ("--max_bundle_time_mills=100",)
"""For streams: how long the engine may hold back what a bundle gives. Flink's default is a second."""

_POM = Path(__file__).with_name("flink.pom.xml")
_MAIN = "org.apache.beam.runners.flink.FlinkJobServerDriver"
_STARTED = re.compile(r"JobService started on \S+:(\d+)")
_OPENED = ("java.util", "java.lang", "java.net", "java.util.concurrent", "java.time", "java.nio")
_JAVA = [
    *(f"--add-opens=java.base/{package}=ALL-UNNAMED" for package in _OPENED),  # Flink looks into them
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
    "-Dorg.slf4j.simpleLogger.log.org.apache.beam.runners.jobsubmission.JobServerDriver=info",
]


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
    ports = ["--job-host=127.0.0.1", "--job-port=0", "--artifact-port=0", "--expansion-port=0"]
    command: list[str | Path] = ["java", *_JAVA, "-jar", jar(options), f"--flink-master={master}", *ports]
    if shutil.which("java") is None:
        raise UserError("--runner=FlinkRunner: no java on the PATH; install a Java 17 runtime")
    with jobs.serving("flink", command, _STARTED) as endpoint:
        yield endpoint


def jar(options: PipelineOptions) -> Path:
    """The job server to start: the given one, else what was composed here, else Beam's own, else composed now.

    Raises UserError where none can be had.
    """
    composed = jobs.folder("flink") / "job-server.jar"
    given = options.view_as(FlinkRunnerOptions).flink_job_server_jar
    if given or not composed.exists():
        server = FlinkJarJobServer(options)
        try:
            return Path(server.local_jar(server.path_to_jar()))
        except Exception as error:
            if given:
                raise UserError(f"--flink_job_server_jar={given}: {error}") from None
        _compose(composed)
    return composed


def _compose(place: Path) -> None:
    """Writes a jar of nothing but a manifest, beside the libraries that it names."""
    print(f"no job server for this Beam to download; composing one by Maven into {place.parent}", file=sys.stderr)
    place.parent.mkdir(parents=True, exist_ok=True)
    libraries = place.parent / "lib"
    copy = ["dependency:copy-dependencies", f"-DoutputDirectory={libraries}"]
    try:
        subprocess.run(["mvn", "-q", "-B", "-f", _POM, *copy], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(
            "--runner=FlinkRunner: no mvn on the PATH; install Maven, or name a --flink_job_server_jar"
        ) from None
    except subprocess.CalledProcessError as error:
        said = next((line for line in cast(str, error.stdout).splitlines() if "ERROR" in line), "it fails")
        raise UserError(f"--runner=FlinkRunner: Maven cannot compose a job server: {said}") from None
    names = " ".join(f"lib/{path.name}" for path in sorted(libraries.glob("*.jar")))
    made = place.with_suffix(".new")
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("META-INF/MANIFEST.MF", _manifest({"Main-Class": _MAIN, "Class-Path": names}))
    made.rename(place)


def _manifest(entries: dict[str, str]) -> str:
    """A manifest's lines have at most 72 bytes; what is longer goes on after a space.

    >>> [len(line) for line in _manifest({"Class-Path": "a" * 80}).splitlines()]
    [21, 70, 23]
    """
    lines = []
    for name, value in {"Manifest-Version": "1.0", **entries}.items():
        line = f"{name}: {value}"
        lines += [line[:70], *(f" {line[at : at + 69]}" for at in range(70, len(line), 69))]
    return "\r\n".join([*lines, ""])
