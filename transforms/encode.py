"""Rows to messages of a log, in the formats that ``pipelines.transforms.messages`` reads: what a replay sends."""

import io
import json
from collections.abc import Callable
from typing import Any, Literal

import fastavro
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.transforms import query
from pipelines.transforms.avro_schemas import schema_id
from pipelines.transforms.casts import is_list
from pipelines.transforms.errors import UserError
from pipelines.transforms.payloads import path
from pipelines.transforms.schema import RowSchema

ARROW_ROWS = 4096
"""Rows of an Arrow message at most."""

_ROWS = pa.int32()


def encode(rows: pa.Table, schema: RowSchema, format: Literal["json", "avro", "arrow"]) -> pa.Table:
    """Rows as messages: `_raw` (large_binary) and `_rows` (int32), in the rows' order.

    Values stand where the row class says that a payload has them (``Column(path=)``). json: an object a row, with times
    in ISO 8601 and Decimals as text. avro: behind the id of ``avro_schema(schema)``, which readers need in their folder
    of schemas (``Schemas(folder).add(…)``). arrow: streams of up to 4096 rows. Raises UserError for bytes that JSON
    cannot hold.

    >>> class Row:
    ...     n: int | None
    >>> encode(pa.table({"n": [1, None]}), RowSchema.of(Row), "json").to_pylist()
    [{'_raw': b'{"n":1}', '_rows': 1}, {'_raw': b'{"n":null}', '_rows': 1}]
    """
    payload = _payload(rows, schema)
    if format == "arrow":
        starts = range(0, len(payload), ARROW_ROWS)
        messages = [(_stream(part), len(part)) for part in (payload.slice(start, ARROW_ROWS) for start in starts)]
        return _messages([raw for raw, _ in messages], [count for _, count in messages])
    raw = _json(payload) if format == "json" else _avro(payload, schema)
    return _messages(raw, np.ones(len(payload), np.int32))


def avro_schema(schema: RowSchema) -> str:
    """The Avro schema (JSON text) that rows of this class are written with, a record that has the payload's nesting.

    >>> class Row:
    ...     n: int | None
    >>> avro_schema(RowSchema.of(Row))
    '{"type": "record", "name": "Row", "fields": [{"name": "n", "type": ["null", "long"]}]}'
    """
    return json.dumps(_record(_payload(schema.arrow.empty_table(), schema).schema, schema.name))


def _messages(raw: Any, counts: Any) -> pa.Table:
    return pa.table([pa.array(raw, pa.large_binary()), pa.array(counts, _ROWS)], ["_raw", "_rows"])


def _payload(rows: pa.Table, schema: RowSchema) -> pa.Table:
    """The columns as a payload nests them. A column within another one is there already."""
    tree: dict[str, Any] = {}
    for field in sorted(schema.fields, key=lambda field: path(field).count(".")):
        *outer, last = path(field).split(".")
        inside = tree
        for name in outer:
            inside = inside.setdefault(name, {}) if isinstance(inside, dict) else inside
        if isinstance(inside, dict):
            inside.setdefault(last, (field.arrow.with_name(last), rows[field.name].combine_chunks()))
    parts = [_part(name, found) for name, found in tree.items()]
    return pa.Table.from_arrays([values for _, values in parts], schema=pa.schema([field for field, _ in parts]))


def _part(name: str, found: Any) -> tuple[pa.Field, pa.Array]:
    if isinstance(found, tuple):
        return found
    parts = [_part(inner, deeper) for inner, deeper in found.items()]
    values = pa.StructArray.from_arrays([values for _, values in parts], fields=[field for field, _ in parts])
    return pa.field(name, values.type, nullable=False), values


def _stream(rows: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def _json(rows: pa.Table) -> pa.ChunkedArray:
    texts = pa.table({name: _leaves(rows[name].combine_chunks(), _text) for name in rows.column_names})
    found = query.run("SELECT to_json(_row)::VARCHAR AS raw FROM _row", {"_row": texts})["raw"]
    return found.cast(pa.large_binary())


def _text(values: pa.Array) -> pa.Array:
    if pa.types.is_timestamp(values.type):
        return pc.strftime(values, format="%Y-%m-%dT%H:%M:%SZ")
    if pa.types.is_binary(values.type):
        try:
            return values.cast(pa.string())
        except pa.ArrowInvalid:
            raise UserError("bytes that are not UTF-8 text have no place in JSON; send format avro or arrow") from None
    return values.cast(pa.string()) if pa.types.is_decimal(values.type) or pa.types.is_date(values.type) else values


def _avro(rows: pa.Table, schema: RowSchema) -> list[bytes]:
    text = avro_schema(schema)
    header = b"\0" + schema_id(text).to_bytes(4, "big")
    plain = fastavro.parse_schema(_record(rows.schema, schema.name, times=False))
    numbers = pa.table({name: _leaves(rows[name].combine_chunks(), _number) for name in rows.column_names})
    raw = []
    for row in numbers.to_pylist():
        sink = io.BytesIO()
        sink.write(header)
        fastavro.schemaless_writer(sink, plain, row)
        raw.append(sink.getvalue())
    return raw


def _number(values: pa.Array) -> pa.Array:
    """Times as the integers that Avro has: Python's own times are slow."""
    if pa.types.is_timestamp(values.type):
        return values.cast(pa.int64())
    return values.cast(pa.int32()) if pa.types.is_date(values.type) else values


def _leaves(values: pa.Array, convert: Callable[[pa.Array], pa.Array]) -> pa.Array:
    """The array with its values, however deep in lists and structs, converted."""
    if not pa.types.is_nested(values.type):
        return convert(values)
    mask = values.is_null() if values.null_count else None
    if is_list(values.type):
        inner = _leaves(values.flatten(), convert)
        lengths = np.asarray(pc.fill_null(pc.list_value_length(values), 0))
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
        return pa.ListArray.from_arrays(offsets, inner, mask=mask)
    parts = [_leaves(part, convert) for part in values.flatten()]
    return pa.StructArray.from_arrays(parts, names=[field.name for field in values.type], mask=mask)


def _record(fields: Any, name: str, *, times: bool = True) -> dict[str, Any]:
    types = [{"name": field.name, "type": _type(field, f"{name}_{field.name}", times=times)} for field in fields]
    return {"type": "record", "name": name, "fields": types}


def _type(field: pa.Field, name: str, *, times: bool) -> Any:
    """The Avro type of a field. name: what a record is called, as each needs a name of its own."""
    kind: pa.DataType = field.type
    found: Any
    if is_list(kind):
        found = {"type": "array", "items": _type(kind.value_field, f"{name}_item", times=times)}
    elif pa.types.is_struct(kind):
        found = _record(kind, name, times=times)
    elif pa.types.is_timestamp(kind):
        found = {"type": "long", "logicalType": "timestamp-micros"} if times else "long"
    elif pa.types.is_date(kind):
        found = {"type": "int", "logicalType": "date"} if times else "int"
    elif pa.types.is_decimal(kind):
        found = {"type": "bytes", "logicalType": "decimal", "precision": kind.precision, "scale": kind.scale}
    else:
        found = next(avro for arrow, avro in _SCALARS if kind == arrow)
    return ["null", found] if field.nullable else found


_SCALARS = (
    (pa.string(), "string"),
    (pa.binary(), "bytes"),
    (pa.bool_(), "boolean"),
    (pa.int64(), "long"),
    (pa.float64(), "double"),
)
