"""The Beam side of tables: staging from a PCollection. The commit is one call, ``Table.commit``, in one place.

The staged files of every worker go to that one place as tables of STAGED, which the TableCoder carries::

    staged = rows | beam.ParDo(StageTable(table, token=token, version=version))
"""

import hashlib
from collections.abc import Iterator

import apache_beam as beam
import pyarrow as pa
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.windowed_value import WindowedValue

from pipelines.io.table import Stage, Table
from pipelines.transforms import tables  # noqa: F401  registers the coder of pa.Table


@beam.typehints.with_input_types(pa.Table)
@beam.typehints.with_output_types(pa.Table)
class StageTable(beam.DoFn):  # type: ignore[misc]
    """Tables in, STAGED out: the rows of a bundle go to the files of one unit, named by its first rows.

    Bounded input in the global window only. Rows may carry ``_source`` and ``_offset``, which then name the unit; they
    are not written unless the table has such columns. A bundle that is tried again stages files of its own, and only
    those of the attempt that counts reach the commit; the others are deleted after it.
    """

    def __init__(self, table: Table, *, token: str, version: int) -> None:
        self.table, self.token, self.version = table, token, version
        self._stage: Stage | None = None

    def start_bundle(self) -> None:
        self._stage = None

    def process(self, rows: pa.Table) -> None:
        if not rows.num_rows:
            return
        if self._stage is None:
            self._stage = self.table.stage(unit(rows), token=self.token, version=self.version)
        self._stage.add(rows)

    def finish_bundle(self) -> Iterator[WindowedValue]:
        if self._stage is not None:
            staged, self._stage = self._stage.finish(), None
            yield WindowedValue(staged, GlobalWindow().max_timestamp(), (GlobalWindow(),))


def unit(rows: pa.Table) -> str:
    """A name for the files that begin with these rows: where the first row came from, else nothing but its content.

    >>> unit(pa.table({"_source": ["a.csv"], "_offset": [0]})) == unit(pa.table({"_source": ["a.csv"], "_offset": [9]}))
    False
    """
    first = rows.slice(0, 1)
    if {"_source", "_offset"} <= set(rows.column_names):
        first = first.select(["_source", "_offset"])
    return hashlib.blake2b(repr(first.to_pylist()).encode(), digest_size=5).hexdigest()
