"""The Store's Beam side: finished view rows go into a generation, and what was written comes out."""

from collections.abc import Iterator
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.transforms.window import BoundedWindow
from apache_beam.utils.windowed_value import WindowedValue

from pipelines.io.store import Store, open_store

WRITTEN = pa.schema([("view", pa.string()), ("rows", pa.int64()), ("newer", pa.int64())])
"""What a bundle says: rows it was given, and how many were newer than the store's (a retried bundle's are not)."""

_ENOUGH = 64 << 20  # bytes held back for one transaction: the more rows together, the fewer pages written


@beam.typehints.with_input_types(pa.Table)
@beam.typehints.with_output_types(pa.Table)
class WriteStore(beam.DoFn):  # type: ignore[misc]
    """Rows of one view into one generation of the store at a URI: one transaction a bundle; yields WRITTEN tables.

    Guarantee: effectively once. A retried bundle writes the same version again, which changes nothing.
    Raises StoreConflict where another run has taken the view over.
    """

    def __init__(self, uri: str, view: str, generation: int, version: int = 0) -> None:
        self.uri, self.view, self.generation, self.version = uri, view, generation, version
        self._store: Store | None = None
        self._rows: list[pa.Table] = []
        self._waiting = 0
        self._done: dict[BoundedWindow, list[int]] = {}

    def setup(self) -> None:
        self._store = open_store(self.uri)

    def start_bundle(self) -> None:
        self._rows, self._waiting, self._done = [], 0, {}

    def process(self, rows: pa.Table, window: Any = beam.DoFn.WindowParam) -> None:
        self._rows.append(rows)
        self._waiting += rows.nbytes
        self._done.setdefault(window, [0, 0])[0] += rows.num_rows
        if self._waiting >= _ENOUGH:
            self._flush(window)

    def finish_bundle(self) -> Iterator[WindowedValue]:
        for window in list(self._done)[-1:]:
            self._flush(window)
        for window, (rows, newer) in self._done.items():
            written = pa.Table.from_pylist([{"view": self.view, "rows": rows, "newer": newer}], schema=WRITTEN)
            yield WindowedValue(written, window.max_timestamp(), (window,))

    def teardown(self) -> None:
        if self._store is not None:
            self._store.close()

    def _flush(self, window: BoundedWindow) -> None:
        assert self._store is not None
        if self._rows:
            rows = pa.concat_tables(self._rows)
            self._done[window][1] += self._store.upsert(
                self.view, rows, generation=self.generation, version=self.version
            )
        self._rows, self._waiting = [], 0
