"""The live benchmark's stream: appends rows to a log at a fixed rate, each with the wall clock as its event time.

``python -m benchmarks.feed LOG FORMAT START RATExSECONDS…`` sends, from START (Unix seconds, whole) on and every
100 ms, the rows of the last 100 ms: an append of one message a partition (of arrow) or one a row (of json). Then it
prints, as JSON, what it did. The rows of a window are known beforehand, so whoever follows the log can be checked.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from benchmarks.data import block
from pipelines.io.log import open_log

TICKS = 10
"""A second: the last of each has the first row of the next second, in every partition."""

POOL, KEYS = 1_000_000, 500


@dataclasses.dataclass(frozen=True)
class Phase:
    """So many rows a second for so many seconds."""

    rate: int
    seconds: int

    @classmethod
    def of(cls, text: str) -> "Phase":
        """
        >>> Phase.of("200000x60")
        Phase(rate=200000, seconds=60)
        """
        rate, _, seconds = text.partition("x")
        return cls(int(rate), int(seconds))

    def __str__(self) -> str:
        return f"{self.rate}x{self.seconds}"


@dataclasses.dataclass(frozen=True)
class Fed:
    """What was sent. published: for every tick the time (Unix seconds) just before its append. behind: seconds that
    an append ended after it was due, at most."""

    rows: int
    published: list[float]
    behind: float


def ticks(phases: list[Phase]) -> list[int]:
    """The rows of every tick.

    >>> ticks([Phase(20, 1), Phase(40, 1)])
    [2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4]
    """
    return [phase.rate // TICKS for phase in phases for _ in range(phase.seconds * TICKS)]


def times(start: int, number: int, rows: int) -> npt.NDArray[np.int64]:
    """The event times (µs) of a partition's rows in a tick: evenly, the last at the end of the tick.

    >>> times(10, 0, 4).tolist()
    [10025000, 10050000, 10075000, 10100000]
    """
    width = 1_000_000 // TICKS
    return start * 1_000_000 + number * width + width * np.arange(1, rows + 1) // rows


def expected(start: int, phases: list[Phase], partitions: int) -> dict[int, int]:
    """The rows of every window of a second, by its start (µs).

    >>> expected(10, [Phase(20, 1), Phase(40, 1)], partitions=1)
    {10000000: 19, 11000000: 40, 12000000: 1}
    """
    counts: dict[int, int] = {}
    for number, rows in enumerate(ticks(phases)):
        for share in shares(rows, partitions):
            seconds, found = np.unique(times(start, number, share) // 1_000_000, return_counts=True)
            for second, count in zip(seconds.tolist(), found.tolist(), strict=True):
                counts[second * 1_000_000] = counts.get(second * 1_000_000, 0) + count
    return counts


def shares(rows: int, partitions: int) -> list[int]:
    """The rows of each partition."""
    return [rows // partitions + (number < rows % partitions) for number in range(partitions)]


def arrow(rows: pa.Table) -> pa.Table:
    """One message of many rows."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)
    return pa.table({"_raw": pa.array([sink.getvalue().to_pybytes()], pa.large_binary()), "_rows": [len(rows)]})


def json_lines(rows: pa.Table) -> pa.Table:
    """A message a row."""
    columns = {name: rows[name].combine_chunks() for name in rows.column_names}
    moment = columns["ts"].cast(pa.timestamp("us"))
    date, clock = moment.cast(pa.date32()).cast(pa.string()), moment.cast(pa.time64("us")).cast(pa.string())
    value, number = columns["value"].cast(pa.string()), columns["id"].cast(pa.string())
    head, at = ('{"key":"', columns["key"], '","ts":"', date, "T", clock), ('Z","value":', value, ',"id":', number, "}")
    return pa.table({"_raw": pc.binary_join_element_wise(*head, *at, "").cast(pa.large_binary())})


MESSAGES = {"arrow": arrow, "json": json_lines}


def tables(start: int, phases: list[Phase], partitions: int, names: list[str]) -> Iterator[dict[str, pa.Table]]:
    """The rows of every tick by partition. An id is of one row alone; keys and values come again after POOL rows."""
    pool, sent = block(0, POOL, KEYS), 0
    for number, rows in enumerate(ticks(phases)):
        tick = {}
        for partition, share in enumerate(shares(rows, partitions)):
            at = sent % (POOL - share)
            columns = {
                "key": pool["key"].slice(at, share),
                "ts": pa.array(times(start, number, share), pa.timestamp("us", "UTC")),
                "value": pool["value"].slice(at, share),
                "id": pa.array(np.arange(sent, sent + share)),
            }
            tick[str(partition)] = pa.table(columns).select(names)
            sent += share
        yield tick


def feed(uri: str, format: str, start: int, phases: list[Phase]) -> Fed:
    """Sends all phases; an append that is late is made at once, and none is left out."""
    sent, published, behind = 0, [], 0.0
    names = ["key", "ts", "value", *(["id"] if format == "json" else [])]
    with open_log(uri) as log:
        partitions = len(log.bounds())
        for number, tick in enumerate(tables(start, phases, partitions, names)):
            messages = {partition: MESSAGES[format](rows) for partition, rows in tick.items()}
            due = start + (number + 1) / TICKS
            time.sleep(max(0.0, due - time.time()))
            published.append(time.time())
            log.append(messages)
            sent += sum(map(len, tick.values()))
            behind = max(behind, time.time() - due)
    return Fed(sent, published, round(behind, 3))


if __name__ == "__main__":
    told = feed(sys.argv[1], sys.argv[2], int(sys.argv[3]), [Phase.of(text) for text in sys.argv[4:]])
    print(json.dumps(dataclasses.asdict(told)))
