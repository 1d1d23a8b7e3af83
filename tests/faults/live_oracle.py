"""A small log, a speed layer over it, and what it must give: lateness by the rule in plain Python, the rest in DuckDB.

Nothing here is of the code that is tested, but for sending and reading. A row is a dict of its columns.
"""

import collections
import dataclasses
import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from pipelines import Check, Count, Filter, Max, Pipeline, Session, Sliding, Source, Sum, Tumbling, View
from pipelines.io.log import Format, Options
from pipelines.io.sqlite_log import SqliteLog
from pipelines.io.store import LIVE, open_store
from pipelines.io.table import open_table
from pipelines.live import SpeedLayer
from pipelines.options import Deployment
from pipelines.runners import direct
from pipelines.transforms.deadletters import DEAD_LETTERS

NOON = datetime.datetime(2024, 5, 1, 12, tzinfo=datetime.UTC)
EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
SECOND, MINUTE = 1_000_000, 60_000_000
AHEAD = 30 * MINUTE
"""By default: how far past its publication an event may be."""
DISORDER, LATENESS = MINUTE, 2 * MINUTE
"""Of ``sales``."""

Row = dict[str, Any]


class Sale:
    """What is sent."""

    id: int
    at: datetime.datetime
    shop: str
    cents: int
    note: str | None


def sales(**source: Any) -> Pipeline:
    """A view of each kind of window, all of the same measures."""
    measures: dict[str, Any] = {"n": Count(), "cents": Sum("cents"), "most": Max("cents")}
    return Pipeline(
        "sales",
        source=Source(
            **{"row": Sale, "event_time": "at", "identity": "id", "disorder": "1m", "lateness": "2m", **source}
        ),
        steps=(Check(paid="cents < 900"), Filter("cents <> 7")),
        views=(
            View("minutes", by="shop", window=Tumbling("1m"), **measures),
            View("sliding", by="shop", window=Sliding("4m", every="2m"), **measures),
            View("visits", by="shop", window=Session("20s"), **measures),
        ),
        events=False,
    )


class Undated(Sale):
    """As some producers send it."""

    at: datetime.datetime | None  # type: ignore[assignment]


def undated() -> Pipeline:
    """An event may lack its time."""
    return sales(row=Undated)


def sale(number: int, seconds: float, shop: str = "a", cents: int = 100, **others: Any) -> Row:
    """A row so many seconds after noon."""
    at = NOON + datetime.timedelta(seconds=seconds)
    return {"id": number, "at": at, "shop": shop, "cents": cents, "note": None, **others}


def encoded(row: Row) -> bytes:
    return json.dumps(row, default=lambda at: at.isoformat()).encode() + b"\r\n"  # as many producers end messages


def micros(at: datetime.datetime) -> int:
    return (at - EPOCH) // datetime.timedelta(microseconds=1)


@dataclasses.dataclass(frozen=True)
class Sent:
    """A row in the log, or a message that is none. place: the turn that reads it, its partition, its offset there."""

    place: tuple[int, str, int]
    row: Row | None
    published: datetime.datetime
    payload: bytes = b""


@dataclasses.dataclass
class Live:
    """A log with a speed layer over it. now: seconds, of the layer's clock. published: when the log takes what is sent.
    starts: the watermark that a partition has from an offset on whatever came before."""

    folder: Path
    pipeline: Pipeline = dataclasses.field(default_factory=sales)
    format: Format = "json"
    now: float = 0.0
    published: datetime.datetime = NOON
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    partitions: int = 1
    sent: list[Sent] = dataclasses.field(default_factory=list)
    starts: dict[tuple[str, int], int] = dataclasses.field(default_factory=dict)
    took: int = 0

    def __post_init__(self) -> None:
        options = Options(format=self.format, partitions=self.partitions, schemas=f"{self.folder}/schemas")
        self.log = SqliteLog(f"{self.folder}/log.db", options, clock=lambda: self.published)
        self.deployment = Deployment(
            **{
                "live": self.log.uri,
                "store": f"{self.folder}/store.db",
                "dead_letters": f"{self.folder}/dead",
                "state": f"{self.folder}/state",
                "ahead": AHEAD,
                "mode": "micro-batch",
                **self.options,
            }
        )
        self.speed = self._begun()

    def _begun(self) -> SpeedLayer:
        return SpeedLayer(self.pipeline, self.deployment, direct, clock=lambda: self.now)

    def restart(self) -> None:
        """Another process goes on from what is on disk."""
        self.speed.close()
        self.speed = self._begun()

    def send(self, partition: str, *messages: Row | bytes) -> None:
        """Rows, and messages that are none."""
        raw = [message if isinstance(message, bytes) else encoded(message) for message in messages]
        self.append(partition, raw, [None if isinstance(message, bytes) else message for message in messages])

    def append(self, partition: str, raw: list[bytes], rows: list[Row | None]) -> None:
        """Messages of one row each, and what each says: None where it says nothing that is taken."""
        first = self.log.bounds()[partition].end if partition in self.log.bounds() else 0
        table = pa.table({"_raw": pa.array(raw, pa.large_binary()), "_rows": pa.array([1] * len(raw), pa.int32())})
        self.log.append({partition: table})
        for offset, (row, payload) in enumerate(zip(rows, raw, strict=True), first):
            self.sent.append(Sent((self.took, partition, offset), row, self.published, payload))

    def turn(self) -> None:
        """A turn over what was sent."""
        assert self.speed.turn() is False
        self.took += 1

    def answers(self, view: str) -> list[Row]:
        """What readers of the store see."""
        with open_store(str(self.deployment.store)) as store:
            rows = store.scan(f"{self.pipeline.name}.{view}", generation=LIVE)
        return _sorted(rows.select([name for name in rows.column_names if not name.startswith("_")]).to_pylist())

    def letters(self) -> list[Row]:
        """The dead letters, as they lie in their table."""
        dead = open_table(f"{self.folder}/dead/{self.pipeline.name}.live", DEAD_LETTERS)
        if dead.last() is None:
            return []
        return sorted(dead.dataset().to_table().to_pylist(), key=lambda row: (row["source"], row["offset"]))

    @property
    def counts(self) -> dict[str, int]:
        status = self.speed.status()
        assert status is not None
        assert status.counts.violations() == []
        return dict(status.counts.rows)

    @property
    def watermark(self) -> int | None:
        """Seconds after noon."""
        status = self.speed.status()
        assert status is not None
        return None if status.watermark is None else (status.watermark - micros(NOON)) // SECOND

    def check(self) -> "Expected":
        """The law holds, and every count, every dead letter and every answer is the oracle's."""
        expected = Expected.of(self.sent, self.starts, ahead=self.deployment.ahead)
        assert self.counts == expected.counts
        status = self.speed.status()
        assert status is not None
        dropped = {name: {why: n for why, n in of.items() if n} for name, of in status.counts.dropped.items()}
        assert {name: of for name, of in dropped.items() if of} == expected.dropped
        letters = [(letter["source"], letter["offset"]) for letter in self.letters()]
        assert letters == sorted(expected.refused)
        payloads = {sent.place[1:]: sent.payload for sent in self.sent}
        for letter in self.letters():
            if self.format == letter["format"]:  # of Arrow, a row that was read is refused as JSON
                assert letter["payload"] == payloads[letter["source"], letter["offset"]]
        for view in ("minutes", "sliding", "visits"):
            assert self.answers(view) == expected.answers[view], view
        return expected


@dataclasses.dataclass(frozen=True)
class Judged:
    """A row that is read and not of the future, with what it counts for in each view: the windows, none if late."""

    sent: Sent
    row: Row
    minute: list[int]
    sliding: list[int]
    visit: list[int]

    @property
    def late(self) -> bool:
        return not (self.minute or self.sliding or self.visit)


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a speed layer has to say of what was sent. refused: places of dead letters. dropped: late rows by view."""

    counts: dict[str, int]
    answers: dict[str, list[Row]]
    refused: list[tuple[str, int]]
    dropped: dict[str, dict[str, int]]

    @staticmethod
    def of(
        sent: list[Sent], starts: Mapping[tuple[str, int], int], *, ahead: int = AHEAD, lateness: int = LATENESS
    ) -> "Expected":
        refused = [one.place[1:] for one in sent if one.row is None]
        judged, future = _judged(sent, starts, ahead, lateness)
        refused += [one.place[1:] for one in future]
        timely = sorted((one for one in judged if not one.late), key=lambda one: one.sent.place)
        first: dict[int, Row] = {}
        kept, duplicates = [], 0
        for one in timely:
            if one.row["id"] not in first:
                first[one.row["id"]] = one.row
                kept.append(one)
            elif one.row == first[one.row["id"]]:
                duplicates += 1
            else:
                refused.append(one.sent.place[1:])
        refused += [one.sent.place[1:] for one in kept if one.row["cents"] >= 900]
        kept = [one for one in kept if one.row["cents"] < 900]
        filtered = sum(one.row["cents"] == 7 for one in kept)
        kept = [one for one in kept if one.row["cents"] != 7]
        counts = {
            "read": len(sent),
            "kept": len(kept),
            "filtered": filtered,
            "rejected": len(refused),
            "late": sum(one.late for one in judged),
            "duplicate": duplicates,
        }
        dropped = {
            "view:minutes": {"late": sum(not one.minute for one in kept)},
            "view:sliding": {
                "late": sum(not one.sliding for one in kept),
                "partly_late": sum(0 < len(one.sliding) < 2 for one in kept),
            },
            "view:visits": {"late": sum(not one.visit for one in kept)},
        }
        dropped = {name: {why: n for why, n in of.items() if n} for name, of in dropped.items()}
        return Expected(counts, _answers(kept), refused, {name: of for name, of in dropped.items() if of})


def _judged(
    sent: list[Sent], starts: Mapping[tuple[str, int], int], ahead: int, lateness: int
) -> tuple[list[Judged], list[Sent]]:
    """The design's rule: the running greatest event time of the earlier offsets of a partition, less disorder."""
    parts: dict[str, list[Sent]] = collections.defaultdict(list)
    for one in sent:
        parts[one.place[1]].append(one)
    judged, future = [], []
    for partition, messages in parts.items():
        greatest, floor = None, None
        for one in sorted(messages, key=lambda one: one.place[2]):
            floor = starts.get((partition, one.place[2]), floor)
            if one.row is None:
                continue
            at = micros(one.row["at"])
            if at > micros(one.published) + ahead:
                future.append(one)
                continue
            marks = [mark for mark in (floor, None if greatest is None else greatest - DISORDER) if mark is not None]
            mark = max(marks) // 1000 * 1000 if marks else None
            sliding = [at // (2 * MINUTE) * 2 * MINUTE - back for back in (2 * MINUTE, 0)]

            def open_(end: int, mark: int | None = mark) -> bool:
                return mark is None or end + lateness > mark

            judged.append(
                Judged(
                    one,
                    one.row,
                    [start for start in [at // MINUTE * MINUTE] if open_(start + MINUTE)],
                    [start for start in sliding if open_(start + 4 * MINUTE)],
                    [at // 1000 * 1000] if open_(at // 1000 * 1000 + 20 * SECOND) else [],
                )
            )
            greatest = at if greatest is None else max(greatest, at)
    return judged, future


_MEASURES = "count(*) AS n, sum(cents)::BIGINT AS cents, max(cents) AS most"
_WINDOWED = """
    SELECT shop, make_timestamptz(start) AS window_start, make_timestamptz(start + {size}) AS window_end, {measures}
    FROM (SELECT *, unnest({windows}) AS start FROM rows) GROUP BY shop, start"""
_SESSIONS = """
    WITH timed AS (SELECT *, unnest(visit) AS t FROM rows),
    apart AS (SELECT *, t - lag(t) OVER (PARTITION BY shop ORDER BY t) AS gap FROM timed),
    opened AS (SELECT *, coalesce(gap >= 20000000, true)::INT AS o FROM apart),
    numbered AS (SELECT *, sum(o) OVER (PARTITION BY shop ORDER BY t) AS number FROM opened)
    SELECT shop, make_timestamptz(min(t)) AS window_start, make_timestamptz(max(t) + 20000000) AS window_end, {measures}
    FROM numbered GROUP BY shop, number"""


def _answers(kept: list[Judged]) -> dict[str, list[Row]]:
    starts = pa.list_(pa.int64())
    rows = pa.table(
        {
            "shop": pa.array([one.row["shop"] for one in kept], pa.string()),
            "cents": pa.array([one.row["cents"] for one in kept], pa.int64()),
            "minute": pa.array([one.minute for one in kept], starts),
            "sliding": pa.array([one.sliding for one in kept], starts),
            "visit": pa.array([one.visit for one in kept], starts),
        }
    )
    queries = {
        "minutes": _WINDOWED.format(size=MINUTE, windows="minute", measures=_MEASURES),
        "sliding": _WINDOWED.format(size=4 * MINUTE, windows="sliding", measures=_MEASURES),
        "visits": _SESSIONS.format(measures=_MEASURES),
    }
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        connection.register("rows", rows)
        return {name: _sorted(connection.sql(sql).to_arrow_table().to_pylist()) for name, sql in queries.items()}


def _sorted(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (str(row.get("shop")), row["window_start"]))
