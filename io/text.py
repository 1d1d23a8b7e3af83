"""CSV and JSON Lines: the exact lines of a range of a file, as raw tables, without a copy of their bytes."""

import csv
import dataclasses
from collections.abc import Callable, Iterator
from typing import IO

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.io.places import File, option_delimiter
from pipelines.io.splits import ROWS, Split, bookkeeping
from pipelines.transforms.conform import OFFSET, RAW, SOURCE
from pipelines.transforms.delimited import Csv
from pipelines.transforms.errors import UserError
from pipelines.transforms.objects import Json
from pipelines.transforms.payloads import Form, marked, path
from pipelines.transforms.schema import RowSchema

CHUNK = 16 << 20
"""Bytes of a raw table. Its line ends, parsed columns and the next block take about ten times as much."""

LONGEST = 64 << 20
"""A record longer than this is taken for one that does not end."""

Ends = npt.NDArray[np.int64]
"""Where records end in a block: one past their line feed."""

SCAN = 8 << 20
"""Bytes looked at together for quotes."""

_BOM = b"\xef\xbb\xbf"
_RAW_TABLE = pa.schema([SOURCE, OFFSET, RAW])


@dataclasses.dataclass(frozen=True)
class Text:
    """A text file, opened for its header. columns: name to type, None where only the rows know (JSON)."""

    file: File
    form: Form
    start: int
    columns: dict[str, pa.DataType] | None

    @staticmethod
    def of(file: File, schema: RowSchema) -> "Text":
        with file.open() as handle:
            head = handle.read(64 << 10)
            start = len(_BOM) if head.startswith(_BOM) else 0
            if file.format == "csv":
                return _csv(file, schema, head, start, handle)
            if head[start:].lstrip().startswith(b"["):
                raise UserError(f"{file.source}: a JSON array; write one object a line (jq -c '.[]')")
            return Text(file, Json(), start, None)

    def splits(self, _wanted: tuple[str, ...], step: int) -> list[Split]:
        """Pieces of about ``step`` bytes that start and end between records; one piece where that cannot be known."""
        if self.file.codec:
            cuts: list[int] = []
            size = None
        else:
            size = self.file.size
            cuts = self._cuts(step) if size > step else []
        starts = [self.start, *cuts]
        stops = [*cuts, size]
        weights = [(stop or self.file.size) - start for start, stop in zip(starts, stops, strict=True)]
        return [
            Split(self.file, start, stop, form=self.form, bytes=max(weight, 0))
            for start, stop, weight in zip(starts, stops, weights, strict=True)
        ]

    def _cuts(self, step: int) -> list[int]:
        with self.file.open() as handle:
            if not (isinstance(self.form, Csv) and self.form.quote):
                return _line_cuts(handle, self.start, self.file.size, step)
            # Whether a line feed stands in quotes is known only from all quotes before it: a local file is scanned
            # once for them (at the speed of the disk), a remote one is read by one worker.
            return _quoted_cuts(handle, self.form, self.start, step) if self.file.local else []


def read(split: Split, chunk: int = CHUNK) -> Iterator[pa.Table]:
    """Raw tables: `_source`, `_offset` (the byte of the line's start in the decompressed file) and `_raw` (the line's
    exact bytes with its line end, not copied), about ``chunk`` bytes each. Blank lines are no rows. Raises UserError
    where an archive is damaged.
    """
    assert split.form is not None
    schema = marked(_RAW_TABLE, split.form)
    with split.file.open() as handle:
        for data, at in _blocks(handle, split, _splitter(split.form), chunk):
            for start in range(0, len(at.ends), ROWS):
                yield _table(data, at, slice(start, start + ROWS), split, schema)


@dataclasses.dataclass(frozen=True)
class _Lines:
    """offset: where the block starts in the file. starts, ends: the records in the block, blank lines left out."""

    offset: int
    starts: Ends
    ends: Ends


def _table(data: bytes, lines: _Lines, rows: slice, split: Split, schema: pa.Schema) -> pa.Table:
    starts, ends = lines.starts[rows], lines.ends[rows]
    buffer = pa.py_buffer(data)
    if (starts[1:] != ends[:-1]).any():  # blank lines between: only then are the bytes copied
        array = pa.array([data[start:end] for start, end in zip(starts, ends, strict=True)], pa.large_binary())
    else:
        offsets = np.append(starts, ends[-1:]).astype(np.int64)
        array = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(ends), [None, pa.py_buffer(offsets), buffer])
    source, _ = bookkeeping(split.file.source, 0, len(ends))
    return pa.Table.from_arrays([source, pa.array(starts + lines.offset), array], schema=schema)


def _blocks(handle: IO[bytes], split: Split, ends_of: "Splitter", chunk: int) -> Iterator[tuple[bytes, _Lines]]:
    """Blocks of whole records."""
    _skip(handle, split.start)
    offset, rest, left = split.start, b"", None if split.stop is None else split.stop - split.start
    while True:
        more = handle.read(chunk if left is None else min(chunk, left))
        left = left if left is None else left - len(more)
        data = rest + more
        ends = ends_of(data)
        whole = int(ends[-1]) if len(ends) else 0
        while len(data) - whole > (LONGEST if more else 0):
            ends = np.append(ends, _force(data, whole, ends_of, split, bool(more)))
            whole = int(ends[-1])
        if len(ends):
            lines = _not_blank(np.frombuffer(data, np.uint8), ends, offset)
            if len(lines.ends):
                yield data, lines
        if not more:
            return
        offset, rest = offset + whole, data[whole:]


def _force(data: bytes, start: int, ends_of: "Splitter", split: Split, more: bool) -> Ends:
    """Ends for a tail that has none: the file's last line, or a quote that never closes: its first line is one."""
    tail = data[start:]
    closed = ends_of(tail + b"\n")
    if not more and len(closed):
        return np.minimum(closed, len(tail)) + start
    line = tail.find(b"\n") + 1
    if not line and more:
        raise UserError(
            f"{split.file.source}: a line of over {LONGEST >> 20} MiB at byte {start}; is this {split.format}?"
        )
    ends = ends_of(tail[line:]) if line else np.empty(0, np.int64)
    return np.concatenate([[line or len(tail)], ends + line]) + start


def _skip(handle: IO[bytes], start: int) -> None:
    if handle.seekable():
        handle.seek(start)
    else:
        handle.read(start)


def _not_blank(data: npt.NDArray[np.uint8], ends: Ends, offset: int) -> _Lines:
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
    lengths = ends - starts
    if lengths.min() <= 2:
        feeds = data[ends - 1] == 10
        blank = ((lengths == 1) & feeds) | ((lengths == 2) & feeds & (data[np.maximum(ends - 2, 0)] == 13))
        starts, ends = starts[~blank], ends[~blank]
    return _Lines(offset, starts, ends)


Splitter = Callable[[bytes], Ends]


def _splitter(form: Form) -> Splitter:
    if isinstance(form, Csv) and form.quote:
        return lambda data: record_ends(data, form)
    return line_ends


def line_ends(data: bytes) -> Ends:
    """Where the lines end, one past each line feed."""
    return np.flatnonzero(np.frombuffer(data, np.uint8) == 10) + 1


def record_ends(data: bytes, form: Csv) -> Ends:
    """Where the CSV records end that are whole in a block which starts with a record.

    Quotes alternate between opening and closing wherever each opening one starts a field (or doubles the one before),
    and then whether a line feed is inside is the count of quotes before it. Any other text is matched record by record.

    >>> record_ends(b'1,"a\\nb"\\n2,c\\n3', Csv(("x", "y"))).tolist()
    [8, 12]
    """
    if not form.quote or form.quote.encode() not in data:
        return line_ends(data)
    array = np.frombuffer(data, np.uint8)
    quotes = np.flatnonzero(array == ord(form.quote))
    if _regular(array, quotes, form, 10):
        feeds = np.flatnonzero(array == 10)
        outside: Ends = feeds[np.searchsorted(quotes, feeds) % 2 == 0] + 1
        return outside
    ends, at = [], 0
    while (record := form.line.match(data, at)) is not None:
        at = record.end()
        ends.append(at)
    return np.array(ends, np.int64)


def _regular(array: npt.NDArray[np.uint8], quotes: Ends, form: Csv, before: int) -> bool:
    """Whether every opening quote starts a field or doubles the quote before it. before: the byte before the block."""
    opening = quotes[::2]
    prior = np.where(opening > 0, array[np.maximum(opening - 1, 0)], before)
    allowed = np.zeros(256, bool)
    allowed[[10, ord(form.delimiter), ord(form.quote)]] = True
    return bool(allowed[prior].all())


def _line_cuts(handle: IO[bytes], start: int, size: int, step: int) -> list[int]:
    cuts: list[int] = []
    for wanted in range(start + step, size, step):
        at = max(wanted, cuts[-1] if cuts else 0)
        handle.seek(at)
        while (block := handle.read(64 << 10)) and b"\n" not in block:
            at += len(block)
        cut = at + block.find(b"\n") + 1
        if block and cut < size and (not cuts or cut > cuts[-1]):
            cuts.append(cut)
    return cuts


def _quoted_cuts(handle: IO[bytes], form: Csv, start: int, step: int) -> list[int]:
    """Cuts between records by one scan of the file for quotes; none where quotes do not alternate plainly."""
    handle.seek(start)
    cuts: list[int] = []
    at, inside, before, wanted = start, False, 10, start + step
    while block := handle.read(SCAN):
        array = np.frombuffer(block, np.uint8)
        quotes = np.flatnonzero(array == ord(form.quote)) if form.quote.encode() in block else np.empty(0, np.int64)
        if not _regular(array, quotes[1:] if inside else quotes, form, before):
            return []
        if at + len(block) > wanted:
            feeds = np.flatnonzero(array == 10)
            ends = feeds[(np.searchsorted(quotes, feeds) + inside) % 2 == 0] + at + 1
            while (next_end := np.searchsorted(ends, wanted)) < len(ends):
                cuts.append(int(ends[next_end]))
                wanted = cuts[-1] + step
        inside, before, at = bool((len(quotes) + inside) % 2), block[-1], at + len(block)
    return [] if inside else [cut for cut in cuts if cut < at]


def _csv(file: File, schema: RowSchema, head: bytes, start: int, handle: IO[bytes]) -> Text:
    options = file.options
    null = () if options.null is None else (options.null,)
    form = Csv((), option_delimiter(file), options.quote, null)
    if options.header == "no":
        names = tuple(path(field) for field in schema.fields)
    else:
        while not len(ends := record_ends(head[start:], form)) and (more := handle.read(1 << 20)):
            head += more
        stop = start + int(ends[0]) if len(ends) else len(head)
        names = _header(head[start:stop], form, file, {path(field) for field in schema.fields})
        start = stop
    return Text(file, dataclasses.replace(form, columns=names), start, dict.fromkeys(names, pa.string()))


def _header(line: bytes, form: Csv, file: File, wanted: set[str]) -> tuple[str, ...]:
    try:
        text = line.decode().rstrip("\r\n")
    except UnicodeDecodeError:
        raise UserError(f"{file.source}: the header is not UTF-8 text; is this csv?") from None
    lines = [f"{part}\n" for part in text.split("\n")]
    rows = csv.reader(lines, delimiter=form.delimiter, quotechar=form.quote or None, quoting=0 if form.quote else 3)
    try:
        names = tuple(next(rows, []))
    except csv.Error as error:
        raise UserError(f"{file.source}: the header is not a CSV line ({error})") from None
    if not any(names):
        raise UserError(f"{file.source}: no header line; add ?header=no if the first line is data")
    if twice := [name for name in names if names.count(name) > 1 and name in wanted]:
        raise UserError(f"{file.source}: {names.count(twice[0])} columns are named {twice[0]!r}; rename all but one")
    before = [names[:at].count(name) for at, name in enumerate(names)]
    return tuple(f"{name}.{n + 1}" if n else name for name, n in zip(names, before, strict=True))
