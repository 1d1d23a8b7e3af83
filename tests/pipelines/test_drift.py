import io
import json
import threading
from pathlib import Path

import pytest

from pipelines import drift
from pipelines.transforms.conservation import Conservation, merge, tally


def counts(read: int, kept: int) -> Conservation:
    return Conservation.of(merge([tally("source", "read", read), tally("source", "kept", kept)]))


def test_what_is_on_its_way_is_no_drift_and_what_stays_missing_is() -> None:
    watched = drift.Drift()
    assert watched.of(counts(5, 3), 0.0) == []
    assert watched.of(counts(9, 7), drift.PATIENCE) == []  # it moved
    assert watched.of(counts(9, 7), 2 * drift.PATIENCE - 1) == []
    assert "off by 2" in watched.of(counts(9, 7), 2 * drift.PATIENCE)[0]
    assert watched.of(counts(9, 9), 4 * drift.PATIENCE) == []
    assert watched.of(counts(9, 9), 9 * drift.PATIENCE) == []


def test_a_stream_is_told_line_by_line_with_an_alert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts, out, times = tmp_path / "stream.json", io.StringIO(), iter([0.0, 10.0, 100.0])
    told = merge([tally("source", "read", 1000), tally("source", "kept", 990)]).to_pylist()
    facts.write_text(json.dumps({"tallies": told}))
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
    assert first == "sales: 1,000 rows · 100 rows/s · late 0 · rejected 0"
    assert second == "sales: 1,000 rows · 0 rows/s · late 0 · rejected 0"
    assert alert.startswith("sales: ALERT: read 1,000 = kept 990")


def test_counts_that_are_not_there_or_half_written_are_none(tmp_path: Path) -> None:
    assert drift.counted(f"{tmp_path}/none.json").rows["read"] == 0
    (tmp_path / "half.json").write_text('{"tallies": [')
    assert drift.counted(f"{tmp_path}/half.json").rows["read"] == 0
