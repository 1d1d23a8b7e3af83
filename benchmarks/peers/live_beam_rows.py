"""Beam with an element per row, in micro-batches on FnApiRunner: ``python live_beam_rows.py LOG STORE ROWS``.

A turn is a pipeline over the rows since the last one: the second is a part of the key, as that is four times as fast as
Beam's windows. What is open between turns is in this process's memory and would not survive it: that is in its favour.
"""

import sqlite3
import sys
import time
from collections.abc import Iterator

import apache_beam as beam
import pyarrow as pa
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

from benchmarks.peers.on_beam_rows import Accumulator, Summary
from pipelines.io.log import open_log

Key = tuple[str, int]
Span = tuple[str, int, int]

TRIGGER = 1.0
TABLE = '"live.per_second#0"'
COLUMNS = "key, window_start, n, total, mean, least, most"
combiner = Summary()
summaries: dict[Key, Accumulator] = {}
changed: set[Key] = set()


def rows(span: Span, uri: str) -> Iterator[tuple[Key, float]]:
    partition, start, stop = span
    with open_log(uri) as log:
        while start < stop:
            for message in log.read(partition, start, stop)["_raw"]:
                table = pa.ipc.open_stream(message.as_buffer()).read_all()
                start += len(table)
                keys, values = table["key"].to_pylist(), table["value"].to_pylist()
                for key, micros, value in zip(keys, table["ts"].cast(pa.int64()).to_pylist(), values, strict=True):
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
    answers = []
    for key, second in changed:
        n, total, least, most = summaries[key, second]
        answers.append((key, second * 1_000_000, n, total, total / n, least, most))
    store.executemany(f"INSERT OR REPLACE INTO {TABLE} VALUES (?, ?, ?, ?, ?, ?, ?)", answers)
    store.commit()
    newest = max(second for _, second in changed)
    for old in [key for key in changed if key[1] < newest - 1]:
        del summaries[old]
    changed.clear()


def main(uri: str, path: str, total: str) -> None:
    store = sqlite3.connect(path)
    store.execute("PRAGMA journal_mode = WAL")
    store.execute(f"CREATE TABLE {TABLE} ({COLUMNS}, PRIMARY KEY (key, window_start)) WITHOUT ROWID")
    log = open_log(uri)
    offsets = dict.fromkeys(log.bounds(), 0)
    while sum(offsets.values()) < int(total):
        due = time.monotonic() + TRIGGER
        ends = {name: bounds.end for name, bounds in log.bounds().items()}
        if spans := [(name, offsets[name], end) for name, end in ends.items() if end > offsets[name]]:
            turn(uri, spans, store)
            offsets = ends
        time.sleep(max(0.0, due - time.monotonic()))


if __name__ == "__main__":
    from benchmarks.peers import live_beam_rows  # Beam would pickle what __main__ has by value

    live_beam_rows.main(*sys.argv[1:])
