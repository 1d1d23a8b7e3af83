"""Encoding: whatever the row class, the messages decode to the same rows, in every format."""

import datetime
import tempfile
import types
from decimal import Decimal
from typing import Annotated, Any, Literal

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.transforms.avro_schemas import Schemas
from pipelines.transforms.decoder import Decoder
from pipelines.transforms.encode import ARROW_ROWS, avro_schema, encode
from pipelines.transforms.errors import UserError
from pipelines.transforms.messages import Messages
from pipelines.transforms.schema import Column, RowSchema

UTC = datetime.UTC
Format = Literal["json", "avro", "arrow"]

Text = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
SCALARS: dict[Any, st.SearchStrategy[Any]] = {
    str: Text,
    bytes: Text.map(str.encode),
    bool: st.booleans(),
    int: st.integers(-(2**63), 2**63 - 1),
    float: st.floats(allow_nan=False),
    Decimal: st.decimals(-(10**20), 10**20, places=9),
    datetime.date: st.dates(),
    datetime.datetime: st.datetimes(timezones=st.just(UTC)),
}


@st.composite
def kinds(draw: st.DrawFn, depth: int = 2) -> tuple[Any, st.SearchStrategy[Any]]:
    """A Python type of a column, and its values."""
    shape = draw(st.sampled_from(["plain"] * 4 + ["list", "row"] * (depth > 0)))
    kind: Any
    if shape == "plain":
        kind = draw(st.sampled_from(list(SCALARS)))
        values = SCALARS[kind]
    elif shape == "list":
        inner, items = draw(kinds(depth - 1))
        kind, values = types.GenericAlias(list, (inner,)), st.lists(items, max_size=3)
    else:
        parts = draw(st.lists(kinds(depth - 1), min_size=1, max_size=2))
        kind = type("Part", (), {"__annotations__": {f"x{n}": part for n, (part, _) in enumerate(parts)}})
        values = st.fixed_dictionaries({f"x{n}": items for n, (_, items) in enumerate(parts)})
    return (kind | None, st.none() | values) if draw(st.booleans()) else (kind, values)


@st.composite
def tables(draw: st.DrawFn) -> tuple[RowSchema, pa.Table]:
    """A schema, with some of its columns deeper in the payload, and rows of it."""
    columns = draw(st.lists(kinds(), min_size=1, max_size=4))
    hints = {}
    for n, (kind, _) in enumerate(columns):
        where = draw(st.sampled_from([None, None, f"a{n}", f"a.b{n}", f"a.c.d{n}"]))
        hints[f"c{n}"] = Annotated[kind, Column(path=where)]
    schema = RowSchema.of(type("Row", (), {"__annotations__": hints}))
    rows = draw(st.lists(st.fixed_dictionaries({f"c{n}": values for n, (_, values) in enumerate(columns)}), max_size=5))
    return schema, pa.Table.from_pylist(rows, schema.arrow)


def decoded(schema: RowSchema, messages: pa.Table, format: Format, folder: str) -> pa.Table:
    count = len(messages)
    starts = [sum(messages["_rows"].to_pylist()[:n]) for n in range(count)]
    table = messages.append_column("_source", pa.array(["p0"] * count, pa.string()).dictionary_encode())
    table = table.append_column("_offset", pa.array(starts, pa.int64()))
    table = table.append_column("_published", pa.array([0] * count, pa.timestamp("us", "UTC")))
    found = Messages(Decoder(schema, "p"), format, folder).decode(table)
    assert found.dead is None or found.dead.to_pylist() == []
    assert found.rows["_offset"].to_pylist() == list(range(len(found.rows)))
    return found.rows.select(schema.names)


@pytest.mark.parametrize("format", ["json", "avro", "arrow"])
@given(given_rows=tables())
def test_rows_are_what_their_messages_decode_to(format: Format, given_rows: tuple[RowSchema, pa.Table]) -> None:
    schema, rows = given_rows
    with tempfile.TemporaryDirectory() as folder:
        Schemas(folder).add(avro_schema(schema))
        found = decoded(schema, encode(rows, schema, format), format, folder)
    assert found.schema == schema.arrow
    assert found.to_pylist() == rows.to_pylist()


class Payload:
    """What is sent."""

    body: bytes


def test_bytes_that_are_no_text_have_no_json_but_the_other_formats() -> None:
    rows = pa.table({"body": [b"\xff"]}, schema=RowSchema.of(Payload).arrow)
    with pytest.raises(UserError, match="bytes that are not UTF-8 text have no place in JSON"):
        encode(rows, RowSchema.of(Payload), "json")
    with tempfile.TemporaryDirectory() as folder:
        Schemas(folder).add(avro_schema(RowSchema.of(Payload)))
        formats: tuple[Format, ...] = ("avro", "arrow")
        for format in formats:
            found = decoded(RowSchema.of(Payload), encode(rows, RowSchema.of(Payload), format), format, folder)
            assert found["body"].to_pylist() == [b"\xff"]


def test_arrow_messages_hold_a_bounded_number_of_rows() -> None:
    rows = pa.table({"body": [b"x"] * (2 * ARROW_ROWS + 1)}, schema=RowSchema.of(Payload).arrow)
    assert encode(rows, RowSchema.of(Payload), "arrow")["_rows"].to_pylist() == [ARROW_ROWS, ARROW_ROWS, 1]
