"""Streams on Flink that are stopped, killed and go on, each in a process of its own, as users run them."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from pipelines.runners.clusters import Cluster
from tests.engines.sales import WAIT, Sales

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not (shutil.which("java") and shutil.which("mvn")), reason="no java, or no mvn"),
]

ENGINE = "flink"


@pytest.fixture
def place(tmp_path: Path) -> Sales:
    return Sales(tmp_path)


def ended(place: Sales, *flags: str) -> None:
    """A run up to the end of the log."""
    with place.running("--until=end", *flags) as process:
        assert process.wait(WAIT) == 0, place.said[-3000:]


def test_a_stream_goes_on_where_it_was_stopped_and_refuses_another_definition(place: Sales) -> None:
    place.send(1500)
    with place.running() as process:
        place.until_read(process, 1000)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, place.said[-3000:]
    assert "stopped; the next run goes on from file:///" in place.said and "savepoint-" in place.said
    read = place.read
    place.send(1500)
    place.define(800)
    with place.running() as process:
        assert process.wait(60) == 2
    assert "its state is of another steps than this run's; start it again with --rebuild" in place.said
    place.define(900)
    with place.running() as process:  # idle at its end, and stopped there
        place.until_read(process, place.length)
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, place.said[-3000:]
        assert time.monotonic() - start < 20
    assert read < place.read
    ended(place)
    place.check()
    run = json.loads((place.path / "run.json").read_text())
    assert run["lag"] == 0
    assert run["views"]["minutes"]["complete_through"] > "2024-05-01T12:00"
    place.define(800)
    ended(place, "--rebuild")
    place.check()


@pytest.mark.parametrize("seed", [1])
def test_killed_again_and_again_it_ends_with_what_a_bounded_run_gives(place: Sales, seed: int) -> None:
    chosen, kills = random.Random(seed), int(os.environ.get("KILLS", "5"))
    for _ in range(kills):
        place.send(600)
        with place.running() as process:
            place.until_read(process, place.read + 1)
            for _ in range(chosen.randrange(4)):
                place.send(300)
                time.sleep(chosen.random() * 2)
            time.sleep(chosen.random() * 4)
    ended(place)
    place.check()
    assert "goes on from file:///" in place.said


def test_a_job_on_a_cluster_outlives_its_client_and_is_never_started_twice(cluster: Cluster, place: Sales) -> None:
    place.send(900)
    with place.running(local=False) as process:
        place.until_read(process, 1)
    place.send(300)
    place.until_all()
    (listed,) = json.loads(place.jobs("list", "--json"))
    assert (listed["pipeline"], listed["state"]) == ("sales", "running")
    assert json.loads(place.jobs("show", "sales", "--json"))["at"].startswith(cluster.facts["rest"])
    with place.running(local=False) as process:
        assert process.wait(WAIT) == 2
    assert f"sales: already runs as job {listed['job']}" in place.said
    assert "savepoint-" in place.jobs("savepoint", "sales")
    assert "goes on from file:" in place.jobs("stop", "sales")
    place.send(300)
    with place.running(local=False) as process:
        place.until_read(process, place.length)
        assert "closed early and are incomplete" in place.jobs("stop", "sales", "--drain")
        assert process.wait(WAIT) == 0, place.said[-3000:]
    place.check()
    assert "incomplete" in json.loads((place.path / "run.json").read_text())


def test_a_mistake_ends_a_job_on_a_cluster(cluster: Cluster, place: Sales) -> None:
    place.send(300)
    text = (place.path / "sales.py").read_text()
    (place.path / "sales.py").write_text(text.replace("Check(paid", 'Check(on_fail="stop", paid'))
    with place.running(local=False) as process:
        assert process.wait(WAIT) == 3, place.said[-3000:]
    assert "Check(on_fail='stop') ends the run" in place.said
    (listed,) = json.loads(place.jobs("list", "--json"))
    assert listed["state"] == "canceled"
