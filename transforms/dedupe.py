"""De-duplication of a bounded PCollection of row tables, in any Beam pipeline."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.pvalue import TaggedOutput

from pipelines.transforms import tables  # noqa: F401  (registers the coder of pa.Table)
from pipelines.transforms.buckets import split
from pipelines.transforms.conservation import tally
from pipelines.transforms.deadletters import refuse
from pipelines.transforms.identity import deduplicate
from pipelines.transforms.protect import Cipher
from pipelines.transforms.spill import Segment, Spill, Writer

_ELEMENT = 1_000_000
"""Rows of a table that is given on."""


@dataclasses.dataclass
class Dedupe(beam.PTransform):  # type: ignore[misc]
    """Row tables to row tables in which every identity is there once. Outputs, all of pa.Table: ``rows``, ``dead``
    (DEAD_LETTERS, reason "conflict") and ``tallies`` (TALLY: source duplicate, and rejected by conflict).

    The first row of an identity in (_source, _offset) order wins, on every engine and however the tables are cut. A
    later row that says the same in ``columns`` is a duplicate; one that says something else is a conflict.

    spill: hash partitions of the same identity on this machine's disk, of which about 128 MB are in memory at a time:
    for DirectRunner, which would hold all that it shuffles in memory. None: a shuffle of the rows to ``buckets``
    buckets, of which a worker holds one at a time (Flink, Spark, Dataflow). A rerun of a bundle changes nothing.

    >>> rows = pa.table({"id": [1, 1, 2], "_source": pa.array(["a"] * 3).dictionary_encode(), "_offset": [0, 1, 2]})
    >>> dedupe = Dedupe(("id",), ("id",), pipeline="calls", format="csv", buckets=1)
    >>> with beam.Pipeline("FnApiRunner") as pipeline:
    ...     once = pipeline | beam.Create([rows]) | dedupe
    ...     _ = once.rows | beam.Map(lambda table: print(table["_offset"].to_pylist()))
    [0, 2]
    """

    identity: tuple[str, ...]
    columns: tuple[str, ...]
    _: dataclasses.KW_ONLY
    pipeline: str
    format: str
    spill: Spill | None = None
    buckets: int = 64
    cipher: Cipher | None = None

    def __post_init__(self) -> None:
        super().__init__()
        if self.spill is not None and self.spill.identity != self.identity:
            raise ValueError(f"rows spilled by {self.spill.identity} cannot be compared by {self.identity}")

    def expand(self, rows: beam.PCollection) -> Any:
        once = _Once(self.identity, self.columns, Repeated(self.pipeline, self.format, self.cipher))
        if self.spill is None:
            shares = rows | "split" >> beam.ParDo(Split(self.identity, self.buckets))
            part = beam.ParDo(_Bucket(once))
        else:
            shares = rows | "spill" >> beam.ParDo(_Spill(self.spill))
            part = beam.ParDo(_Partitions(once, self.spill))
        part = part.with_output_types(pa.Table, dead=pa.Table, tallies=pa.Table)
        return shares | beam.GroupByKey() | "once" >> part.with_outputs("dead", "tallies", main="rows")


@dataclasses.dataclass(frozen=True)
class Repeated:
    """What is given for rows that are not the first of their identity: ``dead`` and ``tallies``."""

    pipeline: str
    format: str
    cipher: Cipher | None = None

    def outputs(self, duplicates: int, conflicts: pa.Table, details: pa.Array) -> Iterator[TaggedOutput]:
        if duplicates:
            yield TaggedOutput("tallies", tally("source", "duplicate", duplicates))
        if len(conflicts):
            yield TaggedOutput("tallies", tally("source", "rejected", len(conflicts), "conflict"))
            refused = refuse(
                conflicts,
                pipeline=self.pipeline,
                step="dedupe",
                reason="conflict",
                detail=details,
                format=self.format,
                cipher=self.cipher,
            )
            yield TaggedOutput("dead", refused)


@dataclasses.dataclass(frozen=True)
class _Once:
    identity: tuple[str, ...]
    columns: tuple[str, ...]
    repeated: Repeated

    def outputs(self, rows: pa.Table) -> Iterator[pa.Table]:
        found = deduplicate(rows, self.identity, self.columns)
        del rows
        yield from self.repeated.outputs(found.duplicates, found.conflicts, found.details)
        for start in range(0, len(found.rows), _ELEMENT):
            yield found.rows.slice(start, _ELEMENT)


@beam.typehints.with_input_types(pa.Table)
@beam.typehints.with_output_types(tuple[int, pa.Table])
class Split(beam.DoFn):  # type: ignore[misc]
    """Row tables to (bucket, its rows), by a stable hash of the identity."""

    def __init__(self, identity: tuple[str, ...], buckets: int) -> None:
        self._identity, self._buckets = identity, buckets

    def process(self, rows: pa.Table) -> Iterable[tuple[int, pa.Table]]:
        return split(rows, self._identity, self._buckets)


@beam.typehints.with_input_types(tuple[int, Iterable[pa.Table]])
class _Bucket(beam.DoFn):  # type: ignore[misc]
    def __init__(self, once: _Once) -> None:
        self._once = once

    def process(self, element: tuple[int, Iterable[pa.Table]]) -> Iterator[pa.Table]:
        return self._once.outputs(pa.concat_tables(list(element[1])))


@beam.typehints.with_input_types(pa.Table)
@beam.typehints.with_output_types(tuple[int, Segment])
class _Spill(beam.DoFn):  # type: ignore[misc]
    """Writes a bundle's rows and gives where they are, all under one key: they are read in one place, one by one."""

    def __init__(self, spill: Spill) -> None:
        self._spill = spill

    def start_bundle(self) -> None:
        self._writer = Writer(self._spill)

    def process(self, rows: pa.Table) -> None:
        self._writer.add(rows)

    def finish_bundle(self) -> Iterator[beam.utils.windowed_value.WindowedValue]:
        for segment in self._writer.finish():
            yield beam.transforms.window.GlobalWindows.windowed_value((0, segment))


@beam.typehints.with_input_types(tuple[int, Iterable[Segment]])
class _Partitions(beam.DoFn):  # type: ignore[misc]
    def __init__(self, once: _Once, spill: Spill) -> None:
        self._once, self._spill = once, spill

    def process(self, element: tuple[int, Iterable[Segment]]) -> Iterator[pa.Table]:
        for rows in self._spill.read(element[1]):
            yield from self._once.outputs(rows)
