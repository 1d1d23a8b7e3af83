"""A source's tables, raw payloads or typed columns, to rows of exactly the declared schema. No Beam in here.

Row table: the schema's columns, `_extra` (string, a JSON object or null) with ``extra="keep"`` only, then `_source`
(dictionary<int32, string>), `_offset` (int64) and, where the source is text or messages, `_raw` (large_binary: the
exact bytes of the row, with its line end) and, of a log, `_published` (timestamp[us, UTC]).
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.transforms import query
from pipelines.transforms.avro import Avro
from pipelines.transforms.conform import EXTRA, OFFSET, PUBLISHED, RAW, SOURCE, conform
from pipelines.transforms.deadletters import refuse
from pipelines.transforms.delimited import Csv
from pipelines.transforms.errors import DataRefused
from pipelines.transforms.objects import Json
from pipelines.transforms.payloads import Fault, Faults, Form, Parsed, Rows, mark, path, positions, untexted
from pipelines.transforms.protect import Cipher
from pipelines.transforms.schema import Extra, Field, Invalid, RowSchema

_PLACES = (SOURCE, OFFSET, RAW, PUBLISHED)
_BOOKKEEPING = (EXTRA.name, *(field.name for field in _PLACES))
_SHOWN = 60


@dataclasses.dataclass(frozen=True)
class Decoded:
    """rows: the row table. dead: the dead letters (DEAD_LETTERS), None when every row is good."""

    rows: pa.Table
    dead: pa.Table | None = None

    @property
    def read(self) -> int:
        """Rows that came in: each is either taken or refused."""
        return len(self.rows) + (0 if self.dead is None else len(self.dead))


@dataclasses.dataclass(frozen=True)
class Decoder:
    """How the rows of a source are taken.

    extra: a column the schema does not have: ignore, keep (in `_extra`), reject the row, or stop the run. invalid: a
    value of another type: reject the row, take it as null, or stop. form: how to read payloads of raw tables that do
    not say it themselves. coded: text that comes as codes (dictionary<int32, string>) stays so. A null in a column that
    may not be null is rejected. Stopping raises DataRefused.

    >>> class Row:
    ...     n: int
    >>> rows = pa.table({"n": ["1", "x"], "_source": pa.array(["a", "a"]).dictionary_encode(), "_offset": [0, 4]})
    >>> decoded = Decoder(RowSchema.of(Row), "numbers").decode(rows)
    >>> decoded.rows["n"].to_pylist(), decoded.dead["reason"].to_pylist(), decoded.dead["offset"].to_pylist()
    ([1], ['invalid int in n'], [4])
    """

    schema: RowSchema
    pipeline: str
    extra: Extra = "ignore"
    invalid: Invalid = "reject"
    form: Form | None = None
    cipher: Cipher | None = None
    coded: bool = False

    def decode(self, table: pa.Table) -> Decoded:
        """Good rows in order, and dead letters with step "decode". A table that is right already is not copied."""
        raw = RAW.name in table.column_names
        form = (_form_of(table.schema) or self.form) if raw else None
        if raw and table[RAW.name].null_count:  # a message without a payload: no bytes, which no format takes
            table = table.set_column(table.schema.get_field_index(RAW.name), RAW, table[RAW.name].fill_null(b""))
        parsed = self._parse(table, form)
        rows, faults = self._rows(table, parsed)
        if not len(faults):
            return Decoded(rows)
        bad = faults.rows()
        good = rows.filter(self._good(parsed, bad)) if len(rows) else rows
        reason, detail = faults.reasons()
        refused = table.take(pa.array(bad))
        if not raw:
            refused = _printable(refused)
        name = form.name if form is not None else "json"
        return Decoded(good, self.refuse(refused, reason, detail, name))

    def refuse(self, refused: pa.Table, reason: pa.Array, detail: pa.Array, form: str) -> pa.Table:
        """The dead letters (DEAD_LETTERS, step "decode") of these rows. form: how to read their payloads."""
        return refuse(
            refused,
            pipeline=self.pipeline,
            step="decode",
            reason=reason,
            detail=detail,
            format=form,
            cipher=self.cipher,
        )

    def _parse(self, table: pa.Table, form: Form | None) -> Parsed:
        if form is None:
            return Parsed(table, None, Faults())
        payloads = table[RAW.name]
        whole = payloads.chunk(0) if payloads.num_chunks == 1 else payloads.combine_chunks()
        return form.parse(whole, self.schema, extra=self.extra != "ignore")

    def _good(self, parsed: Parsed, bad: Rows) -> pa.Array:
        """Which of the parsed rows stand."""
        if parsed.kept is None:
            mask = np.ones(len(parsed.columns), bool)
            mask[bad] = False
            return pa.array(mask)
        return pa.array(~np.isin(parsed.kept, bad))

    def _rows(self, table: pa.Table, parsed: Parsed) -> tuple[pa.Table, Faults]:
        """The parsed rows in the schema's types, those with faults included."""
        faults, length = parsed.faults, len(parsed.columns)
        for fault in parsed.lost:
            self._fault(fault, None, table, parsed, faults)
        columns = []
        for field in self.schema.fields:
            values = column_at(parsed.columns, field)
            if values is None:
                values = pa.chunked_array([pa.nulls(length, field.type)])
            column, found = conform(values, field, self.coded)
            for fault in found:
                self._fault(fault, values, table, parsed, faults)
            columns.append(column)
        kept = table if parsed.kept is None else table.take(pa.array(parsed.kept))
        if self.extra != "ignore":
            extras = self._extras(parsed)
            self._judge(extras, table, parsed, faults)
            columns += [extras] if self.extra == "keep" else []
        columns += [kept[place.name] for place in _PLACES if place.name in kept.column_names]
        fields = self.arrow(table.column_names)
        typed = (field.with_type(column.type) for field, column in zip(fields, columns, strict=True))
        return pa.Table.from_arrays(columns, schema=pa.schema(typed)), faults

    def arrow(self, given: Sequence[str]) -> pa.Schema:
        """The schema of the rows of a table with these columns."""
        extra = [EXTRA] if self.extra == "keep" else []
        return pa.schema([*self.schema.arrow, *extra, *(place for place in _PLACES if place.name in given)])

    def _fault(
        self, fault: Fault, values: pa.ChunkedArray | None, table: pa.Table, parsed: Parsed, faults: Faults
    ) -> None:
        if fault.missing:
            faults.add(_at(parsed, fault.rows), fault.reason, f"{fault.reason}, which may not be null")
            return
        if self.invalid == "null":
            return
        detail = self._detail(None if values is None else values.take(pa.array(fault.rows)), fault)
        if self.invalid == "stop":
            raise self._stopped(detail[0], table, _at(parsed, fault.rows), "invalid")
        faults.add(_at(parsed, fault.rows), fault.reason, detail)

    def _detail(self, values: pa.ChunkedArray | None, fault: Fault) -> list[str]:
        if values is None:
            return [fault.reason] * len(fault.rows)
        values = _printable(pa.table({"x": values}))["x"]
        # A shifted line puts one column's value in another's place: with personal columns, no value is shown at all.
        if self.schema.personal:
            return [f"{fault.reason}, a value of {len(str(value))} characters" for value in values.to_pylist()]
        return [f"{fault.reason}: {_shown(value)}" for value in values.to_pylist()]

    def _extras(self, parsed: Parsed) -> pa.ChunkedArray:
        """The columns the schema does not have, as one JSON object a row (string), null when a row has none."""
        if EXTRA.name in parsed.columns.column_names:
            return parsed.columns[EXTRA.name]
        others = [name for name in parsed.columns.column_names if name not in self._known and name not in _BOOKKEEPING]
        if not others or not len(parsed.columns):
            return pa.chunked_array([pa.nulls(len(parsed.columns), EXTRA.type)])
        unknown = _printable(parsed.columns.select(others))
        text = query.run("select to_json(_row)::varchar as extra from _row", {"_row": unknown})
        return text["extra"].cast(EXTRA.type)

    def _judge(self, extras: pa.ChunkedArray, table: pa.Table, parsed: Parsed, faults: Faults) -> None:
        rows = positions(extras.is_valid())
        if self.extra == "keep" or not len(rows):
            return
        sql = "SELECT array_to_string(json_keys(extra), ', ') AS names FROM extras"
        unknown = query.run(sql, {"extras": pa.table({"extra": extras.take(pa.array(rows))})})["names"]
        details = [f"{self.schema.name} does not declare {names}" for names in unknown.to_pylist()]
        if self.extra == "stop":
            raise self._stopped(details[0], table, _at(parsed, rows), "extra")
        faults.add(_at(parsed, rows), "extra column", details)

    def _stopped(self, what: str, table: pa.Table, rows: Rows, setting: str) -> DataRefused:
        first = int(rows[0])
        where = f"{table[SOURCE.name][first]} at {table[OFFSET.name][first]}"
        return DataRefused(f"{self.pipeline}: {where}: {what}; Source({setting}='stop') ends the run")

    @functools.cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(path(field).partition(".")[0] for field in self.schema.fields) | {
            path(field) for field in self.schema.fields
        }


def column_at(table: pa.Table, field: Field) -> pa.ChunkedArray | None:
    """The field's column in a payload's columns, by name, else step by step into structs."""
    where = path(field)
    if where in table.column_names:
        return table[where]
    first, *rest = where.split(".")
    if first not in table.column_names or not rest:
        return None
    column = table[first]
    for name in rest:
        if not pa.types.is_struct(column.type) or column.type.get_field_index(name) < 0:
            return None
        column = pc.struct_field(column, name)
    return column


def _form_of(schema: pa.Schema) -> Form | None:
    noted = mark(schema)
    if noted is None:
        return None
    forms: dict[object, type[Form]] = {form.name: form for form in (Csv, Json, Avro)}
    form = forms[noted.pop("form")]
    return form(**{name: tuple(value) if isinstance(value, list) else value for name, value in noted.items()})


def _printable(rows: pa.Table) -> pa.Table:
    """The rows as JSON writers and Python take them: times past their range as text, text not in UTF-8 as bytes."""
    for at, field in enumerate(rows.schema):
        column = rows[field.name]
        if pa.types.is_dictionary(field.type) and field.name != SOURCE.name:
            column = column.cast(field.type.value_type)
        try:
            if pa.types.is_temporal(field.type):
                column.to_pylist()
            column.validate(full=True)
        except OverflowError:
            rows = rows.set_column(at, field.name, column.cast(pa.string()))
        except pa.ArrowInvalid:
            raw = untexted(column.type)
            rows = rows.set_column(at, field.name, pa.chunked_array([chunk.view(raw) for chunk in column.chunks], raw))
    return rows


def _at(parsed: Parsed, rows: Rows) -> Rows:
    """Positions among the parsed rows as positions in the table they came from."""
    return rows if parsed.kept is None else parsed.kept[rows]


def _shown(value: object) -> str:
    text = str(value)
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "…")
