"""The gate itself: it passes where the layers agree, and finds each way in which they may not."""

import dataclasses
import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines import cli, definition, parity, samples, scope, trial_turns
from pipelines.definition import Pipeline, Source, View
from pipelines.io.lake import Lake
from pipelines.live import SpeedLayer
from pipelines.transforms.disorder import Disorder
from pipelines.transforms.errors import UserError
from pipelines.transforms.measures import Count, Quantile, Sum
from pipelines.transforms.speed import Advanced, OpenView
from pipelines.transforms.windows import Session, Sliding, Tumbling

EXAMPLES = ("calls", "flights", "orders", "sensors")


class Reading:
    sensor: str
    at: datetime.datetime
    number: int
    celsius: float | None


def pipeline() -> Pipeline:
    source = Source(Reading, event_time="at", identity="number", disorder="5s", lateness="30s")
    measures: dict[str, Any] = {"n": Count(), "total": Sum("celsius"), "p95": Quantile("celsius", 0.95)}
    views = (
        View("by_minute", by="sensor", window=Tumbling("1m"), **measures),
        View("sliding", by="sensor", window=Sliding("1m", every="20s"), **measures),
        View("stays", by="sensor", window=Session("10s"), **measures),
        View("latest", by="sensor", **measures),
    )
    return Pipeline("readings", source=source, views=views)


def tried(of: Pipeline, **settings: Any) -> parity.Report:
    given = {"history": samples.history(of, 3, 2_000), "seed": 3, "restarts": 4, "turns": 6, **settings}
    return parity.parity(of, given.pop("history"), **given)


@pytest.mark.parametrize("name", EXAMPLES)
def test_samples_fit_their_definition(name: str) -> None:
    of = definition.load(name)
    rows = samples.history(of, 1, 200)
    assert (
        len(rows) == 200 and rows.equals(samples.history(of, 1, 200)) and not rows.equals(samples.history(of, 2, 200))
    )
    assert rows.column_names == of.source.schema.names
    for dimension in of.dimensions:
        assert set(samples.dimension(dimension, 1).column_names) == set(dimension.schema.names)


@pytest.mark.slow
def test_layers_that_agree_are_said_to_and_a_seed_gives_the_same_trial() -> None:
    reports = [tried(pipeline()) for _ in range(2)]
    for report in reports:
        assert report.different == 0, report.text()
        assert sum(report.points.values()) == 4
        assert min(report.counts[name] for name in ("kept", "late", "duplicate", "rejected")) > 20
        assert len(report.views) == 5
        for views in report.views.values():
            assert all(one.windows > 3 for one in views.values()) and len(views) == 4
    first, second = (dataclasses.replace(report, seconds=0.0) for report in reports)
    assert first == second
    assert json.loads(first.json())["different"] == 0


def lost_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """One window of each batch keeps its former answer."""
    real = OpenView.advance

    def advance(self: OpenView, *given: Any) -> Advanced:
        moved = real(self, *given)
        return dataclasses.replace(moved, answers=moved.answers.slice(1))

    monkeypatch.setattr(OpenView, "advance", advance)


def forgotten_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions that were absorbed stay in the store."""
    real = OpenView.advance

    def advance(self: OpenView, *given: Any) -> Advanced:
        moved = real(self, *given)
        return dataclasses.replace(moved, gone=moved.gone.slice(0, 0))

    monkeypatch.setattr(OpenView, "advance", advance)


def lost_delivery(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that starts again does not deliver what the one before has committed."""
    real = trial_turns.InTurns._begun

    def begun(self: trial_turns.InTurns) -> Any:
        with monkeypatch.context() as patched:
            patched.setattr(SpeedLayer, "deliver", lambda _: None)
            return real(self)

    monkeypatch.setattr(trial_turns.InTurns, "_begun", begun)
    monkeypatch.setattr(trial_turns, "POINTS", ("after it commits",))


def late_rows_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lake has no row that was late."""
    real = Lake._rows

    def rows(self: Lake, messages: pa.Table, intake: Any) -> pa.Table:
        found = real(self, messages, intake)
        greatest = np.maximum.accumulate(found["event_time"].cast(pa.int64()).fill_null(0).to_numpy())
        late = found["event_time"].cast(pa.int64()).fill_null(2**62).to_numpy() < greatest - 120_000_000
        return found.filter(pa.array(~late))

    monkeypatch.setattr(Lake, "_rows", rows)


def spoken_too_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch layer says that it speaks for an hour more than it has read."""
    real = scope.spoken

    def spoken(*given: Any) -> dict[str, int]:
        return {name: boundary + 3_600_000_000 for name, boundary in real(*given).items()}

    monkeypatch.setattr(scope, "spoken", spoken)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "view"),
    [
        (lost_rows, "by_minute"),
        (forgotten_sessions, "stays"),
        (lost_delivery, "sliding"),
        (late_rows_left_out, "by_minute"),
        (spoken_too_far, "latest"),
    ],
)
def test_a_fault_is_found_and_shown(fault: Any, view: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    report = tried(pipeline())
    assert any(views[view].different for views in report.views.values())
    assert view in report.text() and "They differ" in report.text()


@pytest.mark.slow
def test_the_command_ends_with_3_where_layers_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(samples, "ROWS", 500)
    monkeypatch.setattr(parity, "TURNS", 3)
    monkeypatch.setattr("sys.argv", ["pipelines", "parity", "--pipeline=sensors", "--restarts=1", "--json"])
    codes = []
    for fault in (None, lost_rows):
        if fault is not None:
            fault(monkeypatch)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        codes.append(ended.value.code)
        out = capsys.readouterr()
        told = json.loads(out.out)
        assert (told["different"] > 0) == (fault is not None)
        assert ("the layers differ, with seed 0" in out.err) == (fault is not None)
    assert codes == [0, 3]
    assert list(tmp_path.iterdir()) == []


def test_a_history_without_rows_and_an_unknown_runner_are_the_users_mistakes() -> None:
    with pytest.raises(UserError, match="readings: its history has no rows to try it on; name another"):
        tried(pipeline(), history=samples.history(pipeline(), 1, 0))
    with pytest.raises(UserError, match="--runner=Nobody: no such runner"):
        tried(pipeline(), runner="Nobody")


@pytest.mark.slow
@pytest.mark.parametrize("format", ["avro", "arrow"])
def test_every_format_and_disorder(format: Any) -> None:
    report = tried(pipeline(), format=format, disorder=Disorder("2m", 0.1, 0.3, 0.1, seed=8), seed=8, restarts=2)
    assert report.different == 0, report.text()


def test_rows_are_made_for_every_type() -> None:
    class Odd:
        at: datetime.datetime
        day: datetime.date
        raw: bytes | None
        flags: list[bool]
        maybe: list[int | None] | None

    of = Pipeline("odd", source=Source(Odd, event_time="at"), views=(View("all", n=Count()),))
    rows = samples.history(of, 1, 100)
    assert rows.schema.types == of.source.schema.arrow.types
    assert rows["raw"].null_count and rows["maybe"].null_count and not rows["flags"].null_count
    assert isinstance(rows, pa.Table)
