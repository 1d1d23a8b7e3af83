"""What a live run shows of itself."""

import datetime
import io
from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa
import pytest

from pipelines import watch
from pipelines.io.turns import Turn
from pipelines.live import SpeedLayer, Status
from pipelines.transforms.conservation import Conservation, merge, tally

AT = datetime.datetime(2013, 1, 1, 10, tzinfo=datetime.UTC)


def status(read: int, watermark: int | None = int(AT.timestamp()) * 1_000_000) -> Status:
    counts = Conservation.of(merge([tally("source", "read", read), tally("source", "late", 2)]))
    return Status(Turn(7, (), {}), watermark, "p1", 12, 3, counts)


def answers(hours: list[int]) -> pa.Table:
    starts = pa.array([AT + datetime.timedelta(hours=hour) for hour in hours], pa.timestamp("us", "UTC"))
    return pa.table(
        {"key": [f"k{hour}" for hour in hours], "window_start": starts, "n": [1.23456789] * len(hours), "_rows": hours}
    )


class Speed:
    """As much of a SpeedLayer as is looked at."""

    def __init__(self, read: int, given: list[tuple[str, str, pa.Table]]) -> None:
        plan = SimpleNamespace(name="by_hour", by=("key",), columns=["key", "window_start", "n"])
        self.layer, self._read, self._given = SimpleNamespace(views=[SimpleNamespace(plan=plan)]), read, given

    def status(self) -> Status:
        return status(self._read)

    def delivered(self) -> list[tuple[str, str, pa.Table]]:
        return self._given


def test_a_line_tells_how_far_it_is_and_who_holds_it_back() -> None:
    told = watch.told(status(1234), 10.4)
    assert told.startswith("watermark 2013-01-01 10:00 UTC (partition p1) · 1,234 rows · 10 rows/s · lag 12 · late 2")
    assert watch.told(status(0, None), 0).startswith("watermark none yet")


def test_the_latest_windows_of_a_view_stay_until_others_come() -> None:
    many = cast(Any, Speed(0, [("answers", "by_hour", answers([1, 9, 3, 4, 5, 6])), ("dead", "", pa.table({}))]))
    found = watch.latest(many, {})
    assert found["by_hour"]["key"].to_pylist() == ["k9", "k6", "k5", "k4", "k3"]
    assert watch.latest(cast(SpeedLayer, Speed(0, [])), found) == found


def test_without_a_terminal_there_is_a_line_every_few_seconds() -> None:
    stream, now = io.StringIO(), iter([0.0, 0.0, 1.0, 2.0, 6.0])
    with watch.shown("flights", stream, lambda: next(now)) as told:
        for read in (100, 200, 700):
            told(cast(SpeedLayer, Speed(read, [])))
    lines = stream.getvalue().splitlines()
    assert [line.partition(" · lag")[0].rpartition(" · ")[2] for line in lines] == ["100 rows/s", "120 rows/s"]


def test_on_a_terminal_columns_that_do_not_fit_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "24")
    stream = Terminal()
    with watch.shown("flights", stream, lambda: 0.0) as told:
        told(cast(SpeedLayer, Speed(5, [("answers", "by_hour", answers([1, 2]))])))
    assert "not shown: n" in " ".join(stream.getvalue().split())
    assert "2013-01-01 12:00" in stream.getvalue()
