"""The bounded graph of one turn of a micro-batch: rows of a log in, the open windows moved on, one commit at the end.

Read → decode → late rows out → dedupe → steps → views, as everywhere; the state that a stream keeps between elements
is read from the last turn's files and written to this turn's. Nothing is visible before the commit.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.pvalue import TaggedOutput
from apache_beam.transforms.window import GlobalWindows

from pipelines.io.log import open_log
from pipelines.io.table import STAGED, Table
from pipelines.io.turns import Turn, Turns
from pipelines.io.write import StageTable
from pipelines.sql import Plan
from pipelines.transforms import tables  # noqa: F401  (registers the coder of pa.Table)
from pipelines.transforms.buckets import split
from pipelines.transforms.clean import SPAN, Between, Clean
from pipelines.transforms.conservation import TALLY, Conservation, merge, tally
from pipelines.transforms.deadletters import refuse
from pipelines.transforms.errors import DataRefused
from pipelines.transforms.intake import Intake
from pipelines.transforms.lateness import EXPIRES, NEVER, Position
from pipelines.transforms.protect import Cipher
from pipelines.transforms.seen import Seen, compacted
from pipelines.transforms.speed import OpenView, Piece

ROWS = 1 << 20
"""Rows of a table that is handed on, at most."""

STATE = pa.schema(
    {
        "part": pa.string(),
        "bucket": pa.int32(),
        "name": pa.string(),
        "low": pa.int64(),
        "high": pa.int64(),
        "rows": pa.int64(),
    }
)
"""What a turn has written, one row a file. part: "seen", or "open:", "answers:" or "gone:" and the view. The files of a
part and bucket take the place of those of the last turn; name null: there is none left."""

POSITIONS = pa.schema({"partition": pa.string(), "offset": pa.int64(), "greatest": pa.int64(), "idle": pa.int64()})

State = dict[str, list[dict[str, Any]]]
"""Part and bucket, as "open:by_hour/0", to its pieces, as a turn's facts hold them."""


NOTHING: dict[str, Any] = {
    "positions": {},
    "watermark": NEVER,
    "state": {},
    "outbox": {},
    "tallies": [],
    "dead": [],
    "token": "",
    "span": {},
    "anew": False,
}
"""The facts of a turn before any row was read, beside its fingerprint."""


@dataclasses.dataclass(frozen=True)
class Span:
    """Offsets of a partition that a turn reads: from the position up to ``stop``."""

    partition: str
    position: Position
    stop: int


@dataclasses.dataclass(frozen=True)
class Layer:
    """The speed layer of a pipeline, as its graphs need it. log: a URI. seen: None where every row counts."""

    pipeline: str
    log: str
    intake: Intake
    seen: Seen | None
    plan: Plan
    views: tuple[OpenView, ...]
    turns: Turns
    dead_letters: Table
    buckets: int
    disorder: int
    cipher: Cipher | None
    max_rejected: float | None = None

    @property
    def format(self) -> str:
        return self.intake.messages.format


@dataclasses.dataclass(frozen=True)
class Next:
    """The turn to take. positions: of every partition, as they are before it; those that are idle moved on. last: the
    turn before. token: names its files by what it is made of. fingerprint: of the definition."""

    number: int
    spans: tuple[Span, ...]
    positions: dict[str, Position]
    last: Turn | None
    token: str
    fingerprint: dict[str, str]

    @property
    def state(self) -> State:
        return {} if self.last is None else self.last.facts["state"]

    @property
    def closed(self) -> int:
        """The watermark of the last turn (µs): what it closed was delivered."""
        return NEVER if self.last is None else int(self.last.facts["watermark"])

    def name(self, part: str, bucket: int, index: int) -> str:
        """Of a file of this turn."""
        return f"{part.replace(':', '-')}-{bucket}-{self.number:010d}-{self.token}-{index}"


def build(root: beam.Pipeline, layer: Layer, turn: Next, dimensions: dict[str, pa.Table], *, distributed: bool) -> None:
    """Puts a turn on an empty Beam pipeline. dimensions: whole tables, as they are now."""
    sides = {
        name: root | f"dimension {name}" >> beam.Create([table], reshuffle=False) for name, table in dimensions.items()
    }
    spans = root | "spans" >> beam.Create(turn.spans, reshuffle=False)
    if distributed:
        spans = spans | beam.Reshuffle()
    taken = spans | "take" >> beam.ParDo(_Take(layer)).with_outputs("dead", "tallies", "positions", main="rows")
    rows, dead, tallies, state = taken.rows, [taken.dead], [taken.tallies], []
    if layer.seen is not None:
        shares = rows | "by identity" >> beam.ParDo(_Split(layer.seen.identity, layer.buckets)) | beam.GroupByKey()
        fresh = shares | "dedupe" >> beam.ParDo(_Fresh(layer, turn)).with_outputs(
            "dead", "tallies", "state", main="rows"
        )
        rows = fresh.rows
        dead.append(fresh.dead)
        tallies.append(fresh.tallies)
        state.append(fresh.state)
    chain = dataclasses.replace(layer.plan.chain, format=layer.format)
    clean = rows | "clean" >> Clean(chain, Between(layer.plan.event_time), sides, layer.cipher)
    dead.append(clean.dead)
    tallies.append(clean.tallies)
    for view in layer.views:
        name = view.plan.name
        used = () if view.plan.chain is None else view.plan.chain.dimensions
        given = [beam.pvalue.AsSingleton(sides[dimension]) for dimension in used]
        partial = beam.ParDo(Partial(view, layer.buckets, used, layer.cipher, layer.format), *given)
        parts = clean.rows | f"{name} partial" >> partial.with_outputs("dead", "tallies", main="states")
        moved = parts.states | f"{name} by bucket" >> beam.GroupByKey()
        moved = moved | f"{name} advance" >> beam.ParDo(_Advance(view, turn, layer.turns)).with_outputs(
            "tallies", main="state"
        )
        dead.append(parts.dead)
        tallies += [parts.tallies, moved.tallies]
        state.append(moved.state)
    stage = StageTable(layer.dead_letters, token=turn.token, version=turn.number)
    staged = dead | "dead letters" >> beam.Flatten() | "stage dead letters" >> beam.ParDo(stage)
    gathered = [
        beam.pvalue.AsList(parts | f"gather {number}" >> beam.Flatten(pipeline=root))
        for number, parts in enumerate([tallies, [taken.positions], state, [clean.spans], [staged]])
    ]
    _ = root | "once" >> beam.Create([0], reshuffle=False) | "commit" >> beam.ParDo(_Commit(layer, turn), *gathered)


@beam.typehints.with_output_types(pa.Table, dead=pa.Table, tallies=pa.Table, positions=pa.Table)
class _Take(beam.DoFn):  # type: ignore[misc]
    """Spans in, rows of the log out, those of a bundle together: a query costs some ms whatever its rows."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    def start_bundle(self) -> None:
        self._rows: list[pa.Table] = []

    def process(self, span: Span) -> Iterator[Any]:
        position = span.position
        with open_log(self.layer.log) as log:
            while position.offset < span.stop:
                messages = log.read(span.partition, position.offset, span.stop)
                if not len(messages):
                    position = dataclasses.replace(position, offset=span.stop)
                    break
                taken = self.layer.intake.take(messages, position)
                position = taken.position
                yield TaggedOutput("tallies", taken.tallies)
                if len(taken.dead):
                    yield TaggedOutput("dead", taken.dead)
                if len(taken.rows):
                    self._rows.append(taken.rows)
        yield TaggedOutput("positions", _position(span.partition, position))

    def finish_bundle(self) -> Iterator[Any]:
        if self._rows:
            rows = pa.concat_tables(self._rows)
            for at in range(0, len(rows), ROWS):
                yield GlobalWindows.windowed_value(rows.slice(at, ROWS))
        self._rows = []


def _position(partition: str, position: Position) -> pa.Table:
    values = [partition, position.offset, position.greatest, position.idle]
    return pa.table([[value] for value in values], schema=POSITIONS)


@beam.typehints.with_input_types(pa.Table)
@beam.typehints.with_output_types(tuple[int, pa.Table])
class _Split(beam.DoFn):  # type: ignore[misc]
    def __init__(self, keys: tuple[str, ...], buckets: int) -> None:
        self.keys, self.buckets = keys, buckets

    def process(self, rows: pa.Table) -> Iterable[tuple[int, pa.Table]]:
        return split(rows, self.keys, self.buckets)


@beam.typehints.with_input_types(tuple[int, Iterable[pa.Table]])
@beam.typehints.with_output_types(pa.Table, dead=pa.Table, tallies=pa.Table, state=pa.Table)
class _Fresh(beam.DoFn):  # type: ignore[misc]
    """A bucket's rows without those that were seen; what is seen now goes to this turn's files."""

    def __init__(self, layer: Layer, turn: Next) -> None:
        self.layer, self.turn = layer, turn

    def process(self, element: tuple[int, Iterable[pa.Table]]) -> Iterator[Any]:
        bucket, given = element
        rows = pa.concat_tables(list(given))
        known = self.turn.state.get(f"seen/{bucket}", [])
        pieces = {piece["name"]: self.layer.turns.read(piece["name"]) for piece in known}
        assert self.layer.seen is not None
        fresh = self.layer.seen.advance(list(pieces.values()), rows, rows[EXPIRES.name].to_numpy())
        yield TaggedOutput("tallies", tally("source", "duplicate", fresh.duplicates))
        if len(fresh.conflicts):
            yield TaggedOutput("tallies", tally("source", "rejected", len(fresh.conflicts), "conflict"))
            yield TaggedOutput("dead", self._refused(fresh.conflicts, fresh.details))
        kept = compacted([*pieces.values(), *([] if fresh.piece is None else [fresh.piece])], self.turn.closed)
        names = {id(table): name for name, table in pieces.items()}
        written = []
        for index, piece in enumerate(kept):
            name = names.get(id(piece)) or self.turn.name("seen", bucket, index)
            if id(piece) not in names:
                self.layer.turns.write(name, piece)
            written.append(Piece(name, 0, 0, len(piece)))
        yield TaggedOutput("state", _state("seen", bucket, written))
        yield fresh.rows.drop_columns([EXPIRES.name])

    def _refused(self, conflicts: pa.Table, details: pa.Array) -> pa.Table:
        return refuse(
            conflicts,
            pipeline=self.layer.pipeline,
            step="dedupe",
            reason="conflict",
            detail=details,
            format=self.layer.format,
            cipher=self.layer.cipher,
        )


def _state(part: str, bucket: int, pieces: Iterable[Piece]) -> pa.Table:
    rows = [{"part": part, "bucket": bucket, **dataclasses.asdict(piece)} for piece in pieces]
    return pa.Table.from_pylist(rows or [{"part": part, "bucket": bucket}], STATE)


@beam.typehints.with_output_types(tuple[int, pa.Table], dead=pa.Table, tallies=pa.Table)
class Partial(beam.DoFn):  # type: ignore[misc]
    """Cleaned rows of a log in, (bucket, states) of a view out, without what is late for it. Tags: dead, tallies."""

    def __init__(
        self, view: OpenView, buckets: int, dimensions: tuple[str, ...], cipher: Cipher | None, format: str
    ) -> None:
        self.view, self.buckets, self.dimensions, self.cipher, self.format = view, buckets, dimensions, cipher, format

    def process(self, rows: pa.Table, *sides: Any) -> Iterator[Any]:
        plan, part = self.view.plan, f"view:{self.view.plan.name}"
        dead, tallies = [], []
        if plan.chain is not None:
            chain = dataclasses.replace(plan.chain, format=self.format)
            outcome = chain.run(rows, dict(zip(self.dimensions, sides, strict=True)), self.cipher)
            rows = outcome.rows
            dead.append(outcome.dead)
            tallies.append(outcome.tallies)
        timely = self.view.timely(rows)
        states, refused = plan.tried(timely.rows, self.cipher)
        taken = len(timely.rows)
        if refused is not None:
            taken = len(refused.rows)
            dead.append(refused.dead)
            tallies.append(refused.tallies)
        counts = (
            tally(part, "late", timely.late),
            tally(part, "partly_late", timely.partly),
            tally(part, "rows_in", taken),
        )
        yield TaggedOutput("tallies", merge([*tallies, *counts]))
        for letters in dead:
            if len(letters):
                yield TaggedOutput("dead", letters)
        yield from split(states, plan.by, self.buckets)


@beam.typehints.with_input_types(tuple[int, Iterable[pa.Table]])
@beam.typehints.with_output_types(pa.Table, tallies=pa.Table)
class _Advance(beam.DoFn):  # type: ignore[misc]
    """A bucket's partial states into its open windows; what changed, and what of it is to be delivered, as STATE."""

    def __init__(self, view: OpenView, turn: Next, turns: Turns) -> None:
        self.view, self.turn, self.turns = view, turn, turns

    def process(self, element: tuple[int, Iterable[pa.Table]]) -> Iterator[Any]:
        bucket, parts = element
        name = self.view.plan.name
        pieces = [Piece(**piece) for piece in self.turn.state.get(f"open:{name}/{bucket}", [])]
        moved = self.view.advance(pieces, lambda piece: self.turns.read(piece.name), parts, self.turn.closed)
        written = [self._write("open", bucket, index, table) for index, table in enumerate(moved.tables)]
        yield _state(f"open:{name}", bucket, [*moved.kept, *written])
        for part, table in (("answers", moved.answers), ("gone", moved.gone)):
            if len(table):
                named = self.turn.name(f"{part}:{name}", bucket, 0)
                self.turns.write(named, table)
                yield _state(f"{part}:{name}", bucket, [Piece(named, 0, 0, len(table))])
        yield TaggedOutput("tallies", tally(f"view:{name}", "rows_out", moved.rows))
        yield TaggedOutput("tallies", tally(f"view:{name}", "results", len(moved.answers)))

    def _write(self, part: str, bucket: int, index: int, table: pa.Table) -> Piece:
        name = self.turn.name(f"{part}:{self.view.plan.name}", bucket, index)
        self.turns.write(name, table)
        low, high = self.view.span(table)
        return Piece(name, low, high, len(table))


class _Commit(beam.DoFn):  # type: ignore[misc]
    """Makes the turn. Given all that was counted and written, as side inputs.

    Guarantee: exactly once: the turn's file is created by one process, once. Raises DataRefused, before anything is
    committed, if the law of conservation is broken or more rows were rejected than allowed.
    """

    def __init__(self, layer: Layer, turn: Next) -> None:
        self.layer, self.turn = layer, turn

    def process(self, _: int, tallies: Any, positions: Any, state: Any, spans: Any, staged: Any) -> None:
        before = NOTHING if self.turn.last is None else self.turn.last.facts
        now = merge(tallies)
        self._judge(Conservation.of(now))
        every = merge([now, pa.Table.from_pylist(before["tallies"], TALLY)])
        self._bound(Conservation.of(every))
        places = {name: dataclasses.asdict(position) for name, position in self.turn.positions.items()}
        for row in pa.concat_tables([POSITIONS.empty_table(), *positions]).to_pylist():
            places[row.pop("partition")] = row
        watermark = min((Position(**place).watermark(self.layer.disorder) for place in places.values()), default=NEVER)
        kept, outbox = self._state(state)
        letters = pa.concat_tables([STAGED.empty_table(), *staged]).to_pylist()
        facts = {
            "fingerprint": self.turn.fingerprint,
            "positions": places,
            "watermark": max(watermark, self.turn.closed),
            "state": kept,
            "outbox": outbox,
            "tallies": every.to_pylist(),
            "dead": letters,
            "token": self.turn.token,
            "anew": False,
            "span": _span([before["span"], *pa.concat_tables([SPAN.empty_table(), *spans]).to_pylist()]),
        }
        names = [piece["name"] for part in (kept, outbox) for pieces in part.values() for piece in pieces]
        self.layer.turns.commit(Turn(self.turn.number, tuple(sorted(names)), facts))

    def _state(self, written: list[pa.Table]) -> tuple[State, State]:
        """The state from now on, without what was closed already; and what is to be delivered."""
        kept, outbox = {key: list(pieces) for key, pieces in self.turn.state.items()}, State()
        for table in written:
            for row in table.to_pylist():
                part, bucket = row.pop("part"), row.pop("bucket")
                into = outbox if part.startswith(("answers:", "gone:")) else kept
                # a part and bucket is one table
                into[f"{part}/{bucket}"] = []
        for table in written:
            for row in table.to_pylist():
                part, bucket = row.pop("part"), row.pop("bucket")
                into = outbox if part.startswith(("answers:", "gone:")) else kept
                if row["name"] is not None:
                    into[f"{part}/{bucket}"].append(row)
        for view in self.layer.views:
            for key in [key for key in kept if key.startswith(f"open:{view.plan.name}/")]:
                kept[key] = [piece for piece in kept[key] if not view.closed(Piece(**piece), self.turn.closed)]
        return {key: pieces for key, pieces in kept.items() if pieces}, outbox

    def _judge(self, counts: Conservation) -> None:
        if violations := counts.violations():
            raise DataRefused(
                f"{self.layer.pipeline}: the law of conservation is broken, turn {self.turn.number} was not committed: "
                f"{'; '.join(violations)}"
            )

    def _bound(self, counts: Conservation) -> None:
        allowed, read, rejected = self.layer.max_rejected, counts.rows["read"], counts.rows["rejected"]
        if allowed is not None and read and rejected / read > allowed:
            raise DataRefused(
                f"{self.layer.pipeline}: {rejected:,} of {read:,} rows were rejected ({rejected / read:.2%}), past "
                f"--max_rejected={allowed}; turn {self.turn.number} was not committed"
            )


def _span(spans: list[dict[str, int]]) -> dict[str, int]:
    """The least and greatest event time of all."""

    def join(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
        if not one or not other:
            return one or other
        return {"first": min(one["first"], other["first"]), "last": max(one["last"], other["last"])}

    return functools.reduce(join, spans, {})
