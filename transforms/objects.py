"""JSON payloads to columns of text, parsed by DuckDB: a batch of objects at a time.

Every scalar comes out as its text, so that a JSON number, a JSON string and a CSV field of the same text are one value.
"""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any, ClassVar

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.transforms import query
from pipelines.transforms.casts import is_list, type_name
from pipelines.transforms.payloads import Fault, Faults, Parsed, path, positions, refuse_not_utf8
from pipelines.transforms.schema import RowSchema

_LONG_NUMBER = r"\d[\d.]{15}|\d[eE]"
"""Digits that a double may not hold."""


@dataclasses.dataclass(frozen=True)
class Json:
    """One JSON object a payload. Of a name that occurs twice the first counts; NaN and Infinity are taken as numbers.

    Columns come out as Arrow string, lists and objects as list and struct of them. Unknown names go as one JSON object
    to the column `_extra` when asked for. A value that is not the list or object it should be is null, and noted.

    >>> class Row:
    ...     n: int
    >>> raw = pa.array([b'{"n": 1, "m": 2}', b'{"n":', b'{"n": "x"}'], pa.large_binary())
    >>> parsed = Json().parse(raw, RowSchema.of(Row))
    >>> parsed.columns["n"].to_pylist(), parsed.kept.tolist(), parsed.faults.reasons()[0].to_pylist()
    (['1', 'x'], [0, 2], ['invalid json'])
    """

    name: ClassVar[str] = "json"

    def parse(self, raw: pa.LargeBinaryArray, schema: RowSchema, *, extra: bool = False) -> Parsed:
        """The schema's columns by path, names joined by dots."""
        faults = Faults()
        refuse_not_utf8(raw, faults)
        sql = _sql(schema, extra)
        try:
            answer = _run(sql, raw, faults, schema)
        except (duckdb.InvalidInputException, duckdb.ConversionException):
            answer = None
        if answer is None:
            _refuse_torn(raw, faults)
            answer = _run(sql, raw, faults, schema)
            assert answer is not None
        columns, lost = _columns(answer, schema)
        return Parsed(columns, faults.others(len(raw)) if len(faults) else None, faults, lost)


def _run(sql: str, raw: pa.LargeBinaryArray, faults: Faults, schema: RowSchema) -> pa.Table | None:
    """The answer over the payloads without faults; None (or DuckDB's error) when some is no object."""
    if len(faults):
        raw = raw.take(pa.array(faults.others(len(raw))))
    text = raw.cast(pa.large_string())
    if any(pa.types.is_decimal(kind) for field in schema.fields for kind in _leaves(field.type)):
        text = _numbers_as_text(text)
    answer = query.run(sql, {"_raw": pa.table({"r": text})})
    return answer if pc.all(pc.fill_null(answer["_object"], False), min_count=0).as_py() else None


def _refuse_torn(raw: pa.LargeBinaryArray, faults: Faults) -> None:
    rows = faults.others(len(raw))
    text = raw.take(pa.array(rows)).cast(pa.large_string())
    sql = "select case when json_valid(r) then json_type(r) else '' end as kind from _raw"
    kinds = query.run(sql, {"_raw": pa.table({"r": text})})["kind"]
    torn = pc.equal(kinds, "")
    faults.add(rows[positions(torn)], "invalid json", "bytes that are not JSON")
    others = positions(pc.and_(pc.invert(torn), pc.not_equal(kinds, "OBJECT")))
    faults.add(rows[others], "not an object", "JSON, but not an object")


def _leaves(kind: pa.DataType) -> Iterator[pa.DataType]:
    if is_list(kind):
        yield from _leaves(kind.value_type)
    elif pa.types.is_struct(kind):
        for child in kind:
            yield from _leaves(child.type)
    else:
        yield kind


def _numbers_as_text(text: pa.Array) -> pa.Array:
    """DuckDB holds a JSON number as a double: what has more digits than that goes in as text, exactly."""
    long = pc.match_substring_regex(text, _LONG_NUMBER)
    if not pc.any(long).as_py():
        return text
    return pc.replace_with_mask(text, long, pa.array(map(_exact, text.filter(long).to_pylist()), pa.large_string()))


def _exact(text: str) -> str:
    try:
        found = json.loads(text, parse_float=str, parse_int=str, object_pairs_hook=_first)
    except (ValueError, RecursionError):
        return text  # not JSON, as the query will find
    return json.dumps(found)


def _first(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return dict(reversed(pairs))


def _sql(schema: RowSchema, extra: bool) -> str:
    """One query for all columns: `_flat` has those at the top, each other path is a column ``p<n>``; ``k<n>`` says
    whether every list and object of field n is one."""
    parts = ["json_type(r) = 'OBJECT' as _object"]
    flat = {path(field): _shape(field.type) for field in schema.fields if "." not in path(field)}
    if flat:
        parts.append(f"json_transform(r, {_quoted(json.dumps(flat))}) as _flat")
    for at, field in enumerate(schema.fields):
        where = "$" + "".join(f".{_name(name)}" for name in path(field).split("."))
        shape = _shape(field.type)
        if "." in path(field):
            inner = f"json_extract(r, {_quoted(where)})"
            found = f"json_extract_string(r, {_quoted(where)})"
            nested = f"json_transform({inner}, {_quoted(json.dumps(shape))})"
            parts.append(f"{found if shape == 'VARCHAR' else nested} as p{at}")
        if shape != "VARCHAR":
            parts.append(f"{' and '.join(_kinds(field.type, where))} as k{at}")
    if extra:
        known = {path(field).partition(".")[0]: None for field in schema.fields}
        parts.append(f"nullif(json_merge_patch(r, {_quoted(json.dumps(known))})::varchar, '{{}}') as _extra")
    return f"select {', '.join(parts)} from _raw"


def _name(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _shape(kind: pa.DataType) -> Any:
    """The type as json_transform takes it, with text at the leaves."""
    if is_list(kind):
        return [_shape(kind.value_type)]
    if pa.types.is_struct(kind):
        return {child.name: _shape(child.type) for child in kind}
    return "VARCHAR"


def _kinds(kind: pa.DataType, where: str) -> Iterator[str]:
    """Conditions that every list and object in the type is one in the payload: json_transform makes nulls of others."""
    if not pa.types.is_nested(kind):
        return
    wanted = "ARRAY" if is_list(kind) else "OBJECT"
    found = f"json_type(r, {_quoted(where)})"
    if "[*]" in where:
        yield f"coalesce(len(list_filter({found}, lambda x: x not in ('{wanted}', 'NULL'))) = 0, true)"
    else:
        yield f"coalesce({found} in ('{wanted}', 'NULL'), true)"
    if is_list(kind):
        yield from _kinds(kind.value_type, f"{where}[*]")
    else:
        for child in kind:
            yield from _kinds(child.type, f"{where}.{_name(child.name)}")


def _columns(answer: pa.Table, schema: RowSchema) -> tuple[pa.Table, list[Fault]]:
    columns: dict[str, pa.ChunkedArray] = {}
    lost = []
    for at, field in enumerate(schema.fields):
        where = path(field)
        column = answer[f"p{at}"] if "." in where else pc.struct_field(answer["_flat"], where)
        if f"k{at}" in answer.column_names and not pc.all(answer[f"k{at}"], min_count=0).as_py():
            rows = positions(pc.invert(answer[f"k{at}"]))
            column = pc.if_else(answer[f"k{at}"], column, pa.scalar(None, column.type))
            lost.append(Fault(rows, f"invalid {type_name(field.type)} in {field.name}"))
        columns[where] = column
    if "_extra" in answer.column_names:
        columns["_extra"] = answer["_extra"]
    return pa.table(columns), lost
