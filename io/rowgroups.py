"""Parquet in: whole row groups to a worker, only the columns that the schema names, types as the file has them."""

import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Iterator
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.io.places import File
from pipelines.io.splits import ROWS, Split, bookkeeping
from pipelines.transforms.conform import OFFSET, SOURCE
from pipelines.transforms.errors import UserError

BYTES = 64 << 20
"""Bytes of a table's columns, about."""

STEP = 1 << 17
"""Rows that are decoded at once, and become one chunk of a table."""


@dataclasses.dataclass(frozen=True)
class RowGroups:
    """A Parquet file, opened for its footer. columns: name to type."""

    file: File
    footer: pq.FileMetaData
    columns: dict[str, pa.DataType]

    @staticmethod
    def of(file: File) -> "RowGroups":
        """Raises UserError for a file that is cut off or damaged."""
        with _opened(file) as parquet:
            schema = parquet.schema_arrow
            if twice := [name for name in schema.names if schema.names.count(name) > 1]:
                raise UserError(f"{file.source}: two columns are named {twice[0]!r}; write it again with other names")
            return RowGroups(file, parquet.metadata, {field.name: field.type for field in schema})

    def splits(self, wanted: tuple[str, ...], step: int) -> list[Split]:
        """Runs of row groups of about ``step`` stored bytes of the wanted columns; one where the file is compressed."""
        found: list[Split] = []
        first = start = rows = stored = 0
        for group in range(self.footer.num_row_groups):
            rows += self.footer.row_group(group).num_rows
            stored += self._stored(group, wanted)
            last = group + 1 == self.footer.num_row_groups
            if last or (stored >= step and not self.file.codec):
                found.append(Split(self.file, start, group + 1, stored, rows, first, wanted))
                first, start, rows, stored = first + rows, group + 1, 0, 0
        return found

    def _stored(self, group: int, wanted: tuple[str, ...]) -> int:
        with _damage(self.file):
            meta = self.footer.row_group(group)
            columns = (meta.column(index) for index in range(meta.num_columns))
            return sum(column.total_compressed_size for column in columns if _under(column.path_in_schema, wanted))


def _under(path: str, wanted: tuple[str, ...]) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in wanted)


def read(split: Split) -> Iterator[pa.Table]:
    """Tables of the split's columns, `_source` and `_offset` (the row's number in the file, from 0): about 2M rows or
    64 MB each, in chunks. Raises UserError where the file is damaged.
    """
    at, gathered, size = split.first, [], 0
    groups = range(split.start, split.stop or 0)
    with _opened(split.file, groups, split.columns) as parquet:
        # One thread: who reads ahead is the caller. Small steps: what dictionaries unfold to is known only afterwards.
        for batch in parquet.iter_batches(STEP, row_groups=groups, columns=list(split.columns), use_threads=False):
            gathered.append(batch)
            size += batch.nbytes
            if len(gathered) * STEP >= ROWS or size >= BYTES:
                yield _table(split.file.source, at, gathered)
                at, gathered, size = at + sum(map(len, gathered)), [], 0
        if gathered:
            yield _table(split.file.source, at, gathered)


def _table(source: str, first: int, batches: list[pa.RecordBatch]) -> pa.Table:
    table = pa.Table.from_batches(batches)
    name, offset = bookkeeping(source, first, len(table))
    return table.append_column(SOURCE, name).append_column(OFFSET, offset)


@contextlib.contextmanager
def _opened(file: File, groups: range = range(0), columns: tuple[str, ...] = ()) -> Iterator[pq.ParquetFile]:
    """groups, columns: what will be read, where text of which these have codes comes as codes."""
    with _damage(file), _seekable(file) as handle:
        # Of a remote file all columns of a split are fetched side by side, before they are decoded. Of a local one
        # that would only hold them (400 MB for a file of 30M rows).
        how = {"pre_buffer": not file.local, "buffer_size": 1 << 18 if file.local else 0}
        parquet = pq.ParquetFile(handle, **how)
        if coded := _coded(parquet, groups, columns):
            parquet = pq.ParquetFile(handle, metadata=parquet.metadata, read_dictionary=coded, **how)
        yield parquet


def _coded(parquet: pq.ParquetFile, groups: range, columns: tuple[str, ...]) -> list[str]:
    """The columns of text of which the file has codes, all through: to read these as they are costs half."""
    found = []
    meta = parquet.metadata
    texts = {field.name for field in parquet.schema_arrow if pa.types.is_string(field.type)}
    for index in range(meta.num_columns):
        name = meta.schema.column(index).path
        if name in columns and name in texts:
            stored = [meta.row_group(group).column(index) for group in groups]
            # Codes have at most 4 bytes; where the dictionary grew too large, text follows them.
            small = (part.has_dictionary_page and part.total_uncompressed_size < 4 * part.num_values for part in stored)
            found += [name] if all(small) else []
    return found


@contextlib.contextmanager
def _damage(file: File) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file.source}: damaged or cut-off Parquet ({reason}); write it again") from error


@contextlib.contextmanager
def _seekable(file: File) -> Iterator[IO[bytes] | str]:
    """Parquet is read from its end: what is compressed around it is unpacked to a temporary file first."""
    if file.local and not file.codec:
        yield file.path
        return
    with file.open() as handle:
        if not file.codec:
            yield handle
            return
        with tempfile.TemporaryFile() as unpacked:
            shutil.copyfileobj(handle, unpacked, 1 << 20)
            unpacked.seek(0)
            yield unpacked
