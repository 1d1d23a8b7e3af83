"""What a bounded run reads: files or a lake, planned into splits that any worker can read. No Beam in here."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import pyarrow as pa


class Piece(Protocol):
    """A split. bytes: how much of the work it is. packed: stored smaller than its rows are, so they do not tell how far
    it was read."""

    @property
    def bytes(self) -> int: ...
    @property
    def packed(self) -> bool: ...


class History(Protocol):
    """A bounded source, looked at once. Reading is repeatable: a split always gives the same rows, with their source
    and offset. rows: None where nobody knows before reading. bytes: as stored. format: how the bytes of a refused row
    are read."""

    @property
    def splits(self) -> Sequence[Piece]: ...
    @property
    def rows(self) -> int | None: ...
    @property
    def bytes(self) -> int: ...
    @property
    def format(self) -> str: ...

    def read(self, split: Any) -> Iterator[pa.Table]:
        """The tables of a split, for the decoder of the kind."""
