"""Payload bytes to columns: a batch of CSV lines at a time, never a row at a time.

The same parsers serve lines of files and messages of a log. A row that cannot be parsed is told apart by its position
and a reason; the rest of the batch goes on.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from pipelines.transforms.schema import RowSchema

Rows = npt.NDArray[np.int64]
"""Positions of rows in a batch."""

_FORMAT = b"payload"


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

    def reasons(self) -> tuple[pa.Array, pa.Array]:
        """Reason and detail of ``rows()``, in that order."""
        found = [self._found[row] for row in sorted(self._found)]
        return pa.array([reason for reason, _ in found], pa.string()), pa.array(
            [text for _, text in found], pa.string()
        )


@dataclasses.dataclass
class Parsed:
    """Columns as the payload has them (for CSV all text), for the rows at ``kept`` (None: all of them)."""

    columns: pa.Table
    kept: Rows | None
    faults: Faults


def salvage(values: pa.Array, convert: Callable[[pa.Array], pa.Array], to: pa.DataType) -> pa.Array:
    """``convert(values)`` with null where a value fails, found by halving: one bad value costs log2(n) small calls."""
    try:
        return convert(values)
    except (pa.ArrowInvalid, OverflowError):
        if len(values) == 1:
            return pa.nulls(1, to)
        half = len(values) // 2
        return pa.concat_arrays([salvage(values[:half], convert, to), salvage(values[half:], convert, to)])


def not_utf8(raw: pa.LargeBinaryArray) -> Rows:
    """Positions of the payloads that are not UTF-8 text."""
    text = salvage(raw, lambda values: values.cast(pa.large_string()), pa.large_string())
    if text.null_count == raw.null_count:
        return np.empty(0, np.int64)
    return positions(pc.and_(text.is_null(), raw.is_valid()))


def positions(mask: pa.BooleanArray | pa.ChunkedArray) -> Rows:
    """Where the mask is true."""
    return np.asarray(pc.indices_nonzero(mask)).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Csv:
    """Delimited text (RFC 4180). A field that is empty or one of ``null`` is null, unless it stands in quotes.

    quote: '' when quotes mean nothing. Bytes are UTF-8. Every column comes out as Arrow string.
    """

    name: ClassVar[str] = "csv"
    columns: tuple[str, ...]
    delimiter: str = ","
    quote: str = '"'
    null: tuple[str, ...] = ()

    def parse(self, raw: pa.LargeBinaryArray, schema: RowSchema, *, extra: bool = False) -> Parsed:
        """The schema's columns (extra: all columns). Each payload is one record, with or without its line end."""
        names = {field.column.path or field.name for field in schema.fields}
        wanted = [name for name in self.columns if extra or name in names]
        faults = Faults()
        faults.add(not_utf8(raw), "invalid utf-8", "bytes that are not UTF-8 text")
        table, bad = (None, {}) if faults else self._read(_joined(raw), wanted)
        kept: Rows | None = None
        if table is None or len(table) + len(bad) != len(raw) or (len(raw) and not self._whole(raw[-1].as_py())):
            # Some record would take its neighbours with it: find those, and parse the others without them.
            self._isolate(raw, faults)
            kept = np.setdiff1d(np.arange(len(raw)), faults.rows())
            table, bad = self._read(_joined(raw.take(pa.array(kept))), wanted)
            assert len(table) + len(bad) == len(kept)
        if bad:
            kept = np.arange(len(raw)) if kept is None else kept
            for row, fields in bad.items():
                few = "too few fields" if fields < len(self.columns) else "too many fields"
                faults.add([kept[row]], few, f"{fields} fields, the header has {len(self.columns)}")
            kept = np.delete(kept, list(bad))
        return Parsed(table, kept, faults)

    def _read(self, data: pa.Buffer, wanted: Sequence[str]) -> tuple[pa.Table, dict[int, int]]:
        bad: dict[int, int] = {}

        def skip(row: pa.csv.InvalidRow) -> str:
            bad[row.number - 1] = row.actual_columns
            return "skip"

        if not data.size:
            return pa.table({name: pa.array([], pa.string()) for name in wanted}), bad
        # Text for every type: Arrow's CSV reader parses some values otherwise than its casts (a decimal past its
        # precision comes out as another number), and a value must mean the same whatever its batch.
        table = pa.csv.read_csv(
            pa.BufferReader(data),
            pa.csv.ReadOptions(use_threads=False, block_size=data.size + 1, column_names=self.columns),
            pa.csv.ParseOptions(
                delimiter=self.delimiter,
                quote_char=self.quote or False,
                newlines_in_values=True,
                ignore_empty_lines=False,
                invalid_row_handler=skip,
            ),
            pa.csv.ConvertOptions(
                column_types=dict.fromkeys(self.columns, pa.string()),
                include_columns=list(wanted),
                check_utf8=False,
                null_values=["", *self.null],
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
            ),
        )
        return table, bad

    def _isolate(self, raw: pa.LargeBinaryArray, faults: Faults) -> None:
        doubtful = positions(pc.match_substring_regex(raw, f"[\r\n{re.escape(self.quote)}]"))
        for row in doubtful:
            if not self._whole(raw[row].as_py()):
                faults.add([row], "unterminated quote", "a quoted field that does not end, or a stray line break")

    def _whole(self, payload: bytes) -> bool:
        return self.record.fullmatch(payload) is not None

    @property
    def record(self) -> re.Pattern[bytes]:
        """One record with its line end, by the same rules as Arrow's parser: a quote opens only at a field's start."""
        return _record(self.delimiter, self.quote, "\r\n", r"(?:\r?\n|\r|\Z)")

    @property
    def line(self) -> re.Pattern[bytes]:
        """A record up to its line feed, as files are cut: there a carriage return is a byte like any other."""
        return _record(self.delimiter, self.quote, "\n", r"\n")


@functools.cache
def _record(delimiter: str, quote: str, breaks: str, end: str) -> re.Pattern[bytes]:
    d, q = re.escape(delimiter), re.escape(quote)
    quoted = f"{q}(?:[^{q}]++|{q}{q})*+{q}[^{d}{breaks}]*+|" if quote else ""
    field = f"(?:{quoted}[^{q}{d}{breaks}][^{d}{breaks}]*+|)"
    return re.compile(f"{field}(?:{d}{field})*+{end}".encode())


def _joined(raw: pa.LargeBinaryArray) -> pa.Buffer:
    """The payloads one after the other, each with a line end: no copy when they lie so already."""
    offsets = np.frombuffer(raw.buffers()[1], np.int64)[raw.offset : raw.offset + len(raw) + 1]
    data = raw.buffers()[2]
    if not len(raw) or data is None:
        return pa.py_buffer(b"\n" * len(raw))
    ends = offsets[1:] - 1
    if (np.diff(offsets) > 0).all() and (np.frombuffer(data, np.uint8)[ends[:-1]] == 10).all():
        return data.slice(int(offsets[0]), int(offsets[-1] - offsets[0]))
    joined = pc.binary_join_element_wise(
        bare(raw), pa.scalar(b"\n", pa.large_binary()), pa.scalar(b"", pa.large_binary())
    )
    return joined.buffers()[2]


def bare(raw: pa.LargeBinaryArray | pa.ChunkedArray) -> pa.LargeBinaryArray | pa.ChunkedArray:
    """The payloads without their line ends."""
    return pc.replace_substring_regex(raw, r"\r?\n\z", "")


Format = Csv


def marked(schema: pa.Schema, form: Format) -> pa.Schema:
    """The schema of raw tables that say themselves how to read their payloads."""
    text = json.dumps({"format": form.name, **dataclasses.asdict(form)})
    return schema.with_metadata({_FORMAT: text.encode()})


def form_of(schema: pa.Schema) -> Format | None:
    """How to read the payloads of a raw table, as ``marked`` noted it."""
    text = (schema.metadata or {}).get(_FORMAT)
    if text is None:
        return None
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in json.loads(text).items()}
    forms = {form.name: form for form in (Csv,)}
    return forms[fields.pop("format")](**fields)
