"""Beam's job servers in Java: the jar of one, and a process of it.

The job server of this Beam version is downloaded, as Beam does; where that cannot be had, Maven composes one out of
libraries (``<engine>.pom.xml``), of an older release that knows all that our graphs use, with the whole engine in it.
Beam is not imported for what is composed.
"""

import contextlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from pipelines.runners import clusters, launcher
from pipelines.transforms.errors import UserError

if TYPE_CHECKING:
    from apache_beam.runners.portability.job_server import JavaJarJobServer

STARTED = re.compile(r"JobService started on \S+:(\d+)")
_OPENED = ("java.util", "java.util.concurrent", "java.lang", "java.lang.invoke", "java.net", "java.time", "java.nio")
JAVA = [
    *(
        f"--add-opens=java.base/{package}=ALL-UNNAMED" for package in (*_OPENED, "sun.nio.ch")
    ),  # the engines look into them
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
    "-Dorg.slf4j.simpleLogger.log.org.apache.beam.runners.jobsubmission.JobServerDriver=info",
]


def listening(port: int = 0, artifacts: int = 0) -> tuple[str, ...]:
    """Where a job server listens, as it is told; port, artifacts: 0 for one that it chooses."""
    return "--job-host=127.0.0.1", f"--job-port={port}", f"--artifact-port={artifacts}", "--expansion-port=0"


@dataclass(frozen=True)
class JobServer:
    """What there is to know of an engine's job server. engine: as in ``Flink``. main: its class.
    given: the jar that the user has named; official: makes Beam's own way to one."""

    engine: str
    main: str
    given: str | None
    official: Callable[[], "JavaJarJobServer"]

    @contextlib.contextmanager
    def serving(self, arguments: Sequence[str], properties: Sequence[str] = ()) -> Iterator[str]:
        """The server, while the block lasts; yields its endpoint. properties: of Java, as in ``-Dname=value``."""
        from pipelines.runners import jobs

        program = [*self.launched(self.jar()), self.main]
        command = [self.java(), *JAVA, *properties, *program, *arguments, *listening()]
        with jobs.serving(self.engine.lower(), command, STARTED) as endpoint:
            yield endpoint

    def java(self) -> str:
        """The program to start."""
        if (found := shutil.which("java")) is None:
            raise UserError(f"--runner={self.engine}Runner: no java on the PATH; install a Java 17 runtime")
        return found

    def jar(self) -> Path:
        """The jar to start: the given one, else what was composed here, else Beam's own, else composed now.

        Raises UserError where none can be had.
        """
        if self.given or not self._composed.exists():
            try:
                official = self.official()
                return Path(official.local_jar(official.path_to_jar()))
            except Exception as error:
                if self.given:
                    raise UserError(f"--{self.engine.lower()}_job_server_jar={self.given}: {error}") from None
        self._composed.parent.mkdir(parents=True, exist_ok=True)
        with clusters.locked(self._composed.with_name("compose.lock")):
            if not self._stamp.exists() or self._stamp.read_bytes() != self._pom.read_bytes():
                self._compose()
        return self._composed

    def told(self, jar: Path) -> str:
        """Which one it is, for people."""
        if jar == self._composed:
            return f"the job server composed by Maven, {jar}"
        return f"the job server given, {jar}" if self.given else f"Beam's own job server, {jar}"

    def launched(self, jar: Path) -> list[str]:
        """What Java is given to start any program with the classes of a job server's jar, and so of its engine."""
        jars = sorted((self._composed.parent / "lib").glob("*.jar")) if jar == self._composed else [jar]
        agent = self._composed.with_name("launcher.jar")
        if not launcher.write(agent, jars):
            print(
                f"{self.engine}: its job server listens on all interfaces: {jar} is of a kind not known here",
                file=sys.stderr,
            )
        return [f"-javaagent:{agent}", "-cp", f"{self._composed.parent}/none"]

    @property
    def _composed(self) -> Path:
        return clusters.folder(self.engine.lower()) / "job-server.jar"

    @property
    def _pom(self) -> Path:
        return Path(__file__).with_name(f"{self.engine.lower()}.pom.xml")

    @property
    def _stamp(self) -> Path:
        """Of what the jar was composed."""
        return self._composed.with_name("job-server.pom.xml")

    def _compose(self) -> None:
        """Writes a jar of nothing but a manifest, beside the libraries that it names."""
        place = self._composed.parent
        print(f"no job server for this Beam to download; composing one by Maven into {place}", file=sys.stderr)
        libraries = place / "lib.new"
        shutil.rmtree(libraries, ignore_errors=True)
        copy = ["dependency:copy-dependencies", f"-DoutputDirectory={libraries}"]
        try:
            subprocess.run(["mvn", "-q", "-B", "-f", self._pom, *copy], check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise UserError(
                f"--runner={self.engine}Runner: no mvn on the PATH; install Maven, "
                f"or name a --{self.engine.lower()}_job_server_jar"
            ) from None
        except subprocess.CalledProcessError as error:
            said = next((line for line in cast(str, error.stdout).splitlines() if "ERROR" in line), "it fails")
            raise UserError(f"--runner={self.engine}Runner: Maven cannot compose a job server: {said}") from None
        shutil.rmtree(place / "lib", ignore_errors=True)
        libraries.rename(place / "lib")
        names = " ".join(f"lib/{path.name}" for path in sorted((place / "lib").glob("*.jar")))
        made = self._composed.with_suffix(".new")
        with zipfile.ZipFile(made, "w") as archive:
            archive.writestr("META-INF/MANIFEST.MF", launcher.manifest({"Main-Class": self.main, "Class-Path": names}))
        made.rename(self._composed)
        shutil.copyfile(self._pom, self._stamp)
