"""Tables on disk, so that one machine holds more than its memory: rows in hash partitions, states yet to be merged.

What lies on disk is unreadable: every segment is sealed by AES-GCM with a key that never leaves memory.
"""

import contextlib
import dataclasses
import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from pipelines.transforms.buckets import cut
from pipelines.transforms.errors import UserError
from pipelines.transforms.identity import identity_hashes

BATCH = 64 * 2**20
"""Bytes of rows that wait to be written, and of the small partitions that are read together. A single partition may
have twice as many."""

ROWS, BYTES = 2_000_000, 64 * 2**20
"""What one partition should hold at most: rows, and bytes of its source's files."""

PART = 256 * 2**10
"""Bytes of a table that are sealed at a time: no more of it is in memory twice."""

Segment = tuple[int, str, int, int, int]
"""One partition's share of one write: partition, file, first byte, bytes in the file, bytes in memory."""

_OPTIONS = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
_PREFIX = "pipelines-spill-"
_NONCE = 12


def partitions(rows: int | None, size: int | None) -> int:
    """How many partitions for so many rows in files of so many bytes; None where one is not known.

    >>> partitions(3_000_000, 2**20), partitions(None, 2**30), partitions(None, None)
    (2, 16, 64)
    """
    if rows is None and size is None:
        return 64
    return min(max(1, -(-(rows or 0) // ROWS), -(-(size or 0) // BYTES)), 1024)


@contextlib.contextmanager
def spill_folder(base: Path | None = None) -> Iterator[Path]:
    """A temporary folder (under base, else the system's) that is removed at the end, also after a failure.

    What a killed process left there is removed by the next one: a folder is locked as long as its process lives.
    """
    base = Path(tempfile.gettempdir()) if base is None else base
    for left in base.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), _locked(left):
            shutil.rmtree(left)
    try:
        fresh = Path(tempfile.mkdtemp(prefix=f"new-{_PREFIX}", dir=base))
    except OSError as error:
        raise UserError(f"cannot make a folder to spill rows in {base}: {error.strerror}") from None
    with _locked(fresh):
        folder = fresh.rename(base / fresh.name.removeprefix("new-"))  # found by others only now that it is locked
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@dataclasses.dataclass(frozen=True)
class Spill:
    """Where rows are spilled, by which identity and into how many partitions.

    Equal identities share a partition. Reading needs the object that wrote, or a pickled copy of it.
    """

    folder: Path
    identity: tuple[str, ...]
    partitions: int
    key: bytes = dataclasses.field(default_factory=lambda: secrets.token_bytes(32), repr=False)

    def read(self, segments: Iterable[Segment]) -> Iterator[pa.Table]:
        """All rows of the segments, in groups that share no identity, each of about BATCH bytes at most.

        Small partitions make a group together; one that outgrew its estimate is read several times, a share each.
        """
        with contextlib.ExitStack() as stack:
            files = _Files(self, stack)
            for group, shares in _groups(segments):
                for share in range(shares):
                    yield pa.concat_tables([self._share(files.table(segment), shares, share) for segment in group])

    def _share(self, table: pa.Table, shares: int, share: int) -> pa.Table:
        if shares == 1:
            return table
        numbers = identity_hashes(table, self.identity) // np.uint64(self.partitions) % np.uint64(shares)
        return table.filter(pa.array(numbers == share))


class _Files:
    """The files of a spill, each opened once, closed with the stack."""

    def __init__(self, spill: Spill, stack: contextlib.ExitStack) -> None:
        self._folder, self._aes, self._stack = spill.folder, AESGCM(spill.key), stack
        self._opened: dict[str, BinaryIO] = {}

    def table(self, segment: Segment) -> pa.Table:
        _, name, start, length, _ = segment
        if name not in self._opened:
            self._opened[name] = self._stack.enter_context(open(self._folder / name, "rb"))  # noqa: SIM115  (the stack)
        sealed = os.pread(self._opened[name].fileno(), length, start)
        return _unsealed(self._aes, sealed)


class Writer:
    """Takes tables and writes them by partition. Not for several threads; a file of its own."""

    def __init__(self, spill: Spill) -> None:
        self._spill, self._aes = spill, AESGCM(spill.key)
        self._waiting: list[pa.Table] = []
        self._segments: list[Segment] = []
        self._file: BinaryIO | None = None
        self._name = ""

    def add(self, table: pa.Table) -> None:
        self._waiting.append(table)
        if sum(waiting.nbytes for waiting in self._waiting) > BATCH:
            self._flush()

    def finish(self) -> list[Segment]:
        """Closes the file; the segments of everything that was added. Raises UserError where the disk is full."""
        self._flush()
        if self._file is not None:
            with _disk(self._spill.folder):
                self._file.close()
        return self._segments

    def _flush(self) -> None:
        tables, self._waiting = [table for table in self._waiting if len(table)], []
        if not tables:
            return
        table, n = pa.concat_tables(tables).unify_dictionaries(), self._spill.partitions
        numbers = identity_hashes(table, self._spill.identity) % np.uint64(n)
        for number, rows in cut(table, numbers.astype(np.int64), n):
            self._write(number, rows)

    def _write(self, number: int, rows: pa.Table) -> None:
        sealed = _sealed(self._aes, rows)
        with _disk(self._spill.folder):
            if self._file is None:
                descriptor, self._name = tempfile.mkstemp(dir=self._spill.folder)
                self._file = os.fdopen(descriptor, "wb")
            start = self._file.tell()
            self._file.write(sealed)
        self._segments.append((number, os.path.basename(self._name), start, len(sealed), rows.nbytes))


@dataclasses.dataclass(frozen=True)
class Shelf:
    """Where a process puts tables down: what stands for one is a table itself, of its place and size.

    A file stays until it is dropped or the folder is removed, so what was put may be taken several times.
    """

    folder: Path
    key: bytes = dataclasses.field(default_factory=lambda: secrets.token_bytes(32), repr=False)

    def put(self, table: pa.Table, onto: pa.Table | None = None) -> pa.Table:
        """What stands for a table from now on; onto: what already lies there, of the same schema, comes before it.

        Raises UserError where the disk is full.
        """
        if shelved(table):
            return table
        name, held, starts, lengths = _place(onto) if onto is not None else ("", 0, [], [])
        aes, rows = AESGCM(self.key), max(1, len(table) * PART // max(1, table.nbytes))
        with _disk(self.folder):
            if not name:
                descriptor, name = tempfile.mkstemp(dir=self.folder)
                os.close(descriptor)
            with open(name, "ab") as file:
                for start in range(0, max(1, len(table)), rows):
                    starts.append(file.tell())
                    lengths.append(file.write(_sealed(aes, table.slice(start, rows), len(lengths))))
        return pa.table([[name], [held + table.nbytes], [starts], [lengths]], schema=_SHELVED)

    def get(self, table: pa.Table) -> pa.Table:
        """What a table stands for; one that was never put is itself."""
        return pa.concat_tables(self.parts(table))

    def parts(self, table: pa.Table) -> list[pa.Table]:
        """The same in the pieces that it was put in, or smaller ones."""
        if not shelved(table):
            return [table]
        aes, parts = AESGCM(self.key), []
        name, _, starts, lengths = _place(table)
        with open(name, "rb") as file:
            for number, (start, length) in enumerate(zip(starts, lengths, strict=True)):
                file.seek(start)
                parts.append(_unsealed(aes, file.read(length), number))
        return parts

    def drop(self, table: pa.Table) -> None:
        """Gives back the space of what a table stands for."""
        if shelved(table):
            Path(table["_file"][0].as_py()).unlink(missing_ok=True)


def _sealed(aes: AESGCM, table: pa.Table, number: int = 0) -> bytes:
    """number: which part of several it is; unsealing asks for it."""
    sink, nonce = pa.BufferOutputStream(), secrets.token_bytes(_NONCE)
    with pa.ipc.new_stream(sink, table.schema, options=_OPTIONS) as stream:
        stream.write_table(table)
    return nonce + aes.encrypt(nonce, memoryview(sink.getvalue()).cast("B"), b"%d" % number)


def _unsealed(aes: AESGCM, sealed: bytes, number: int = 0) -> pa.Table:
    return pa.ipc.open_stream(aes.decrypt(sealed[:_NONCE], sealed[_NONCE:], b"%d" % number)).read_all()


_SHELVED = pa.schema(
    [("_file", pa.string()), ("_bytes", pa.int64()), ("_starts", _INTS := pa.list_(pa.int64())), ("_lengths", _INTS)]
)


def _place(table: pa.Table) -> tuple[str, int, list[int], list[int]]:
    """File and bytes of what lies on a shelf, and where in the file its parts start, and how long they are."""
    name, held, starts, lengths = (column[0].as_py() for column in table.columns)
    return name, held, starts, lengths


def shelved(table: pa.Table) -> bool:
    """Whether it stands for a table on a shelf."""
    return bool(table.schema == _SHELVED)


def size(table: pa.Table) -> int:
    """Bytes of a table, or of what it stands for on a shelf."""
    return int(table["_bytes"][0].as_py() if shelved(table) else table.nbytes)


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot spill rows to {folder}: {error.strerror}; free some space there, or set another TMPDIR"
        ) from None


def _groups(segments: Iterable[Segment]) -> Iterator[tuple[list[Segment], int]]:
    """Segments to be read together, and in how many shares: all of a partition, or of several small ones."""
    partitions: dict[int, list[Segment]] = {}
    for segment in segments:
        partitions.setdefault(segment[0], []).append(segment)
    group: list[Segment] = []
    for number in sorted(partitions):
        partition = sorted(partitions[number])
        if group and _size(group) + _size(partition) > BATCH:
            yield group, 1
            group = []
        group += partition
        if _size(group) > BATCH:
            yield group, -(-_size(group) // (2 * BATCH))
            group = []
    if group:
        yield group, 1


def _size(segments: list[Segment]) -> int:
    return sum(size for *_, size in segments)
