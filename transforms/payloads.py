"""What the parsers of payloads share: the same ones serve lines of files and messages of a log, a batch at a time.

A payload that cannot be parsed is told apart by its position and a reason, and the rest of the batch goes on.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.transforms.schema import Field, RowSchema

Rows = npt.NDArray[np.int64]
"""Positions of rows in a batch."""

_FORM = b"payload"


class Faults:
    """What is wrong with which row of a batch; the first fault of a row stands."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[str, str]] = {}

    def add(self, rows: Sequence[int] | Rows, reason: str, detail: str | Sequence[str]) -> None:
        details = [detail] * len(rows) if isinstance(detail, str) else detail
        for row, text in zip(rows, details, strict=True):
            self._found.setdefault(int(row), (reason, text))

    def __len__(self) -> int:
        return len(self._found)

    def rows(self) -> Rows:
        return np.array(sorted(self._found), dtype=np.int64)

    def others(self, length: int) -> Rows:
        """The rows of a batch of this length that have no fault."""
        good = np.ones(length, bool)
        good[list(self._found)] = False
        return np.flatnonzero(good)

    def reasons(self) -> tuple[pa.Array, pa.Array]:
        """Reason and detail of ``rows()``, in that order."""
        found = [self._found[row] for row in sorted(self._found)]
        return pa.array([reason for reason, _ in found], pa.string()), pa.array(
            [text for _, text in found], pa.string()
        )


@dataclasses.dataclass(frozen=True)
class Fault:
    """Rows whose value of one column cannot be taken, and why: "invalid int in n", "naive time in at", "null in n".
    missing: there is no value, or none is left, where there must be one.
    """

    rows: Rows
    reason: str
    missing: bool = False


@dataclasses.dataclass
class Parsed:
    """Columns as the payload has them, by path, for the rows at ``kept`` (None: all). faults: rows that did not parse.
    lost: values that are of another kind than declared and null in ``columns``, at positions in it.
    """

    columns: pa.Table
    kept: Rows | None
    faults: Faults
    lost: list[Fault] = dataclasses.field(default_factory=list)


class Form(Protocol):
    """How payloads are read."""

    name: ClassVar[str]

    def parse(self, raw: pa.LargeBinaryArray, schema: RowSchema, *, extra: bool = False) -> Parsed:
        """The columns of the schema (extra: the unknown ones too, as columns or as JSON in `_extra`)."""


def path(field: Field) -> str:
    """Where the payload has the column: a name, or names joined by dots."""
    return field.column.path or field.name


def salvage(values: pa.Array, convert: Callable[[pa.Array], pa.Array], to: pa.DataType) -> pa.Array:
    """``convert(values)`` with null where a value fails, found by halving: one bad value costs log2(n) small calls."""
    try:
        return convert(values)
    except (pa.ArrowInvalid, OverflowError):
        if len(values) == 1:
            return pa.nulls(1, to)
        half = len(values) // 2
        return pa.concat_arrays([salvage(values[:half], convert, to), salvage(values[half:], convert, to)])


def positions(mask: pa.BooleanArray | pa.ChunkedArray) -> Rows:
    """Where the mask is true."""
    if not len(mask):  # Arrow crashes on no chunks
        return np.zeros(0, np.int64)
    return np.asarray(pc.indices_nonzero(mask)).astype(np.int64)


def untexted(kind: pa.DataType) -> pa.DataType:
    """The type with bytes in the place of text."""
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pa.binary() if pa.types.is_string(kind) else pa.large_binary()
    if pa.types.is_list(kind):
        return pa.list_(untexted(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(child.name, untexted(child.type)) for child in kind])
    return kind


def refuse_not_utf8(raw: pa.LargeBinaryArray, faults: Faults) -> None:
    """Faults for the payloads that are not UTF-8 text."""
    text = salvage(raw, lambda values: values.cast(pa.large_string()), pa.large_string())
    if text.null_count > raw.null_count:
        rows = positions(pc.and_(text.is_null(), raw.is_valid()))
        faults.add(rows, "invalid utf-8", "bytes that are not UTF-8 text")


def bare(raw: pa.LargeBinaryArray | pa.ChunkedArray) -> pa.LargeBinaryArray | pa.ChunkedArray:
    """The payloads without their line ends."""
    return pc.replace_substring_regex(raw, r"\r?\n\z", "")


def marked(schema: pa.Schema, form: Form) -> pa.Schema:
    """The schema of raw tables that say themselves how their payloads are read."""
    fields = dataclasses.asdict(form)  # type: ignore[call-overload]
    return schema.with_metadata({_FORM: json.dumps({"form": form.name, **fields}).encode()})


def mark(schema: pa.Schema) -> dict[str, object] | None:
    """What ``marked`` noted: the form's name and its fields."""
    text = (schema.metadata or {}).get(_FORM)
    return None if text is None else json.loads(text)
