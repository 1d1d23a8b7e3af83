"""The Store: keyed rows of views for fast look-ups, written by the batch layer and by the speed layer.

A view's rows live in *generations*. The batch layer writes a new one beside the one that is read, and moves the view's
pointer to it in one step; generation ``LIVE`` belongs to the speed layer and outlives them all. Rows are Arrow tables;
a row's key is the view's ``by`` columns and ``window_start``, where null equals null and NaN equals NaN.

Delivery guarantee, for every implementation: **effectively once**. A write is an absolute value with a version and
replaces only an older version, so a repeated, late or reordered write changes nothing. A batch run that dies leaves
its generation unread; the next ``begin`` removes it and never gives its number again, so a writer that was thought
dead is refused instead of mixing its rows in.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol, Self

import pyarrow as pa

from pipelines.transforms.errors import UserError
from pipelines.transforms.ranges import EVERYTHING, Range, Ranges

LIVE = 0
"""The generation of the speed layer's rows."""


class StoreConflict(UserError):
    """Another run has taken this view over, or its rows are of another definition: nothing was written."""


@dataclasses.dataclass(frozen=True)
class Pointer:
    """What a view's readers see: the batch generation, and the event time (µs, UTC) up to which it speaks. note: what
    its run had to say with it."""

    generation: int
    boundary: int | None
    note: str | None = None


class Store(Protocol):
    """Keyed upsert and get with versions. Picklable: a worker opens its own connection.

    Any Arrow type comes back exactly as it was written (NaN, infinities, -0.0, decimals of 38 digits, nested lists).
    Raises UserError where the place cannot be opened, written or is full; StoreConflict where a run was overtaken.
    """

    def begin(self, view: str, schema: pa.Schema, keys: Sequence[str], replace: Ranges = (EVERYTHING,)) -> int:
        """Starts a batch generation and answers its number; removes what a dead run has left.

        The current generation's rows of windows that start outside ``replace`` are carried over (a row written later
        under the same key wins); a null window_start (Whole) is in every range. Raises UserError where they are of
        another schema: only a whole run can change that.
        """

    def resume(self, view: str, schema: pa.Schema, keys: Sequence[str]) -> None:
        """Makes the LIVE generation ready. Raises UserError where it holds rows of another schema."""

    def upsert(self, view: str, rows: pa.Table, *, generation: int, version: int | pa.ChunkedArray = 0) -> int:
        """Writes rows (all of the schema's columns, keys distinct) where newer than what is there, in one transaction.

        version: of all the rows, or one for each (int64).
        Answers how many were newer. Raises StoreConflict where the generation has been removed or has been read.
        """

    def delete(self, view: str, keys: pa.Table, *, generation: int, version: int) -> int:
        """Deletes the rows of these keys where older than ``version``; an older upsert does not bring them back."""

    def get(self, view: str, keys: pa.Table, *, generation: int | None = None) -> pa.Table:
        """The rows of these keys that exist, in the order asked. None: the pointer's generation, in one snapshot.

        Raises StoreConflict where the generation is gone (a run has replaced it: read the pointer again).
        """

    def scan(self, view: str, within: Range = EVERYTHING, *, generation: int | None = None) -> pa.Table:
        """The rows of the windows that start in a range (and those of Whole), in key order; otherwise as ``get``."""

    def pointer(self, view: str) -> Pointer | None:
        """What readers see; None before the first run has finished."""

    def flip(self, pointers: Mapping[str, Pointer]) -> None:
        """Moves the views' pointers to generations of ``begin``, all or none, and removes the former generations.

        Compare-and-set: raises StoreConflict where any of them has been overtaken by a later ``begin``. A repeated
        flip changes nothing, so it may be retried after an unknown outcome.
        """

    def prune(self, view: str, boundary: int) -> int:
        """Removes the LIVE rows of windows that end by ``boundary`` (µs): the batch layer speaks for them. Answers how
        many. Rows without a window_end stay; what is left of deleted ones goes a day later, as it holds off older
        writes.
        """

    def drop(self, view: str, generation: int) -> None:
        """Removes a generation that no pointer names: a run that was given up, or LIVE rows of an old definition."""

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def open_store(uri: str) -> Store:
    """The store at a URI: a path, or ``sqlite:///`` before one (a fourth slash makes it absolute): SQLite.

    Raises UserError for a URI of a system that is not there.
    """
    from pipelines.io.sqlite import SqliteStore

    scheme, separator, path = uri.partition("://")
    if not separator:
        return SqliteStore(uri)
    if scheme == "sqlite" and path.startswith("/") and len(path) > 1:
        return SqliteStore(path[1:])
    raise UserError(f"--store={uri}: no such store; give a path (data/store.db) or sqlite:///path")
