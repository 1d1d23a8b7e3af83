import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines import definition, live, run
from pipelines.examples import flights
from pipelines.io.log import open_log
from pipelines.options import Deployment
from pipelines.replay import messages
from pipelines.runners import jobs


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("java") and shutil.which("mvn")), reason="no java or no mvn")
def test_a_stream_on_spark_is_of_turns_on_one_server_and_gives_what_batch_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = []
    serving = jobs.serving

    @contextlib.contextmanager
    def counted(*given: Any) -> Iterator[str]:
        with serving(*given) as endpoint:
            started.append(endpoint)
            yield endpoint

    monkeypatch.setattr(jobs, "serving", counted)
    monkeypatch.setattr(live, "TURN_ROWS", 100_000)
    pipeline = definition.load("flights")
    with open_log(f"{tmp_path}/log.db") as log:
        for sent in messages(pipeline, flights.HISTORY(), partitions=["0", "1"]):
            log.append(sent)
    found = {}
    for mode, runner in (("batch", "DirectRunner"), ("stream", "SparkRunner")):
        place = tmp_path / mode
        deployment = Deployment(
            mode=mode,
            history=flights.HISTORY(),
            live=f"{tmp_path}/log.db",
            until="end",
            buckets=2,
            dimensions=flights.DIMENSIONS(),
            warehouse=f"{place}/warehouse",
            store=f"{place}/store.db",
            state=f"{place}/state",
            dead_letters=f"{place}/dead",
            report=f"{place}/run.json",
            runner=runner,
        )
        views = run.run(pipeline, deployment).facts["views"]
        found[mode] = {name: (view["rows"], view["digest"]) for name, view in views.items()}
    assert found["stream"] == found["batch"]
    assert len(started) == 1
    assert "takes no unbounded graph; here a stream runs as micro-batch" in capsys.readouterr().err
