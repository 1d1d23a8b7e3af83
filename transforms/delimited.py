"""CSV payloads to columns of text: a batch of records at a time."""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from pipelines.transforms.payloads import Faults, Parsed, bare, path, positions, refuse_not_utf8
from pipelines.transforms.schema import RowSchema


@dataclasses.dataclass(frozen=True)
class Csv:
    """Delimited text (RFC 4180). A field that is empty or one of ``null`` is null, unless it stands in quotes.

    quote: '' when quotes mean nothing. Bytes are UTF-8. Every column comes out as Arrow string.

    >>> class Row:
    ...     b: str | None
    >>> raw = pa.array([b"1,2", b"3", b'4,"x,y"'], pa.large_binary())
    >>> parsed = Csv(("a", "b")).parse(raw, RowSchema.of(Row))
    >>> parsed.columns["b"].to_pylist(), parsed.kept.tolist(), parsed.faults.reasons()[0].to_pylist()
    (['2', 'x,y'], [0, 2], ['too few fields'])
    """

    name: ClassVar[str] = "csv"
    columns: tuple[str, ...]
    delimiter: str = ","
    quote: str = '"'
    null: tuple[str, ...] = ()

    def parse(self, raw: pa.LargeBinaryArray, schema: RowSchema, *, extra: bool = False) -> Parsed:
        """The schema's columns (extra: all columns). Each payload is one record, with or without its line end."""
        names = {path(field) for field in schema.fields}
        wanted = [name for name in self.columns if extra or name in names]
        faults = Faults()
        refuse_not_utf8(raw, faults)
        self._refuse_empty(raw, faults)
        table: pa.Table | None = None
        wrong: dict[int, int] = {}
        if not len(faults) and self._plain(raw):
            table, wrong = self._records(raw, wanted)
        if table is None or len(table) + len(wrong) != len(raw):
            self._refuse_torn(raw, faults)
            whole = raw.take(pa.array(faults.others(len(raw)))) if len(faults) else raw
            table, wrong = self._records(whole, wanted)
            assert len(table) + len(wrong) == len(whole), "one whole record did not parse as one"
        kept = faults.others(len(raw)) if len(faults) else np.arange(len(raw))
        for row, fields in wrong.items():
            few = "too few fields" if fields < len(self.columns) else "too many fields"
            faults.add([kept[row]], few, f"{fields} fields, the header has {len(self.columns)}")
        return Parsed(table, np.delete(kept, list(wrong)) if len(faults) else None, faults)

    def _plain(self, raw: pa.LargeBinaryArray) -> bool:
        """Whether a count of records shows that each payload is one: a quote that never closes takes the records after
        it, unless it is in the last payload, and a carriage return on its own makes one more.
        """
        return not len(raw) or (self._whole(raw[-1].as_py()) and not _stray_returns(_joined(raw)))

    def _records(self, raw: pa.LargeBinaryArray, wanted: Sequence[str]) -> tuple[pa.Table, dict[int, int]]:
        """The wanted columns, and how many fields those payloads have that have the wrong number."""
        wrong: dict[int, int] = {}

        def skip(row: pa.csv.InvalidRow) -> str:
            wrong[row.number - 1] = row.actual_columns
            return "skip"

        if not len(raw):
            return pa.table({name: pa.array([], pa.string()) for name in wanted}), wrong
        data = _joined(raw)
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
        return table, wrong

    def _refuse_empty(self, raw: pa.LargeBinaryArray, faults: Faults) -> None:
        # Arrow takes an empty line for a record of nulls, whatever the number of columns.
        lengths = pc.binary_length(raw)
        if len(self.columns) > 1 and len(raw) and pc.min(lengths).as_py() <= 2:
            rows = positions(pc.equal(pc.binary_length(bare(raw)), 0))
            faults.add(rows, "too few fields", f"an empty line, the header has {len(self.columns)}")

    def _refuse_torn(self, raw: pa.LargeBinaryArray, faults: Faults) -> None:
        """Faults for the payloads that are not one record; only those with quotes or breaks within are looked at."""
        doubtful = positions(pc.match_substring_regex(bare(raw), f"[\r\n{re.escape(self.quote)}]"))
        for row in doubtful:
            if not self._whole(raw[int(row)].as_py()):
                faults.add([row], "unterminated quote", "a quoted field that does not end, or a stray line break")

    def _whole(self, payload: bytes) -> bool:
        return self.record.fullmatch(payload) is not None

    @property
    def record(self) -> re.Pattern[bytes]:
        """One record with its line end, by the same rules as Arrow's parser: a quote opens only at a field's start."""
        return _record(self.delimiter, self.quote, "\r\n", r"(?:\r?\n|\r?\Z)")

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


def _stray_returns(data: pa.Buffer) -> bool:
    array = np.frombuffer(data, np.uint8)
    returns = np.flatnonzero(array == 13)
    return bool(len(returns)) and bool((array[np.minimum(returns + 1, len(array) - 1)] != 10).any())


def _joined(raw: pa.LargeBinaryArray) -> pa.Buffer:
    """The payloads one after the other, each with a line end: no copy when they lie so already."""
    offsets = np.frombuffer(raw.buffers()[1], np.int64)[raw.offset : raw.offset + len(raw) + 1]
    data = raw.buffers()[2]
    if data is None:
        return pa.py_buffer(b"\n" * len(raw))
    ends = offsets[1:] - 1
    if (np.diff(offsets) > 0).all() and (np.frombuffer(data, np.uint8)[ends[:-1]] == 10).all():
        return data.slice(int(offsets[0]), int(offsets[-1] - offsets[0]))
    feed, nothing = pa.scalar(b"\n", pa.large_binary()), pa.scalar(b"", pa.large_binary())
    return pc.binary_join_element_wise(bare(raw), feed, nothing).buffers()[2]
