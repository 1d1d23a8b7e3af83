"""The lake: every message of a log as it came, kept for good, in a Delta table; what the batch layer recomputes from.

``archive`` is a consumer of the log of its own. Its rows and the offsets that it has read to are one commit, and it
reads on from the offsets of the last commit: so every row is there exactly once, whoever archives, how often and
however it ends. Two archivers at once disturb nothing: one of them finds that it came second, and looks again.

A commit has a file for each event date, so least and greatest values find the files of a time. ``compact`` makes one
of the small files of a date.
"""

import dataclasses
import hashlib
import hmac
import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.io.log import Bounds, Log
from pipelines.io.parquet import ROW_GROUP, Folder
from pipelines.io.table import STAGED, Files, Part, Table, TableConflict, open_table
from pipelines.transforms.buckets import hashes
from pipelines.transforms.conform import EXTRA
from pipelines.transforms.encode import encode
from pipelines.transforms.errors import DataRefused, UserError
from pipelines.transforms.intake import Intake, next_offset
from pipelines.transforms.lateness import Position
from pipelines.transforms.protect import Cipher
from pipelines.transforms.schema import UTC_MICROS

LAKE = pa.schema(
    [
        pa.field("event_time", UTC_MICROS),
        pa.field("event_date", pa.date32()),
        pa.field("identity", pa.int64()),
        pa.field("partition", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("published", UTC_MICROS, nullable=False),
        pa.field("format", pa.string(), nullable=False),
        pa.field("payload", pa.binary()),
        pa.field("key_id", pa.string()),
    ]
)
"""One row an event. event_time, event_date: null where the message cannot be decoded, has no event time, or one later
than the log took it. identity: a hash of the source's identity, equal for equal ones; null where there is none, or it
says the event time. published: when the log took it. format: how the payload is read: "json", "avro", or "arrow" for an
Arrow message that is none; of a good one each row is a payload of its own, in JSON. payload: the message's exact bytes.
key_id: null where the payload is in the clear, else the name of the key of its AES-GCM."""

_NOTHING = LAKE.remove(LAKE.get_field_index("key_id")).empty_table()

PURPOSE = "lake"
"""What the cipher of the lake is for: ``Cipher(Key.load(), PURPOSE)``."""

COMMIT = 64 << 20
"""Bytes of rows that are committed together, about: what an archiver holds, a few times over."""

READ = 16 << 20
"""Bytes of messages that are read together."""

DATES = 400
"""Files of a commit, at most: event dates past that share them."""

SMALL, FEW = 16 << 20, 4
"""Files under so many bytes, and so many of a date and about a size, are made one: so each row is written a logarithmic
number of times."""

_DAY = 86_400_000_000


@dataclasses.dataclass(frozen=True)
class Extent:
    """What a lake holds. offsets: by partition, the next one to be archived. greatest: by partition, the greatest event
    time (µs), None where no row has one. dated: what event times and identities were found by, ever. format: of the
    payloads ("json" of rows that came in Arrow). version: of the commit that says so; 0: nothing was archived yet."""

    version: int
    offsets: Mapping[str, int]
    greatest: Mapping[str, int | None]
    dated: tuple[str, ...] = ()
    format: str = "json"

    def through(self, disorder: int) -> int | None:
        """The event time (µs) up to which the rows are there, when they are late by ``disorder`` µs at most: the least
        over the partitions that have rows.

        >>> Extent(1, {"0": 9, "1": 7, "2": 0}, {"0": 5_000_000, "1": 4_000_000, "2": None}).through(1_000_000)
        3000000
        """
        return min((time - disorder for time in self.greatest.values() if time is not None), default=None)


@dataclasses.dataclass(frozen=True)
class Archived:
    """What one call of ``archive`` added. undated: those of the rows that have no event time in the lake."""

    rows: int
    undated: int
    commits: int
    extent: Extent


@dataclasses.dataclass(frozen=True)
class Lake:
    """The lake of one pipeline, at a URI ``<lake>/<pipeline>``. cipher: of payloads with personal columns. identity:
    the columns that name an event, where events of one name may have several event times."""

    uri: str
    cipher: Cipher | None = None
    identity: tuple[str, ...] = ()

    def dated(self, event_time: str) -> str:
        """What is noted of how event times and identities were found."""
        return f"{event_time} by {', '.join(self.identity)}" if self.identity else event_time

    @property
    def schemas(self) -> str:
        """Where the writers' schemas of Avro messages are kept, beside the table."""
        return f"{self.uri}/_schemas"

    @property
    def table(self) -> Table:
        return open_table(self.uri, LAKE)

    def extent(self) -> Extent:
        """What was archived so far."""
        return _extent(self.table)

    def archive(
        self, log: Log, intake: Intake, *, commit: int = COMMIT, stop: threading.Event | None = None
    ) -> Archived:
        """Archives what the log holds now beyond the last commit, in commits of about so many bytes.

        intake: what finds the event times; its dead letters are not kept, their messages are. stop: ends after the
        commit that is being made. Raises DataRefused where rows that were not archived are gone from the log, or this
        is another log.
        """
        ends = {name: bounds.end for name, bounds in log.bounds().items()}
        before, form = self.extent(), "avro" if log.format == "avro" else "json"
        if before.version and before.format != form:
            raise UserError(f"lake {self.uri}: holds {before.format}, this log has {log.format}; name another lake")
        if log.schemas is not None:
            _copy(log.schemas, self.schemas)
        rows = undated = commits = 0
        while True:
            extent = self.extent()
            try:
                added = self._next(log, intake, ends, extent, commit)
            except (TableConflict, FileNotFoundError):  # the other's commit has swept what was staged here
                if self.extent().version == extent.version:
                    raise
                continue
            if added is not None:
                rows, undated, commits = rows + len(added), undated + added["event_time"].null_count, commits + 1
            if added is None or (stop is not None and stop.is_set()):
                return Archived(rows, undated, commits, self.extent())

    def _next(self, log: Log, intake: Intake, ends: Mapping[str, int], extent: Extent, enough: int) -> pa.Table | None:
        """Commits the next rows of all partitions and gives them; None when there are no more."""
        positions = _positions(self.uri, log.bounds(), extent)
        parts, size, started = [], 0, False
        while size < enough and (open_ := [name for name in ends if positions[name].offset < ends[name]]):
            for name in open_:
                messages = log.read(name, positions[name].offset, ends[name], max_bytes=min(READ, enough))
                started = True
                if not len(messages):
                    positions[name] = dataclasses.replace(positions[name], offset=ends[name])
                    continue
                rows = self._rows(messages, intake)
                times = [time for time in (positions[name].greatest, _greatest(rows)) if time is not None]
                positions[name] = Position(next_offset(messages), max(times, default=None))
                parts.append(rows.append_column("partition", pa.repeat(pa.scalar(name), len(rows))))
                size += rows.nbytes
        if not started:
            return None
        rows = pa.concat_tables(parts) if parts else _NOTHING
        self._commit(self._sealed(rows), extent, positions, intake)
        return rows

    def _rows(self, messages: pa.Table, intake: Intake) -> pa.Table:
        """event_time, event_date, identity, offset, published, format, payload of the messages of one partition."""
        dated, form = intake.dated(messages), intake.messages.format
        if form == "arrow":
            rows = _events(dated.rows, dated.dead, intake).sort_by("offset")
        else:
            rows = pa.table({"offset": messages["_offset"], "payload": messages["_raw"].cast(pa.binary())})
            rows = rows.append_column("format", pa.repeat(form, len(rows)))
        offsets = rows["offset"].to_numpy()
        at = np.searchsorted(offsets, dated.rows["_offset"].to_numpy())
        times, unknown = np.zeros(len(rows), np.int64), np.ones(len(rows), np.bool_)
        times[at], unknown[at] = dated.times, ~dated.known
        times[unknown] = 0
        names, unnamed = np.zeros(len(rows), np.int64), np.ones(len(rows), np.bool_)
        if self.identity:
            names[at], unnamed[at] = self._named(dated.rows), False
        message = np.searchsorted(messages["_offset"].to_numpy(), offsets, side="right") - 1
        rows = rows.append_column("event_time", pa.array(times, pa.int64(), mask=unknown).cast(UTC_MICROS))
        rows = rows.append_column(
            "event_date", pa.array((times // _DAY).astype(np.int32), mask=unknown).cast(pa.date32())
        )
        rows = rows.append_column("identity", pa.array(names, pa.int64(), mask=unnamed))
        return rows.append_column("published", messages["_published"].take(pa.array(message)))

    def _named(self, rows: pa.Table) -> npt.NDArray[np.int64]:
        """A hash of each row's identity, which nobody can try values out on without the key, where there is one."""
        found = hashes(rows, list(self.identity))
        if self.cipher is None:
            return found.view(np.int64)
        key = self.cipher.key.derive(f"{PURPOSE}/identity")
        digests = b"".join(hmac.digest(key, value.tobytes(), "sha256")[:8] for value in found)
        return np.frombuffer(digests, np.int64)

    def _commit(self, rows: pa.Table, before: Extent, positions: Mapping[str, Position], intake: Intake) -> None:
        table, version = self.table, before.version + 1
        dated = tuple(dict.fromkeys([*before.dated, self.dated(intake.event_time)]))
        form = "avro" if intake.messages.format == "avro" else "json"
        offsets = {name: position.offset for name, position in sorted(positions.items())}
        greatest = {name: position.greatest for name, position in sorted(positions.items())}
        note = _note(Extent(version, offsets, greatest, dated, form))
        token = _token(dict(before.offsets), offsets)
        staged = [
            _staged(table, some, f"{number}", token, version) for number, some in enumerate(_by_date(rows), start=1)
        ]
        every = pa.concat_tables([STAGED.empty_table(), *staged])
        table.commit(every, token=token, version=version, replace="nothing", note=note)

    def _sealed(self, rows: pa.Table) -> pa.Table:
        """The rows as LAKE, their payloads encrypted where they are personal."""
        payload = rows["payload"].cast(pa.binary())
        if self.cipher is not None:
            payload = self.cipher.encrypt(payload, contexts(rows))
        rows = rows.set_column(rows.schema.get_field_index("payload"), "payload", payload)
        key = None if self.cipher is None else self.cipher.key_id
        return rows.append_column("key_id", pa.repeat(pa.scalar(key, pa.string()), len(rows))).select(LAKE.names)

    def compact(self) -> int:
        """Makes one file of the small files of each event date; how many files there are less. The rows stay as they
        are, and so do the offsets of the last commit."""
        fewer = 0
        while (group := next(_small(self._parts()), None)) is not None:
            extent = self.extent()
            try:
                fewer += len(group) - self._rewrite(group, extent)
            except (TableConflict, FileNotFoundError):
                if self.extent().version == extent.version:
                    raise
        return fewer

    def _parts(self) -> list[Part]:
        return self.table.parts() if self.table.last() is not None else []

    def _rewrite(self, group: Sequence[Part], extent: Extent) -> int:
        table, version = self.table, extent.version + 1
        names = sorted(part.name for part in group)
        rows = pa.concat_tables(self.read(name) for name in names)
        rows = rows.sort_by([("partition", "ascending"), ("offset", "ascending")])
        token = _token(names, version)
        staged = _staged(table, rows, "compact", token, version)
        table.commit(staged, token=token, version=version, replace=Files(frozenset(names)), note=_note(extent))
        return len(staged)

    def read(self, name: str) -> pa.Table:
        """The rows of one file, as stored."""
        with Folder(self.uri).files.open_input_file(name) as file:
            return pq.read_table(file).cast(LAKE)


def contexts(rows: pa.Table) -> Iterator[bytes]:
    """What the cipher of each payload is bound to: where the row stands in the log."""
    places = zip(rows["partition"].to_pylist(), rows["offset"].to_pylist(), strict=True)
    return (f"{partition}\n{offset}".encode() for partition, offset in places)


def _extent(table: Table) -> Extent:
    last = table.last()
    if last is None:
        return Extent(table.next_version() - 1, {}, {})
    return Extent(
        last.version, last.note["offsets"], last.note["greatest"], tuple(last.note["dated"]), last.note["format"]
    )


def _note(extent: Extent) -> dict[str, Any]:
    note = {"offsets": dict(extent.offsets), "greatest": dict(extent.greatest)}
    return note | {"dated": list(extent.dated), "format": extent.format}


def _positions(uri: str, bounds: Mapping[str, Bounds], extent: Extent) -> dict[str, Position]:
    """Where each partition is read next. What was never archived begins with the first offset that the log retains."""
    positions = {name: Position(held.start) for name, held in bounds.items()}
    for name, offset in extent.offsets.items():
        held = bounds.get(name)
        if held is None or offset > held.end:
            ends = "is not there" if held is None else f"ends at offset {held.end}"
            raise DataRefused(
                f"lake {uri}: partition {name} of this log {ends}, {offset} offsets are archived: it is another log, "
                "or it was emptied. Name the right one, or another lake"
            )
        if offset < held.start:
            raise DataRefused(
                f"lake {uri}: offsets {offset} to {held.start - 1} of partition {name} are gone from the log and were "
                "not archived. Restore them there, or name another lake; archive within the log's retention"
            )
        positions[name] = Position(offset, extent.greatest.get(name))
    return positions


def _greatest(rows: pa.Table) -> int | None:
    return pc.max(rows["event_time"].cast(pa.int64())).as_py()  # type: ignore[no-any-return]


def _copy(source: str, to: str) -> None:
    """Copies the schemas that are not there yet; a file never changes."""
    (from_, folder), (there, place) = fsspec.url_to_fs(source), fsspec.url_to_fs(to)
    known = {name.rpartition("/")[2] for name in there.glob(f"{place}/*.avsc")}
    for path in from_.glob(f"{folder}/*.avsc"):
        if (name := path.rpartition("/")[2]) not in known:
            there.makedirs(place, exist_ok=True)
            there.pipe_file(f"{place}/.{name}", from_.cat_file(path))
            there.mv(f"{place}/.{name}", f"{place}/{name}")


def _events(rows: pa.Table, dead: pa.Table, intake: Intake) -> pa.Table:
    """offset, format, payload of the rows in Arrow messages: JSON of those that are rows, exact bytes of the others."""
    payloads = _with_extras(encode(rows, intake.messages.decoder.schema, "json")["_raw"], rows)
    good = pa.table({"offset": rows["_offset"], "format": pa.repeat("json", len(rows)), "payload": payloads})
    bad = dead.select(good.column_names)
    return pa.concat_tables([good.cast(bad.schema), bad])


def _with_extras(payloads: pa.ChunkedArray, rows: pa.Table) -> pa.ChunkedArray:
    """JSON objects with the columns that the row class does not declare, too."""
    if EXTRA.name not in rows.column_names or rows[EXTRA.name].null_count == len(rows):
        return payloads
    head = pc.binary_slice(payloads.cast(pa.binary()), 0, -1)
    rest = pc.binary_slice(rows[EXTRA.name].cast(pa.binary()), 1)
    both = pc.binary_join_element_wise(head, rest, pa.scalar(b",", pa.binary()))
    return pc.coalesce(both, payloads.cast(pa.binary()))


def _by_date(rows: pa.Table) -> Iterator[pa.Table]:
    """The rows of each event date, by partition and offset, those without one last."""
    rows = rows.sort_by([(name, "ascending") for name in ("event_date", "partition", "offset")])
    dates = rows["event_date"].combine_chunks().cast(pa.int32())
    known = dates.drop_null().to_numpy()
    _, starts = np.unique(known, return_index=True)
    shares = np.array_split(starts, min(DATES, len(starts))) if len(starts) else []
    firsts = [int(share[0]) for share in shares]
    for start, stop in itertools.pairwise([*firsts, len(known)]):
        yield rows.slice(start, stop - start)
    if dates.null_count:
        yield rows.slice(len(known))


def _staged(table: Table, rows: pa.Table, unit: str, token: str, version: int) -> pa.Table:
    stage = table.stage(unit, token=token, version=version)
    for start in range(0, len(rows), ROW_GROUP):
        stage.add(rows.slice(start, ROW_GROUP))
    return stage.finish()


def _token(*said: object) -> str:
    return hashlib.blake2b(repr(said).encode(), digest_size=8).hexdigest()


def _small(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Groups of small files of the same event dates and, within a factor of four, of a size."""
    groups: dict[tuple[object, ...], list[Part]] = {}
    for part in parts:
        if part.bytes < SMALL:
            dates = part.least.get("event_date"), part.greatest.get("event_date")
            groups.setdefault((*dates, part.bytes.bit_length() // 2), []).append(part)
    return (group[: 4 * FEW] for group in groups.values() if len(group) >= FEW)
