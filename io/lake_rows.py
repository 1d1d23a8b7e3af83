"""Reading a lake: the files of a time as splits, their rows as messages again, and those to rows of the schema.

What is read is fixed by the plan: files that are compacted meanwhile stay readable for a week, and rows that are
archived meanwhile are not in it. Files and rows outside the event times that are asked for are not read, nor decoded.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.io.lake import LAKE, Extent, Lake, contexts
from pipelines.io.parquet import Folder
from pipelines.io.table import Part
from pipelines.transforms.conform import PUBLISHED, RAW, SOURCE
from pipelines.transforms.decoder import Decoded, Decoder
from pipelines.transforms.errors import UserError
from pipelines.transforms.intake import Intake
from pipelines.transforms.messages import Messages
from pipelines.transforms.protect import Cipher
from pipelines.transforms.ranges import EVERYTHING, Range, Ranges, inside

ROWS, BYTES = 1 << 18, 32 << 20
"""Rows and bytes from which on what was read is given on as a table: a table costs the same however small it is."""

SPLIT = 32 << 20
"""Stored bytes of a split, about."""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Which rows of a lake: those with an event time in the ranges, and of those without one the rows from these
    offsets on, by partition (None: all of them)."""

    ranges: Ranges = (EVERYTHING,)
    offsets: tuple[tuple[str, int], ...] | None = None

    @property
    def all(self) -> bool:
        return EVERYTHING in self.ranges and self.offsets is None

    def file(self, part: Part) -> bool:
        """Whether a file may hold such rows."""
        if "event_time" not in part.least:
            return self.offsets is None or newer(part, dict(self.offsets))
        rows = Range(_micros(part.least["event_time"]), _micros(part.greatest["event_time"]) + 1)
        return _meet(self.ranges, rows)

    def rows(self, rows: pa.Table) -> npt.NDArray[np.bool_]:
        """Which rows of a file are such rows."""
        times = rows["event_time"].cast(pa.int64())
        undated = times.is_null().to_numpy(zero_copy_only=False)
        wanted = undated if self.offsets is None else undated & since(rows, dict(self.offsets))
        dated = inside(self.ranges, times.fill_null(0).to_numpy()) & ~undated
        return np.asarray(dated | wanted, np.bool_)


@dataclasses.dataclass(frozen=True)
class Split:
    """Files of the lake."""

    names: tuple[str, ...]
    rows: int
    bytes: int

    @property
    def packed(self) -> bool:
        return True


@dataclasses.dataclass(frozen=True)
class Archive:
    """What a bounded run reads of a lake: a History. rows: of the files, more than are read where only some are."""

    lake: Lake
    extent: Extent
    wanted: Wanted
    splits: tuple[Split, ...]
    rows: int
    bytes: int
    format: str

    def read(self, split: Split) -> Iterator[pa.Table]:
        """Messages: `_source` (the partition), `_offset`, `_raw` in the clear, `_published`, `_rows` (1)
        and `_format`, a table of one format. Raises UserError without the key of what is encrypted."""
        waiting: list[pa.Table] = []
        for rows in self._rows(split):
            waiting.append(rows)
            if sum(map(len, waiting)) >= ROWS or sum(some.nbytes for some in waiting) >= BYTES:
                yield from _messages(_opened(pa.concat_tables(waiting), self.lake.cipher))
                waiting = []
        if waiting:
            yield from _messages(_opened(pa.concat_tables(waiting), self.lake.cipher))

    def _rows(self, split: Split) -> Iterator[pa.Table]:
        for name in split.names:
            with Folder(self.lake.uri).files.open_input_file(name) as file:
                for batch in pq.ParquetFile(file).iter_batches(ROWS):
                    rows = pa.Table.from_batches([batch]).cast(LAKE)
                    if not self.wanted.all:
                        rows = rows.filter(pa.array(self.wanted.rows(rows)))
                    if len(rows):
                        yield rows


def plan(lake: Lake, extent: Extent, wanted: Wanted = Wanted()) -> Archive:
    """The files to read of what was archived. Raises UserError where nothing was yet."""
    if extent.version == 0:
        raise UserError(
            f"lake {lake.uri}: there is none yet; archive the log first (pipelines archive --live=… --lake=…)"
        )
    splits = _splits([part for part in lake.table.parts() if wanted.file(part)])
    rows, size = sum(split.rows for split in splits), sum(split.bytes for split in splits)
    return Archive(lake, extent, wanted, tuple(splits), rows, size, extent.format)


@dataclasses.dataclass(frozen=True)
class Since:
    """What is new in a lake. times: event times (µs) that the new rows have, or rows that share an identity with one of
    them: in seconds, each once. rows: how many are new."""

    times: npt.NDArray[np.int64]
    rows: int


def arrived(lake: Lake, offsets: Mapping[str, int], extent: Extent) -> Since:
    """What was archived from these offsets on.

    A row whose identity an earlier row has, with another event time, is a conflict: which of the two stands is found
    where both are computed again, so the times of all rows of such an identity are in the answer.
    """
    times, names, rows = [np.empty(0, np.int64)], [np.empty(0, np.int64)], 0
    parts = lake.table.parts()
    columns = ["event_time", "partition", "offset", "identity"]
    for part in parts:
        if newer(part, offsets):
            found = _read(lake, part, columns)
            found = found.filter(pa.array(since(found, offsets)))
            rows += len(found)
            times.append(_seconds(found["event_time"]))
            names.append(np.unique(found["identity"].drop_null().to_numpy()))
    named = np.unique(np.concatenate(names))
    for part in parts if len(named) else ():
        found = _read(lake, part, ["event_time", "identity"])
        same = np.isin(found["identity"].fill_null(0).to_numpy(), named)
        times.append(_seconds(found["event_time"].filter(pa.array(same & found["identity"].is_valid().to_numpy()))))
    return Since(np.unique(np.concatenate(times)), rows)


@dataclasses.dataclass(frozen=True)
class Archived:
    """Decodes what ``Archive.read`` gives, as ``Decoder`` does for files. schemas: where those of Avro messages are.

    ahead: as the speed layer's: µs that an event time may be past the time at which the log took its message.
    """

    decoder: Decoder
    event_time: str
    ahead: int
    schemas: str

    def decode(self, table: pa.Table) -> Decoded:
        """The rows, and dead letters of what cannot be read or is of the future."""
        messages = Messages(self.decoder, table["_format"][0].as_py(), self.schemas)
        dated = Intake(messages, self.event_time, 0, self.ahead, (), self.decoder.cipher).dated(table)
        return Decoded(dated.rows, dated.dead if len(dated.dead) else None)


def newer(part: Part, offsets: Mapping[str, int]) -> bool:
    """Whether a file may hold rows from these offsets on."""
    least, greatest = part.least.get("partition"), part.greatest.get("partition")
    if least is not None and least == greatest:
        return bool(part.greatest["offset"] >= offsets.get(least, 0))
    return bool(part.greatest["offset"] >= min(offsets.values(), default=0))


def since(rows: pa.Table, offsets: Mapping[str, int]) -> npt.NDArray[np.bool_]:
    """Which rows are from these offsets on; all rows of a partition that has none."""
    names = rows["partition"].combine_chunks().dictionary_encode()
    starts = np.array([offsets.get(name, 0) for name in names.dictionary.to_pylist()], np.int64)
    if not len(rows):
        return np.zeros(0, np.bool_)
    return cast(npt.NDArray[np.bool_], rows["offset"].to_numpy() >= starts[names.indices.to_numpy()])


def _splits(parts: Sequence[Part]) -> list[Split]:
    """Files of near times together."""
    groups: list[list[Part]] = []
    for part in sorted(parts, key=lambda part: (str(part.least.get("event_date")), part.name)):
        if not groups or sum(other.bytes for other in groups[-1]) >= SPLIT:
            groups.append([])
        groups[-1].append(part)
    return [
        Split(tuple(part.name for part in group), sum(part.rows for part in group), sum(part.bytes for part in group))
        for group in groups
    ]


def _read(lake: Lake, part: Part, columns: Sequence[str]) -> pa.Table:
    with Folder(lake.uri).files.open_input_file(part.name) as file:
        return pq.read_table(file, columns=list(columns))


def _seconds(times: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """No window begins or ends within a second."""
    micros = times.drop_null().cast(pa.int64()).to_numpy()
    return cast(npt.NDArray[np.int64], np.unique(micros // 1_000_000 * 1_000_000))


def _meet(ranges: Ranges, rows: Range) -> bool:
    assert rows.start is not None and rows.stop is not None
    return any(
        (part.start is None or part.start < rows.stop) and (part.stop is None or rows.start < part.stop)
        for part in ranges
    )


def _micros(time: Any) -> int:
    return int(pa.scalar(time, LAKE.field("event_time").type).value)


def _opened(rows: pa.Table, cipher: Cipher | None) -> pa.Table:
    sealed = pc.is_valid(rows["key_id"])
    if not pc.any(sealed).as_py():
        return rows
    if cipher is None:
        raise UserError(f"the lake is encrypted with key {pc.max(rows['key_id']).as_py()}: set PIPELINES_KEY_FILE")
    closed = pc.if_else(sealed, rows["payload"], pa.scalar(None, pa.binary()))
    clear = pc.coalesce(cipher.decrypt(closed, contexts(rows)), rows["payload"].combine_chunks())
    return rows.set_column(rows.schema.get_field_index("payload"), "payload", clear)


def _messages(rows: pa.Table) -> Iterator[pa.Table]:
    """The rows as messages, those of each format together, in the order of partitions and offsets."""
    rows = rows.sort_by([(name, "ascending") for name in ("format", "partition", "offset")])
    for count in pc.value_counts(rows["format"]).to_pylist():
        some, rows = rows.slice(0, count["counts"]), rows.slice(count["counts"])
        columns = {
            SOURCE: some["partition"].combine_chunks().dictionary_encode().cast(SOURCE.type),
            pa.field("_offset", pa.int64()): some["offset"],
            RAW: some["payload"].cast(RAW.type),
            PUBLISHED: some["published"],
            pa.field("_rows", pa.int32()): pa.array(np.ones(len(some), np.int32)),
            pa.field("_format", pa.string()): some["format"],
        }
        yield pa.table(list(columns.values()), schema=pa.schema(list(columns)))
