"""The Parquet files of a table: written by workers into its folder, unseen until a commit names them.

zstd level 1, row groups of 131,072 rows (or of 8 MiB), dictionaries for text only. Measured on 3M rows of two texts, a
time, two integers and a float: 0.5 CPU-s and 44 MB; with dictionaries for all 0.6 and 49; snappy 0.4 and 58; zstd 3
0.8 and 43.
"""

import contextlib
import dataclasses
import datetime
import errno
import functools
import hashlib
import json
import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipelines.io.table import STAGED
from pipelines.transforms.errors import UserError

ROW_GROUP = 131_072
WAITING = 8 << 20
"""Bytes of rows that make a row group before there are so many: rows with sketches have 10 kB each."""
FILE_BYTES = 128 << 20
TEXT = 32


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder by URI: a local path, ``file://``, or an object store (its keys and endpoint from the environment)."""

    uri: str

    @property
    def local(self) -> Path | None:
        """Its path, if other programs of this machine can open it by one."""
        if "://" not in self.uri:
            return Path(self.uri).absolute()
        return Path(self.uri.removeprefix("file://")) if self.uri.startswith("file://") else None

    @property
    def files(self) -> pafs.FileSystem:
        """Paths are relative to the folder."""
        if self.local is not None:
            return pafs.SubTreeFileSystem(str(self.local), pafs.LocalFileSystem())
        if self.uri.startswith("gs://") and (emulator := os.environ.get("STORAGE_EMULATOR_HOST")):
            # as Google's own libraries have it; Arrow's asks for credentials first
            scheme, _, endpoint = emulator.rpartition("://")
            system = pafs.GcsFileSystem(anonymous=True, scheme=scheme or "http", endpoint_override=endpoint)
            return pafs.SubTreeFileSystem(self.uri.removeprefix("gs://"), system)
        system, path = pafs.FileSystem.from_uri(self.uri)
        return pafs.SubTreeFileSystem(path, system)

    def make(self) -> None:
        """Make a local folder; an object store needs none. Raises UserError where none can be."""
        if self.local is not None:
            try:
                self.local.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise self.told(error) from error

    def told(self, error: Exception) -> Exception:
        """What a disk says to its user, in one line; any other error as it is."""
        code, said = getattr(error, "errno", None), str(error)
        codes = {code} | {number for number in _TOLD if f"(os error {number})" in said}
        reason = next((_TOLD[number] for number in codes if number in _TOLD), None)
        return error if reason is None else UserError(f"table {self.uri}: {reason}, and run again")

    def unreachable(self, error: Exception) -> Exception:
        """Why it could not be opened: of an object store, what its own answer was."""
        if self.local is not None:
            return self.told(error)
        said = " ".join(re.sub(r"\x1b\[\d*m|↳", "", str(error)).split())[:300]
        return UserError(
            f"table {self.uri}: check its name, and the keys and endpoint in the environment. It said: {said}"
        )


_TOLD = {
    errno.ENOSPC: "no space left on the disk; free some or name another place",
    errno.EDQUOT: "the disk quota is used up; free some space or name another place",
    errno.EACCES: "not allowed to read and write there; change its permissions or name another place",
    errno.EPERM: "not allowed to read and write there; change its permissions or name another place",
    errno.EROFS: "the disk is read-only; name another place",
    errno.ENOTDIR: "part of that path is a file, and a table is a folder; name another place",
    errno.EEXIST: "it is a file, and a table is a folder; name another place",
}


class ParquetStage:
    """The files of one unit of work. Memory: the rows of one row group, and the tables as they come.

    A file is written under a hidden name beside its place, and moved there when it is whole. Its name ends in a digest
    of its bytes: an attempt with the rows in another order writes another file, never over one that may be committed.
    """

    def __init__(self, folder: Folder, name: str, schema: pa.Schema) -> None:
        self._folder, self._name, self._schema = folder, name, schema
        self._waiting: list[pa.Table] = []
        self._rows = 0
        self._file: _File | None = None
        self._done: list[dict[str, Any]] = []

    def add(self, rows: pa.Table) -> None:
        """Write rows; those of small tables wait until they fill a row group."""
        if not rows.num_rows:
            return
        self._waiting.append(rows.select(self._schema.names).cast(self._schema))
        self._rows += rows.num_rows
        if self._rows >= ROW_GROUP or sum(waiting.nbytes for waiting in self._waiting) >= WAITING:
            self._flush()

    def finish(self) -> pa.Table:
        """The files as STAGED."""
        if self._rows:
            self._flush()
        self._close()
        return pa.Table.from_pylist(self._done, STAGED)

    def _flush(self) -> None:
        rows, self._waiting, self._rows = pa.concat_tables(self._waiting), [], 0
        self._folder.make()
        with self._telling():
            if self._file is None:
                self._file = _File(self._folder, f"{self._name}-{len(self._done)}", self._schema)
            self._file.write(rows)
        if self._file is not None and self._file.bytes >= FILE_BYTES:
            self._close()

    def _close(self) -> None:
        if self._file is not None:
            with self._telling():
                self._done.append(self._file.close())
            self._file = None

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self._file is not None:
                self._file.abandon()
            raise self._folder.told(error) from error


class _File:
    """One Parquet file on its way: beside its place or, for an object store, in the temporary folder."""

    def __init__(self, folder: Folder, name: str, schema: pa.Schema) -> None:
        # A suffix by chance: two attempts at one unit, perhaps on two hosts, write apart until their files are whole.
        self._path = (folder.local or Path(tempfile.gettempdir())) / f".{name}-{secrets.token_hex(4)}"
        self._folder, self._name, self._schema = folder, name, schema
        self._footers: list[pq.FileMetaData] = []
        self._sink = pa.OSFile(str(self._path), "wb")
        self._writer = pq.ParquetWriter(
            self._sink,
            schema,
            compression="zstd",
            compression_level=1,
            use_dictionary=[field.name for field in schema if pa.types.is_string(field.type)] or False,
            metadata_collector=self._footers,
        )

    @property
    def bytes(self) -> int:
        return self._sink.tell()  # type: ignore[no-any-return]

    def write(self, rows: pa.Table) -> None:
        self._writer.write_table(rows, row_group_size=ROW_GROUP)

    def close(self) -> dict[str, Any]:
        self._writer.close()
        self._sink.close()
        with self._path.open("rb") as file:
            digest = hashlib.file_digest(file, functools.partial(hashlib.blake2b, digest_size=8)).hexdigest()
            os.fsync(file.fileno())  # before a commit names it
        name, size, footer = f"{self._name}-{digest}.parquet", self._path.stat().st_size, self._footers[0]
        if self._folder.local is not None:
            self._path.replace(self._folder.local / name)
        else:
            pafs.copy_files(str(self._path), name, pafs.LocalFileSystem(), self._folder.files)
            self._path.unlink()
        return {"path": name, "rows": footer.num_rows, "bytes": size, "stats": json.dumps(_stats(footer, self._schema))}

    def abandon(self) -> None:
        """Give back the space: the disk may be full."""
        self._path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._writer.close()
        with contextlib.suppress(OSError):
            self._sink.close()


def ordered(kind: pa.DataType) -> bool:
    """Whether files state the least and greatest value of such a column.

    Not for floats (a NaN is in no statistics, and to DuckDB the greatest value) nor decimals (read back as doubles).
    """
    return bool(
        pa.types.is_signed_integer(kind)
        or pa.types.is_date(kind)
        or pa.types.is_string(kind)
        or (pa.types.is_timestamp(kind) and kind.tz is not None)
    )


def _stats(footer: pq.FileMetaData, schema: pa.Schema) -> dict[str, Any]:
    """Statistics as a Delta log has them. A text past 32 characters is cut as least value and left out as greatest."""
    stats: dict[str, Any] = {"numRecords": footer.num_rows, "minValues": {}, "maxValues": {}, "nullCount": {}}
    groups = [footer.row_group(index) for index in range(footer.num_row_groups)]
    for index in range(footer.num_columns):
        name = footer.schema.column(index).path
        found = [group.column(index).statistics for group in groups]
        if name not in schema.names or not ordered(schema.field(name).type) or any(one is None for one in found):
            continue
        stats["nullCount"][name] = sum(one.null_count for one in found)
        full = [one for one, group in zip(found, groups, strict=True) if one.null_count < group.num_rows]
        if full and all(one.has_min_max for one in full):
            least, greatest = min(one.min for one in full), max(one.max for one in full)
            stats["minValues"][name] = _plain(least)
            if not isinstance(greatest, str) or len(greatest) <= TEXT:
                stats["maxValues"][name] = _plain(greatest)
    return stats


def _plain(value: Any) -> Any:
    if isinstance(value, datetime.datetime):
        return value.astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    return value.isoformat() if isinstance(value, datetime.date) else value[:TEXT] if isinstance(value, str) else value


def within(least: Any, greatest: Any, nulls: int | None, field: pa.Field) -> pc.Expression:
    """What is true of every row of a file, by the statistics of one column: readers skip the file by it."""
    if not ordered(field.type) or least is None or greatest is None:
        return pc.scalar(True)
    column = pc.field(field.name)
    values = (column >= pa.scalar(least, field.type)) & (column <= pa.scalar(greatest, field.type))
    return values if nulls == 0 else values | column.is_null()
