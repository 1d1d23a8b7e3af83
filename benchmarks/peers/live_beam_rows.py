"""Beam with an element per row follows a log: ``python live_beam_rows.py LOG STORE ROWS micro-batch|Flink``.

``micro-batch``, on FnApiRunner: a turn is a pipeline over the rows since the last one; the second is a part of the key,
as that is four times as fast as Beam's windows. What is open between turns is in this process's memory and would not
survive it: that is in its favour. ``Flink``: one unbounded graph as Beam's guide writes it, on the Flink that ours has:
a splittable DoFn with a watermark, FixedWindows, CombinePerKey. It claims a message and not a row: in its favour.
"""

import sqlite3
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import apache_beam as beam
import pyarrow as pa
from apache_beam.io.restriction_trackers import OffsetRange, OffsetRestrictionTracker
from apache_beam.io.watermark_estimators import ManualWatermarkEstimator
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.transforms.core import RestrictionProvider
from apache_beam.transforms.window import FixedWindows, TimestampedValue
from apache_beam.utils.timestamp import Duration, Timestamp

from benchmarks.peers.on_beam_rows import Accumulator, Summary
from pipelines.io.log import open_log
from pipelines.runners import Following

Key = tuple[str, int]
Span = tuple[str, int, int]
Answer = tuple[str, int, int, float, float, float, float]

TRIGGER = 1.0
BUNDLE, POLL = 0.2, 0.1
"""As our own source: seconds that a bundle reads, and until a partition that is read to its end is read again."""

FLAGS = (
    "--streaming",
    "--flink_master=[local]",
    "--checkpointing_interval=1000",
    "--min_pause_between_checkpoints=0",
)
"""Beside those of our own graph on Flink. Under load a watermark of Beam's moves with a checkpoint only: what a source
gives goes on first, and then it is due again, as Flink takes what it defers in whole seconds."""

END = sys.maxsize
TABLE = '"live.per_second#0"'
COLUMNS = "key, window_start, n, total, mean, least, most"
combiner = Summary()
summaries: dict[Key, Accumulator] = {}
changed: set[Key] = set()


def read(message: pa.LargeBinaryScalar) -> list[tuple[str, int, float]]:
    """The rows of a message: key, time (µs), value."""
    table = pa.ipc.open_stream(message.as_buffer()).read_all()
    columns = (table["key"], table["ts"].cast(pa.int64()), table["value"])
    return list(zip(*(column.to_pylist() for column in columns), strict=True))


def opened(path: str) -> sqlite3.Connection:
    """The store. Beam's workers are threads, of which one at a time has a DoFn."""
    store = sqlite3.connect(path, check_same_thread=False)
    store.execute("PRAGMA journal_mode = WAL")
    store.execute(f"CREATE TABLE IF NOT EXISTS {TABLE} ({COLUMNS}, PRIMARY KEY (key, window_start)) WITHOUT ROWID")
    return store


def upsert(store: sqlite3.Connection, answers: list[Answer]) -> None:
    store.executemany(f"INSERT OR REPLACE INTO {TABLE} VALUES (?, ?, ?, ?, ?, ?, ?)", answers)
    store.commit()


def answer(key: str, second: int, summary: Accumulator) -> Answer:
    n, total, least, most = summary
    return key, second * 1_000_000, n, total, total / n, least, most


# In turns


def rows(span: Span, uri: str) -> Iterator[tuple[Key, float]]:
    partition, start, stop = span
    with open_log(uri) as log:
        while start < stop:
            for message in log.read(partition, start, stop)["_raw"]:
                found = read(message)
                start += len(found)
                for key, micros, value in found:
                    yield (key, micros // 1_000_000), value


def keep(result: tuple[Key, Accumulator]) -> None:
    key, summary = result
    known = summaries.get(key)
    summaries[key] = summary if known is None else combiner.merge_accumulators([known, summary])
    changed.add(key)


def turn(uri: str, spans: list[Span], store: sqlite3.Connection) -> None:
    with beam.Pipeline(runner=FnApiRunner()) as pipeline:
        _ = (
            pipeline
            | beam.Create(spans, reshuffle=False)
            | beam.FlatMap(rows, uri).with_output_types(tuple[Key, float])
            | beam.CombinePerKey(Summary())
            | beam.Map(keep)
        )
    upsert(store, [answer(*key, summaries[key]) for key in changed])
    newest = max(second for _, second in changed)
    for old in [key for key in changed if key[1] < newest - 1]:
        del summaries[old]
    changed.clear()


def in_turns(uri: str, path: str, total: int) -> None:
    store, log = opened(path), open_log(uri)
    offsets = dict.fromkeys(log.bounds(), 0)
    while sum(offsets.values()) < total:
        due = time.monotonic() + TRIGGER
        ends = {name: bounds.end for name, bounds in log.bounds().items()}
        if spans := [(name, offsets[name], end) for name, end in ends.items() if end > offsets[name]]:
            turn(uri, spans, store)
            offsets = ends
        time.sleep(max(0.0, due - time.monotonic()))


# Unbounded


class Tracker(OffsetRestrictionTracker):  # type: ignore[misc]
    """Claims the offset of a message's first row. It is only cut where it is: the end is none that there will be."""

    def try_split(self, fraction_of_remainder: float) -> tuple[OffsetRange, OffsetRange] | None:
        return None if fraction_of_remainder else super().try_split(0)

    def is_bounded(self) -> bool:
        return False


class Offsets(RestrictionProvider):  # type: ignore[misc]
    """Of a partition, all."""

    def initial_restriction(self, partition: str) -> OffsetRange:
        return OffsetRange(0, END)

    def create_tracker(self, restriction: OffsetRange) -> Tracker:
        return Tracker(restriction)

    def restriction_size(self, partition: str, restriction: OffsetRange) -> int:
        return 1


class Read(beam.DoFn):  # type: ignore[misc]
    """The rows of a partition, each at its time, until the log has had so many in all."""

    def __init__(self, uri: str, total: int) -> None:
        self.uri, self.total = uri, total

    def setup(self) -> None:
        self.log = open_log(self.uri)

    @beam.DoFn.unbounded_per_element()  # type: ignore[untyped-decorator]
    def process(
        self,
        partition: str,
        tracker: Any = beam.DoFn.RestrictionParam(Offsets()),  # noqa: B008  (Beam's way to ask for it)
        watermark: Any = beam.DoFn.WatermarkEstimatorParam(ManualWatermarkEstimator.default_provider()),  # noqa: B008
    ) -> Iterator[TimestampedValue]:
        start, until = tracker.current_restriction().start, time.monotonic() + BUNDLE
        ends = {name: bounds.end for name, bounds in self.log.bounds().items()}
        messages = self.log.read(partition, start, ends[partition])
        for message, first in zip(messages["_raw"], messages["_offset"].to_pylist(), strict=True):
            if not tracker.try_claim(first):
                return
            for key, micros, value in read(message):
                yield TimestampedValue((key, value), Timestamp(micros=micros))
            watermark.set_watermark(Timestamp(micros=micros))  # no disorder: what is to come is later
            if time.monotonic() > until:
                tracker.defer_remainder()
                return
        if not len(messages) and sum(ends.values()) >= self.total:
            tracker.try_claim(END - 1)
        else:
            tracker.defer_remainder(Duration(POLL))


class Upsert(beam.DoFn):  # type: ignore[misc]
    """Answers into the store, a transaction a bundle. rows: that they are of, in this process."""

    rows: ClassVar[int] = 0

    def __init__(self, path: str) -> None:
        self.path = path

    def setup(self) -> None:
        self.store = opened(self.path)

    def start_bundle(self) -> None:
        self.answers: list[Answer] = []

    def process(self, result: tuple[str, Accumulator], window: Any = beam.DoFn.WindowParam) -> None:
        key, summary = result
        self.answers.append(answer(key, int(window.start), summary))

    def finish_bundle(self) -> None:
        upsert(self.store, self.answers)
        Upsert.rows += sum(n for _, _, n, *_ in self.answers)


def unbounded(uri: str, path: str, total: int) -> None:
    from pipelines.runners import flink  # the other style needs none of it

    with open_log(uri) as log:
        partitions = list(log.bounds())

    def build(pipeline: beam.Pipeline) -> None:
        _ = (
            pipeline
            | beam.Create(partitions, reshuffle=False)
            | beam.ParDo(Read(uri, total)).with_output_types(tuple[str, float])
            | beam.WindowInto(FixedWindows(1))
            | beam.CombinePerKey(Summary())
            | beam.ParDo(Upsert(path))
        )

    kept = f"{Path(path).parent}/checkpoints"
    flink.follow(build, FLAGS, Following("rows", kept, None, lambda *_: None, lambda: Upsert.rows >= total))


def main(uri: str, path: str, total: str, style: str) -> None:
    (unbounded if style == "Flink" else in_turns)(uri, path, int(total))


if __name__ == "__main__":
    from benchmarks.peers import live_beam_rows  # Beam would pickle what __main__ has by value

    live_beam_rows.main(*sys.argv[1:])
