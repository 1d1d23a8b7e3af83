"""Turns in which nothing is read: only positions move on, and no graph runs for that."""

import dataclasses
import datetime
from pathlib import Path
from typing import Any, cast

import pytest

from pipelines import Count, Pipeline, Source, Tumbling, View
from pipelines.live import SpeedLayer
from pipelines.options import Deployment


@dataclasses.dataclass(frozen=True)
class Row:
    at: datetime.datetime


COUNTED = Pipeline("counted", source=Source(Row, event_time="at"), views=(View("v", window=Tumbling("1s"), n=Count()),))


class Engine:
    """Of an engine no more than it is asked for here."""

    DISTRIBUTED = False

    def prepared(self, *_: Any) -> Any:
        return lambda: pytest.fail("no rows, no graph")


def test_partitions_without_rows_are_noted_once_and_no_graph_runs(tmp_path: Path) -> None:
    uri = f"{tmp_path}/log.db?partitions=2"
    deployment = Deployment(live=uri, store=None, state=str(tmp_path), dead_letters=str(tmp_path / "dead"))
    now = [0.0]
    speed = SpeedLayer(COUNTED, deployment, cast(Any, Engine()), clock=lambda: now[0])
    assert not speed.turn() and speed.last is not None
    assert sorted(speed.last.facts["positions"]) == ["0", "1"]
    noted = speed.last.number
    assert not speed.turn() and speed.last.number == noted
    speed.last.facts["positions"]["0"]["greatest"] = 5_000_000
    now[0] = 12.0
    assert not speed.turn() and speed.positions["0"].idle == 7_000_000
    assert speed.last.number == noted + 1
    speed.close()
