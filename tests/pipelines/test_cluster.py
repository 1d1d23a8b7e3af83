import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pipelines.cluster import cluster
from pipelines.runners import clusters

MEMBER = {
    "engine": "flink",
    "member": "job server",
    "state": "dead",
    "pid": 4711,
    "since": "2024-05-01T12:00:00+00:00",
    "bytes": 3 << 20,
    "port": None,
    "log": "/x/job server.log",
}


def said(*arguments: str) -> str:
    done = CliRunner().invoke(cluster, arguments)
    assert done.exit_code == 0, done.output
    return done.output


def test_status_is_a_table_or_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINES_CLUSTERS", str(tmp_path))
    assert said("status") == "no cluster is up\n"
    assert said("status", "flink") == "flink: not up\n"
    told: dict[str, list[dict[str, Any]]] = {"flink": [MEMBER]}
    monkeypatch.setattr(clusters, "status", lambda engine: told.get(engine, []))
    head, row = said("status").splitlines()
    assert head.split() == ["engine", "member", "state", "pid", "since", "MiB", "port", "log"]
    assert row.split()[:6] == ["flink", "job", "server", "dead", "4711", "2024-05-01T12:00:00+00:00"]
    assert row.split()[6:] == ["3", "/x/job", "server.log"]
    assert json.loads(said("status", "--json")) == [MEMBER]


def test_down_tells_what_was_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINES_CLUSTERS", str(tmp_path))
    assert said("down") == ""
    assert said("down", "spark") == "spark: was not up\n"
    (tmp_path / "flink").mkdir()
    (tmp_path / "flink" / "cluster.json").write_text("{}")
    ended = []
    monkeypatch.setattr(clusters, "down", lambda engine: not ended.append(engine))  # type: ignore[func-returns-value]
    assert said("down") == "flink: down\n"
    assert ended == ["flink"]
