"""A view as a Beam transform: partial states per batch, merged by bucket of the key, then the answers.

The shuffle carries states, never rows. A bucket holds all tiles of its keys, so its merged states are enough for every
window. In batch the tile is a column; nothing depends on Beam's windows.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa

from pipelines.transforms import conservation
from pipelines.transforms.buckets import bucket, split
from pipelines.transforms.protect import Cipher
from pipelines.transforms.ranges import EVERYTHING, Ranges
from pipelines.transforms.sketches import Sketch
from pipelines.transforms.spill import Shelf, shelved, size
from pipelines.transforms.tables import TABLES
from pipelines.transforms.view import ViewPlan

PENDING = 32 * 2**20
"""Bytes of partials over all buckets that may wait before they are merged."""

SHELVED = 8 * 2**20
"""Bytes from which on a table of an accumulator is kept on disk, where there is a shelf for it."""

SHARE = 300_000
"""Rows of which sketches are made at a time: DuckDB holds some 120 bytes for each while it gathers their values."""

RUN = 10 * 2**20
"""Bytes of sketches of one bucket on the shelf from which on they are merged, so about what a merge reads at once."""

FINER = 8
"""A view with sketches has so many times the buckets: its states are hundreds of times as large."""

ANSWERS = pa.schema([("view", pa.string()), ("rows", pa.int64()), ("digest", pa.uint64()), ("boundary", pa.int64())])
"""What a bucket answered: rows, their digest, and the greatest window_end (µs; null for Whole) that is no later than
the boundary may be."""


@beam.typehints.with_output_types(tuple[int, pa.Table], dead=pa.Table, tallies=pa.Table)
class Partial(beam.DoFn):  # type: ignore[misc]
    """Rows in, (bucket, states) out; the view's own steps come first. Tags: dead (DEAD_LETTERS), tallies (TALLY)."""

    def __init__(self, plan: ViewPlan, buckets: int, dimensions: tuple[str, ...], cipher: Cipher | None) -> None:
        self.plan, self.buckets, self.dimensions, self.cipher = plan, buckets, dimensions, cipher

    def process(self, rows: pa.Table, *sides: Any) -> Iterator[Any]:
        if self.plan.chain is not None:
            outcome = self.plan.chain.run(rows, dict(zip(self.dimensions, sides, strict=True)), self.cipher)
            rows = outcome.rows
            yield beam.pvalue.TaggedOutput("dead", outcome.dead)
            yield beam.pvalue.TaggedOutput("tallies", outcome.tallies)
        for share in _shares(rows, self.plan, self.buckets):
            yield from self._states(share)

    def _states(self, rows: pa.Table) -> Iterator[Any]:
        states, refused = self.plan.tried(rows, self.cipher)
        if refused is not None:
            rows = refused.rows
            yield beam.pvalue.TaggedOutput("dead", refused.dead)
            yield beam.pvalue.TaggedOutput("tallies", refused.tallies)
        yield beam.pvalue.TaggedOutput("tallies", conservation.tally(f"view:{self.plan.name}", "rows_in", len(rows)))
        yield from split(states, self.plan.by, self.buckets)


def _shares(rows: pa.Table, plan: ViewPlan, buckets: int) -> Iterator[pa.Table]:
    """The rows, of a view with sketches some buckets at a time: no group is in two shares."""
    n = min(-(-len(rows) // SHARE), buckets)
    if n < 2 or not plan.by or not _sketched(plan):
        yield rows
        return
    for name in plan.coded:  # codes take less to filter than texts
        texts = rows[name].dictionary_encode().unify_dictionaries()
        rows = rows.set_column(rows.schema.get_field_index(name), name, texts)
    numbers = bucket(rows, plan.by, buckets) * n // buckets
    yield from (rows.filter(pa.array(numbers == number)) for number in np.unique(numbers))


def _sketched(plan: ViewPlan) -> bool:
    return any(isinstance(state, Sketch) for state in plan.states)


@beam.typehints.with_input_types(pa.Table)
@beam.typehints.with_output_types(pa.Table)
class Merge(beam.CombineFn):  # type: ignore[misc]
    """Merges states. An accumulator is tables still to be merged, the first of them merged already.

    Compaction is geometric: when what waits weighs more than what is merged (and than a share of PENDING), so each
    state is merged a logarithmic number of times. Never mutates any accumulator but the first. shelf: a disk that large
    tables wait on, where all runs in one process. There sketches, which merging hardly makes less of, wait for RUN.
    """

    def __init__(self, plan: ViewPlan, buckets: int, shelf: Shelf | None = None) -> None:
        self.plan, self.held, self.shelf = plan, PENDING // buckets, shelf
        self.waits = shelf is not None and _sketched(plan)
        self.enough, self.least = (RUN, self.held // 8) if self.waits else (self.held, SHELVED)

    def create_accumulator(self) -> list[pa.Table]:
        return [self.plan.partial_schema.empty_table()]

    def add_input(self, accumulator: list[pa.Table], states: pa.Table) -> list[pa.Table]:
        self._wait(accumulator, states)
        first, *waiting = map(size, accumulator)
        if sum(waiting) > max(first, self.enough):
            return self._merged(accumulator)
        return self._laid(accumulator) if self.waits else accumulator

    def merge_accumulators(self, accumulators: Iterable[list[pa.Table]]) -> list[pa.Table]:
        first, *others = accumulators
        for other in others:
            for states in other:
                first = self.add_input(first, states)
        return first

    def compact(self, accumulator: list[pa.Table]) -> list[pa.Table]:
        return accumulator if self.waits or len(accumulator) == 1 else self._merged(accumulator)

    def _merged(self, accumulator: list[pa.Table]) -> list[pa.Table]:
        merged = self.extract_output(accumulator)
        if self.shelf is not None:
            for states in accumulator:
                self.shelf.drop(states)
        kept: list[pa.Table] = []
        self._wait(kept, merged)
        return kept

    def _laid(self, accumulator: list[pa.Table]) -> list[pa.Table]:
        """The small tables that wait go to the shelf as one, when they are more than is to be held."""
        first, *waiting = accumulator
        here = [states for states in waiting if not shelved(states)]
        if sum(map(size, here)) <= self.held:
            return accumulator
        laid = [first, *filter(shelved, waiting)]
        self._wait(laid, self.plan.merged(here))
        return laid

    def _wait(self, accumulator: list[pa.Table], states: pa.Table) -> None:
        """Adds a table: a large one on the shelf, onto what waits there, as each place costs some kB of memory."""
        if self.shelf is None or size(states) < self.least:
            # A slice would hold the states of all buckets as long as it waits.
            accumulator.append(states.take(np.arange(len(states))))
            return
        lying = next((at for at in range(1, len(accumulator)) if shelved(accumulator[at])), None)
        if lying is None or shelved(states):
            accumulator.append(self.shelf.put(states))
        else:
            accumulator[lying] = self.shelf.put(states, accumulator[lying])

    def extract_output(self, accumulator: list[pa.Table]) -> pa.Table:
        if self.shelf is None:
            return self.plan.merged(accumulator)
        if len(accumulator) == 1:
            return self.shelf.get(accumulator[0])
        return self.plan.merged([part for states in accumulator for part in self.shelf.parts(states)])

    def get_accumulator_coder(self) -> beam.coders.Coder:
        return TABLES


@beam.typehints.with_input_types(tuple[int, pa.Table])
@beam.typehints.with_output_types(pa.Table, answered=pa.Table, tallies=pa.Table)
class Answer(beam.DoFn):  # type: ignore[misc]
    """Merged states of a bucket in, its answers out: keys, window_start, window_end, measures, states.

    ranges: where the windows start. through: the boundary is no later. Tags: answered (ANSWERS), tallies.
    """

    def __init__(self, plan: ViewPlan, ranges: Ranges, through: int | None) -> None:
        self.plan, self.ranges, self.through = plan, ranges, through

    def process(self, element: tuple[int, pa.Table]) -> Iterator[Any]:
        _, merged = element
        part = f"view:{self.plan.name}"
        yield beam.pvalue.TaggedOutput("tallies", conservation.tally(part, "rows_out", total(merged)))
        answers = self.plan.within(self.plan.finished(merged), self.ranges)
        yield beam.pvalue.TaggedOutput("tallies", conservation.tally(part, "results", len(answers)))
        ends = answers["window_end"].cast(pa.int64())
        if self.through is not None:
            ends = ends.filter(pa.compute.less_equal(ends, self.through))
        told = [[self.plan.name], [len(answers)], [self.plan.digested(answers)], [pa.compute.max(ends).as_py()]]
        yield beam.pvalue.TaggedOutput("answered", pa.table(told, schema=ANSWERS))
        if len(answers):
            yield answers


def total(states: pa.Table) -> int:
    """How many rows these states are of."""
    return pa.compute.sum(states["_rows"]).as_py() or 0


@dataclasses.dataclass
class Aggregate(beam.PTransform):  # type: ignore[misc]
    """A bounded PCollection of row tables (with event_time) to the answers of a view.

    Outputs: ``main`` (the plan's schema), ``answered`` (ANSWERS), ``dead`` (DEAD_LETTERS), ``tallies`` (TALLY).
    dimensions: name to a PCollection of one table, for the view's own look-ups. ranges: only windows that start there.
    through: the boundary that is told is no later (µs). shelf: where large states wait on disk instead of in memory, in
    one process.

    >>> import datetime
    >>> from pipelines import Count, Pipeline, Source, View
    >>> class Sale:
    ...     time: datetime.datetime
    ...     shop: str
    >>> shops = View("shops", by="shop", sales=Count())
    >>> plan = Pipeline("sales", source=Source(Sale, event_time="time"), views=(shops,)).plan()
    >>> noon = pa.array([datetime.datetime(2024, 5, 1, 12, tzinfo=datetime.UTC)] * 3, pa.timestamp("us", "UTC"))
    >>> rows = pa.table({"shop": ["a", "b", "a"], "event_time": noon})
    >>> with beam.Pipeline("FnApiRunner") as pipeline:
    ...     answers = pipeline | beam.Create([rows]) | Aggregate(plan.views[0], buckets=1)
    ...     _ = answers["main"] | beam.Map(lambda table: print(table.sort_by("shop")["sales"].to_pylist()))
    [2, 1]
    """

    plan: ViewPlan
    buckets: int = 8
    dimensions: dict[str, beam.PCollection] = dataclasses.field(default_factory=dict)
    cipher: Cipher | None = None
    ranges: Ranges = (EVERYTHING,)
    through: int | None = None
    shelf: Shelf | None = None

    def __post_init__(self) -> None:
        super().__init__(self.plan.name)

    def expand(self, rows: beam.PCollection) -> dict[str, beam.PCollection]:
        used = tuple(
            name for name in self.dimensions if self.plan.chain is not None and name in self.plan.chain.dimensions
        )
        sides = [beam.pvalue.AsSingleton(self.dimensions[name]) for name in used]
        buckets = self.buckets * FINER if _sketched(self.plan) else self.buckets
        partial = Partial(self.plan, buckets, used, self.cipher)
        parts = rows | "partial" >> beam.ParDo(partial, *sides).with_outputs("dead", "tallies", main="states")
        answers = (
            parts.states
            | "merge" >> beam.CombinePerKey(Merge(self.plan, buckets, self.shelf))
            | "answer"
            >> beam.ParDo(Answer(self.plan, self.ranges, self.through)).with_outputs("answered", "tallies", main="main")
        )
        tallies = (parts.tallies, answers.tallies) | "tallies" >> beam.Flatten()
        return {"main": answers.main, "answered": answers.answered, "dead": parts.dead, "tallies": tallies}
