"""Messages of a log to rows of the declared schema: JSON, Avro behind the id of its schema, or Arrow. No Beam in here.

A message that cannot be read is one row read and refused, with its exact bytes, and the rest of the batch goes on.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Literal

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.transforms.avro import Avro
from pipelines.transforms.avro_schemas import HEADER, Schemas, split_headers
from pipelines.transforms.conform import OFFSET, PUBLISHED, RAW, SOURCE
from pipelines.transforms.decoder import Decoded, Decoder
from pipelines.transforms.errors import UserError
from pipelines.transforms.objects import Json
from pipelines.transforms.payloads import Faults, Rows, path, positions, untexted

LARGEST = 8 << 20
"""Bytes of a message. A larger one is refused: a poisoned message must not take the memory of a worker."""

_PLACES = [SOURCE.name, OFFSET.name, PUBLISHED.name]
_FAILURES = (pa.ArrowException, duckdb.Error, ValueError, ArithmeticError)
"""What the libraries say of values that they were not made for."""

_SMALL = 4096
"""Arrow messages of fewer rows are copied together: each chunk costs some calls a column."""


@dataclasses.dataclass(frozen=True)
class Messages:
    """How the messages of a log are read.

    format: json and avro have one row a message, arrow has an IPC stream of rows. schemas: in format avro, the folder
    of the schemas that messages were written with, ``<id>.avsc``. Columns are found by name, in every format: one that
    a message lacks is null, one that the row class lacks is what the decoder's ``extra`` says, and values of another
    type are taken where nothing is lost.

    >>> from pipelines.transforms.schema import RowSchema
    >>> class Row:
    ...     n: int
    >>> columns = [["p0", "p0"], [4, 5], [b'{"n": 1}', b'{"n":'], [0, 0]]
    >>> places = pa.schema([SOURCE, OFFSET, RAW, PUBLISHED])
    >>> batch = pa.table(columns, places.names).cast(places)
    >>> decoded = Messages(Decoder(RowSchema.of(Row), "numbers"), "json").decode(batch)
    >>> decoded.rows["n"].to_pylist(), decoded.dead.select(["reason", "offset", "payload"]).to_pylist()
    ([1], [{'reason': 'invalid json', 'offset': 5, 'payload': b'{"n":'}])
    """

    decoder: Decoder
    format: Literal["json", "avro", "arrow"]
    schemas: str | None = None

    def __post_init__(self) -> None:
        if self.format == "avro" and self.schemas is None:
            raise UserError("format=avro needs schemas=<folder>: the schemas messages were written with, <id>.avsc")

    def decode(self, messages: pa.Table) -> Decoded:
        """Messages of one partition in order of their offsets (`_source`, `_offset`, `_raw`, `_published` and, in
        format arrow, `_rows`) to the row table with `_published` last, and dead letters (step "decode"), each in that
        order. Rows of Arrow messages have no `_raw`.

        Raises UserError for a schema file that is none, DataRefused where the decoder is to stop.
        """
        raw = messages[RAW.name].combine_chunks().fill_null(b"")
        messages = messages.set_column(messages.schema.get_field_index(RAW.name), RAW, raw)
        faults = Faults()
        _unfit(raw, faults)
        parts = list(self._parts(messages, raw, faults))
        if len(faults):
            reason, detail = faults.reasons()
            dead = self.decoder.refuse(messages.take(pa.array(faults.rows())), reason, detail, self.format)
            parts.append(Decoded(self._none, dead))
        return _together(parts) if parts else Decoded(self._none)

    @property
    def _none(self) -> pa.Table:
        raw = [] if self.format == "arrow" else [RAW.name]
        return self.decoder.arrow([*_PLACES, *raw]).empty_table()

    def _parts(self, messages: pa.Table, raw: pa.LargeBinaryArray, faults: Faults) -> Iterator[Decoded]:
        if self.format == "arrow":
            streams = _Streams(messages, raw, faults, self._wanted)
            for rows in streams.alike():
                yield from self._decoded(self.decoder, rows, streams.table, faults)
            return
        payloads = messages.select([*_PLACES, RAW.name])
        for decoder, rows in self._forms(raw, faults):
            yield from self._decoded(decoder, rows, lambda some: _taken(payloads, some), faults)

    def _forms(self, raw: pa.LargeBinaryArray, faults: Faults) -> Iterator[tuple[Decoder, Rows]]:
        """Which messages are read how."""
        if self.format == "json":
            yield dataclasses.replace(self.decoder, form=Json()), faults.others(len(raw))
            return
        found = split_headers(raw, faults)
        known = Schemas(str(self.schemas)).find(found)
        for number, rows in found.items():
            if number in known:
                yield dataclasses.replace(self.decoder, form=Avro(known[number], HEADER)), rows
            else:
                detail = f"schema id {number}, for which {self.schemas} has no {number}.avsc"
                faults.add(rows, "unknown schema id", detail)

    def _decoded(
        self, decoder: Decoder, rows: Rows, table: Callable[[Rows], pa.Table], faults: Faults
    ) -> Iterator[Decoded]:
        """The rows of messages at these positions. What makes a library fail is found by halving."""
        if not len(rows):
            return
        try:
            yield decoder.decode(table(rows))
        except _FAILURES as error:
            if len(rows) == 1:
                faults.add(rows, f"invalid {self.format}", f"values that cannot be read ({type(error).__name__})")
                return
            for half in np.array_split(rows, 2):
                yield from self._decoded(decoder, half, table, faults)

    @property
    def _wanted(self) -> frozenset[str] | None:
        """The columns at the top of a payload that are read; None for all."""
        if self.decoder.extra != "ignore":
            return None
        paths = [path(field) for field in self.decoder.schema.fields]
        return frozenset(paths) | frozenset(where.partition(".")[0] for where in paths)


class _Streams:
    """The IPC streams of Arrow messages, by position; those that are none are faults."""

    def __init__(
        self, messages: pa.Table, raw: pa.LargeBinaryArray, faults: Faults, wanted: frozenset[str] | None
    ) -> None:
        self._messages = messages
        self._tables: dict[int, pa.Table] = {}
        counts = messages["_rows"].to_pylist()
        for row in faults.others(len(raw)).tolist():
            try:
                self._tables[row] = _stream(raw[row].as_py(), counts[row], wanted)
            except Exception as error:  # whatever a decoder makes of bytes that are none of its own
                told = str(error) if isinstance(error, _Unlike) else f"no Arrow IPC stream ({type(error).__name__})"
                faults.add([row], "invalid arrow", told)

    def alike(self) -> Iterator[Rows]:
        """The positions of messages of one schema each."""
        groups: dict[bytes, list[int]] = {}
        for row, table in self._tables.items():
            groups.setdefault(table.schema.serialize().to_pybytes(), []).append(row)
        return (np.array(rows, np.int64) for rows in groups.values())

    def table(self, rows: Rows) -> pa.Table:
        """The rows of some messages of one schema, each with its place."""
        tables = [self._tables[row] for row in rows.tolist()]
        counts = np.array([len(table) for table in tables], np.int64)
        table = pa.concat_tables(tables)
        if len(table) < _SMALL * len(tables):
            table = table.combine_chunks()
        places = self._messages.select(_PLACES).take(pa.array(np.repeat(rows, counts)))
        within = np.arange(len(table)) - np.repeat(np.cumsum(counts) - counts, counts)
        for name in (SOURCE.name, PUBLISHED.name):
            table = table.append_column(name, places[name])
        return table.append_column(OFFSET, pa.array(np.asarray(places[OFFSET.name]) + within))


class _Unlike(ValueError):
    """A stream that is not what its message should have."""


def _stream(payload: bytes, count: int, wanted: frozenset[str] | None) -> pa.Table:
    """The wanted columns of an IPC stream of so many rows, checked so that no later use reads past its buffers."""
    with pa.ipc.open_stream(payload, options=pa.ipc.IpcReadOptions(use_threads=False)) as reader:
        table = reader.read_all().replace_schema_metadata()
    own = {*_PLACES, RAW.name}
    names = [name for name in table.column_names if name not in own and (wanted is None or name in wanted)]
    if len(set(names)) < len(names):
        raise _Unlike(f"two columns of the name {max(names, key=names.count)!r}")
    if len(table) != count:
        raise _Unlike(f"{len(table)} rows in a message of {count}")
    table = table.select(names)
    for field in table.schema:
        if not _sound(field.type):
            raise _Unlike(f"column {field.name!r} is a {field.type}")
    try:
        table.validate(full=True)
    except pa.ArrowInvalid:  # text that is not UTF-8 is the fault of its row; anything else of the message
        for column in table.columns:
            for chunk in column.chunks:
                chunk.view(untexted(chunk.type)).validate(full=True)
    return table


def _sound(kind: pa.DataType) -> bool:
    """Whether casts may trust the type: Arrow reads any scale, and looks up powers of ten by it unchecked."""
    if pa.types.is_dictionary(kind):
        return _sound(kind.value_type)
    if pa.types.is_decimal(kind):
        return bool(0 <= kind.scale <= kind.precision)
    return all(_sound(kind.field(at).type) for at in range(kind.num_fields))


def _unfit(raw: pa.LargeBinaryArray, faults: Faults) -> None:
    lengths = pc.binary_length(raw)
    faults.add(positions(pc.equal(lengths, 0)), "empty message", "a message without a body")
    large = positions(pc.greater(lengths, LARGEST))
    told = [f"{length:,} bytes; at most {LARGEST:,}" for length in lengths.take(pa.array(large)).to_pylist()]
    faults.add(large, "message too large", told)


def _taken(messages: pa.Table, rows: Rows) -> pa.Table:
    return messages if len(rows) == len(messages) else messages.take(pa.array(rows))


def _together(parts: list[Decoded]) -> Decoded:
    """The parts as one, in the order of the log."""
    dead = [part.dead for part in parts if part.dead is not None]
    rows = [part.rows for part in parts if len(part.rows)] or [parts[0].rows]
    return Decoded(_ordered(rows, OFFSET.name), _ordered(dead, "offset") if dead else None)


def _ordered(tables: list[pa.Table], offset: str) -> pa.Table:
    return tables[0] if len(tables) == 1 else pa.concat_tables(tables).sort_by(offset)
