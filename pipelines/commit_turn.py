"""What a turn is about, and its commit: from all that its parts have counted and written to one file that names it.

Beam-free: a worker of any engine reads what the turn is about, and the one that gathers everything commits it.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from pipelines.io.turns import Turn, Turns
from pipelines.layer import Layer
from pipelines.transforms.conservation import SPAN, TALLY, Conservation, merge
from pipelines.transforms.deadletters import DEAD_LETTERS
from pipelines.transforms.errors import DataRefused
from pipelines.transforms.lateness import NEVER, Position
from pipelines.transforms.speed import Piece

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

NOTHING: dict[str, Any] = {
    "positions": {},
    "watermark": NEVER,
    "state": {},
    "outbox": {},
    "dimensions": {},
    "tallies": [],
    "token": "",
    "letters": None,
    "span": {},
    "anew": [],
}
"""The facts of a turn before any row was read, beside its fingerprint. anew: the views whose rows it has removed."""

State = dict[str, list[dict[str, Any]]]
"""Part and bucket, as "open:by_hour/0", to its pieces, as a turn's facts hold them."""


@dataclasses.dataclass(frozen=True)
class Span:
    """Offsets of a partition that a turn reads: from the position up to ``stop``, or until it has so many ``bytes`` of
    payloads."""

    partition: str
    position: Position
    stop: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Next:
    """A turn to take. positions: of every partition before it, those that are idle moved on. token: names its files by
    what it is made of. fingerprint: of the definition. dimensions: name to state file. last: the turn before."""

    number: int
    spans: tuple[Span, ...]
    positions: dict[str, Position]
    token: str
    fingerprint: dict[str, str]
    dimensions: dict[str, str]
    last: Turn | None = dataclasses.field(default=None, compare=False)

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

    def put(self, turns: Turns) -> None:
        """Makes this the turn that ``following`` answers."""
        said = dataclasses.asdict(dataclasses.replace(self, last=None))
        turns.intend(json.dumps(said))


def following(turns: Turns) -> Next:
    """The turn that is to be taken."""
    said = json.loads(turns.intended())
    del said["last"]
    spans = tuple(Span(**{**one, "position": Position(**one["position"])}) for one in said.pop("spans"))
    positions = {name: Position(**position) for name, position in said.pop("positions").items()}
    last = turns.last()
    if last is not None and last.number >= said["number"]:  # a commit that is tried again
        last = turns.turn(said["number"] - 1) if said["number"] > 1 else None
    return Next(**said, spans=spans, positions=positions, last=last)


def state(part: str, bucket: int, pieces: Iterable[Piece]) -> pa.Table:
    """STATE of a part and bucket."""
    rows = [{"part": part, "bucket": bucket, **dataclasses.asdict(piece)} for piece in pieces]
    return pa.Table.from_pylist(rows or [{"part": part, "bucket": bucket}], STATE)


def commit(layer: Layer, turn: Next, given: list[pa.Table]) -> None:
    """Makes the turn. given: tables of TALLY, DEAD_LETTERS, SPAN, POSITIONS and STATE.

    Guarantee: exactly once: the turn's file is created by one process, once. Raises DataRefused, before anything is
    committed, if the law of conservation is broken or more rows were rejected than allowed.
    """
    tallies, dead, spans, positions, written = (
        _of(schema, given) for schema in (TALLY, DEAD_LETTERS, SPAN, POSITIONS, STATE)
    )
    before = NOTHING if turn.last is None else turn.last.facts
    _judge(layer, turn, Conservation.of(tallies))
    every = merge([tallies, pa.Table.from_pylist(before["tallies"], TALLY)])
    _bound(layer, turn, Conservation.of(every))
    places = {name: dataclasses.asdict(position) for name, position in turn.positions.items()}
    for row in positions.to_pylist():
        places[row.pop("partition")] = row
    watermark = min((Position(**place).watermark(layer.disorder) for place in places.values()), default=NEVER)
    kept, outbox = _state(layer, turn, written)
    if len(dead):
        name = turn.name("dead", 0, 0)
        layer.turns.write(name, dead)
        outbox["dead/0"] = [dataclasses.asdict(Piece(name, 0, 0, len(dead)))]
    facts = {
        "fingerprint": turn.fingerprint,
        "positions": places,
        "watermark": max(watermark, turn.closed),
        "state": kept,
        "outbox": outbox,
        "dimensions": turn.dimensions,
        "tallies": every.to_pylist(),
        "token": turn.token,
        "letters": layer.dead_letters.next_version() if len(dead) else None,
        "span": _span([before["span"], *spans.to_pylist()]),
        "anew": [],
    }
    names = [piece["name"] for part in (kept, outbox) for pieces in part.values() for piece in pieces]
    layer.turns.commit(Turn(turn.number, tuple(sorted({*names, *turn.dimensions.values()})), facts))


def _of(schema: pa.Schema, given: list[pa.Table]) -> pa.Table:
    return pa.concat_tables([schema.empty_table(), *(table for table in given if table.schema.names == schema.names)])


def _state(layer: Layer, turn: Next, written: pa.Table) -> tuple[State, State]:
    """The state from now on, without what was closed already; and what is to be delivered."""
    new: State = {}
    for row in written.to_pylist():
        pieces = new.setdefault(f"{row.pop('part')}/{row.pop('bucket')}", [])
        if row["name"] is not None:
            pieces.append(row)
    outbox = {key: pieces for key, pieces in new.items() if key.startswith(("answers:", "gone:"))}
    kept = turn.state | {key: pieces for key, pieces in new.items() if key not in outbox}
    for view in layer.views:
        for key in [key for key in kept if key.startswith(f"open:{view.plan.name}/")]:
            kept[key] = [piece for piece in kept[key] if not view.closed(Piece(**piece), turn.closed)]
    return {key: pieces for key, pieces in kept.items() if pieces}, outbox


def _judge(layer: Layer, turn: Next, counts: Conservation) -> None:
    if violations := counts.violations():
        raise DataRefused(
            f"{layer.pipeline}: the law of conservation is broken, turn {turn.number} was not committed: "
            f"{'; '.join(violations)}"
        )


def _bound(layer: Layer, turn: Next, counts: Conservation) -> None:
    allowed, read, rejected = layer.max_rejected, counts.rows["read"], counts.rows["rejected"]
    if allowed is not None and read and rejected / read > allowed:
        raise DataRefused(
            f"{layer.pipeline}: {rejected:,} of {read:,} rows were rejected ({rejected / read:.2%}), more than "
            f"--max_rejected={allowed}; turn {turn.number} was not committed"
        )


def _span(spans: list[dict[str, int]]) -> dict[str, int]:
    """The least and greatest event time of all."""

    def join(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
        if not one or not other:
            return one or other
        return {"first": min(one["first"], other["first"]), "last": max(one["last"], other["last"])}

    return functools.reduce(join, spans, {})
