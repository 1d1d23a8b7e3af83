"""How a stream is sent and what a reader of the store makes of it: a latency that is told must be one."""

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks import feed, page
from benchmarks.feed import Phase
from benchmarks.figures import Figures, LiveRun
from benchmarks.live import Watched
from pipelines.io.log import open_log

SECOND = 1_000_000


def test_what_is_sent_is_what_is_expected_of_each_window(tmp_path: Path) -> None:
    uri = f"{tmp_path}/log.db?format=arrow&partitions=2"
    phases = [Phase(50, 1), Phase(100, 1)]
    sent = feed.feed(uri, "arrow", 1000, phases)
    found: dict[int, int] = {}
    with open_log(uri) as log:
        for partition, bounds in log.bounds().items():
            messages = [
                pa.ipc.open_stream(raw).read_all() for raw in log.read(partition, 0, bounds.end)["_raw"].to_pylist()
            ]
            times = pa.concat_tables(messages)["ts"].cast(pa.int64()).to_numpy()
            assert (np.diff(times) > 0).all() and times[-1] == 1002 * SECOND
            for second in (times // SECOND).tolist():
                found[second * SECOND] = found.get(second * SECOND, 0) + 1
    assert sent.rows == 150 and found == feed.expected(1000, phases, 2)


def test_json_messages_are_the_same_rows() -> None:
    (tick, *_) = feed.tables(0, [Phase(20, 1)], 1, ["key", "ts", "value", "id"])
    found = [json.loads(raw) for raw in feed.json_lines(tick["0"])["_raw"].to_pylist()]
    assert [(row["id"], row["ts"]) for row in found] == [
        (0, "1970-01-01T00:00:00.050000Z"),
        (1, "1970-01-01T00:00:00.100000Z"),
    ]
    assert [row["value"] for row in found] == tick["0"]["value"].to_pylist()


def test_a_window_counts_from_the_sight_of_its_last_count() -> None:
    watched = Watched({0: 5, SECOND: 2})
    watched.look(10.0, [("a", 0, 2), ("b", 0, 1)])
    watched.look(11.0, [("a", 0, 4), ("b", 0, 1), ("a", SECOND, 1)])
    assert watched.through == SECOND and watched.shown(10.5) == 3
    assert sorted(watched.latencies({0: 9.0})) == [1.0, 2.0]
    assert watched.latencies({SECOND: 9.5}) == [math.inf]


def run(rate: int, p99: float, counted: int, peer: str = page.MICRO, cpu: float = 1.0) -> LiveRun:
    sizes = {"sent": 10, "counted": counted, "backlog": 0, "surge": 0, "p50": 0.1, "p99": p99, "drained": 1.0}
    costs = {"status": 0, "cpu": cpu, "wall": 1.0, "peak_mib": 1.0, "feeder_cpu": 1.0, "behind": 0.0, "load": 0.1}
    return LiveRun(job="live", format="arrow", peer=peer, rate=rate, seconds=60, **sizes, **costs)  # type: ignore[arg-type]


def test_a_rate_is_held_only_in_time_and_with_every_row() -> None:
    figures = Figures({}, [])
    for made in (run(200_000, 1.0, 10), run(300_000, 2.5, 10), run(400_000, 1.0, 9), run(200_000, 1.5, 10)):
        figures.add_live(made)
    assert [made.p99 for made in figures.live] == [2.5, 1.0, 1.5]
    bars = page.tables(figures)["live-bars"]
    assert "| micro-batch, Arrow: rows/s held | at least 200,000 | 200,000 | met |" in bars


def test_the_same_flink_is_compared_at_the_greatest_rate_of_each() -> None:
    figures = Figures({}, [])
    assert page.tables(figures)["live-flink"] == page.NONE
    figures.live = [run(rate, 1.0, 10, page.ROWS_FLINK, cpu) for rate, cpu in ((10_000, 0.0006), (5_000, 0.0009))]
    figures.live += [run(rate, 1.0, 10, page.FLINK, cpu) for rate, cpu in ((200_000, 0.0001), (400_000, 0.00002))]
    told = page.tables(figures)["live-flink"]
    assert "60.0 CPU-s per 1M rows at 10,000 rows/s: 30 times the 2.00 of ours at 400,000 rows/s" in told
