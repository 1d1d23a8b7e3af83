"""The Store's Beam side: finished view rows go into a generation, and what was written comes out."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import apache_beam as beam
import pyarrow as pa
import pyarrow.compute as pc
from apache_beam.transforms.window import BoundedWindow
from apache_beam.utils.windowed_value import WindowedValue

from pipelines.io.store import LIVE, Store, open_store
from pipelines.transforms import query
from pipelines.transforms.expressions import quote
from pipelines.transforms.ranges import Range

WRITTEN = pa.schema([("view", pa.string()), ("rows", pa.int64()), ("newer", pa.int64())])
"""What a bundle says: rows it was given, and how many were newer than the store's (a retried bundle's are not)."""

ROWS_BITS = 35
"""Of a version in a stream: the rows that an answer is of, behind the epoch of the job."""

AGAIN = 600.0
"""Seconds after the start of a worker in which it may write again what was written before."""

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


def epoch(seconds: float) -> int:
    """What the versions of a job begin with: a job that starts later than another by 8 s writes over it.

    >>> epoch(1_700_000_000) << ROWS_BITS < 2**63
    True
    """
    return int(seconds) >> 3


@dataclasses.dataclass(eq=False)
class Deliver(beam.DoFn):  # type: ignore[misc]
    """Answers into the LIVE generation of a view in a store; gone: sessions out of it. One transaction a bundle.

    sessions: the windows of a key never overlap. A job that goes on from a checkpoint may find sooner than before that
    two of them are one; then what begins inside of an answer is a part that was told before, and is deleted.

    Guarantee: effectively once. The version of an answer is the rows that it is of, which only grow; that of a session
    that another absorbed is past any. So a bundle that is tried again, or a job that goes on from a checkpoint and cuts
    its panes differently, changes nothing that is newer.
    """

    uri: str
    view: str
    keys: tuple[str, ...]
    epoch: int
    gone: bool = False
    sessions: bool = False
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        super().__init__()
        self._store: Store | None = None
        self._rows: list[pa.Table] = []

    def setup(self) -> None:
        self._store, self._since = open_store(self.uri), self.clock()

    def start_bundle(self) -> None:
        self._rows = []

    def process(self, rows: pa.Table) -> None:
        if len(rows):
            self._rows.append(rows)

    def finish_bundle(self) -> None:
        assert self._store is not None
        if not self._rows:
            return
        rows, first, several = pa.concat_tables(self._rows), self.epoch << ROWS_BITS, len(self._rows) > 1
        self._rows = []
        if self.gone:
            self._store.delete(self.view, rows, generation=LIVE, version=first + (1 << ROWS_BITS) - 1)
            return
        if several:  # a key may have answers of several panes
            keys = ", ".join(map(quote, self.keys))
            newest = f"SELECT * FROM rows QUALIFY row_number() OVER (PARTITION BY {keys} ORDER BY _rows DESC) = 1"
            rows = query.run(newest, {"rows": rows})
        self._store.upsert(self.view, rows, generation=LIVE, version=pc.add(rows["_rows"], first))
        if self.sessions and self.clock() - self._since < AGAIN:
            self._delete_parts(self._store, rows)

    def _delete_parts(self, store: Store, rows: pa.Table) -> None:
        start, end = (times.cast(pa.int64()) for times in (rows["window_start"], rows["window_end"]))
        held = store.scan(self.view, Range(pc.min(start).as_py() + 1, pc.max(end).as_py()), generation=LIVE)
        keys = [quote(name) for name in self.keys]
        same = [f"held.{key} IS NOT DISTINCT FROM rows.{key}" for key in keys[:-1]]
        inside = "held.window_start > rows.window_start AND held.window_start < rows.window_end"
        parts = f"SELECT {', '.join(keys)} FROM held SEMI JOIN rows ON {' AND '.join([*same, inside])}"
        if len(gone := query.run(parts, {"held": held, "rows": rows})):
            store.delete(self.view, gone, generation=LIVE, version=((self.epoch + 1) << ROWS_BITS) - 1)

    def teardown(self) -> None:
        if self._store is not None:
            self._store.close()
