"""What Dataflow is given, and what is refused before anything is built; submitting itself is in tests/engines."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from apache_beam.options.pipeline_options import PipelineOptions

from pipelines import remote, runners
from pipelines.options import Deployment
from pipelines.runners import dataflow, package
from pipelines.runners.dataflow_jobs import Region
from pipelines.transforms.errors import UserError

FLAGS = ["--project=p", "--region=r", "--temp_location=gs://bucket/tmp"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (FLAGS[1:], "--runner=DataflowRunner needs --project, for example --project=my-project"),
        ([FLAGS[0], FLAGS[2]], "--runner=DataflowRunner needs --region, for example --region=europe-west1"),
        (FLAGS[:2], "--runner=DataflowRunner needs --temp_location, for example --temp_location=gs://bucket/tmp"),
        ([*FLAGS[:2], "--temp_location=/tmp/x"], "--temp_location=/tmp/x: Dataflow stages in Cloud Storage"),
        ([*FLAGS, "--template_location=t"], "--template_location=t: Dataflow stages in Cloud Storage"),
        ([*FLAGS, "--job_name=A_b"], "--job_name=A_b: lower-case letters, digits and -"),
        ([*FLAGS, "--dataflow_service_options=streaming_mode_at_least_once"], "counts would be wrong"),
    ],
)
def test_options_that_are_missing_or_wrong_are_refused(flags: list[str], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        dataflow.check(PipelineOptions(flags))


def test_right_options_pass() -> None:
    dataflow.check(PipelineOptions([*FLAGS, "--job_name=flights-1", "--staging_location=gs://bucket"]))


PLACES: dict[str, Any] = {
    "history": "gs://b/*.csv",
    "warehouse": "gs://b/w",
    "dead_letters": "s3://b/d",
    "report": "gs://b/run.json",
    "store": None,
    "runner": "DataflowRunner",
}


@pytest.mark.parametrize(
    ("place", "flag"),
    [
        ({"history": "data/x.csv"}, "--history=data/x.csv"),
        ({"warehouse": "file:///w"}, "--warehouse=file:///w"),
        ({"store": "sqlite:///s.db"}, "--store=sqlite:///s.db"),
        ({"dimensions": {"weather": "w.csv"}}, "--dimension weather=w.csv"),
        ({"report": "run.json"}, "--report=run.json"),
        ({"mode": "stream", "live": "data/log.db"}, "--live=data/log.db"),
        ({"mode": "stream", "live": "kafka://h/t", "state": "data/live"}, "--state=data/live"),
    ],
)
def test_places_of_this_machine_are_refused(place: dict[str, Any], flag: str) -> None:
    remote.check(Deployment(**PLACES))
    with pytest.raises(UserError, match=f"^{flag}: only this machine has it"):
        remote.check(Deployment(**{**PLACES, **place}))


def test_a_stream_that_nobody_stays_with_archives_nothing() -> None:
    with pytest.raises(UserError, match=r"^--lake=gs://b/lake: .* run `pipelines archive` beside it$"):
        remote.check(Deployment(**{**PLACES, "mode": "stream", "lake": "gs://b/lake"}))


def test_without_googles_libraries_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "apache_beam.runners.dataflow.internal.apiclient", None)
    with pytest.raises(UserError, match=r"pip install 'pipelines\[gcp\]'"):
        dataflow.submit(lambda root: None, FLAGS, tmp_path)


def test_a_turn_is_not_a_job() -> None:
    with pytest.raises(UserError, match="--mode=stream"):
        runners.named("DataflowRunner").prepared(lambda root: None, FLAGS)


def test_an_installed_package_cannot_be_made_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(package, "__file__", str(tmp_path / "pipelines/runners/package.py"))
    with pytest.raises(UserError, match=r"no checkout.*--sdk_container_image=IMAGE"):
        package.sdist(tmp_path)


class Answers:
    """A service that gives these answers by method and path, and keeps what it was asked."""

    def __init__(self, answers: dict[tuple[str, str], Any]) -> None:
        self.answers, self.asked = answers, list[tuple[str, str, Any]]()

    def request(self, method: str, url: str, json: Any = None, timeout: float = 0) -> Any:
        path = url.partition("/jobs")[2]
        self.asked.append((method, path, json))
        code, said = self.answers.get((method, path), (404, {"error": {"message": "no such job"}}))
        return SimpleNamespace(status_code=code, json=lambda: said, reason="?")


def region(monkeypatch: pytest.MonkeyPatch, answers: dict[tuple[str, str], Any]) -> tuple[Region, Answers]:
    service = Answers(answers)
    monkeypatch.setattr(Region, "_session", lambda self: service)
    return Region("p", "r"), service


def job(number: str, **more: Any) -> dict[str, Any]:
    told = {"id": number, "name": f"job-{number}", "currentState": "JOB_STATE_RUNNING", "type": "JOB_TYPE_STREAMING"}
    return told | {"createTime": f"2026-01-0{number}", "labels": {"made-by": "pipelines"}} | more


def test_jobs_of_all_pages_are_listed_the_newest_first_and_others_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    here, _ = region(
        monkeypatch,
        {
            ("GET", "?pageSize=100&pageToken="): (200, {"jobs": [job("1"), job("2", labels={})], "nextPageToken": "x"}),
            ("GET", "?pageSize=100&pageToken=x"): (200, {"jobs": [job("3", type="JOB_TYPE_BATCH")]}),
        },
    )
    assert [(found.id, found.mode, found.state, found.lives) for found in here.jobs()] == [
        ("3", "batch", "RUNNING", True),
        ("1", "stream", "RUNNING", True),
    ]


def test_draining_and_stopping_ask_for_a_state_and_refuse_what_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = {"1": job("1"), "2": job("2", type="JOB_TYPE_BATCH"), "3": job("3", currentState="JOB_STATE_DRAINED")}
    answers: dict[tuple[str, str], Any] = {("GET", f"/{number}"): (200, told) for number, told in jobs.items()}
    here, service = region(monkeypatch, answers | {("PUT", "/1"): (200, {})})
    here.drain("1")
    here.stop("1")
    assert [asked for asked in service.asked if asked[0] == "PUT"] == [
        ("PUT", "/1", {"requestedState": "JOB_STATE_DRAINING"}),
        ("PUT", "/1", {"requestedState": "JOB_STATE_CANCELLED"}),
    ]
    with pytest.raises(UserError, match="a batch job cannot be drained"):
        here.drain("2")
    with pytest.raises(UserError, match=r"is over already \(drained\)"):
        here.stop("3")
    with pytest.raises(UserError, match=r"project p, region r: no such job \(404\)"):
        here.job("9")
