"""Decode as a part of any Beam pipeline; what it does is in ``pipelines.transforms.decoder``, without Beam."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import apache_beam as beam
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.transforms import tables  # noqa: F401  (registers the coder of pa.Table)
from pipelines.transforms.conservation import tally
from pipelines.transforms.decoder import Decoder


@dataclasses.dataclass
class Decode(beam.PTransform):  # type: ignore[misc]
    """Raw or typed tables to rows of the schema. Outputs, all of pa.Table: ``rows``, ``dead`` (DEAD_LETTERS) and
    ``tallies`` (TALLY: source rejected by reason).

    >>> from pipelines.transforms.schema import RowSchema
    >>> class Row:
    ...     n: int
    >>> given = pa.table({"n": ["1", "x"], "_source": pa.array(["a", "a"]).dictionary_encode(), "_offset": [0, 4]})
    >>> with beam.Pipeline("FnApiRunner") as pipeline:
    ...     decoded = pipeline | beam.Create([given]) | Decode(Decoder(RowSchema.of(Row), "numbers"))
    ...     _ = decoded.rows | beam.Map(lambda table: print(table["n"].to_pylist()))
    [1]
    """

    decoder: Decoder

    def __post_init__(self) -> None:
        super().__init__()

    def expand(self, given: beam.PCollection) -> Any:
        part = beam.ParDo(_Decode(self.decoder)).with_output_types(pa.Table, dead=pa.Table, tallies=pa.Table)
        return given | part.with_outputs("dead", "tallies", main="rows")


class _Decode(beam.DoFn):  # type: ignore[misc]
    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    def process(self, table: pa.Table) -> Iterator[pa.Table]:
        decoded = self._decoder.decode(table)
        if len(decoded.rows):
            yield decoded.rows
        if decoded.dead is not None:
            yield beam.pvalue.TaggedOutput("dead", decoded.dead)
            for count in pc.value_counts(decoded.dead["reason"]).to_pylist():
                yield beam.pvalue.TaggedOutput("tallies", tally("source", "rejected", count["counts"], count["values"]))
