"""Turns: what a micro-batch commits. A folder of immutable state files and, for each turn, one file that names them.

A turn is there when its ``turn-0000000012.json`` is, and that file is only ever created, never replaced: two processes
cannot commit the same turn. Whatever a dead process left is named by no turn, so nobody reads it, and ``sweep`` removes
it. A folder is local, or anywhere that fsspec can create a file exclusively::

    turns = Turns("data/live/flights")
    with turns.own():
        last = turns.last()
        number = last.number + 1 if last else 1
        turns.write(f"open-{number}", rows)                   # in any process
        turns.commit(Turn(number, (f"open-{number}",), {"watermark": 5}))
        turns.sweep()
"""

import collections
import contextlib
import dataclasses
import json
import re
import secrets
import threading
from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from pipelines.io.exclusive import ASIDE, folder
from pipelines.transforms.errors import UserError

CACHE = 256 << 20
"""Bytes of state that a process keeps in memory, as it lies on disk."""

_FORMAT = 1
_INTENT = "next.json"
_OPTIONS = pa.ipc.IpcWriteOptions(unify_dictionaries=True)
_OURS = re.compile(rf"turn-(\d{{10}})\.json|[\w=-][\w.=-]*\.arrow|{re.escape(ASIDE)}\w+")


class Overtaken(UserError):
    """Another process has committed this turn."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """One commit. files: names of all the state it consists of. facts: what else it says, as JSON holds it."""

    number: int
    files: tuple[str, ...]
    facts: dict[str, Any]

    def encoded(self) -> bytes:
        """The turn as bytes: equal turns give equal bytes."""
        shown = {"format": _FORMAT, "number": self.number, "files": self.files, "facts": self.facts}
        return json.dumps(shown, sort_keys=True, allow_nan=False, separators=(",", ":")).encode()


class Turns:
    """The turns of one pipeline. Picklable; safe for threads.

    Guarantee: a turn is committed once and by one process, and when ``commit`` returns, it and all its files are on
    disk. A process that is killed at any point leaves the last turn and the one before whole.

    >>> import tempfile
    >>> turns = Turns(tempfile.mkdtemp())
    >>> turns.write("open-1", pa.table({"x": [1, 2]}))
    >>> turns.commit(Turn(1, ("open-1",), {"watermark": 5}))
    >>> turns.last()
    Turn(number=1, files=('open-1',), facts={'watermark': 5})
    >>> turns.read("open-1")["x"].to_pylist()
    [1, 2]
    """

    def __init__(self, uri: str) -> None:
        """uri: of a folder, made at the first write. Raises UserError where turns cannot be kept."""
        self.uri = uri.rstrip("/") if len(uri) > 1 else uri
        self._folder = folder(self.uri)
        self._synced: frozenset[str] = frozenset()
        self._before: frozenset[str] | None = None
        self._taker = secrets.token_hex(8)

    def __getstate__(self) -> dict[str, Any]:
        """A copy takes part in the turns that this one intends."""
        return {**vars(self), "_synced": frozenset(), "_before": None}

    def own(self) -> contextlib.AbstractContextManager[None]:
        """While it is held, no other process on this machine can: call it before anything is read.

        Raises UserError if one does. A lock dies with its process. A remote folder has none: there the second process
        is Overtaken at its first commit.
        """
        return self._folder.own()

    def last(self) -> Turn | None:
        """The turn with the greatest number; None before the first. Raises UserError if it is damaged."""
        numbers = _numbers(self._folder.names())
        if not numbers:
            return None
        turn = self._turn(numbers[-1])
        self._synced = frozenset(turn.files)
        return turn

    def turn(self, number: int) -> Turn:
        """The turn of a number: of those that are left, which are at least the last two. Raises Overtaken for an older
        one: who asks for it takes part in a turn that others have left behind.
        """
        numbers = _numbers(self._folder.names())
        if numbers and number < numbers[0]:
            raise self._overtaken(number + 1)
        return self._turn(number)

    def intend(self, text: str) -> None:
        """Notes what the next turn is about, for the workers that take it, which have copies of this. It is no part of
        any turn. What is there now is what a ``sweep`` may remove once one of them has committed.
        """
        self._before = frozenset(self._folder.names())
        self._folder.write(_INTENT, pa.py_buffer(f"{self._taker}\n{text}".encode()))

    def intended(self) -> str:
        """What ``intend`` noted last. Raises Overtaken where another process has done so since: no turn is made of two
        processes' parts.
        """
        taker, _, text = str(self._read(_INTENT).to_pybytes(), "utf-8").partition("\n")
        if taker != self._taker:
            raise Overtaken(f"{self.uri}: another process takes the next turn; let only one run this pipeline")
        return text

    def write(self, name: str, table: pa.Table) -> None:
        """Writes a state file, any Arrow types; on disk when the turn that names it is committed.

        The same name always means the same rows: whoever writes it again, after a failure, changes nothing.
        """
        file = f"{name}.arrow"
        if not _OURS.fullmatch(file):
            raise ValueError(f"state file {name!r}: letters, digits, . _ = and - only")
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema, options=_OPTIONS) as stream:
            stream.write_table(table.combine_chunks())
        stored = sink.getvalue()
        self._folder.write(file, stored)
        _KEPT.put((self.uri, name), pa.ipc.open_file(stored).read_all(), stored.size)

    def read(self, name: str) -> pa.Table:
        """The rows of a state file; from memory where this process has written or read it lately.

        Raises UserError for a file that is missing or damaged.
        """
        if (kept := _KEPT.get((self.uri, name))) is not None:
            return kept
        stored = self._read(f"{name}.arrow")
        try:
            table = pa.ipc.open_file(stored).read_all()
        except pa.ArrowInvalid as error:
            raise self._damaged(f"{name}.arrow", error) from None
        _KEPT.put((self.uri, name), table, stored.size)
        return table

    def commit(self, turn: Turn) -> None:
        """Makes the turn the last. Its number follows the last one's; the first may have any.

        Committing the same turn again does nothing. Raises Overtaken where its number, or a later one, is another
        process's.
        """
        before = self._folder.names()
        numbers = _numbers(before)
        if numbers and turn.number > numbers[-1] + 1:
            raise ValueError(f"turn {turn.number} does not follow turn {numbers[-1]}")
        fresh = sorted(f"{name}.arrow" for name in set(turn.files) - self._synced)
        encoded, file = turn.encoded(), _file(turn.number)
        if not self._folder.create(file, encoded, after=fresh) and self._read(file).to_pybytes() != encoded:
            raise self._overtaken(turn.number)
        if _numbers(self._folder.names())[-1] > turn.number:
            raise self._overtaken(turn.number)
        self._synced, self._before = frozenset(turn.files), frozenset(before)

    def sweep(self) -> None:
        """Removes every file of ours that neither the last turn names nor the one before.

        For the owner; at the start, or at any time after a commit, also beside the writes of the next turn: then it
        removes only what was there before that commit. Whoever else wrote that comes too late to commit it.
        """
        before = self._before
        names = self._folder.names()
        if before is None:
            before = frozenset(names) if self._folder.alone else frozenset()
        numbers = _numbers(names)[-2:]
        keep = {_file(number) for number in numbers}
        keep |= {f"{name}.arrow" for number in numbers for name in self._turn(number).files}
        gone = [name for name in names if name in before and name not in keep and _OURS.fullmatch(name)]
        gone.sort(key=lambda name: name.endswith(".arrow"))
        self._folder.remove(gone)  # turns first: none outlives its files
        for name in gone:
            _KEPT.drop((self.uri, name.removesuffix(".arrow")))

    def clear(self) -> None:
        """Removes every turn, latest first, and its files: for the owner."""
        gone = sorted((name for name in self._folder.names() if _OURS.fullmatch(name)), reverse=True)
        self._folder.remove(sorted(gone, key=lambda name: not name.startswith("turn-")))
        self._synced, self._before = frozenset(), None

    def _turn(self, number: int) -> Turn:
        file = _file(number)
        try:
            shown = json.loads(self._read(file).to_pybytes())
            if shown["format"] != _FORMAT:
                raise UserError(f"{self.uri}/{file}: format {shown['format']}, of another release; run that one")
            return Turn(shown["number"], tuple(shown["files"]), shown["facts"])
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(file, error) from None

    def _read(self, file: str) -> pa.Buffer:
        try:
            return self._folder.read(file)
        except FileNotFoundError:
            raise UserError(f"{self.uri}/{file}: missing; restore it, or {self._anew}") from None

    def _damaged(self, file: str, error: Exception) -> UserError:
        return UserError(f"{self.uri}/{file}: damaged ({str(error).splitlines()[0]}); restore it, or {self._anew}")

    @property
    def _anew(self) -> str:
        return f"remove {self.uri} to start anew from the log"

    def refuse_overtaken(self, number: int) -> None:
        """Raises Overtaken where a turn of another process follows the one of this number."""
        if _numbers(self._folder.names())[-1:] > [number]:
            raise self._overtaken(number + 1)

    def _overtaken(self, number: int) -> Overtaken:
        return Overtaken(
            f"{self.uri}: another process has committed turn {number}; let only one run this pipeline, and start again"
        )


def _file(number: int) -> str:
    return f"turn-{number:010d}.json"


def _numbers(names: Iterable[str]) -> list[int]:
    """The turns among files, in order."""
    found = (_OURS.fullmatch(name) for name in names)
    return sorted(int(match[1]) for match in found if match and match[1])


class _Kept:
    """State files in memory: the lately used ones, of so many bytes at most."""

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self._tables: collections.OrderedDict[tuple[str, str], tuple[pa.Table, int]] = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[str, str]) -> pa.Table | None:
        with self._lock:
            if key not in self._tables:
                return None
            self._tables.move_to_end(key)
            return self._tables[key][0]

    def put(self, key: tuple[str, str], table: pa.Table, size: int) -> None:
        with self._lock:
            self._drop(key)
            self._tables[key] = table, size
            self.size += size
            while self.size > self.limit:
                self._drop(next(iter(self._tables)))

    def drop(self, key: tuple[str, str]) -> None:
        with self._lock:
            self._drop(key)

    def clear(self) -> None:
        with self._lock:
            self._tables.clear()
            self.size = 0

    def _drop(self, key: tuple[str, str]) -> None:
        _, size = self._tables.pop(key, (None, 0))
        self.size -= size


_KEPT = _Kept(CACHE)


def forget() -> None:
    """Empties this process's memory of state files: what is read next comes from where it is kept."""
    _KEPT.clear()
