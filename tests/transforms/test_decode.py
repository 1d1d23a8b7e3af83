"""Decoding: every type and its bad values, by payload format; a value means the same whatever its batch."""

import datetime
import json
import math
from decimal import Decimal
from typing import Annotated, Any

import apache_beam as beam
import fastavro
import pyarrow as pa
import pytest
from apache_beam.testing.util import assert_that, equal_to
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.transforms.avro import Avro
from pipelines.transforms.conservation import merge
from pipelines.transforms.deadletters import DEAD_LETTERS
from pipelines.transforms.decode import Decode
from pipelines.transforms.decoder import Decoded, Decoder
from pipelines.transforms.delimited import Csv
from pipelines.transforms.errors import DataRefused
from pipelines.transforms.objects import Json
from pipelines.transforms.payloads import Form
from pipelines.transforms.schema import Column, RowSchema

UTC = datetime.UTC
NOON = datetime.datetime(2024, 7, 1, 12, tzinfo=UTC)


def raw(*payloads: bytes) -> pa.Table:
    """Payloads as messages of a log."""
    return pa.table(
        {
            "_source": pa.array(["log"] * len(payloads), pa.string()).dictionary_encode(),
            "_offset": pa.array(range(len(payloads)), pa.int64()),
            "_raw": pa.array(payloads, pa.large_binary()),
        }
    )


def typed(**columns: Any) -> pa.Table:
    """Columns as a Parquet file has them."""
    rows = len(next(iter(columns.values())))
    book = {"_source": pa.array(["file"] * rows).dictionary_encode(), "_offset": pa.array(range(rows), pa.int64())}
    return pa.table({**columns, **book})


def row(kind: Any) -> RowSchema:
    """A schema of one column x."""
    return RowSchema.of(type("Row", (), {"__annotations__": {"x": kind}}))


def one(kind: Any, text: str, **options: Any) -> Any:
    """What a CSV field becomes, or why not."""
    decoded = Decoder(row(kind), "p", form=Csv(("x", "y")), **options).decode(raw(f"{text},1".encode()))
    return decoded.dead["reason"][0].as_py() if decoded.dead is not None else decoded.rows["x"][0].as_py()


Paris = Annotated[datetime.datetime, Column(timezone="Europe/Paris")]
Cents = Annotated[Decimal, Column(scale=2)]


@pytest.mark.parametrize(
    ("kind", "text", "wanted"),
    [
        (int, "12", 12),
        (int, "-12", -12),
        (int, " +12 ", 12),
        (int, "517.0", 517),
        (int, "1e3", 1000),
        (int, '"12"', 12),
        (int, "9223372036854775807", 2**63 - 1),
        (int, "9223372036854775808", "invalid int in x"),
        (int, "99999999999999999999999", "invalid int in x"),
        (int, "9007199254740993.0", "invalid int in x"),
        (int, "1.5", "invalid int in x"),
        (int, "nan", "invalid int in x"),
        (int, "", "null in x"),
        (int, "twelve", "invalid int in x"),
        (int | None, "", None),
        (float, "1.5", 1.5),
        (float, " .5", 0.5),
        (float, "inf", math.inf),
        (float, "-Infinity", -math.inf),
        (float, "1e400", "invalid float in x"),
        (float, "1,5".replace(",", ";"), "invalid float in x"),
        (bool, "true", True),
        (bool, "FALSE", False),
        (bool, "1", True),
        (bool, "yes", "invalid bool in x"),
        (str, "é", "é"),
        (str, " a ", " a "),
        (str, '""', ""),
        (str, "", "null in x"),
        (bytes, "é", "é".encode()),
        (Decimal, "1.10", Decimal("1.10")),
        (Decimal, "12345678901234567890.123456789", Decimal("12345678901234567890.123456789")),
        (Cents, "1.10", Decimal("1.10")),
        (Cents, "1.111", "invalid Decimal in x"),
        (Decimal, "99999999999999999999999999999999999999", "invalid Decimal in x"),
        (Decimal, "nan", "invalid Decimal in x"),
        (datetime.date, "2024-02-29", datetime.date(2024, 2, 29)),
        (datetime.date, "2023-02-29", "invalid date in x"),
        (datetime.date, "01/02/2024", "invalid date in x"),
        (datetime.datetime, "2024-07-01T12:00:00Z", NOON),
        (datetime.datetime, "2024-07-01 14:00:00+02:00", NOON),
        (datetime.datetime, "2024-07-01 14:00:00.000000999+0200", NOON),
        (datetime.datetime, "2024-07-01T12:00:00", "naive time in x"),
        (datetime.datetime, "2024-07-01", "naive time in x"),
        (datetime.datetime, "2024-07-01T25:00:00Z", "invalid datetime in x"),
        (datetime.datetime, "yesterday", "invalid datetime in x"),
        (datetime.datetime, "1719835200", "invalid datetime in x"),
        (datetime.datetime, "0000-12-31T00:00:00Z", "time out of range in x"),
        (datetime.datetime, "10000-01-01T00:00:00Z", "invalid datetime in x"),
        (datetime.datetime, "9999-12-31T23:59:59.999999Z", datetime.datetime.max.replace(tzinfo=UTC)),
        (datetime.datetime, "0001-01-01T00:00:00Z", datetime.datetime.min.replace(tzinfo=UTC)),
        (Paris, "2024-07-01T14:00:00", NOON),
        (Paris, "2024-07-01T14:00:00.000000999", NOON),
        (Paris, "2024-07-01T12:00:00Z", NOON),
        (Paris, "2024-10-27T02:30:00", datetime.datetime(2024, 10, 27, 0, 30, tzinfo=UTC)),  # twice: the first
        (Paris, "2024-03-31T02:30:00", "invalid datetime in x"),  # never
    ],
)
def test_a_field_of_text_becomes_its_type_or_says_why_not(kind: Any, text: str, wanted: Any) -> None:
    assert one(kind, text) == wanted
    assert one(kind, f'"{text}"' if text and '"' not in text else text) == wanted  # in quotes it is the same


def test_nan_is_a_float() -> None:
    assert math.isnan(one(float, "NaN"))


JSON = [
    (int, "12", 12),
    (int, '"12"', 12),
    (int, "12.0", 12),
    (int, "12.5", "invalid int in x"),
    (int, "true", "invalid int in x"),
    (int, "[1]", "invalid int in x"),
    (int, "9223372036854775807", 2**63 - 1),
    (int, "9223372036854775808", "invalid int in x"),
    (int, "null", "null in x"),
    (int | None, "null", None),
    (float, "1e400", "invalid float in x"),
    (float, "-Infinity", -math.inf),
    (float, "0.1", 0.1),
    (str, r'"\u00e9\ud83d\ude00\n\""', 'é😀\n"'),
    (str, '""', ""),
    (bool, "true", True),
    (bool, '"no"', "invalid bool in x"),
    (Decimal, "12345678901234567890.123456789", Decimal("12345678901234567890.123456789")),
    (Decimal, '"1.10"', Decimal("1.10")),
    (Decimal, "1.1e2", Decimal("110")),
    (datetime.datetime, '"2024-07-01T12:00:00Z"', NOON),
    (datetime.datetime, '"2024-07-01T12:00:00"', "naive time in x"),
    (datetime.datetime, "1719835200", "invalid datetime in x"),
    (datetime.date, '"2024-07-01"', datetime.date(2024, 7, 1)),
    (list[int], "[1, 2]", [1, 2]),
    (list[int], "[]", []),
    (list[int], "[1, null]", "null in x"),
    (list[int | None], "[1, null]", [1, None]),
    (list[int], '[1, "x"]', "invalid int in x"),
    (list[int], "5", "invalid list in x"),
    (list[int] | None, "null", None),
    (list[list[int]], "[[1], 2]", "invalid list in x"),
]


@pytest.mark.parametrize(("kind", "text", "wanted"), JSON)
def test_a_json_value_becomes_its_type_or_says_why_not(kind: Any, text: str, wanted: Any) -> None:
    decoded = Decoder(row(kind), "p", form=Json()).decode(raw(f'{{"x": {text}}}'.encode()))
    got = decoded.dead["reason"][0].as_py() if decoded.dead is not None else decoded.rows["x"][0].as_py()
    assert got == wanted


class Line:
    sku: str
    quantity: int | None
    price: Decimal


class Order:
    id: int
    country: Annotated[str, Column(path="ship.to.country")]
    lines: list[Line]
    first: Annotated[Line | None, Column(path="ship.line")]


ORDER = RowSchema.of(Order)
GOOD = (
    b'{"id":1,"ship":{"to":{"country":"FR"},"line":{"sku":"b","price":2}},'
    b'"lines":[{"sku":"a","quantity":2,"price":12345678901234567.01,"more":1}]}'
)
GOOD_ROW = {
    "id": 1,
    "country": "FR",
    "lines": [{"sku": "a", "quantity": 2, "price": Decimal("12345678901234567.010000000")}],
    "first": {"sku": "b", "quantity": None, "price": Decimal(2)},
}


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b'{"id":2,"lines":[]}', "null in country"),
        (b'{"id":2,"ship":{"to":{"country":"FR"}},"lines":[{"price":1}]}', "null in lines.sku"),
        (
            b'{"id":2,"ship":{"to":{"country":"FR"}},"lines":[{"sku":"a","price":"x"}]}',
            "invalid Decimal in lines.price",
        ),
        (b'{"id":2,"ship":{"to":{"country":"FR"}},"lines":[7]}', "invalid list in lines"),
        (b'{"id":2,"ship":{"to":{"country":"FR"}}}', "null in lines"),
        (b'{"id":2,"ship":{"to":{"country":"FR"},"line":[]},"lines":[]}', "invalid object in first"),
        (b'{"id":2', "invalid json"),
        (b"null", "not an object"),
        (b"[1]", "not an object"),
        (b'{"id":2}{"id":3}', "invalid json"),
        (b"", "invalid json"),
        (b'{"id":"\xff"}', "invalid utf-8"),
    ],
)
def test_a_bad_payload_is_refused_with_its_bytes_and_the_others_go_on(payload: bytes, reason: str) -> None:
    decoded = Decoder(ORDER, "orders", form=Json()).decode(raw(GOOD, payload, GOOD + b"\r\n"))
    assert decoded.rows.select(ORDER.names).to_pylist() == [GOOD_ROW, GOOD_ROW]
    assert decoded.rows["_offset"].to_pylist() == [0, 2]
    assert decoded.dead is not None
    assert decoded.dead.schema == DEAD_LETTERS
    (letter,) = decoded.dead.to_pylist()
    assert (letter["reason"], letter["payload"], letter["offset"], letter["source"]) == (reason, payload, 1, "log")
    assert (letter["pipeline"], letter["step"], letter["format"]) == ("orders", "decode", "json")


def test_csv_lines_of_the_wrong_width_or_bytes_are_refused_alone() -> None:
    lines = [
        b"1,2\n",
        b"3\n",
        b"4,5,6\r\n",
        b'7,"8\n9"\r\n',
        b'10,"x\n',
        b"\xff,1\n",
        b'11,5" p',
        b"",
        b"12,a\rb",
        b"1,1\n2,2\n",
    ]
    decoded = Decoder(
        RowSchema.of(type("Row", (), {"__annotations__": {"a": int, "b": str}})), "p", form=Csv(("a", "b"))
    ).decode(raw(*lines))
    assert decoded.rows.select(["a", "b"]).to_pylist() == [
        {"a": 1, "b": "2"},
        {"a": 7, "b": "8\n9"},
        {"a": 11, "b": '5" p'},
    ]
    assert decoded.dead is not None
    assert decoded.dead.select(["offset", "reason", "payload"]).to_pylist() == [
        {"offset": 1, "reason": "too few fields", "payload": b"3"},
        {"offset": 2, "reason": "too many fields", "payload": b"4,5,6"},
        {"offset": 4, "reason": "unterminated quote", "payload": b'10,"x'},
        {"offset": 5, "reason": "invalid utf-8", "payload": b"\xff,1"},
        {"offset": 7, "reason": "too few fields", "payload": b""},
        {"offset": 8, "reason": "unterminated quote", "payload": b"12,a\rb"},
        {"offset": 9, "reason": "unterminated quote", "payload": b"1,1\n2,2"},
    ]


def decode_each(schema: RowSchema, form: Form, payloads: list[bytes]) -> list[Any]:
    """Each payload by itself: its row, or its reason."""
    return [
        outcome for payload in payloads for outcome in outcomes(Decoder(schema, "p", form=form).decode(raw(payload)))
    ]


def outcomes(decoded: Decoded) -> list[Any]:
    """Rows and reasons in order of offset."""
    names = [name for name in decoded.rows.column_names if not name.startswith("_")]
    found = dict(zip(decoded.rows["_offset"].to_pylist(), decoded.rows.select(names).to_pylist(), strict=True))
    if decoded.dead is not None:
        found |= dict(zip(decoded.dead["offset"].to_pylist(), decoded.dead["reason"].to_pylist(), strict=True))
    return [str(found[offset]) for offset in sorted(found)]


class Mixed:
    n: int
    f: float | None
    at: datetime.datetime | None
    d: Annotated[Decimal | None, Column(scale=2)]
    s: str


FIELDS = st.sampled_from(
    [
        "1",
        "2.0",
        "+3",
        "x",
        "",
        "nan",
        "1e400",
        "NA",
        '"4"',
        '"a""b"',
        '"',
        'a"b',
        "\r",
        "é",
        "2024-07-01T12:00:00Z",
        "2024-07-01",
    ]
)


@given(st.lists(st.lists(FIELDS, min_size=4, max_size=6).map(",".join), min_size=1, max_size=12))
@settings(max_examples=25, deadline=None)
def test_a_csv_line_means_the_same_whatever_its_batch(lines: list[str]) -> None:
    schema, form = RowSchema.of(Mixed), Csv(("n", "f", "at", "d", "s"), null=("NA",))
    payloads = [line.encode() for line in lines]
    assert outcomes(Decoder(schema, "p", form=form).decode(raw(*payloads))) == decode_each(schema, form, payloads)


VALUES = st.sampled_from(
    [
        "1",
        "2.0",
        '"3"',
        "null",
        "NaN",
        "1e400",
        "[]",
        "{}",
        "true",
        '"2024-07-01T12:00:00Z"',
        '"x"',
        "12345678901234567.25",
        "",
        "]",
    ]
)


@given(st.lists(st.tuples(VALUES, VALUES, VALUES), min_size=1, max_size=10))
@settings(max_examples=15, deadline=None)
def test_a_json_object_means_the_same_whatever_its_batch(rows: list[tuple[str, str, str]]) -> None:
    schema = RowSchema.of(Mixed)
    payloads = [f'{{"n": {n}, "f": {f}, "d": {d}, "s": "s"}}'.encode() for n, f, d in rows]
    assert outcomes(Decoder(schema, "p", form=Json()).decode(raw(*payloads))) == decode_each(schema, Json(), payloads)


# Columns with types


@pytest.mark.parametrize(
    ("kind", "values", "wanted"),
    [
        (int, pa.array([1, 2], pa.int8()), [1, 2]),
        (int, pa.array([1, 2**63], pa.uint64()), [1, "invalid int in x"]),
        (int, pa.array([1.0, 1.5, math.nan]), [1, "invalid int in x", "invalid int in x"]),
        (int, pa.array([1e18, -(2.0**63), 0.5]), [10**18, -(2**63), "invalid int in x"]),
        (int, pa.array([1e18, -(2.0**63)]), [10**18, -(2**63)]),
        (int, pa.array(["1", "x"]).dictionary_encode(), [1, "invalid int in x"]),
        (int, pa.array([1, None]), [1, "null in x"]),
        (int | None, pa.nulls(2), [None, None]),
        (float, pa.array([1, 2**53 + 1]), [1.0, "invalid float in x"]),
        (float, pa.array([1.5], pa.float32()), [1.5]),
        (float, pa.array([math.inf, -math.inf]), [math.inf, -math.inf]),
        (Cents, pa.array([1.1, 2.0]), [Decimal("1.10"), Decimal(2)]),
        (Cents, pa.array([Decimal("1.111")]), ["invalid Decimal in x"]),
        (str, pa.array(["a", "b"]).dictionary_encode(), ["a", "b"]),
        (str, pa.array(["a"], pa.large_string()), ["a"]),
        (str, pa.array(["a"], pa.string_view()), ["a"]),
        (str, pa.array([b"a", b"\xff"]), ["a", "invalid str in x"]),
        (str, pa.array([b"\xc3\xa9", b"\xff", None]).view(pa.string()), ["é", "invalid str in x", "null in x"]),
        (str, pa.array([b"\xff", b"a"]).view(pa.string()).dictionary_encode(), ["invalid str in x", "a"]),
        (int, pa.array([b"1", b"\xff"]).view(pa.string()), [1, "invalid int in x"]),
        (datetime.datetime, pa.array([b"\xff"]).view(pa.string()), ["invalid datetime in x"]),
        (list[str], pa.array([[b"a"], [b"\xff"]]).view(pa.list_(pa.string())), [["a"], "invalid str in x"]),
        (datetime.datetime, pa.array([NOON], pa.timestamp("ns", "Europe/Paris")), [NOON]),
        (
            datetime.datetime,
            pa.array([1999], pa.timestamp("ns", "UTC")),
            [datetime.datetime(1970, 1, 1, microsecond=1, tzinfo=UTC)],
        ),
        (
            datetime.datetime,
            pa.array([0, 2**62], pa.timestamp("us", "UTC")),
            [datetime.datetime(1970, 1, 1, tzinfo=UTC), "time out of range in x"],
        ),
        (datetime.datetime, pa.array([2**62], pa.timestamp("s", "UTC")), ["invalid datetime in x"]),
        (Paris, pa.array([datetime.datetime(2024, 7, 1, 14)], pa.timestamp("ms")), [NOON]),
        (datetime.date, pa.array([0], pa.date64()), [datetime.date(1970, 1, 1)]),
        (datetime.date, pa.array([2**30], pa.date32()), ["time out of range in x"]),
        (list[int], pa.array([[1], None, [2, None], []], pa.list_(pa.int32())), [[1], "null in x", "null in x", []]),
        (
            list[int],
            pa.array([["1"], ["x"], ["2", "3"]], pa.large_list(pa.string())),
            [[1], "invalid int in x", [2, 3]],
        ),
    ],
)
def test_a_typed_column_becomes_the_declared_type_when_nothing_is_lost(
    kind: Any, values: pa.Array, wanted: list[Any]
) -> None:
    decoded = Decoder(row(kind), "p").decode(typed(x=values))
    found: dict[int, Any] = dict(zip(decoded.rows["_offset"].to_pylist(), decoded.rows["x"].to_pylist(), strict=True))
    if decoded.dead is not None:
        found |= dict(zip(decoded.dead["offset"].to_pylist(), decoded.dead["reason"].to_pylist(), strict=True))
    assert [found[offset] for offset in sorted(found)] == wanted
    assert decoded.rows.schema.field("x") == row(kind).arrow.field("x")


def test_nested_columns_conform_part_by_part() -> None:
    lines = pa.array(
        [
            [{"price": 1.5, "sku": "a", "other": 1}],
            [{"price": 1.5, "sku": None, "other": 1}],
            None,
            [{"price": math.nan, "sku": "c", "other": 1}, {"price": 2.0, "sku": "d", "other": 1}],
            [],
        ]
    )

    class Row:
        lines: list[Line] | None

    decoded = Decoder(RowSchema.of(Row), "p").decode(typed(lines=lines).slice(0))
    assert decoded.rows["lines"].to_pylist() == [[{"sku": "a", "quantity": None, "price": Decimal("1.5")}], None, []]
    assert decoded.dead is not None
    assert decoded.dead["reason"].to_pylist() == ["null in lines.sku", "invalid Decimal in lines.price"]


def test_chunks_and_slices_keep_their_rows() -> None:
    table = pa.concat_tables([typed(x=["1", "2", "x"]), typed(x=["4", "y", "6"])]).slice(1, 4)
    decoded = Decoder(row(int), "p").decode(table)
    assert decoded.rows["x"].to_pylist() == [2, 4]
    assert decoded.dead is not None
    assert decoded.dead["offset"].to_pylist() == [2, 1]


def test_a_batch_without_rows_is_a_batch() -> None:
    for table, form in ((typed(x=[]), None), (raw(), Csv(("x",))), (raw(), Json())):
        decoded = Decoder(row(int), "p", form=form).decode(table)
        assert (len(decoded.rows), decoded.dead) == (0, None)
        assert decoded.rows.schema.names[:3] == ["x", "_source", "_offset"]


@pytest.mark.parametrize(
    "form", [Csv(("x", "y")), Json(), Avro('{"type":"record","name":"R","fields":[{"name":"x","type":"int"}]}')]
)
def test_a_message_without_a_payload_is_refused(form: Form) -> None:
    table = raw(b"").set_column(2, "_raw", pa.array([None], pa.large_binary()))
    dead = Decoder(row(int), "p", form=form).decode(table).dead
    assert dead is not None
    assert dead["payload"].to_pylist() == [b""]


# invalid, extra, personal


def test_an_invalid_value_can_be_null_or_stop_the_run() -> None:
    assert one(int | None, "x", invalid="null") is None
    assert one(int, "x", invalid="null") == "null in x"
    with pytest.raises(DataRefused, match=r"p: log at 0: invalid int in x: 'x'; Source\(invalid='stop'\)"):
        one(int | None, "x", invalid="stop")
    decoded = Decoder(row(list[int] | None), "p", form=Json(), invalid="null").decode(raw(b'{"x":[1]}', b'{"x":5}'))
    assert (decoded.rows["x"].to_pylist(), decoded.dead) == ([[1], None], None)


@pytest.mark.parametrize(
    ("form", "payloads"), [(Json(), [b'{"x":1,"y":{"z":2}}', b'{"x":1}']), (Csv(("x", "y")), [b"1,2", b"1,"])]
)
def test_extra_values_are_ignored_kept_refused_or_stop(form: Form, payloads: list[bytes]) -> None:
    schema, table = row(int), raw(*payloads)
    assert Decoder(schema, "p", form=form).decode(table).rows.schema.names == ["x", "_source", "_offset", "_raw"]
    kept = Decoder(schema, "p", form=form, extra="keep").decode(table).rows
    assert kept.schema.names == ["x", "_extra", "_source", "_offset", "_raw"]
    assert json.loads(kept["_extra"][0].as_py()) == ({"y": {"z": 2}} if form.name == "json" else {"y": "2"})
    dead = Decoder(schema, "p", form=form, extra="reject").decode(table).dead
    assert dead is not None
    assert dead.select(["reason", "detail"]).slice(0, 1).to_pylist() == [
        {"reason": "extra column", "detail": "Row does not declare y"}
    ]
    with pytest.raises(DataRefused, match=r"p: log at 0: Row does not declare y; Source\(extra='stop'\) ends the run"):
        Decoder(schema, "p", form=form, extra="stop").decode(table)


def test_no_value_of_a_source_with_personal_columns_is_told() -> None:
    class Call:
        caller: Annotated[str, Column(personal="phone")]
        seconds: int

    plain = Decoder(RowSchema.of(Call), "calls", form=Csv(("caller", "seconds"))).decode(raw(b"1,seven"))
    assert plain.dead is not None
    assert plain.dead["detail"].to_pylist() == ["invalid int in seconds, a value of 5 characters"]


# Avro messages, and the Beam side

SCHEMA = {
    "type": "record",
    "name": "R",
    "fields": [
        {"name": "id", "type": "long"},
        {"name": "at", "type": ["null", {"type": "long", "logicalType": "timestamp-millis"}]},
        {"name": "day", "type": {"type": "int", "logicalType": "date"}},
        {"name": "price", "type": {"type": "bytes", "logicalType": "decimal", "precision": 9, "scale": 2}},
        {"name": "kind", "type": {"type": "enum", "name": "Kind", "symbols": ["A", "B"]}},
        {"name": "either", "type": ["null", "string", "long"]},
        {"name": "tags", "type": {"type": "map", "values": "int"}},
        {"name": "line", "type": {"type": "record", "name": "Line", "fields": [{"name": "kind", "type": "Kind"}]}},
        {"name": "ids", "type": {"type": "array", "items": "int"}},
    ],
}


class Tag:
    kind: str


class Event:
    id: int
    at: datetime.datetime | None
    day: datetime.date
    price: Cents
    kind: str
    either: int | None
    tags: str
    line: Tag
    ids: list[int]


EVENT = {
    "id": 1,
    "at": NOON,
    "day": datetime.date(2024, 7, 1),
    "price": Decimal("1.10"),
    "kind": "B",
    "either": 5,
    "tags": {"a": 1},
    "line": {"kind": "A"},
    "ids": [1, 2],
}


def record(**changes: Any) -> bytes:
    sink = pa.BufferOutputStream()
    fastavro.schemaless_writer(sink, fastavro.parse_schema(SCHEMA), {**EVENT, **changes})
    return bytes(sink.getvalue())


def test_avro_messages_become_rows() -> None:
    payloads = [record(), record(at=None, either="x"), record()[:-4], record() + b"more", record(kind="A")]
    decoded = Decoder(RowSchema.of(Event), "p", form=Avro(json.dumps(SCHEMA))).decode(raw(*payloads))
    assert decoded.rows.select(list(EVENT)).to_pylist() == [
        {**EVENT, "tags": '{"a": 1}'},
        {**EVENT, "tags": '{"a": 1}', "kind": "A"},
    ]
    assert decoded.dead is not None
    assert decoded.dead.select(["offset", "reason", "format"]).to_pylist() == [
        {"offset": 1, "reason": "invalid int in either", "format": "avro"},
        {"offset": 2, "reason": "invalid avro", "format": "avro"},
        {"offset": 3, "reason": "invalid avro", "format": "avro"},
    ]


def test_avro_text_that_is_not_utf8_and_times_past_pythons_cost_their_row_only() -> None:
    class Row:
        s: str
        at: datetime.datetime

    fields = [
        {"name": "s", "type": "string"},
        {"name": "at", "type": {"type": "long", "logicalType": "timestamp-micros"}},
    ]
    schema = json.dumps({"type": "record", "name": "R", "fields": fields})
    payloads = [b"\x02a\x02", b"\x02\xff\x02", b"\x02b" + b"\xfe\xff\xff\xff\xff\xff\xff\xff\xff\x01"]
    decoded = Decoder(RowSchema.of(Row), "p", form=Avro(schema)).decode(raw(*payloads))
    assert decoded.rows["s"].to_pylist() == ["a"]
    assert decoded.dead is not None
    assert decoded.dead["reason"].to_pylist() == ["invalid str in s", "time out of range in at"]


@pytest.mark.slow
def test_the_beam_part_gives_rows_dead_letters_and_tallies_with_their_coder() -> None:
    decoder = Decoder(row(int), "p", form=Csv(("x",)))
    with beam.Pipeline("FnApiRunner") as pipeline:
        decoded = pipeline | beam.Create([raw(b"1", b"x"), raw(b"2", b"y")]) | Decode(decoder)
        for output in (decoded.rows, decoded.dead, decoded.tallies):
            assert output.element_type == pa.Table
        assert_that(decoded.rows | beam.Map(lambda table: table["x"].to_pylist()), equal_to([[1], [2]]))
        assert_that(
            decoded.dead | "dead" >> beam.Map(lambda table: table["payload"].to_pylist()),
            equal_to([[b"x"], [b"y"]]),
            "d",
        )
        total = decoded.tallies | beam.combiners.ToList() | "sum" >> beam.Map(lambda tables: merge(tables).to_pylist())
        wanted = [{"part": "source", "counter": "rejected", "reason": "invalid int in x", "n": 2}]
        assert_that(total, equal_to([wanted]), "t")


@pytest.mark.parametrize("coded", [True, False])
def test_codes_are_judged_as_the_text_they_stand_for(coded: bool) -> None:
    bad = pa.array([b"ok", b"\xff", None, b"ok"], pa.binary()).view(pa.string()).dictionary_encode()
    decoded = Decoder(row(str), "p", coded=coded).decode(typed(x=bad))
    assert decoded.rows["x"].to_pylist() == ["ok", "ok"]
    assert decoded.dead is not None
    assert decoded.dead["reason"].to_pylist() == ["invalid str in x", "null in x"]
    good = pa.array(["a", None, "a"]).dictionary_encode()
    decoded = Decoder(row(str), "p", coded=coded).decode(typed(x=good))
    assert decoded.rows["x"].to_pylist() == ["a", "a"]
    assert decoded.dead is not None and decoded.dead["offset"].to_pylist() == [1]
    assert pa.types.is_dictionary(decoded.rows["x"].type) == coded
