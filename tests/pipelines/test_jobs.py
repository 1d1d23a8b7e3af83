"""Streams that are found again, and where a run would begin."""

import dataclasses
import datetime
import json
import os
from pathlib import Path
from typing import Any

import click.testing
import pyarrow as pa
import pytest

from pipelines import Count, Filter, Pipeline, Source, Tumbling, View, job, resume, running, streaming
from pipelines.io.log import open_log
from pipelines.io.store import LIVE, StoreConflict, open_store
from pipelines.io.turns import Turn
from pipelines.job import Job
from pipelines.jobs import jobs
from pipelines.layer import Layer, layer
from pipelines.live import SpeedLayer
from pipelines.options import Deployment
from pipelines.run import dry_run
from pipelines.runners import Detached, direct, preflight
from pipelines.transforms.errors import UserError


class Sale:
    at: datetime.datetime
    shop: str


def pipeline(*steps: Any, view: str = "minutes") -> Pipeline:
    views = (View(view, by="shop", window=Tumbling("1m"), n=Count()),)
    return Pipeline("sales", source=Source(Sale, event_time="at"), steps=steps, views=views, events=False)


@pytest.fixture
def deployment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Deployment:
    monkeypatch.setenv("PIPELINES_CLUSTERS", str(tmp_path / "clusters"))
    with open_log(f"{tmp_path}/log.db") as log:
        log.append({"0": pa.table({"_raw": [b"{}"] * 3})})
    return Deployment(
        live=f"{tmp_path}/log.db",
        store=f"{tmp_path}/store.db",
        dead_letters=f"{tmp_path}/dead",
        state=f"{tmp_path}/live",
        runner="FlinkRunner",
        mode="stream",
    )


def made(deployment: Deployment, of: Pipeline | None = None) -> Layer:
    return layer(of or pipeline(), deployment, 4)


def start(deployment: Deployment, of: Pipeline | None = None, epoch: int = 5, **changed: Any) -> resume.Start:
    deployment = dataclasses.replace(deployment, **changed)
    return resume.start(made(deployment, of), deployment, epoch)


def checkpoint(start: resume.Start, name: str = "job/chk-1", at: int = 1) -> str:
    place = Path(start.job.kept(start.place), name)
    place.mkdir(parents=True)
    (place / "_metadata").touch()
    os.utime(place / "_metadata", (at, at))
    return f"file://{place}"


def live_rows(deployment: Deployment, of: Pipeline, upsert: bool = False) -> int:
    (plan,) = of.plan(live=True).views
    with open_store(deployment.store or "") as store:
        if upsert:
            rows = pa.Table.from_pylist([dict.fromkeys(plan.schema.names) | {"_rows": 1}], schema=plan.schema)
            store.upsert(f"sales.{plan.name}", rows, generation=LIVE, version=1)
        return len(store.scan(f"sales.{plan.name}", generation=LIVE))


def test_a_stream_goes_on_from_its_newest_checkpoint_with_its_epoch(deployment: Deployment) -> None:
    first = start(deployment)
    assert (first.since, first.job.epoch, first.job.first) == (None, 5, {"0": 0})
    kept = checkpoint(first)
    live_rows(deployment, pipeline(), upsert=True)
    again = start(deployment, epoch=9)
    assert (again.since, again.job.epoch) == (kept, 5)
    assert again.job.name != first.job.name
    assert live_rows(deployment, pipeline()) == 1
    newer = checkpoint(again, "savepoints/savepoint-2", at=2)
    assert start(deployment).since == newer
    assert not Path(kept.removeprefix("file://")).exists()  # nobody goes on from there


def test_one_that_has_no_checkpoint_or_is_to_be_rebuilt_begins_anew(deployment: Deployment) -> None:
    start(deployment)
    live_rows(deployment, pipeline(), upsert=True)
    again = start(deployment)  # it died before its first checkpoint
    assert (again.since, again.job.epoch) == (None, 6)
    assert live_rows(deployment, pipeline()) == 0
    checkpoint(again)
    anew = start(deployment, pipeline(view="hours"), rebuild=True, epoch=3)
    assert (anew.since, anew.job.epoch, anew.job.anew) == (None, 7, ["hours", "minutes"])
    assert not Path(again.job.kept(again.place)).exists()
    job.write(anew.place, dataclasses.replace(anew.job, ended="it has ended"))
    checkpoint(anew)
    assert start(deployment, pipeline(view="hours")).since is None


def test_a_changed_definition_is_refused(deployment: Deployment) -> None:
    checkpoint(start(deployment))
    with pytest.raises(UserError, match="of another steps than this run's; start it again with --rebuild"):
        start(deployment, pipeline(Filter("shop <> 'a'")))
    with pytest.raises(UserError, match="of another buckets"):
        start(deployment, buckets=9)
    with pytest.raises(UserError, match=r"has no live rows of sales\.minutes"):
        start(deployment, store=f"{deployment.store}.other")


def test_rows_that_the_log_no_longer_holds_are_not_left_out_in_silence(deployment: Deployment) -> None:
    start(deployment)
    with open_log(deployment.live or "") as log:
        log.trim(datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1))
    with pytest.raises(UserError, match="the log no longer holds all of partition 0; --rebuild begins"):
        start(deployment)
    assert start(deployment, rebuild=True).job.first == {"0": 3}


def test_what_was_to_end_ends_as_it_was_to(deployment: Deployment) -> None:
    checkpoint(start(deployment))
    ended = start(deployment, until="end")
    assert ended.until == {"0": 3}
    with open_log(deployment.live or "") as log:
        log.append({"0": pa.table({"_raw": [b"{}"]})})
    assert start(deployment, until="end").until == {"0": 3}
    with pytest.raises(UserError, match="was to run with --until=end"):
        start(deployment)
    noon = datetime.datetime(2024, 5, 1, 12, tzinfo=datetime.UTC)
    timed = start(deployment, until=noon, rebuild=True)
    assert timed.until == int(noon.timestamp()) * 1_000_000


def test_two_modes_do_not_share_a_state(deployment: Deployment) -> None:
    turns = made(deployment).turns
    turns.commit(Turn(1, (), {}))
    with pytest.raises(UserError, match="its state is of --mode=micro-batch"):
        start(deployment)
    start(deployment, rebuild=True)
    assert turns.last() is None


def test_turns_refuse_the_state_of_a_stream_and_begin_anew_when_told(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(streamed := start(deployment, pipeline(view="hours")))
    live_rows(deployment, pipeline(view="hours"), upsert=True)
    turned = dataclasses.replace(deployment, mode="micro-batch", runner="DirectRunner")
    with pytest.raises(UserError, match="its state is of --mode=stream on FlinkRunner; go on with that, name another"):
        SpeedLayer(pipeline(), turned, direct)
    again = dataclasses.replace(turned, rebuild=True)
    with monkeypatch.context() as patch:
        patch.setattr(running, "engine", lambda *_: Engine())
        with pytest.raises(UserError, match="sales: already runs as job j1; see"):
            SpeedLayer(pipeline(), again, direct)
    SpeedLayer(pipeline(), again, direct).close()
    assert live_rows(deployment, pipeline()) == 0
    with pytest.raises(StoreConflict):
        live_rows(deployment, pipeline(view="hours"))
    assert not Path(streamed.job.kept(streamed.place)).exists()
    SpeedLayer(pipeline(), turned, direct).close()  # the state is of turns now


def test_a_stream_of_an_engine_that_keeps_nothing_has_no_twin_and_begins_anew(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = resume.start(made(deployment), deployment, 5, kept=False)
    job.write(begun.place, dataclasses.replace(begun.job, runner="DataflowRunner", id="j1", at={"region": "r"}))
    with monkeypatch.context() as patch:
        patch.setattr(running, "engine", lambda *_: Engine())
        with pytest.raises(UserError, match="sales: already runs as job j1; see"):
            resume.start(made(deployment), deployment, 6, kept=False)
    monkeypatch.setattr(running, "engine", lambda *_: None)
    checkpoint(begun)  # of whom it may be
    live_rows(deployment, pipeline(), upsert=True)
    again = resume.start(made(deployment), deployment, 1, kept=False)
    assert (again.since, again.job.epoch) == (None, 6)
    assert live_rows(deployment, pipeline()) == 0


def test_a_dry_run_of_a_stream_holds_its_graph_against_what_is_known(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    dry_run(pipeline(), deployment)
    refused = preflight.Known("FlinkRunner", "an unbounded source", "refuse", "it is a test", 1)
    monkeypatch.setattr(preflight, "KNOWN", (refused,))
    with pytest.raises(UserError, match=r"preflight: FlinkRunner: an unbounded source \(.*: it is a test"):
        dry_run(pipeline(), deployment)
    assert not Path(deployment.state).exists() and not Path(deployment.store or "").exists()


def test_a_stream_that_is_staged_as_a_template_takes_nothing_from_one_that_runs(deployment: Deployment) -> None:
    class Staging:
        DEALT = False

        def run(self, *_: Any) -> None:
            raise Detached("staged")

    made(deployment).resume(deployment.store or "", anew=True)
    live_rows(deployment, pipeline(), upsert=True)
    turns = made(deployment).turns
    turns.commit(Turn(1, (), {}))
    engine: Any = Staging()
    with pytest.raises(Detached):
        streaming.run(pipeline(), deployment, engine, ["--template_location=gs://bucket/template"])
    assert live_rows(deployment, pipeline()) == 1
    assert turns.last() is not None and job.read(turns.uri) is None


class Engine:
    """A job that lives until it is stopped."""

    id = "j1"

    def __init__(self) -> None:
        self.lives, self.stopped = True, list[str]()

    def state(self) -> str:
        return "RUNNING" if self.lives else "CANCELED"

    def details(self) -> dict[str, Any]:
        return {"checkpoints": 3}

    def stop(self, how: str) -> str | None:
        self.stopped.append(how)
        self.lives = False
        return "file:/savepoint" if how == "savepoint" else None

    def savepoint(self) -> str:
        return "file:/savepoint"


def test_jobs_are_listed_told_and_stopped(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*arguments: str) -> str:
        result = click.testing.CliRunner().invoke(jobs, [*arguments, f"--state={deployment.state}"])
        assert result.exit_code == 0, result.output
        return result.output

    assert "no stream has run" in asked("list")
    started = start(deployment)
    kept, engine = checkpoint(started), Engine()
    (listed,) = json.loads(asked("list", "--json"))
    assert (listed["state"], listed["goes on from"]) == ("gone", kept)
    with pytest.raises(UserError, match="Nearest: sales"):
        running.found("sale", deployment.state)
    with pytest.raises(UserError, match="sales: does not run"):
        running.living("sales", deployment.state)
    monkeypatch.setattr(running, "engine", lambda *_: engine)
    assert "running" in asked("list")
    told = json.loads(asked("show", "sales", "--json"))
    assert (told["checkpoints"], told["state"], told["job"]) == (3, "running", "j1")
    assert asked("savepoint", "sales") == "sales: file:/savepoint\n"
    assert asked("stop", "sales") == "sales: stopped; the next run goes on from file:/savepoint\n"
    engine.lives = True
    assert asked("stop", "sales", "--now").endswith(f"goes on from {kept}\n")
    engine.lives = True
    assert "closed early and are incomplete" in asked("stop", "sales", "--drain")
    assert engine.stopped == ["savepoint", "now", "drain"]
    assert "drained" in str((job.read(started.place) or started.job).ended)


def test_a_command_is_run_again_without_rebuild_and_never_with_a_mask(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["/bin/pipelines", "run", "--pipeline=sales", "--rebuild", "--store=s://me:pw@h"])
    started = start(deployment)
    assert started.job.command == ["--pipeline=sales", "--store=s://me:***@h"]
    result = click.testing.CliRunner().invoke(jobs, ["resume", "sales", f"--state={deployment.state}"])
    assert isinstance(result.exception, UserError)
    assert "had a secret" in str(result.exception)


def test_a_job_that_still_runs_is_not_started_twice(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    class Rest:
        url = "http://flink"

        def state(self, _: str) -> str:
            return "RESTARTING"

    start(deployment)
    monkeypatch.setattr(Job, "found", lambda _: (Rest(), "j1"))
    with pytest.raises(UserError, match="sales: already runs as job j1; see `pipelines jobs show sales`"):
        start(deployment)
