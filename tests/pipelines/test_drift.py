import io
import json
import threading
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines import drift
from pipelines.drift import Facts
from pipelines.reached import Reached
from pipelines.transforms.conservation import Conservation, merge, tally
from pipelines.transforms.lateness import NEVER


def counts(read: int, kept: int, reached: Reached | None = None) -> Facts:
    return Facts(Conservation.of(merge([tally("source", "read", read), tally("source", "kept", kept)])), reached)


def places(**told: tuple[int, int]) -> pa.Table:
    offsets, watermarks = zip(*told.values(), strict=True)
    return pa.table({"partition": list(told), "offset": offsets, "watermark": watermarks})


def test_what_is_on_its_way_is_no_drift_and_what_stays_missing_is() -> None:
    watched = drift.Drift()
    assert watched.of(counts(5, 3), 0.0) == []
    assert watched.of(counts(9, 7), drift.PATIENCE) == []  # it moved
    assert watched.of(counts(9, 7), 2 * drift.PATIENCE - 1) == []
    assert "off by 2" in watched.of(counts(9, 7), 2 * drift.PATIENCE)[0]
    assert watched.of(counts(9, 9), 4 * drift.PATIENCE) == []
    assert watched.of(counts(9, 9), 9 * drift.PATIENCE) == []


def test_rows_that_an_engine_still_holds_are_no_drift_however_long_it_takes() -> None:
    """Nothing moves for hours under backpressure; then the watermark that follows the rows has passed."""
    watched, hour = drift.Drift(), 3600.0
    held = Reached().told(places(a=(9, 60)))
    assert watched.of(counts(9, 7, held), 0.0) == []
    assert watched.of(counts(9, 7, held), hour) == []
    more = held.told(places(a=(12, 90)))
    assert watched.of(counts(12, 7, more), 2 * hour) == []
    once = more.passed()  # what was read before 60
    assert not once.settled
    assert watched.of(counts(12, 10, once), 3 * hour) == []
    passed = once.passed()
    assert passed.settled
    assert watched.of(counts(12, 10, passed), 4 * hour) == []  # it may be in the next counts
    assert "off by 2" in watched.of(counts(12, 10, passed), 4 * hour + drift.PATIENCE)[0]


def test_how_far_a_stream_is_is_the_watermark_that_followed_the_rows() -> None:
    reached = Reached().told(places(a=(5, 60), b=(7, 40)))
    assert (reached.through, reached.waits) == (None, (40, {"a": 5, "b": 7}))
    reached = reached.told(places(b=(9, 50))).told(places(a=(4, 30)))  # the last is an old one, come late
    assert (reached.waits, reached.offsets) == ((40, {"a": 5, "b": 7}), {"a": 5, "b": 9})
    reached = reached.passed()
    assert (reached.through, reached.settled, reached.waits) == (40, False, (50, {"a": 5, "b": 9}))
    reached = Reached.of(json.loads(json.dumps(reached.json()))).passed()
    assert (reached.through, reached.settled, reached.waits) == (50, True, None)
    same = reached.told(places(a=(6, 60)))  # the least watermark stays: rows may be under way that it does not tell of
    assert (same.settled, same.waits) == (False, None)
    assert Reached().told(places(a=(5, 60), new=(0, NEVER))).waits is None


def test_a_stream_is_told_line_by_line_with_an_alert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts, out, times = tmp_path / "stream.json", io.StringIO(), iter([0.0, 10.0, 100.0])
    told = merge([tally("source", "read", 1000), tally("source", "kept", 990)]).to_pylist()
    reached = Reached().told(places(a=(1000, 1_000_000))).passed()
    facts.write_text(json.dumps({"tallies": told, "reached": reached.json()}))
    monkeypatch.setattr(drift, "SECONDS", 0.0)
    ended = threading.Event()

    def clock() -> float:
        try:
            return next(times)
        except StopIteration:
            ended.set()
            return 200.0

    with drift.shown("sales", str(facts), out, clock):
        assert ended.wait(10)
    first, second, alert = out.getvalue().splitlines()[:3]
    through = "late 0 · rejected 0 · complete through 1970-01-01 00:00:01 UTC"
    assert first == f"sales: 1,000 rows · 100 rows/s · {through}"
    assert second == f"sales: 1,000 rows · 0 rows/s · {through}"
    assert alert.startswith("sales: ALERT: read 1,000 = kept 990")


def test_counts_that_are_not_there_or_half_written_are_none(tmp_path: Path) -> None:
    assert drift.counted(f"{tmp_path}/none.json").rows["read"] == 0
    (tmp_path / "half.json").write_text('{"tallies": [')
    assert drift.counted(f"{tmp_path}/half.json").rows["read"] == 0
