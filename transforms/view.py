"""A view's arithmetic: partial states of a batch, their merge, and the answer; each one DuckDB query.

The same plan serves every engine, the tests' harness and the serving layer: states are a commutative monoid under
``merged``, with no rows as identity.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator

import duckdb
import numpy as np
import pyarrow as pa

from pipelines.transforms import gather, query
from pipelines.transforms.buckets import hashes
from pipelines.transforms.chain import FAILURES, Chain, Outcome
from pipelines.transforms.errors import DataRefused
from pipelines.transforms.protect import Cipher
from pipelines.transforms.ranges import EVERYTHING, Ranges, inside
from pipelines.transforms.sketches import Sketch
from pipelines.transforms.states import State
from pipelines.transforms.windows import Window


@dataclasses.dataclass(frozen=True)
class ViewPlan:
    """A compiled view. partial: rows (``batch``, with event_time) to states by key and tile. merge: states to states.
    windowed: merged states to states by window. result: those to answers: keys, window_start, window_end
    (timestamp[us, UTC]), measures, ``_rows``, states. coded: keys of text that only group, so a code may stand
    for each. chain: the view's own steps. digest: answers to the columns that a digest is of. guard: refuses the rows
    in which a measure's expression fails; run when ``partial`` did.
    """

    name: str
    by: tuple[str, ...]
    window: Window
    chain: Chain | None
    guard: Chain
    states: tuple[State, ...]
    partial: str
    merge: str
    windowed: str
    result: str
    digest: str
    partial_schema: pa.Schema
    schema: pa.Schema
    measures: tuple[str, ...]
    coded: tuple[str, ...] = ()

    @property
    def columns(self) -> list[str]:
        """The columns of an answer that are not states: keys, window_start, window_end, measures."""
        return [name for name in self.schema.names if not name.startswith("_")]

    @property
    def samples(self) -> str:
        """The query for what rows are to sketches; empty where there is none."""
        return gather.samples(self.states)

    def partials(self, rows: pa.Table) -> pa.Table:
        """The states of these rows (partial_schema)."""
        if not len(rows):
            return self.partial_schema.empty_table()
        coded, texts = _coded(rows, self.coded)
        states = gather.partials(self.partial, coded, self.states)
        for name, values in texts.items():
            column = values.take(states[name].combine_chunks())
            states = states.set_column(states.schema.get_field_index(name), name, column)
        return states

    def tried(self, rows: pa.Table, cipher: Cipher | None = None) -> tuple[pa.Table, Outcome | None]:
        """The states of these rows; and what was refused of them, if in some the expression of a measure fails."""
        try:
            return self.partials(rows), None
        except FAILURES:
            outcome = self.guard.run(rows, {}, cipher)
        with self._overflow():
            return self.partials(outcome.rows), outcome

    def merged(self, parts: Iterable[pa.Table]) -> pa.Table:
        """The states of all parts together (partial_schema), one row for each key and tile or session."""
        parts = [part for part in parts if len(part)]
        if len(parts) < 2:
            return parts[0] if parts else self.partial_schema.empty_table()
        with self._overflow():
            return gather.merged(self.merge, pa.concat_tables(parts), self.states)

    def finished(self, merged: pa.Table) -> pa.Table:
        """The answers (schema) of merged states. Every row of a key must be in this one table."""
        if not len(merged):
            return self.schema.empty_table()
        with self._overflow():
            if not any(isinstance(state, Sketch) for state in self.states):
                both = f"WITH batch AS ({self.windowed}) SELECT * FROM ({self.result})"
                return query.run(both, {"batch": merged})
            windowed = gather.merged(self.windowed, merged, self.states, final=True)
            return query.run(self.result, {"batch": windowed})

    @contextlib.contextmanager
    def _overflow(self) -> Iterator[None]:
        """A value of many rows together that is past its type is no row's fault: it refuses the run."""
        try:
            yield
        except (duckdb.ConversionException, duckdb.OutOfRangeException) as error:
            named = (f"the {state.label} of {state.expr}" for state in self.states if state.column in str(error))
            raise DataRefused(
                f"view {self.name}: {next(named, 'a sum')} is past its type and nothing was committed; "
                "measure a wider one, as in Sum('x::DECIMAL(38,0)') or Sum('x::DOUBLE')"
            ) from error

    def within(self, answers: pa.Table, ranges: Ranges) -> pa.Table:
        """The answers whose window starts in one of the ranges."""
        if EVERYTHING in ranges:
            return answers
        starts = answers["window_start"].cast(pa.int64()).to_numpy()
        return answers.filter(pa.array(inside(ranges, starts)))

    def digested(self, answers: pa.Table) -> int:
        """An order-independent hash of the exact measures: digests of disjoint answers add up modulo 2^64.

        It does not depend on the engine, nor on a library's own hash, so it may be compared by eye.
        """
        exact = query.run(self.digest, {"batch": answers})
        return int(hashes(exact, exact.column_names).sum(dtype=np.uint64))


SAMPLE, FEW = 1 << 15, 8
"""Texts are coded where so many rows hold at most an eighth as many of them."""


def _coded(rows: pa.Table, names: Iterable[str]) -> tuple[pa.Table, dict[str, pa.Array]]:
    """The rows with these columns of text as int32 codes, and the text of each code: grouping by a code costs half."""
    texts = {}
    for name in names:
        column = rows[name]
        if not pa.types.is_dictionary(column.type):
            sample = column.slice(0, SAMPLE)
            if len(sample.unique()) * FEW > len(sample):
                continue
            column = column.dictionary_encode()
        chunks = column.unify_dictionaries().chunks
        texts[name] = chunks[0].dictionary
        codes = pa.chunked_array([chunk.indices for chunk in chunks])
        rows = rows.set_column(rows.schema.get_field_index(name), name, codes)
    return rows, texts
