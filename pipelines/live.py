"""A live run in turns: follows a log, keeps the open windows, and gives every change of an answer to the store.

One commit a turn. A turn's answers are delivered after its commit and before the next turn; a run that died in between
delivers them when it starts again. So nothing is counted twice and nothing is lost, wherever it dies.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipelines import job, running
from pipelines.commit_turn import NOTHING, Next, Span, commit
from pipelines.definition import Pipeline
from pipelines.dimensions import Clock, Dimensions, whole
from pipelines.io.log import Bounds, Log, open_log, refuse_gone
from pipelines.io.store import LIVE, Store, open_store
from pipelines.io.turns import Turn, Turns
from pipelines.job import Job
from pipelines.layer import fingerprint, layer
from pipelines.options import Deployment, masked
from pipelines.report import counted, iso
from pipelines.runners import Engine
from pipelines.runners.microbatch import stopped_by_signals, turns
from pipelines.transforms.conservation import TALLY, Conservation
from pipelines.transforms.errors import UserError
from pipelines.transforms.lateness import IDLE_AFTER, NEVER, Position

if TYPE_CHECKING:
    import apache_beam as beam

TURN_ROWS = 1 << 19
"""Rows that a turn reads at most, of all partitions: how long it may take, and what it holds in memory where rows are
small."""

TURN_BYTES = 64 << 20
"""Bytes of payloads that it reads at most, but the last message of each partition whole: what it holds where they are
large."""


@dataclasses.dataclass(frozen=True)
class Status:
    """How a live run stands after a turn. watermark: µs, None before the first; held: the partition that holds it back.
    lag: rows that the log has and no turn has read."""

    turn: Turn
    watermark: int | None
    held: str | None
    lag: int
    state: int
    counts: Conservation


class SpeedLayer:
    """Takes turns on one pipeline and delivers what they give. One process at a time: hold ``layer.turns.own()``.

    Guarantee: effectively once. Raises UserError where the kept state is of another definition, DataRefused where the
    log no longer has what was not read yet.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        deployment: Deployment,
        engine: Engine,
        flags: Sequence[str] = (),
        clock: Clock = time.monotonic,
        turns: Turns | None = None,
    ) -> None:
        """turns: where they are kept; by default in the deployment's folder of the pipeline."""
        self.deployment, self.engine, self.flags, self.clock = deployment, engine, flags, clock
        made = layer(pipeline, deployment, 2 if engine.DISTRIBUTED else 1)
        self.layer = dataclasses.replace(made, turns=turns or made.turns)
        self.fingerprint = fingerprint(self.layer)
        self.last: Turn | None = self.layer.turns.last()
        self._log: Log = open_log(self.layer.log)
        self._store: Store | None = open_store(deployment.store) if deployment.store else None
        self._dimensions = Dimensions(pipeline, deployment, self.layer, clock)
        self._active: dict[str, float] = {}
        streamed = job.read(self.layer.place)
        if streamed is not None:
            self._refuse_stream(streamed)
        if self.last is None or deployment.rebuild:
            self.last = self._begin_anew({} if streamed is None else streamed.fingerprint)
        self._refuse_other(self.last.facts["fingerprint"])
        if anew := self.last.facts["anew"]:  # again if this run dies before the next turn
            self.layer.forget(anew, deployment.store, f"anew-{self.last.number}")
        if streamed is not None:
            job.remove(self.layer.place)
        if deployment.store:
            self.layer.resume(deployment.store, anew=bool(anew))
        self.layer.turns.sweep()
        self._take = engine.prepared(self._build, flags)

    def _begin_anew(self, streamed: Mapping[str, str]) -> Turn:
        """A turn that knows nothing, but the views whose rows go: those of now, and of the definition before."""
        number, before = (1, NOTHING) if self.last is None else (self.last.number + 1, self.last.facts)
        views = {*before["anew"], *self.layer.views_of(before.get("fingerprint", {}), streamed)}
        turn = Turn(number, (), {**NOTHING, "fingerprint": self.fingerprint, "anew": sorted(views)})
        self.layer.turns.commit(turn)
        return turn

    def close(self) -> None:
        self._log.close()
        if self._store is not None:
            self._store.close()

    @property
    def positions(self) -> dict[str, Position]:
        """Where every partition that was ever read is read next."""
        places = {} if self.last is None else self.last.facts["positions"]
        return {name: Position(**place) for name, place in places.items()}

    def turn(self) -> bool:
        """One turn, if there is anything new; whether a backlog is left."""
        bounds = self._log.bounds()
        for name, position in self.positions.items():
            refuse_gone(masked(self.layer.log), name, position.offset, bounds.get(name, Bounds(0, 0)))
        positions = self._positions(bounds)
        spans = _spans(positions, bounds)
        idled = {name: self._idled(name, position, positions, bounds) for name, position in positions.items()}
        if not spans and idled == self.positions:
            return False
        spans = tuple(dataclasses.replace(span, position=idled[span.partition]) for span in spans)
        assert self.last is not None
        number = self.last.number + 1
        dimensions = self._dimensions.now()
        token = _token(number, self.last, spans, dimensions, self.fingerprint)
        turn = Next(number, spans, idled, token, self.fingerprint, dimensions, self.last)
        if spans:
            self._run(turn)
        else:  # partitions that are new, or idle
            commit(self.layer, turn, [])
        self.last = self.layer.turns.last()
        assert self.last is not None and self.last.number == number
        self.deliver()
        self.layer.turns.sweep()
        return any(bounds[name].end > position.offset for name, position in self.positions.items() if name in bounds)

    def _run(self, turn: Next) -> None:
        turn.put(self.layer.turns)
        self._take()

    def _build(self, root: "beam.Pipeline") -> None:
        from pipelines import turn as graph

        graph.build(root, self.layer, distributed=self.engine.DISTRIBUTED)

    def deliver(self) -> None:
        """Gives the last turn's answers to the store, its dead letters to their table. Repeating it changes nothing."""
        views = {view.plan.name: self.layer.named(view) for view in self.layer.views}
        for kind, view, rows in self.delivered():
            self._deliver(kind, views.get(view, ""), rows)

    def delivered(self) -> Iterator[tuple[str, str, pa.Table]]:
        """What the last turn gives: "answers" or "gone" of a view, or "dead"; the view; the rows."""
        outbox = {} if self.last is None else self.last.facts["outbox"]
        for key, pieces in outbox.items():
            kind, _, view = key.partition("/")[0].partition(":")
            yield from ((kind, view, self._kept(piece["name"])) for piece in pieces)

    def _kept(self, name: str) -> pa.Table:
        try:
            return self.layer.turns.read(name)
        except UserError:
            assert self.last is not None
            self.layer.turns.refuse_overtaken(self.last.number)  # whoever went on from this turn has swept its files
            raise

    def _deliver(self, kind: str, view: str, rows: pa.Table) -> None:
        assert self.last is not None
        number = self.last.number
        if kind == "dead":
            token, version = self.last.facts["token"], self.last.facts["letters"]
            stage = self.layer.dead_letters.stage("turn", token=token, version=version)
            stage.add(rows)
            self.layer.dead_letters.commit(stage.finish(), token=token, version=version, replace="nothing")
        elif self._store is not None and kind == "answers":
            self._store.upsert(view, rows, generation=LIVE, version=number)
        elif self._store is not None:
            self._store.delete(view, rows, generation=LIVE, version=number)

    def status(self) -> Status | None:
        """How it stands; None before the first turn."""
        if self.last is None:
            return None
        positions, bounds = self.positions, self._log.bounds()
        marks = {name: position.watermark(self.layer.disorder) for name, position in positions.items()}
        held = min(marks, key=lambda name: marks[name]) if marks else None
        watermark = self.last.facts["watermark"]
        lag = sum(
            max(0, bound.end - positions.get(name, Position(bound.start)).offset) for name, bound in bounds.items()
        )
        counts = Conservation.of(pa.Table.from_pylist(self.last.facts["tallies"], TALLY))
        state = sum(piece["rows"] for pieces in self.last.facts["state"].values() for piece in pieces)
        return Status(self.last, None if watermark == NEVER else watermark, held, lag, state, counts)

    def facts(self) -> dict[str, Any]:
        """What a run's report is made of, as ``pipelines.report.Facts``."""
        status = self.status()
        counts = status.counts if status else Conservation.of(TALLY.empty_table())
        through = None if status is None else iso(status.watermark)
        span = self.last.facts["span"] if self.last else {}
        views = {}
        for view in self.layer.views:
            rows = None if self._store is None else self._store.scan(self.layer.named(view), generation=LIVE)
            views[view.plan.name] = {
                "rows": counts.views.get(view.plan.name, (0, 0, 0))[2] if rows is None else len(rows),
                "digest": f"{0 if rows is None else view.plan.digested(rows):016x}",
                "complete_through": through,
            }
        return {
            **counted(counts),
            "views": views,
            "boundary": through,
            "first": iso(span.get("first")),
            "last": iso(span.get("last")),
            "skipped": [],
            "positions": {name: position.offset for name, position in self.positions.items()},
            "lag": status.lag if status else 0,
            "state": status.state if status else 0,
        }

    def _positions(self, bounds: dict[str, Bounds]) -> dict[str, Position]:
        """Also of partitions that are new: they hold the watermark until they have rows, or are idle. What is closed by
        then stays closed, so their rows of before are late."""
        known, now = self.positions, self.clock()
        closed = NEVER if self.last is None else self.last.facts["watermark"]
        for name, bound in bounds.items():
            self._active.setdefault(name, now)
            if name not in known:
                known[name] = Position(bound.start, idle=None if closed == NEVER else closed)
            if bound.end > known[name].offset:
                self._active[name] = now
        return known

    def _idled(
        self, name: str, position: Position, positions: dict[str, Position], bounds: dict[str, Bounds]
    ) -> Position:
        """An idle partition's watermark keeps up with the clock, and with the least of those that are not idle. One
        that never had a row keeps up with those that had."""
        idle = self.clock() - self._active[name] - IDLE_AFTER if name in self._active else 0.0
        if idle <= 0:
            return position
        busy = [other for other in positions if other in bounds and self.clock() - self._active[other] <= IDLE_AFTER]
        filled = [other for other in positions if positions[other].greatest is not None]
        marks = [positions[other].watermark(self.layer.disorder) for other in busy or filled]
        own = position.watermark(self.layer.disorder)
        since = NEVER if position.greatest is None else position.greatest - self.layer.disorder + int(idle * 1_000_000)
        moved = max(own, since // 1000 * 1000, min(marks, default=NEVER))
        return position if moved <= own else dataclasses.replace(position, idle=moved)

    def _refuse_stream(self, streamed: Job) -> None:
        running.refuse(streamed, self.layer.place)
        if not self.deployment.rebuild:
            raise UserError(
                f"{self.layer.place}: its state is of --mode=stream on {streamed.runner}; go on with that, name "
                "another --state, or start again with --rebuild, which reads the log from its first offset"
            )

    def _refuse_other(self, kept: dict[str, str]) -> None:
        for part in {**kept, **self.fingerprint}:
            if kept.get(part) != self.fingerprint.get(part):
                raise UserError(
                    f"{self.layer.turns.uri}: its state is of another {part} than this definition's; "
                    "start it again with --rebuild, which reads the log from its first offset"
                )


def _spans(positions: dict[str, Position], bounds: dict[str, Bounds]) -> tuple[Span, ...]:
    """What a turn reads: a fair share of each partition that has something new."""
    waiting = {name: bounds[name].end - position.offset for name, position in positions.items() if name in bounds}
    taking, left = {}, TURN_ROWS
    for number, (name, rows) in enumerate(sorted(((n, r) for n, r in waiting.items() if r), key=lambda item: item[1])):
        share = max(1, left // (sum(map(bool, waiting.values())) - number))
        taken = min(rows, share)
        left -= taken
        taking[name] = taken
    each = TURN_BYTES // max(1, sum(taking.values()))
    return tuple(
        Span(name, positions[name], positions[name].offset + taken, each * taken)
        for name, taken in sorted(taking.items())
    )


def _token(number: int, last: Turn | None, spans: tuple[Span, ...], *others: object) -> str:
    made = repr((number, last and last.facts["token"], spans, others))
    return hashlib.blake2b(made.encode(), digest_size=6).hexdigest()


def ready(pipeline: Pipeline, deployment: Deployment) -> None:
    """Looks at the log, the dimensions, the kept state and the dead letters. Raises UserError; writes nothing."""
    made = layer(pipeline, deployment, 1)
    for of in pipeline.dimensions:
        whole(of, deployment.dimensions[of.name])
    made.turns.last()


def run(
    pipeline: Pipeline,
    deployment: Deployment,
    engine: Engine,
    flags: Sequence[str] = (),
    *,
    stop: threading.Event | None = None,
    told: Callable[[SpeedLayer], None] = lambda _: None,
) -> dict[str, Any]:
    """Takes turns until ``stop`` is set, by Ctrl-C too, or ``deployment.until`` is reached; answers the facts.

    told: called after every turn.
    """
    stop = stop or threading.Event()
    with contextlib.ExitStack() as stack:
        stack.enter_context(Turns(f"{deployment.state}/{pipeline.name}").own())
        speed = SpeedLayer(pipeline, deployment, engine, flags)
        stack.callback(speed.close)
        stack.enter_context(stopped_by_signals(stop))
        speed.deliver()

        def step() -> bool:
            backlog = speed.turn()
            told(speed)
            if deployment.until is not None and _ended(speed, deployment, backlog):
                stop.set()
            return backlog

        turns(step, trigger=deployment.trigger / 1_000_000, stop=stop)
        return speed.facts()


def _ended(speed: SpeedLayer, deployment: Deployment, backlog: bool) -> bool:
    if deployment.until == "end":
        return not backlog
    status = speed.status()
    assert isinstance(deployment.until, datetime.datetime)
    return status is not None and (status.watermark or NEVER) >= deployment.until.timestamp() * 1_000_000
