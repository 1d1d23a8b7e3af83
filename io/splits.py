"""A split: the piece of a file that one worker reads at a time, and what every row of it carries."""

import dataclasses
import functools

import numpy as np
import pyarrow as pa

from pipelines.io.places import File
from pipelines.transforms.payloads import Form

ROWS = 1 << 21
"""Rows of a table, at most."""


@dataclasses.dataclass(frozen=True)
class Split:
    """start, stop: bytes of the decompressed file (text, Avro; stop None: to its end) or row groups (Parquet).
    first: the number of its first row (Parquet). columns: what to read (Parquet, Avro). rows: where a footer tells.
    bytes: how much of the work it is."""

    file: File
    start: int
    stop: int | None
    bytes: int
    rows: int | None = None
    first: int = 0
    columns: tuple[str, ...] = ()
    form: Form | None = None

    @property
    def format(self) -> str:
        return self.file.format

    @property
    def packed(self) -> bool:
        return bool(self.file.codec)


def bookkeeping(source: str, first: int, rows: int) -> tuple[pa.Array, pa.Array]:
    """`_source` and `_offset` of consecutive rows. The source's indices are one shared array of zeros."""
    indices = _zeros(1 << max(rows - 1, 0).bit_length()).slice(0, rows)
    return pa.DictionaryArray.from_arrays(indices, pa.array([source]), safe=False), pa.array(
        np.arange(first, first + rows)
    )


@functools.lru_cache(4)
def _zeros(length: int) -> pa.Array:
    return pa.array(np.zeros(length, np.int32))
