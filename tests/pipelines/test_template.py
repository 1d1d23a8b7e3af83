"""Templates: their parameters and files, from the flags and the definition; and a classic one's graph, run often."""

import ast
import datetime
import json
import re
from pathlib import Path
from typing import Any

import apache_beam as beam
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.options.value_provider import RuntimeValueProvider
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.transforms.environments import EmbeddedPythonEnvironment

from pipelines import Count, Dimension, Lookup, Pipeline, Source, Sum, Tumbling, View, template, template_graph
from pipelines.definition import load
from pipelines.io.store import open_store
from pipelines.io.table import open_table
from pipelines.options import Deployment
from pipelines.run import run
from pipelines.template_files import Flex
from pipelines.template_parameters import Parameter
from pipelines.transforms.errors import UserError

BATCH = {
    "history": "gs://b/flights-*.csv.zip?null=NA",
    "warehouse": "gs://b/warehouse",
    "dead_letters": "s3://b/dead",
    "report": "gs://b/run.json",
    "dimension_weather": "gs://b/weather.csv",
    "dimension_airports": "gs://b/airports.csv",
}


def flags(**values: str) -> list[str]:
    return [f"--{name}={value}" for name, value in values.items()]


def known(mode: str = "batch") -> dict[str, Parameter]:
    return {one.name: one for one in template.flex_parameters("flights", mode)}


def test_a_launch_is_a_run_with_the_parameters_as_its_flags() -> None:
    given = [*flags(**BATCH, set_late_after="30", **{"from": "2013-06-01"}), "--project=p", "--runner=DataflowRunner"]
    assert template.launched("flights", "batch", given) == [
        "--pipeline=flights",
        "--mode=batch",
        "--runner=DataflowRunner",
        *(f"--{name}={BATCH[name]}" for name in ("history", "warehouse", "dead_letters", "report")),
        "--dimension=weather=gs://b/weather.csv",
        "--dimension=airports=gs://b/airports.csv",
        "--set=late_after=30",
        "--from=2013-06-01",
        "--store=none",
        "--project=p",
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("warehouse", "data/warehouse"),
        ("history", "/flights.csv"),
        ("from", "yesterday"),
        ("since", "first"),
        ("max_rejected", "1.5"),
        ("buckets", "0"),
        ("set_late_after", "half"),
        ("dimension_weather", "weather.csv"),
    ],
)
def test_a_parameter_must_match_the_regex_that_its_metadata_states(name: str, value: str) -> None:
    (regex,) = known()[name].metadata()["regexes"]
    assert re.fullmatch(regex, value) is None
    with pytest.raises(UserError, match=re.escape(f"parameter {name}={value} does not match {regex}")):
        template.launched("flights", "batch", flags(**{**BATCH, name: value}))


@pytest.mark.parametrize(("name", "said"), [("warehouse", "warehouse is missing"), ("history", "history is missing")])
def test_a_required_parameter_must_be_there(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        template.launched("flights", "batch", flags(**{key: value for key, value in BATCH.items() if key != name}))


def test_defaults_match_their_regexes_and_every_flag_is_known_in_one_mode_or_the_other() -> None:
    for mode in ("batch", "stream"):
        for one in known(mode).values():
            assert one.default is None or re.fullmatch(one.regex, one.default), one
    stream = [one.name for one in known("stream").values() if not one.optional]
    assert stream == ["live", "state", "dead_letters", "dimension_weather", "dimension_airports"]


@pytest.mark.parametrize("mode", ["batch", "stream"])
def test_all_files_of_a_flex_template_tell_the_same_parameters(mode: str) -> None:
    flex = Flex("flights", load("flights"), mode, "repo/flights:1", list(known(mode).values()))
    spec = json.loads(json.dumps(flex.spec()))
    assert spec["image"] == "repo/flights:1"
    assert spec["sdkInfo"] == {"language": "PYTHON"}
    assert spec["metadata"] == flex.metadata()
    assert spec["metadata"]["streaming"] is (mode == "stream")
    assert ("streamingMode" in spec["defaultEnvironment"]) is (mode == "stream")
    told = re.findall(r"^\| `(\w+)` \| (yes)?", flex.readme(), re.MULTILINE)
    assert told == [(one["name"], "" if one["isOptional"] else "yes") for one in spec["metadata"]["parameters"]]
    given = re.findall(r"--parameters=(\w+)=", flex.command())
    assert given == [one.name for one in known(mode).values() if not one.optional or one.name == "history"]
    assert "/opt/apache/beam/boot" in flex.dockerfile("pipelines.tar.gz")
    ast.parse(flex.launcher())


def test_a_definition_in_a_file_goes_into_the_image(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text((Path(__file__).parents[2] / "pipelines/examples/flights.py").read_text())
    name = f"{file}:flights"
    flex = Flex(name, load(name), "batch", "i", template.flex_parameters(name, "batch"))
    assert "COPY launch.py mine.py ./" in flex.dockerfile("pipelines.tar.gz")
    assert "launch('/template/mine.py:flights', 'batch'" in flex.launcher()
    assert [one.name for one in flex.parameters if one.name.startswith("set_")] == ["set_late_after"]


def test_one_kind_of_template_must_be_asked_for() -> None:
    from click.testing import CliRunner

    for given in ([], ["--image=i", "--template_location=gs://b/t"]):
        found = CliRunner().invoke(template.template, ["build", "flights", *given])
        assert isinstance(found.exception, UserError)


class Sale:
    """A row of the history."""

    at: datetime.datetime
    shop: str
    cents: int


class Shop:
    """A row of the dimension."""

    name: str
    town: str


SALES = Pipeline(
    "sales",
    source=Source(Sale, event_time='"at"', identity=("at", "shop")),
    steps=(Lookup(Dimension("shops", Shop, key="name"), on={"shop": "name"}, take=("town",)),),
    views=(View("by_town", by="town", window=Tumbling("1h"), sales=Count(), revenue=Sum("cents")),),
)


def sales(folder: Path, cents: int) -> dict[str, str]:
    """Places of some sales."""
    noon = datetime.datetime(2024, 5, 1, 12, tzinfo=datetime.UTC)
    rows = [
        {"at": noon + datetime.timedelta(minutes=7 * n), "shop": "ab"[n % 2], "cents": cents + n} for n in range(40)
    ]
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows, SALES.source.schema.arrow), folder / "sales.parquet", row_group_size=9)
    pq.write_table(pa.table({"name": ["a", "b"], "town": ["Ulm", "Bonn"]}), folder / "shops.parquet")
    return {"history": str(folder / "sales.parquet"), "dimension_shops": str(folder / "shops.parquet")}


@pytest.mark.slow
def test_a_classic_template_runs_often_each_time_as_a_run_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_graph, "reached", lambda deployment: deployment)
    named = Deployment(history="sales.parquet", store=str(tmp_path / "none.db"), warehouse="", dead_letters="")
    root = beam.Pipeline(runner=FnApiRunner(), options=PipelineOptions([]))
    template_graph.build(root, SALES, named)
    assert not list(tmp_path.iterdir()), "building looks at no place"
    graph = root.to_runner_api(default_environment=EmbeddedPythonEnvironment.default())
    for part in graph.components.transforms.values():
        if part.unique_name.startswith(("decode/", "clean/", "stage ", "store ", "dead letters")):
            assert all("TableCoder" in graph.components.pcollections[made].coder_id for made in part.outputs.values())
    answers, digests = [], []
    for number, cents in enumerate((1, 1, 500)):
        inputs = sales(tmp_path / f"in{number}", cents)
        places = {name: str(tmp_path / "out" / name) for name in ("warehouse", "dead_letters", "store", "report")}
        monkeypatch.setattr(RuntimeValueProvider, "runtime_options", {**places, **inputs})
        copy = type(graph)()
        copy.CopyFrom(graph)
        FnApiRunner().run_via_runner_api(copy, PipelineOptions([])).wait_until_finish()
        table = open_table(f"{places['warehouse']}/sales/by_town")
        assert [commit.version for commit in table.history()] == [*range(number + 1, 0, -1)]
        with open_store(places["store"]) as store:
            pointer = store.pointer("sales.by_town")
            assert pointer is not None and pointer.generation == number + 1
            answers.append(store.scan("sales.by_town"))
        digests.append(json.loads(Path(f"{places['report']}.facts.json").read_text())["views"])
        direct = Deployment(
            history=inputs["history"],
            dimensions={"shops": inputs["dimension_shops"]},
            warehouse=str(tmp_path / "direct"),
            dead_letters=str(tmp_path / "direct-dead"),
            store=None,
            report=str(tmp_path / "direct.json"),
        )
        assert digests[-1] == run(SALES, direct).facts["views"]
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.slow
def test_what_begins_in_a_template_names_what_is_missing_or_of_another_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = sales(tmp_path / "in", 1)
    begins = template_graph.Beginning(SALES, "csv", (Parameter("report", "Where.", "^(gs://.*)$", "--report=", False),))
    places = Deployment(history=inputs["history"], dimensions={"shops": inputs["dimension_shops"]}, report="run.json")
    with pytest.raises(UserError, match=r"parameter report=run\.json does not match"):
        begins(places)
    with pytest.raises(UserError, match=r"sales\.parquet: parquet, and the template reads csv"):
        template_graph.Beginning(SALES, "csv")(places)


@pytest.mark.parametrize("given", [{"since": "last"}, {"lake": "gs://b/lake"}])
def test_what_changes_the_graph_is_no_classic_templates(given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"a classic template is of whole runs over files.*Flex"):
        template_graph.refuse(Deployment(**given))
