"""The Log: messages in partitions, addressed by offset, kept for a while and read by any number of readers.

A message is a payload in the log's format: one JSON object, one Avro value behind its schema id, or one Arrow IPC
stream of many rows. Offsets address rows: a message of n rows takes the offsets [o, o + n). A partition's offsets only
increase, may have gaps, and are never given twice.

Delivery guarantee, for every implementation: an append is on disk in every partition when it returns and visible in
all of them or in none, so a reader at any time sees a prefix of every partition. It is **at least once**: a producer
that dies before it is answered does not know, and its repetition is a second copy (a source's identity removes those).
What was read at an offset never changes. A read of offsets that are gone raises, it never skips.
"""

import dataclasses
import datetime
import difflib
import re
from collections.abc import Callable, Mapping
from typing import Literal, Protocol, Self, get_args
from urllib.parse import quote, unquote

import pyarrow as pa

from pipelines.transforms.errors import DataRefused, UserError

Format = Literal["json", "avro", "arrow"]
FORMATS: tuple[Format, ...] = get_args(Format)

MESSAGES = pa.schema(
    [
        ("_source", pa.dictionary(pa.int32(), pa.string())),
        ("_offset", pa.int64()),
        ("_raw", pa.large_binary()),
        ("_published", pa.timestamp("us", "UTC")),
        ("_rows", pa.int32()),
    ]
)
"""_source: the partition. _offset: of the message's first row. _raw: the payload. _published: when the log took it.
_rows: in the message, at least 1."""

MOST = 10_000
"""Partitions that a URI may ask for."""

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}

Clock = Callable[[], datetime.datetime]
"""The time now, aware."""


def utc_now() -> datetime.datetime:
    """The time now."""
    return datetime.datetime.now(datetime.UTC)


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The offsets that a partition holds: from the first retained one to one past the last. Equal: it is empty."""

    start: int
    end: int


class Log(Protocol):
    """Partitions of messages. Picklable: a worker opens its own connection. Guarantee: see the module.

    Raises UserError where the place cannot be opened, written or is full, or holds another format than ``format``.
    """

    @property
    def uri(self) -> str:
        """What opens it again."""

    @property
    def format(self) -> Format:
        """Of every payload."""

    @property
    def schemas(self) -> str | None:
        """The folder of writer schemas, ``<id>.avsc``, where the format is avro."""

    def bounds(self) -> dict[str, Bounds]:
        """Every partition there is now, by name; one that is added later is in a later answer."""

    def read(self, partition: str, start: int, stop: int, *, max_bytes: int = 16 << 20) -> pa.Table:
        """The messages whose first row has an offset in [start, stop), in order, as MESSAGES in one chunk.

        So any cuts of a range give each message once, whole, though its rows may reach past ``stop``. Ends before the
        message that would bring the payloads past ``max_bytes``, but has at least one if there is any in the range.
        The next read starts at the last message's ``_offset + _rows``. Raises DataRefused where offsets at ``start``
        are gone, by retention or because the log was replaced.
        """

    def append(self, messages: Mapping[str, pa.Table]) -> None:
        """Appends messages to partitions, which are made where new; all or none, on disk when it returns.

        A table has ``_raw`` (binary, no nulls) and, in format arrow, ``_rows`` (each at least 1; 1 for what is no
        Arrow). Messages keep their order; several producers' appends do not mix.
        """

    def trim(self, before: datetime.datetime) -> None:
        """Removes what was published before a time, oldest first, in the units in which it was appended."""

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


@dataclasses.dataclass(frozen=True)
class Options:
    """What a log's URI may say. format: of its payloads (a log keeps the one it was made with, json if none is said).
    partitions: it has at least these, ``0`` to n-1. retention: how long messages are kept, as in 7d; for ever if none
    is said. schemas: the folder of writer schemas of format avro.

    >>> Options.of("log.db", "format=arrow&retention=7d").retention
    datetime.timedelta(days=7)
    """

    format: Format | None = None
    partitions: int = 0
    retention: datetime.timedelta | None = None
    schemas: str | None = None

    @property
    def query(self) -> str:
        """As a URI says it, with the question mark; empty where nothing is said."""
        given = {"format": self.format, "partitions": self.partitions or None, "schemas": self.schemas}
        if self.retention is not None:
            given["retention"] = f"{int(self.retention.total_seconds())}s"
        said = [f"{name}={quote(str(value))}" for name, value in given.items() if value is not None]
        return f"?{'&'.join(said)}" if said else ""

    @staticmethod
    def of(uri: str, query: str) -> "Options":
        names = [field.name for field in dataclasses.fields(Options)]
        given = {}
        for part in filter(None, query.split("&")):
            name, _, value = part.partition("=")
            if name not in names:
                nearest = difflib.get_close_matches(name, names, 1, 0)[0]
                raise UserError(f"--live={uri}: no option {name!r}. Nearest: {nearest}. Options: {', '.join(names)}")
            given[name] = unquote(value)
        form, partitions, retention = given.get("format"), given.get("partitions", "0"), given.get("retention")
        if form is not None and form not in FORMATS:
            raise UserError(f"--live={uri}: format={form!r} must be one of {', '.join(FORMATS)}")
        if not partitions.isascii() or not partitions.isdigit() or not int(partitions) <= MOST:
            raise UserError(f"--live={uri}: partitions={partitions!r} must be a number up to {MOST}")
        kept = None if retention is None else _kept(retention, uri)
        return Options(form, int(partitions), kept, given.get("schemas"))


def _kept(retention: str, uri: str) -> datetime.timedelta:
    match = re.fullmatch(r"([1-9]\d{0,7})([smhdw])", retention)
    if not match:
        raise UserError(f"--live={uri}: retention={retention!r} must be a whole number and a unit: s m h d w, as in 7d")
    return datetime.timedelta(seconds=int(match[1]) * _SECONDS[match[2]])


def open_log(uri: str) -> Log:
    """The log at a URI: a path, or ``sqlite:///`` before one (a fourth slash makes it absolute): SQLite.

    Options in the query: ``data/log/flights.db?format=arrow&partitions=4&retention=7d``. Raises UserError for a URI of
    a system that is not there, and for other options.
    """
    from pipelines.io.sqlite_log import SqliteLog

    place, _, query = uri.partition("?")
    scheme, separator, path = place.partition("://")
    if not separator:
        path = place
    elif scheme == "sqlite" and path.startswith("/"):
        path = path[1:]
    else:
        path = ""
    if not path:
        raise UserError(f"--live={uri}: no such log; give a path (data/log/flights.db) or sqlite:///path")
    return SqliteLog(path, Options.of(uri, query))


def refuse_gone(uri: str, partition: str, offset: int, held: Bounds) -> None:
    """Raises DataRefused where a reader's next offset is not one that the log holds or will give next.

    >>> refuse_gone("log.db", "0", 5, Bounds(9, 12))
    Traceback (most recent call last):
    pipelines.transforms.errors.DataRefused: log log.db: offset 5 of partition 0 is gone, the log starts at 9; ...
    """
    if offset < held.start:
        raise DataRefused(
            f"log {uri}: offset {offset} of partition {partition} is gone, the log starts at {held.start}; "
            "recompute what was missed from the lake, then start the live run afresh (remove its state), "
            "and give the log a longer retention"
        )
    if offset > held.end:
        raise DataRefused(
            f"log {uri}: offset {offset} of partition {partition} was never given, the log ends at {held.end}: it is "
            "not the log that was read before; name that one, or start the live run afresh (remove its state)"
        )
