"""The bounded graph of a turn of a micro-batch: rows of a log in, the open windows moved on, one commit at the end.

Read → decode → late rows out → dedupe → steps → views, as everywhere; the state that a stream keeps between elements
is read from the last turn's files and written to this turn's. Nothing is visible before the commit.

The graph is the same in every turn, so an engine may keep it: what a turn is about stands in a file (``Next``).
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.pvalue import TaggedOutput
from apache_beam.transforms.window import GlobalWindows

from pipelines.commit_turn import POSITIONS, Next, Span, commit, following, state
from pipelines.io.log import open_log
from pipelines.layer import Layer
from pipelines.transforms import tables  # noqa: F401  (registers the coder of pa.Table)
from pipelines.transforms.buckets import split
from pipelines.transforms.conform import RAW
from pipelines.transforms.conservation import SPAN, tally
from pipelines.transforms.deadletters import refuse
from pipelines.transforms.lateness import EXPIRES, Position
from pipelines.transforms.seen import compacted
from pipelines.transforms.speed import OpenView, Piece

ROWS = 1 << 20
"""Rows of a table that is handed on, at most."""

READ = 16 << 20
"""Bytes of payloads that are read at once, about."""

Numbered = tuple[int, pa.Table]
"""A table with the number of the place that it goes to. What the commit needs (TALLY, DEAD_LETTERS, SPAN, POSITIONS,
STATE, told apart by their schemas) all goes to place 0."""


def build(root: beam.Pipeline, layer: Layer, *, distributed: bool) -> None:
    """Puts the graph of any turn on an empty Beam pipeline."""
    spans = root | "turn" >> beam.Create([0], reshuffle=False) | "spans" >> beam.ParDo(_Spans(layer))
    if distributed:
        spans = spans | beam.Reshuffle()
    taken = spans | "take" >> beam.ParDo(_Take(layer)).with_outputs("facts", main="rows")
    rows, facts = taken.rows, [taken.facts]
    if layer.seen is not None:
        shares = rows | "by identity" >> beam.ParDo(_Split(layer.seen.identity, layer.buckets)) | beam.GroupByKey()
        fresh = shares | "dedupe" >> beam.ParDo(_Fresh(layer)).with_outputs("facts", main="rows")
        rows = fresh.rows
        facts.append(fresh.facts)
    parts = rows | "steps and views" >> beam.ParDo(_Partials(layer)).with_outputs("facts", main="states")
    moved = parts.states | "by bucket" >> beam.GroupByKey() | "advance" >> beam.ParDo(_Advance(layer))
    every = (*facts, parts.facts, moved) | "facts" >> beam.Flatten() | "all" >> beam.GroupByKey()
    _ = every | "commit" >> beam.ParDo(_Commit(layer))


def _facts(*given: pa.Table) -> Iterator[TaggedOutput]:
    return (TaggedOutput("facts", (0, table)) for table in given if len(table))


@beam.typehints.with_output_types(Span)
class _Spans(beam.DoFn):  # type: ignore[misc]
    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    def process(self, _: int) -> Iterable[Span]:
        return following(self.layer.turns).spans


@beam.typehints.with_input_types(Span)
@beam.typehints.with_output_types(pa.Table, facts=Numbered)
class _Take(beam.DoFn):  # type: ignore[misc]
    """Spans in, rows of the log out, those of a bundle together: a query costs some ms whatever its rows."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    def start_bundle(self) -> None:
        self._rows: list[pa.Table] = []

    def process(self, span: Span) -> Iterator[Any]:
        position, left = span.position, span.bytes
        with open_log(self.layer.log) as log:
            while position.offset < span.stop and left > 0:
                messages = log.read(span.partition, position.offset, span.stop, max_bytes=min(READ, left))
                if not len(messages):
                    position = dataclasses.replace(position, offset=span.stop)
                    break
                left -= messages[RAW.name].nbytes
                taken = self.layer.intake.take(messages, position)
                position = taken.position
                yield from _facts(taken.tallies, taken.dead)
                if len(taken.rows):
                    self._rows.append(taken.rows)
        yield from _facts(_position(span.partition, position))

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
@beam.typehints.with_output_types(Numbered)
class _Split(beam.DoFn):  # type: ignore[misc]
    def __init__(self, keys: tuple[str, ...], buckets: int) -> None:
        self.keys, self.buckets = keys, buckets

    def process(self, rows: pa.Table) -> Iterable[Numbered]:
        return split(rows, self.keys, self.buckets)


@beam.typehints.with_input_types(tuple[int, Iterable[pa.Table]])
@beam.typehints.with_output_types(pa.Table, facts=Numbered)
class _Fresh(beam.DoFn):  # type: ignore[misc]
    """A bucket's rows without those that were seen; what is seen now goes to this turn's files."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    def process(self, element: tuple[int, Iterable[pa.Table]]) -> Iterator[Any]:
        bucket, given = element
        turn, turns, seen = following(self.layer.turns), self.layer.turns, self.layer.seen
        assert seen is not None
        rows = pa.concat_tables(list(given))
        pieces = {piece["name"]: turns.read(piece["name"]) for piece in turn.state.get(f"seen/{bucket}", [])}
        fresh = seen.advance(list(pieces.values()), rows, rows[EXPIRES.name].to_numpy())
        yield from _facts(tally("source", "duplicate", fresh.duplicates))
        if len(fresh.conflicts):
            yield from _facts(tally("source", "rejected", len(fresh.conflicts), "conflict"))
            yield from _facts(self._refused(fresh.conflicts, fresh.details))
        kept = compacted([*pieces.values(), *([] if fresh.piece is None else [fresh.piece])], turn.closed)
        names = {id(table): name for name, table in pieces.items()}
        written = []
        for index, piece in enumerate(kept):
            name = names.get(id(piece)) or turn.name("seen", bucket, index)
            if id(piece) not in names:
                turns.write(name, piece)
            written.append(Piece(name, 0, 0, len(piece)))
        yield from _facts(state("seen", bucket, written))
        yield fresh.rows

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


@beam.typehints.with_input_types(pa.Table)
@beam.typehints.with_output_types(Numbered, facts=Numbered)
class _Partials(beam.DoFn):  # type: ignore[misc]
    """Rows through the shared steps, then to partial states by view and bucket."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    def process(self, rows: pa.Table) -> Iterator[Any]:
        layer = self.layer
        turn = following(layer.turns)
        dimensions = {name: layer.kept(file) for name, file in turn.dimensions.items()}
        chain = dataclasses.replace(layer.plan.chain, format=layer.format)
        outcome = chain.run(rows, dimensions, layer.cipher)
        yield from _facts(outcome.tallies, outcome.dead)
        if not len(outcome.rows):
            return
        ends = pa.compute.min_max(outcome.rows["event_time"].cast(pa.int64())).as_py()
        yield from _facts(pa.table([[ends["min"]], [ends["max"]]], schema=SPAN))
        for number, view in enumerate(layer.views):
            states, dead, tallies = view.partial(outcome.rows, dimensions, layer.cipher, layer.format)
            yield from _facts(dead, tallies)
            for bucket, part in split(states, view.plan.by, layer.buckets):
                yield number * layer.buckets + bucket, part


@beam.typehints.with_input_types(tuple[int, Iterable[pa.Table]])
@beam.typehints.with_output_types(Numbered)
class _Advance(beam.DoFn):  # type: ignore[misc]
    """A bucket's partial states into its open windows; what changed, and what of it is to be delivered, as STATE."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    def process(self, element: tuple[int, Iterable[pa.Table]]) -> Iterator[Numbered]:
        place, parts = element
        number, bucket = divmod(place, self.layer.buckets)
        view, turns, turn = self.layer.views[number], self.layer.turns, following(self.layer.turns)
        name = view.plan.name
        pieces = [Piece(**piece) for piece in turn.state.get(f"open:{name}/{bucket}", [])]
        moved = view.advance(pieces, lambda piece: turns.read(piece.name), parts, turn.closed)
        written = [self._write(turn, view, bucket, index, table) for index, table in enumerate(moved.tables)]
        yield 0, state(f"open:{name}", bucket, [*moved.kept, *written])
        for part, table in (("answers", moved.answers), ("gone", moved.gone)):
            if len(table):
                named = turn.name(f"{part}:{name}", bucket, 0)
                turns.write(named, table)
                yield 0, state(f"{part}:{name}", bucket, [Piece(named, 0, 0, len(table))])
        yield 0, tally(f"view:{name}", "rows_out", moved.rows)
        yield 0, tally(f"view:{name}", "results", len(moved.answers))

    def _write(self, turn: Next, view: OpenView, bucket: int, index: int, table: pa.Table) -> Piece:
        name = turn.name(f"open:{view.plan.name}", bucket, index)
        self.layer.turns.write(name, table)
        low, high = view.span(table)
        return Piece(name, low, high, len(table))


@beam.typehints.with_input_types(tuple[int, Iterable[pa.Table]])
@beam.typehints.with_output_types(pa.Table)
class _Commit(beam.DoFn):  # type: ignore[misc]
    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    def process(self, element: tuple[int, Iterable[pa.Table]]) -> None:
        commit(self.layer, following(self.layer.turns), list(element[1]))
