"""A chain of steps as a part of any Beam pipeline."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import apache_beam as beam
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.transforms import query, tables  # noqa: F401  (tables registers the coder of pa.Table)
from pipelines.transforms.chain import Chain
from pipelines.transforms.conservation import SPAN, tally
from pipelines.transforms.dating import Dating
from pipelines.transforms.protect import Cipher
from pipelines.transforms.ranges import EVERYTHING, Ranges, inside


@dataclasses.dataclass(frozen=True)
class Between:
    """Only rows whose event time is in one of the ranges; the others are counted as filtered.

    A row without an event time passes: refusing it is the chain's."""

    event_time: str
    ranges: Ranges = (EVERYTHING,)

    def split(self, rows: pa.Table) -> tuple[pa.Table, pa.Table]:
        """The rows inside, and the tally of those outside."""
        if EVERYTHING in self.ranges:
            return rows, tally("source", "filtered", 0)
        times = query.run(f"SELECT epoch_us(TRY({self.event_time})) AS t FROM batch", {"batch": rows})["t"]
        kept = inside(self.ranges, times.fill_null(0).to_numpy()) | times.is_null().to_numpy(zero_copy_only=False)
        found = rows if kept.all() else rows.filter(pa.array(kept))
        return found, tally("source", "filtered", len(rows) - len(found), "outside --from/--to")


@dataclasses.dataclass
class Clean(beam.PTransform):  # type: ignore[misc]
    """Row tables through the shared steps. Outputs, all of pa.Table: ``rows`` (the chain's schema and bookkeeping),
    ``dead`` (DEAD_LETTERS), ``tallies`` (TALLY), ``spans`` (SPAN).

    dimensions: name to a PCollection of one table. cipher: for the payloads of dead letters.

    >>> import datetime
    >>> from pipelines import Filter, Pipeline, Source
    >>> class Sale:
    ...     time: datetime.datetime
    ...     cents: int
    >>> plan = Pipeline("sales", source=Source(Sale, event_time="time"), steps=(Filter("cents > 0"),)).plan()
    >>> noon = pa.array([datetime.datetime(2024, 5, 1, 12, tzinfo=datetime.UTC)] * 2, pa.timestamp("us", "UTC"))
    >>> source = pa.array(["a.csv"] * 2).dictionary_encode()
    >>> rows = pa.table({"time": noon, "cents": [5, 0], "_source": source, "_offset": [0, 9]})
    >>> with beam.Pipeline("FnApiRunner") as pipeline:
    ...     clean = pipeline | beam.Create([rows]) | Clean(plan.chain, Between(plan.event_time))
    ...     _ = clean.rows | beam.Map(lambda table: print(table["cents"].to_pylist()))
    [5]
    """

    chain: Chain
    between: Between
    dimensions: Mapping[str, beam.PCollection] = dataclasses.field(default_factory=dict)
    cipher: Cipher | None = None

    def __post_init__(self) -> None:
        super().__init__()

    def expand(self, rows: beam.PCollection) -> beam.pvalue.DoOutputsTuple:
        used = self.chain.dimensions
        sides = [beam.pvalue.AsSingleton(self.dimensions[name]) for name in used]
        return rows | beam.ParDo(_Clean(self.chain, self.between, used, self.cipher), *sides).with_outputs(
            "dead", "tallies", "spans", main="rows"
        )


@dataclasses.dataclass
class Dated(beam.PTransform):  # type: ignore[misc]
    """Row tables without the rows that have no event time, see ``Dating``. Outputs: ``rows``, ``dead``, ``tallies``."""

    dating: Dating
    format: str
    cipher: Cipher | None = None

    def __post_init__(self) -> None:
        super().__init__()

    def expand(self, rows: beam.PCollection) -> beam.pvalue.DoOutputsTuple:
        return rows | beam.ParDo(_Dated(self.dating, self.format, self.cipher)).with_outputs(
            "dead", "tallies", main="rows"
        )


@beam.typehints.with_output_types(pa.Table, dead=pa.Table, tallies=pa.Table)
class _Dated(beam.DoFn):  # type: ignore[misc]
    def __init__(self, dating: Dating, format: str, cipher: Cipher | None) -> None:
        self._dating, self._format, self._cipher = dating, format, cipher

    def process(self, rows: pa.Table) -> Iterator[Any]:
        dated, refused = self._dating.split(rows, self._format, self._cipher)
        if refused is not None:
            yield beam.pvalue.TaggedOutput("tallies", refused.tallies)
            yield beam.pvalue.TaggedOutput("dead", refused.dead)
        if len(dated):
            yield dated


@beam.typehints.with_output_types(pa.Table, dead=pa.Table, tallies=pa.Table, spans=pa.Table)
class _Clean(beam.DoFn):  # type: ignore[misc]
    def __init__(self, chain: Chain, between: Between, dimensions: tuple[str, ...], cipher: Cipher | None) -> None:
        self._chain, self._between, self._dimensions, self._cipher = chain, between, dimensions, cipher

    def process(self, rows: pa.Table, *sides: Any) -> Iterator[Any]:
        rows, outside = self._between.split(rows)
        outcome = self._chain.run(rows, dict(zip(self._dimensions, sides, strict=True)), self._cipher)
        for counted in (outside, outcome.tallies):
            yield beam.pvalue.TaggedOutput("tallies", counted)
        if len(outcome.dead):
            yield beam.pvalue.TaggedOutput("dead", outcome.dead)
        if len(outcome.rows):
            ends = pc.min_max(outcome.rows["event_time"].cast(pa.int64())).as_py()
            yield beam.pvalue.TaggedOutput("spans", pa.table([[ends["min"]], [ends["max"]]], schema=SPAN))
            yield outcome.rows
