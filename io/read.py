"""Reading a history as a part of any Beam pipeline; what it does is in ``pipelines.io.files`` and
``pipelines.io.lake_rows``, without Beam."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import apache_beam as beam
import pyarrow as pa

from pipelines.io.history import History
from pipelines.transforms import progress, tables  # noqa: F401  (tables registers the coder of pa.Table)
from pipelines.transforms.conservation import tally


@dataclasses.dataclass
class ReadFiles(beam.PTransform):  # type: ignore[misc]
    """The tables of a plan, of files or a lake. Outputs, both of pa.Table: ``rows`` and ``tallies`` (TALLY: source rows
    read).

    Applied to a pipeline it reads the plan's splits, and to a PCollection of splits those.

    distributed: share the splits among workers by a Reshuffle (of the splits, never of rows); on one process that would
    only cost. shown: these are the rows that the run's progress counts. Every row is read exactly once per attempt of a
    bundle; position and source name it across attempts.

    >>> import pathlib, tempfile
    >>> from pipelines.io.files import plan
    >>> from pipelines.transforms.schema import RowSchema
    >>> class Row:
    ...     n: int
    >>> with tempfile.TemporaryDirectory() as folder, beam.Pipeline("FnApiRunner") as pipeline:
    ...     _ = pathlib.Path(folder, "a.csv").write_text("n\\n1\\n2\\n")
    ...     read = pipeline | ReadFiles(plan(f"{folder}/a.csv", RowSchema.of(Row)))
    ...     _ = read.rows | beam.Map(lambda table: print(table["_offset"].to_pylist()))
    [2, 4]
    """

    plan: History
    distributed: bool = False
    shown: bool = False

    def __post_init__(self) -> None:
        super().__init__()

    def expand(self, start: Any) -> Any:
        named = isinstance(start, beam.PCollection)
        splits = start if named else start | beam.Create(self.plan.splits, reshuffle=False)
        if self.distributed:
            splits = splits | beam.Reshuffle()
        part = beam.ParDo(_Read(self.plan, self.shown)).with_output_types(pa.Table, tallies=pa.Table)
        return splits | part.with_outputs("tallies", main="rows")


class _Read(beam.DoFn):  # type: ignore[misc]
    def __init__(self, plan: History, shown: bool) -> None:
        self._read, self._by_rows, self._shown = plan.read, plan.rows is not None, shown

    def process(self, split: Any) -> Iterator[pa.Table]:
        rows, weight = 0, split.bytes
        for table in self._read(split):
            rows += len(table)
            done = 0 if split.packed else min(weight, int(table.nbytes))  # how far a packed file is, nobody knows
            weight -= done
            if self._shown:
                progress.advance(len(table), None if self._by_rows else done)
            yield table
        if self._shown and not self._by_rows:
            progress.advance(0, weight)
        yield beam.pvalue.TaggedOutput("tallies", tally("source", "read", rows))
