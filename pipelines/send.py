"""``pipelines replay``: sends a pipeline's history to a log, and tells what it sent."""

import contextlib
import dataclasses
import datetime
import json
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pipelines import progress
from pipelines.io.log import Log, open_log
from pipelines.options import masked
from pipelines.pace import Pace
from pipelines.replay import Counts, Sent, messages, written
from pipelines.report import grid, moment, place
from pipelines.runners.microbatch import stopped_by_signals
from pipelines.transforms import progress as counted
from pipelines.transforms.avro_schemas import Schemas
from pipelines.transforms.disorder import Disorder
from pipelines.transforms.encode import avro_schema
from pipelines.transforms.errors import UserError

if TYPE_CHECKING:
    from pipelines.definition import Pipeline

PARTITIONS = 4
"""Of a log that has none yet."""

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


@dataclasses.dataclass(frozen=True)
class Report:
    """What a replay sent. seconds: from the first message on. stopped: before its end, by Ctrl-C."""

    pipeline: str
    history: str
    live: str
    format: str
    disorder: Disorder
    counts: Counts
    seconds: float
    stopped: bool

    def json(self) -> str:
        """All of it as JSON."""
        counts = self.counts
        times = {name: _time(getattr(counts, name)) for name in ("first", "last", "reached")}
        facts: dict[str, Any] = {
            "pipeline": self.pipeline,
            "history": masked(self.history),
            "live": masked(self.live),
            "format": self.format,
            "stopped": self.stopped,
            "disorder": dataclasses.asdict(self.disorder),
            "total": counts.total,
            **{name: None if at is None else at.isoformat() for name, at in times.items()},
            "seconds": round(self.seconds, 3),
            **dataclasses.asdict(counts.sent),
            "partitions": {name: dataclasses.asdict(sent) for name, sent in counts.partitions.items()},
        }
        return json.dumps(facts, indent=2, ensure_ascii=False)

    def text(self) -> str:
        """For people."""
        counts, sent = self.counts, self.counts.sent
        names = [field.name for field in dataclasses.fields(Sent)]
        rows = [(name, *(f"{n:,}" for n in dataclasses.astuple(of))) for name, of in counts.partitions.items()]
        if len(rows) > 1:
            rows.append(("all", *(f"{n:,}" for n in dataclasses.astuple(sent))))
        rate = f"{sent.rows / max(self.seconds, 1e-9):,.0f} rows/s"
        lines = [
            f"{self.pipeline} · {place(self.history)} → {place(self.live)} · {self.format}",
            "",
            grid(("partition", *names), rows),
            "",
            f"{sent.rows:,} rows in {self.seconds:,.1f} s ({rate}){self._span}",
        ]
        if self.stopped:
            lines.append(self._stop)
        elif not counts.total:
            lines.append("The history has no row in this range of event times.")
        elif self.disorder.late and not sent.late:
            lines.append("No row became late: the history ends before any window, lateness and disorder have passed.")
        return "\n".join(lines)

    @property
    def _span(self) -> str:
        first, reached = _time(self.counts.first), _time(self.counts.reached)
        return f", event times {moment(first)} to {moment(reached)} UTC" if first and reached else ""

    @property
    def _stop(self) -> str:
        reached = _time(self.counts.reached)
        if reached is None:
            return "Stopped before the first row."
        left = self.counts.total - self.counts.sent.rows
        return f"Stopped with {left:,} rows not sent: --from={reached.isoformat()} goes on from about there."


def send(
    pipeline: "Pipeline",
    history: str,
    live: str,
    disorder: Disorder,
    *,
    rate: float | None = None,
    speedup: float | None = None,
    partitions: int | None = None,
    start: datetime.datetime | None = None,
    stop: datetime.datetime | None = None,
) -> Report:
    """Appends the messages of a replay to a log, until its end or the first Ctrl-C, after which all that the report
    tells of is in the log, and nothing else. partitions: 0 to n-1; by default those that the log has, or PARTITIONS.

    Raises UserError and DataRefused as reading the history and opening the log do. Every message is appended once by
    one replay; another replay appends them again.
    """
    if start is not None and stop is not None and start >= stop:
        raise UserError(f"--from={start.isoformat()} is not before --to={stop.isoformat()} (exclusive)")
    stopping, counts = threading.Event(), Counts()
    pace = Pace(rate, speedup, wait=stopping.wait)
    title = f"replay {pipeline.name}"
    with open_log(live) as log, stopped_by_signals(stopping), progress.shown(title):
        names = _partitions(log, partitions)
        _prepare(log, pipeline)
        pieces = messages(
            pipeline,
            history,
            disorder,
            partitions=names,
            format=log.format,
            start=start,
            stop=stop,
            pace=pace,
            counts=counts,
        )
        with contextlib.closing(pieces):
            seconds = _append(log, pieces, counts)
        stopped = stopping.is_set() and not 0 < counts.total == counts.sent.rows
        return Report(pipeline.name, history, live, log.format, disorder, counts, seconds, stopped)


def _append(log: Log, pieces: Iterator[dict[str, Any]], counts: Counts) -> float:
    """The seconds that it took."""
    begun, before = 0.0, 0
    for piece in pieces:
        if not begun:
            begun = time.perf_counter()
            counted.expect(counts.total)
        log.append(piece)
        counted.advance(counts.sent.rows - before, reached=counts.reached)
        before = counts.sent.rows
    return time.perf_counter() - begun if begun else 0.0


def _partitions(log: Log, wanted: int | None) -> list[str]:
    if wanted is not None and wanted < 1:
        raise UserError(f"--partitions={wanted}: at least 1")
    there = list(log.bounds()) if wanted is None else []
    return there or [str(number) for number in range(wanted or PARTITIONS)]


def _prepare(log: Log, pipeline: "Pipeline") -> None:
    """Puts the schema of the messages where readers look for it."""
    if log.format == "avro":
        if log.schemas is None:
            raise UserError(f"--live={log.uri}: format=avro needs a folder for its schemas: add &schemas=FOLDER")
        Schemas(log.schemas).add(avro_schema(written(pipeline)))


def _time(micros: int | None) -> datetime.datetime | None:
    return None if micros is None else _EPOCH + datetime.timedelta(microseconds=micros)
