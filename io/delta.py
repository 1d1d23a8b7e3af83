"""Delta Lake as a Table: Parquet files and a transaction log, in a folder or an object store.

How a commit is made once. The log's ``txn`` action of app ``pipelines`` holds the last version. A commit first reads
it: only a later version may be written. It then writes with the same action and without delta-rs's own retries, so two
committers collide and the second one looks again. Either half alone is not enough: delta-rs writes a version twice when
the handle is fresh, and one that is stale replaces files it has not seen when it may retry.

How files get into it. Workers write final Parquet files, and the commit only lists them (``AddAction``), beside a
``RemoveAction`` for each file it replaces. A file that lies across the edge of a replaced range is read, and its
rows outside the range are written again in the same commit, those before and those after apart: the next run
over a neighbouring range then finds files that end where it begins.

Tables are not partitioned by date. A year of days would be 365 files at least, whatever their size, and every commit
and every reader pays for each (see docs/benchmarks.md); least and greatest values of each file prune as well.
"""

import contextlib
import dataclasses
import datetime
import errno
import functools
import hashlib
import json
import re
import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import deltalake
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction, create_table_with_add_actions

from pipelines.io.table import STAGED, Between, Commit, Replace
from pipelines.transforms.errors import UserError

APP = "pipelines"
ROW_GROUP = 131_072
FILE_BYTES = 128 << 20
ATTEMPTS = 10
KEEP_HOURS = 168

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_TEXT = 32


@dataclasses.dataclass(frozen=True)
class Delta:
    """A Delta table, opened by URI. See ``pipelines.io.table.Table`` for what each method promises.

    Replaced files stay for a week, for readers that still hold the older snapshot, and go with the next commit after.

    >>> import tempfile
    >>> table = Delta.open(tempfile.mkdtemp() + "/t", pa.schema([("x", pa.int64())]))
    >>> stage = table.stage("all", token="a", version=table.next_version())
    >>> stage.add(pa.table({"x": [1, 2]}))
    >>> table.commit(stage.finish(), token="a", version=1, replace="everything").rows
    2
    >>> table.dataset().to_table().to_pydict()
    {'x': [1, 2]}
    """

    uri: str
    declared: pa.Schema | None = None

    @staticmethod
    def open(uri: str, schema: pa.Schema | None = None) -> "Delta":
        """Raises UserError for a place that cannot be a table or, without a schema, is none."""
        table = Delta(uri, None if schema is None else _storable(schema, uri))
        if table.declared is None and table._load() is None:
            raise UserError(f"table {uri}: there is none. Run the pipeline that writes it, or name another place")
        return table

    @property
    def schema(self) -> pa.Schema:
        if self.declared is not None:
            return self.declared
        return pa.schema(self._existing().schema().to_arrow())

    def check(self, replace: Replace) -> None:
        self._check(self._load(), replace)

    def next_version(self) -> int:
        return self._last(self._load()) + 1

    def stage(self, unit: str, *, token: str, version: int) -> "DeltaStage":
        if not re.fullmatch(r"[\w-]*", unit + token):
            raise ValueError(f"unit {unit!r}, token {token!r}: letters, digits, - and _ only")
        return DeltaStage(self, f"{_prefix(version)}{token}-{unit}")

    def commit(self, staged: pa.Table, *, token: str, version: int, replace: Replace) -> Commit:
        """Each attempt looks first whether it is there: so after a conflict, and after an outcome nobody knows."""
        before, failed = None, None
        for _ in range(ATTEMPTS):
            table = self._load()
            if (done := self._done(table, token, version)) is not None:
                self._sweep(version)
                return done
            if failed is not None and not _lost(failed, before, table):
                raise _told(failed, self.uri) from failed
            before = table
            try:
                self._write(table, staged, token, version, replace)
                failed = None
            except Exception as error:  # whatever it was, the commit may have landed
                failed = error
        raise UserError(f"table {self.uri}: others kept committing to it, {ATTEMPTS} times over. Run again") from failed

    def dataset(self) -> pads.Dataset:
        return self._dataset(_files(self._existing()))

    def history(self) -> list[Commit]:
        table = self._load()
        return [] if table is None else list(_commits(table))

    # The commit

    def _done(self, table: deltalake.DeltaTable | None, token: str, version: int) -> Commit | None:
        if table is None or version > self._last(table):
            return None
        ours = next((commit for commit in _commits(table) if commit.version == version), None)
        if ours is not None and ours.token == token:
            return ours
        raise UserError(f"table {self.uri}: another run committed version {version} meanwhile. Run again")

    def _write(
        self, table: deltalake.DeltaTable | None, staged: pa.Table, token: str, version: int, replace: Replace
    ) -> None:
        """One try at the transaction."""
        self._check(table, replace)
        _check_staged(staged, replace)
        note = {"token": token, "version": version, "rows": pc.sum(staged["rows"]).as_py() or 0}
        note |= {"files": staged.num_rows, "replace": str(replace)}
        properties = deltalake.CommitProperties(
            custom_metadata={APP: note},
            app_transactions=[deltalake.Transaction(APP, version)],
            max_commit_retries=0,
        )
        schema = deltalake.Schema.from_arrow(self.schema)
        if table is None:
            self._local_folder()
            create_table_with_add_actions(self.uri, schema, _adds(staged), "error", commit_properties=properties)
            return
        self._sweep(self._last(table))
        if replace == "everything":
            table.create_write_transaction([*_adds(staged)], "overwrite", schema, commit_properties=properties)
            return
        gone, kept = self._replaced(table, replace, token, version) if isinstance(replace, Between) else ([], [])
        actions: list[AddAction | RemoveAction] = [*_adds(pa.concat_tables([staged, *kept]))]
        actions += [_remove(file) for file in gone]
        table.create_write_transaction(actions, "append", schema, commit_properties=properties)

    def _replaced(
        self, table: deltalake.DeltaTable, between: Between, token: str, version: int
    ) -> tuple[list[dict[str, Any]], list[pa.Table]]:
        """The files with rows in the range, and the files written anew that hold their other rows."""
        low, high = _moment(between.start), _moment(between.end)
        gone, torn = [], []
        for file in _files(table):
            match _place(file, between.column, low, high):
                case "inside":
                    gone.append(file)
                case "across":
                    gone.append(file)
                    torn.append(file)
        column, kept = pc.field(between.column), []
        sides = [("before", column < low)] if low else []
        sides += [("after", column >= high)] if high else []
        for side, rows in [*sides, ("null", column.is_null())] if torn else []:
            stage = self.stage(f"kept-{side}", token=token, version=version)
            for batch in self._dataset(torn).scanner(filter=rows, batch_readahead=1, fragment_readahead=1).to_batches():
                stage.add(pa.Table.from_batches([batch]))
            kept.append(stage.finish())
        return gone, kept

    def _sweep(self, version: int) -> None:
        """Delete the files of a version that no commit has named, and what was replaced more than a week ago."""
        table = self._existing()
        active = {file["path"] for file in _files(table)}
        replaced = set(table.vacuum(retention_hours=0, enforce_retention_duration=False))
        expired = set(table.vacuum(retention_hours=KEEP_HOURS, enforce_retention_duration=False)) - active
        for info in self._folder.get_file_info(pafs.FileSelector("")):
            name = info.base_name
            orphan = name.lstrip(".").startswith(_prefix(version)) and name not in active | replaced
            if orphan or name in expired:
                with contextlib.suppress(FileNotFoundError):
                    self._folder.delete_file(name)

    # The columns

    def _check(self, table: deltalake.DeltaTable | None, replace: Replace) -> None:
        if isinstance(replace, Between) and not pa.types.is_timestamp(self.schema.field(replace.column).type):
            raise ValueError(f"table {self.uri}: {replace.column} is no timestamp column")
        if table is None or replace == "everything" or self.declared is None:
            return
        if (change := _change(pa.schema(table.schema().to_arrow()), self.declared)) is not None:
            raise UserError(
                f"table {self.uri}: {change}; only a run that replaces the whole table may change its columns. "
                "Run without --from and --to, or write to another place"
            )

    # The place

    @functools.cached_property
    def _local(self) -> Path | None:
        if "://" not in self.uri:
            return Path(self.uri)
        return Path(self.uri.removeprefix("file://")) if self.uri.startswith("file://") else None

    @functools.cached_property
    def _folder(self) -> pafs.FileSystem:
        if self._local is not None:
            return pafs.SubTreeFileSystem(str(self._local.absolute()), pafs.LocalFileSystem())
        system, path = pafs.FileSystem.from_uri(self.uri)
        return pafs.SubTreeFileSystem(path, system)

    def _local_folder(self) -> Path | None:
        """The table's folder if it is local, made if need be."""
        if self._local is not None:
            try:
                self._local.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise _told(error, self.uri) from None
        return self._local

    def _load(self) -> deltalake.DeltaTable | None:
        try:
            return deltalake.DeltaTable(self.uri)
        except TableNotFoundError:
            if self._local is not None and self._local.is_file():
                raise UserError(f"table {self.uri}: it is a file; a table is a folder. Name another place") from None
            return None
        except (DeltaError, OSError) as error:
            raise _told(error, self.uri) from error

    def _existing(self) -> deltalake.DeltaTable:
        if (table := self._load()) is None:
            raise UserError(f"table {self.uri}: there is none. Run the pipeline that writes it, or name another place")
        return table

    @staticmethod
    def _last(table: deltalake.DeltaTable | None) -> int:
        return 0 if table is None else table.transaction_version(APP) or 0

    def _dataset(self, files: list[dict[str, Any]]) -> pads.Dataset:
        """Not ``DeltaTable.to_pyarrow_dataset``: it finds no row by a column that has no statistics."""
        layout, schema = pads.ParquetFileFormat(), pa.schema(self._existing().schema().to_arrow())
        fragments = [
            layout.make_fragment(file["path"], self._folder, partition_expression=_bounds(file, schema))
            for file in files
        ]
        return pads.FileSystemDataset(fragments, schema, layout, self._folder)


class DeltaStage:
    """The Parquet files of one unit: zstd level 1, row groups of 128k rows, a new file after 128 MiB.

    A file is written beside its place and moved there when it is whole. Its name ends in a digest of its bytes:
    a second attempt that gets the rows in another order writes another file, never over one that may be committed.
    """

    def __init__(self, table: Delta, name: str) -> None:
        self._table = table
        self._name = name
        self._schema = table.schema
        self._waiting: list[pa.Table] = []
        self._rows = 0
        self._file: _File | None = None
        self._done: list[dict[str, Any]] = []

    def add(self, rows: pa.Table) -> None:
        if not rows.num_rows:
            return
        self._waiting.append(rows.select(self._schema.names).cast(self._schema))
        self._rows += rows.num_rows
        if self._rows >= ROW_GROUP:
            self._flush()

    def finish(self) -> pa.Table:
        if self._rows:
            self._flush()
        self._close()
        return pa.Table.from_pylist(self._done, STAGED)

    def _flush(self) -> None:
        rows, self._waiting, self._rows = pa.concat_tables(self._waiting), [], 0
        try:
            if self._file is None:
                self._file = _File(self._table._local_folder(), self._name, self._schema)
            self._file.write(rows)
        except OSError as error:
            raise _told(error, self._table.uri) from error
        if self._file.bytes >= FILE_BYTES:
            self._close()

    def _close(self) -> None:
        if self._file is not None:
            try:
                self._done.append(self._file.close(self._table._folder))
            except OSError as error:
                raise _told(error, self._table.uri) from error
            self._file = None


class _File:
    """One Parquet file on its way: on disk beside its place, or in the temporary folder for an object store."""

    def __init__(self, folder: Path | None, name: str, schema: pa.Schema) -> None:
        self._name, self._schema, self._in_place = name, schema, folder is not None
        # A suffix by chance: two attempts at one unit, perhaps on two hosts, write apart until their files are whole.
        self._path = (folder or Path(tempfile.gettempdir())) / f".{name}-{secrets.token_hex(4)}"
        self._sink = pa.OSFile(str(self._path), "wb")
        self._footers: list[pq.FileMetaData] = []
        options = {"compression": "zstd", "compression_level": 1}
        self._writer = pq.ParquetWriter(self._sink, schema, metadata_collector=self._footers, **options)

    @property
    def bytes(self) -> int:
        return self._sink.tell()  # type: ignore[no-any-return]

    def write(self, rows: pa.Table) -> None:
        self._writer.write_table(rows, row_group_size=ROW_GROUP)

    def close(self, folder: pafs.FileSystem) -> dict[str, Any]:
        self._writer.close()
        self._sink.close()
        with self._path.open("rb") as file:
            digest = hashlib.file_digest(file, functools.partial(hashlib.blake2b, digest_size=8)).hexdigest()
        name, size = f"{self._name}-{digest}.parquet", self._path.stat().st_size
        if self._in_place:
            self._path.replace(self._path.with_name(name))
        else:
            pafs.copy_files(str(self._path), name, pafs.LocalFileSystem(), folder)
            self._path.unlink()
        rows = self._footers[0].num_rows
        return {"path": name, "rows": rows, "bytes": size, "stats": json.dumps(_stats(self._footers[0], self._schema))}


def _lost(error: Exception, before: deltalake.DeltaTable | None, now: deltalake.DeltaTable | None) -> bool:
    """Whether a commit failed because another one came first: then it is made again, from what is there now."""
    created = before is None and now is not None
    moved = before is not None and now is not None and now.version() != before.version()
    return created or (moved and isinstance(error, CommitFailedError))


def _told(error: Exception, uri: str) -> Exception:
    """The user's part of what a disk says, in one line; every other error as it is."""
    code = error.errno if isinstance(error, OSError) else None
    said = str(error)
    if code == errno.ENOSPC or "os error 28" in said:
        return UserError(f"table {uri}: no space left on the disk. Free some, or name another place, and run again")
    if code in (errno.EACCES, errno.EPERM, errno.EROFS) or "os error 13" in said or "os error 30" in said:
        return UserError(f"table {uri}: not allowed to write there. Name another place, or change its permissions")
    if code in (errno.ENOTDIR, errno.EEXIST) or "os error 20" in said:
        return UserError(f"table {uri}: part of that path is a file; a table is a folder. Name another place")
    return error


def _prefix(version: int) -> str:
    return f"part-{version:08d}-"


def _moment(micros: int | None) -> datetime.datetime | None:
    return None if micros is None else _EPOCH + datetime.timedelta(microseconds=micros)


def _storable(schema: pa.Schema, uri: str) -> pa.Schema:
    """The schema as Delta stores it: 32-bit offsets, no dictionaries, no unsigned integers."""
    for field in schema:
        try:
            deltalake.Schema.from_arrow(pa.schema([field]))
        except Exception:
            raise ValueError(f"table {uri}: column {field.name} is {field.type}, which Delta cannot store") from None
    return pa.schema(deltalake.Schema.from_arrow(schema).to_arrow())


def _change(there: pa.Schema, here: pa.Schema) -> str | None:
    """The first difference between the columns of a table and of what is written to it, in words."""
    for name in sorted({*there.names, *here.names}, key=[*here.names, *there.names].index):
        if name not in there.names:
            return f"column {name!r} ({here.field(name).type}) is new"
        if name not in here.names:
            return f"column {name!r} ({there.field(name).type}) is no longer written"
        old, new = there.field(name), here.field(name)
        if (old.type, old.nullable) != (new.type, new.nullable):
            words = [f"{field.type}{'' if field.nullable else ' not null'}" for field in (old, new)]
            return f"column {name!r} is {words[0]} there and {words[1]} here"
    return None


def _check_staged(staged: pa.Table, replace: Replace) -> None:
    """A path twice would count once, and rows outside the replaced range would be there twice: both are our faults."""
    paths = staged["path"].to_pylist()
    if len(paths) != len(set(paths)):
        raise ValueError(f"a file staged twice: {sorted(path for path in paths if paths.count(path) > 1)[0]}")
    if isinstance(replace, Between):
        low, high = _moment(replace.start), _moment(replace.end)
        for path, text in zip(paths, staged["stats"].to_pylist(), strict=True):
            stats = json.loads(text)
            least, greatest = (stats[end].get(replace.column) for end in ("minValues", "maxValues"))
            if least is None or (low and _read(least) < low) or (high and _read(greatest) >= high):
                raise ValueError(f"{path}: {replace.column} from {least} to {greatest} is not within {replace}")


def _place(
    file: dict[str, Any], column: str, low: datetime.datetime | None, high: datetime.datetime | None
) -> Literal["inside", "across", "outside"]:
    """Where a file's rows lie, as far as its statistics tell."""
    least, greatest = file.get(f"min.{column}"), file.get(f"max.{column}")
    if least is None or greatest is None:
        return "across"
    if (low is not None and greatest < low) or (high is not None and least >= high):
        return "outside"
    whole = (low is None or least >= low) and (high is None or greatest < high)
    return "inside" if whole and file[f"null_count.{column}"] == 0 else "across"


def _adds(staged: pa.Table) -> list[AddAction]:
    now = time.time_ns() // 1_000_000
    return [AddAction(row["path"], row["bytes"], {}, now, True, row["stats"]) for row in staged.to_pylist()]


def _remove(file: dict[str, Any]) -> RemoveAction:
    return RemoveAction(file["path"], True, time.time_ns() // 1_000_000, file["size_bytes"], {})


def _files(table: deltalake.DeltaTable) -> list[dict[str, Any]]:
    """The table's files with their statistics: path, size_bytes, null_count.x, min.x, max.x."""
    return pa.table(table.get_add_actions(flatten=True)).to_pylist()  # type: ignore[no-any-return]


def _commits(table: deltalake.DeltaTable) -> Iterator[Commit]:
    for entry in table.history():
        if (note := entry.get(APP)) is not None:
            yield Commit(**note, at=entry["timestamp"])


# Statistics: the least and greatest values of a file, for columns whose order nobody disputes. Not for floats (a NaN is
# in no statistics, and the greatest value to DuckDB) nor decimals (a JSON number is read as a double).


def _plain(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_signed_integer(kind)
        or pa.types.is_date(kind)
        or pa.types.is_string(kind)
        or (pa.types.is_timestamp(kind) and kind.tz is not None)
    )


def _stats(footer: pq.FileMetaData, schema: pa.Schema) -> dict[str, Any]:
    """Delta's statistics from a Parquet footer. Texts longer than 32 characters have a least value and no greatest."""
    stats: dict[str, Any] = {"numRecords": footer.num_rows, "minValues": {}, "maxValues": {}, "nullCount": {}}
    groups = [footer.row_group(index) for index in range(footer.num_row_groups)]
    for index in range(footer.num_columns):
        name = footer.schema.column(index).path
        if name not in schema.names or not _plain(schema.field(name).type):
            continue
        found = [group.column(index).statistics for group in groups]
        if any(one is None or not one.has_null_count for one in found):
            continue
        stats["nullCount"][name] = sum(one.null_count for one in found)
        full = [one for one, group in zip(found, groups, strict=True) if one.null_count < group.num_rows]
        if full and all(one.has_min_max for one in full):
            least, greatest = min(one.min for one in full), max(one.max for one in full)
            stats["minValues"][name] = _write(least)
            if not (isinstance(greatest, str) and len(greatest) > _TEXT):
                stats["maxValues"][name] = _write(greatest)
    return stats


def _write(value: Any) -> Any:
    if isinstance(value, datetime.datetime):
        return value.astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    return value.isoformat() if isinstance(value, datetime.date) else value[:_TEXT] if isinstance(value, str) else value


def _read(text: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(text)


def _bounds(file: dict[str, Any], schema: pa.Schema) -> pc.Expression:
    """What is true of every row of a file, for readers to skip it by."""
    every = pc.scalar(True)
    for field in schema:
        least, greatest = file.get(f"min.{field.name}"), file.get(f"max.{field.name}")
        if _plain(field.type) and least is not None and greatest is not None:
            column = pc.field(field.name)
            within = (column >= pa.scalar(least, field.type)) & (column <= pa.scalar(greatest, field.type))
            every &= within if file[f"null_count.{field.name}"] == 0 else within | column.is_null()
    return every
