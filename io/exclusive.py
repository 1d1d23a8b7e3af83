"""Folders in which a file is there whole or not at all, and can be created once: a local one, or an object store's.

Whoever creates a file first has it, whatever other processes try: a commit can be the creation of a file.
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol

import pyarrow as pa

from pipelines.transforms.errors import UserError

SCHEMES = ("s3", "s3a", "gs", "gcs", "memory")
"""Where a file can be created only if it is not there, in one step. Elsewhere fsspec looks first and then writes."""

ASIDE = ".new-"
"""How the names of files begin that are not there yet; a killed process leaves them."""

OWNER = "owner.lock"
"""The file that the owner of a local folder locks; it holds its process number."""

_SYNCS = 8


class Folder(Protocol):
    """The files of one folder, by name. The folder is made at the first write.

    alone: whether its owner is the only one that writes to it.
    """

    @property
    def alone(self) -> bool: ...

    def own(self) -> contextlib.AbstractContextManager[None]:
        """While it is held, no other process of this machine can hold it. Raises UserError if one does, or cannot."""

    def names(self) -> list[str]: ...

    def read(self, name: str) -> pa.Buffer:
        """Raises FileNotFoundError."""

    def write(self, name: str, stored: pa.Buffer) -> None:
        """Makes the file, or replaces it. It is durable once a file that is created after it is."""

    def create(self, name: str, content: bytes, *, after: list[str]) -> bool:
        """False if it is there already. When this returns, it and the files named in ``after`` are durable."""

    def remove(self, names: Iterable[str]) -> None:
        """Removes them in this order; one that is not there is no fault."""


def folder(uri: str) -> Folder:
    """The folder of a URI: a path, or of one of SCHEMES.

    Raises UserError for any other, and for one whose package is missing.

    >>> import tempfile
    >>> place = folder(tempfile.mkdtemp())
    >>> place.create("a", b"mine", after=[]), place.create("a", b"yours", after=[])
    (True, False)
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return _Local(Path(uri))
    if scheme in ("file", "local"):
        return _Local(Path(rest))
    if scheme not in SCHEMES:
        raise UserError(
            f"{uri}: {scheme}:// cannot create a file exclusively, so two processes could commit the same; "
            f"use a local folder, s3:// or gs://"
        )
    import fsspec

    try:
        return _Remote(uri, *fsspec.core.url_to_fs(uri))
    except (ImportError, ValueError) as error:
        raise UserError(f"{uri}: {' '.join(str(error).split())}") from error


@dataclasses.dataclass(frozen=True)
class _Local:
    """A folder of this machine. Files come into being whole: written aside, then given their name."""

    folder: Path
    alone: ClassVar[bool] = True

    @contextlib.contextmanager
    def own(self) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder / OWNER, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written: {error.strerror}") from None
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.pread(descriptor, 32, 0).decode() or "unknown"
                raise UserError(f"{self.folder}: the pipeline is running as pid {owner}; end that first") from None
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            yield
        finally:
            os.close(descriptor)

    def names(self) -> list[str]:
        try:
            return os.listdir(self.folder)
        except FileNotFoundError:
            return []

    def read(self, name: str) -> pa.Buffer:
        return pa.py_buffer((self.folder / name).read_bytes())

    def write(self, name: str, stored: pa.Buffer) -> None:
        """Not on disk yet; but a file that a turn may name already is only replaced by one that is."""
        aside = self._aside(memoryview(stored))
        if (self.folder / name).exists():
            _sync(aside)
        aside.replace(self.folder / name)

    def create(self, name: str, content: bytes, *, after: list[str]) -> bool:
        """The files are synced side by side, so that they share the disk's journal writes, and before the turn has its
        name. Then one sync of the folder makes all names durable: the file system keeps the order of a folder's names.
        """
        aside = self._aside(content)
        try:
            with concurrent.futures.ThreadPoolExecutor(_SYNCS) as pool:
                list(pool.map(_sync, (aside, *(self.folder / file for file in after))))
            created = True
            try:
                os.link(aside, self.folder / name)
            except FileExistsError:
                created = False
        finally:
            aside.unlink()
        _sync(self.folder)  # also a name that is there already: who made it may have died before
        return created

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            (self.folder / name).unlink(missing_ok=True)

    def _aside(self, content: bytes | memoryview) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=ASIDE, dir=self.folder)
        with open(descriptor, "wb", buffering=0) as file:
            while content:
                content = content[file.write(content) :]
        return Path(name)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclasses.dataclass(frozen=True)
class _Remote:
    """A folder by fsspec: an object is there whole or not at all, and durable when its write returns."""

    uri: str
    files: Any
    path: str
    alone: ClassVar[bool] = False

    @contextlib.contextmanager
    def own(self) -> Iterator[None]:
        """Owned by nobody; but the store must refuse to create a file twice, which some imitations do not."""
        probe = f"{ASIDE}{os.getpid()}"
        try:
            self.remove([probe])
            refused = self._create(probe, b"1") and not self._create(probe, b"2")
            self.remove([probe])
        except Exception as error:  # each store has errors of its own: no rights, no bucket, no network
            told = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(f"{self.uri}: cannot be written: {told}") from error
        if not refused:
            raise UserError(f"{self.uri}: this store replaces a file that was to be created only; use another")
        yield

    def names(self) -> list[str]:
        self.files.invalidate_cache(self.path)
        try:
            return [name.rpartition("/")[2] for name in self.files.ls(self.path, detail=False)]
        except FileNotFoundError:
            return []

    def read(self, name: str) -> pa.Buffer:
        return pa.py_buffer(self.files.cat_file(f"{self.path}/{name}"))

    def write(self, name: str, stored: pa.Buffer) -> None:
        self.files.pipe_file(f"{self.path}/{name}", stored.to_pybytes())

    def create(self, name: str, content: bytes, *, after: list[str]) -> bool:
        return self._create(name, content)

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                self.files.rm_file(f"{self.path}/{name}")

    def _create(self, name: str, content: bytes) -> bool:
        try:
            self.files.pipe_file(f"{self.path}/{name}", content, mode="create")
        except FileExistsError:
            return False
        return True
