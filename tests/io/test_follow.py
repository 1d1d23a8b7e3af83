"""A source over a log: every row once, in the order of its partition, and a watermark that no row in time is behind."""

import dataclasses
import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
import pyarrow as pa
import pytest
from apache_beam.io.watermark_estimators import ManualWatermarkEstimator
from apache_beam.runners.sdf_utils import RestrictionTrackerView, ThreadsafeRestrictionTracker
from apache_beam.testing.util import assert_that, equal_to
from apache_beam.utils.timestamp import MIN_TIMESTAMP, Timestamp

from pipelines.io import follow
from pipelines.io.follow import Follow, Reading, Share, ShareCoder
from pipelines.io.log import Log, open_log
from pipelines.transforms.decoder import Decoder
from pipelines.transforms.errors import DataRefused
from pipelines.transforms.intake import Intake
from pipelines.transforms.lateness import IDLE_AFTER, Lateness, Position
from pipelines.transforms.messages import Messages
from pipelines.transforms.schema import RowSchema
from pipelines.transforms.windows import Tumbling


class Row:
    """What is sent."""

    at: datetime.datetime
    n: int


DISORDER = 2_000_000
INTAKE = Intake(
    Messages(Decoder(RowSchema.of(Row), "rows"), "json"), "at", DISORDER, 0, (Lateness(Tumbling("1m"), allowed=0),)
)
NOON = datetime.datetime(2024, 5, 1, 12, tzinfo=datetime.UTC)


def messages(*seconds: float) -> pa.Table:
    """A message for each second after noon, of which it also is the number."""
    told = [{"at": (NOON + datetime.timedelta(seconds=s)).isoformat(), "n": int(s)} for s in seconds]
    return pa.table({"_raw": [json.dumps(one).encode() for one in told]})


def after_noon(seconds: float) -> Timestamp:
    return Timestamp(micros=int((NOON.timestamp() + seconds) * 1_000_000))


class Source:
    """The source by hand: one bundle a call, at the times that a test says."""

    def __init__(self, log: Log, until: follow.Until = None) -> None:
        self.now = 0.0
        self.read = follow._Read(log.uri, INTAKE, until, lambda: self.now)

    def shares(self) -> list[Share]:
        return list(self.read.split(None, self.read.initial_restriction(None)))

    def bundle(self, share: Share) -> tuple[list[int], Timestamp, Share | None]:
        """The numbers that it gives, its watermark, and what it defers."""
        share = ShareCoder().decode(ShareCoder().encode(share))
        tracker = ThreadsafeRestrictionTracker(self.read.create_tracker(share))
        estimator = ManualWatermarkEstimator(self.read.initial_estimator_state(None, share))
        given = list(self.read.process(None, RestrictionTrackerView(tracker), estimator))
        tracker.check_done()
        rows = [n for table in given if isinstance(table, pa.Table) for n in table["n"].to_pylist()]
        left = tracker.deferred_status()
        return rows, estimator.current_watermark(), left[0] if left else None


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    with open_log(str(tmp_path / "rows.db")) as opened:
        yield opened


def test_a_bounded_source_gives_every_row_once_and_ends(log: Log) -> None:
    for at in range(0, 40, 10):
        log.append({name: messages(*range(at, at + 10)) for name in "abc"})
    with beam.Pipeline("FnApiRunner") as pipeline:
        rows = (pipeline | Follow(log.uri, INTAKE, "end")).rows
        found = rows | beam.Map(lambda table: (table["_source"][0].as_py(), table["n"].to_pylist()))
        assert_that(found, equal_to([(name, list(range(40))) for name in "abc"]))


def test_a_bundle_defers_where_it_stopped_and_the_next_goes_on_there(log: Log) -> None:
    log.append({"a": messages(0, 5)})
    source = Source(log)
    (share,) = source.shares()
    rows, watermark, left = source.bundle(share)
    assert (rows, watermark) == ([0, 5], after_noon(3))
    assert left is not None
    assert source.bundle(left)[0] == []
    log.append({"a": messages(4, 9)})
    assert source.bundle(left)[:2] == ([4, 9], after_noon(7))
    assert source.bundle(left)[:2] == ([4, 9], after_noon(7))  # tried again


def test_the_watermark_is_that_of_the_slowest_partition_and_moves_when_it_is_idle(log: Log) -> None:
    log.append({"a": messages(0), "b": messages(100)})
    source = Source(log)
    share = Share(tuple(share.readings[0] for share in source.shares()))
    _, watermark, left = source.bundle(share)
    assert watermark == after_noon(-2)
    assert left is not None
    source.now = IDLE_AFTER + 30
    rows, watermark, left = source.bundle(left)
    assert (rows, watermark) == ([], after_noon(28))
    assert left is not None
    assert left.readings[0].position.idle == int((NOON.timestamp() + 28) * 1_000_000)
    log.append({"a": messages(-50, 29)})  # the first is late, as the partition was idle
    assert source.bundle(left)[0] == [29]


def test_a_new_partition_starts_at_the_watermark_and_holds_it_until_it_has_its_own(log: Log) -> None:
    log.append({"a": messages(0), "b": messages(100)})
    source = Source(log)
    first, last = source.shares()
    assert (first.discovers, last.discovers, last.known) == (False, True, ("a",))
    _, watermark, left = source.bundle(last)
    assert watermark == after_noon(98)
    log.append({"new": messages(10, 99), "b": messages(300)})
    assert left is not None
    rows, watermark, left = source.bundle(left)
    assert rows == [300, 99]  # 10 is late: its window was closed
    assert watermark == after_noon(98)
    log.append({"new": messages(200)})
    assert left is not None
    assert source.bundle(left)[:2] == ([200], after_noon(198))


def test_an_empty_log_is_followed_without_a_watermark(log: Log) -> None:
    log.bounds()
    source = Source(log)
    (share,) = source.shares()
    rows, watermark, left = source.bundle(share)
    assert (rows, watermark, left) == ([], MIN_TIMESTAMP, share)
    log.append({"a": messages(7)})
    assert source.bundle(share)[:2] == ([7], after_noon(5))
    (ended,) = Source(log, "end").shares()
    assert Source(log, "end").bundle(ended) == ([7], MIN_TIMESTAMP, None)


def test_it_ends_at_a_time(log: Log) -> None:
    log.append({"a": messages(0, 61)})
    source = Source(log, after_noon(60).micros)
    (share,) = source.shares()
    _, _, left = source.bundle(share)
    assert left is not None
    log.append({"a": messages(62)})
    assert source.bundle(left)[2] is None


def test_it_ends_as_soon_as_it_is_drained(log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "LOOK", -1.0)
    log.append({"a": messages(0)})
    source = Source(log)
    source.read = follow._Read(log.uri, INTAKE, None, lambda: 0.0, f"{tmp_path}/drain")
    (share,) = source.shares()
    left = source.bundle(share)[2]
    assert left is not None
    (tmp_path / "drain").touch()
    log.append({"a": messages(1)})
    assert source.bundle(left) == ([1], after_noon(-2), None)


def test_a_share_that_is_resumed_ends_as_the_run_that_resumes_it(log: Log) -> None:
    log.append({"a": messages(0), "b": messages(1)})
    share = dataclasses.replace(Source(log).shares()[0], discovers=True)
    log.append({"a": messages(2), "b": messages(3)})
    assert Source(log, {"a": 2}).bundle(share) == ([0, 2], MIN_TIMESTAMP, None)
    assert Source(log, {"b": 2}).bundle(share) == ([], MIN_TIMESTAMP, None)  # it has nothing of a


def test_how_far_it_has_read_is_told_when_it_moves(log: Log) -> None:
    log.append({"a": messages(0, 5)})
    source = Source(log)
    (share,) = source.shares()

    def told(share: Share) -> list[dict[str, Any]]:
        tracker = ThreadsafeRestrictionTracker(source.read.create_tracker(share))
        estimator = ManualWatermarkEstimator(source.read.initial_estimator_state(None, share))
        given = source.read.process(None, RestrictionTrackerView(tracker), estimator)
        return [row for one in given if getattr(one, "tag", "") == "places" for row in one.value.to_pylist()]

    assert told(share) == [{"partition": "a", "offset": 2, "watermark": after_noon(3).micros}]
    left = source.bundle(share)[2]
    assert left is not None
    assert told(left) == []


def test_what_waits_is_told(log: Log) -> None:
    log.append({"a": messages(0, 1, 2)})
    source = Source(log)
    (share,) = source.shares()
    assert source.read.restriction_size(None, share) == 3
    left = source.bundle(share)[2]
    assert left is not None
    assert source.read.restriction_size(None, left) == 0


def test_offsets_that_are_gone_are_never_skipped(log: Log) -> None:
    log.append({"a": messages(0)})
    source = Source(log)
    (share,) = source.shares()
    log.append({"a": messages(1)})
    log.trim(datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1))
    with pytest.raises(DataRefused, match="offset 0 of partition a is gone"):
        source.bundle(share)


def test_a_split_leaves_nothing_to_claim() -> None:
    share = Share((Reading("a", Position(3, 5, None), 1.5, 9),))
    tracker: Any = follow._Tracker(share)
    assert tracker.try_split(0.5) is None
    assert tracker.try_claim((share, None, 6))
    assert tracker.try_split(0) == (Share(), share)
    assert not tracker.try_claim((share, None, 0))
    assert tracker.is_bounded()
    assert not follow._Tracker(Share(discovers=True)).is_bounded()
