"""Messages of a log: each kind of poison is refused with its exact bytes, the rest goes on, and schemas may drift."""

import io
import json
import random
import struct
from pathlib import Path
from typing import Any, Literal

import fastavro
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.transforms.avro_schemas import Schemas
from pipelines.transforms.decoder import Decoded, Decoder
from pipelines.transforms.encode import avro_schema, encode
from pipelines.transforms.errors import DataRefused, UserError
from pipelines.transforms.messages import LARGEST, Messages
from pipelines.transforms.schema import Extra, RowSchema

Format = Literal["json", "avro", "arrow"]
PUBLISHED = pa.scalar(1_700_000_000_000_000, pa.timestamp("us", "UTC"))


class Row:
    """What is sent."""

    n: int
    word: str | None


ROW = RowSchema.of(Row)
GOOD = pa.table({"n": [1, 2], "word": ["a", None]})
AVRO = {"type": "record", "name": "Row", "fields": [{"name": "n", "type": "long"}, {"name": "word", "type": "string"}]}


def batch(*payloads: bytes | None, rows: list[int] | None = None, start: int = 10) -> pa.Table:
    """Messages of one partition."""
    counts = rows or [1] * len(payloads)
    return pa.table(
        {
            "_source": pa.array(["p0"] * len(payloads), pa.string()).dictionary_encode(),
            "_offset": pa.array([start + sum(counts[:at]) for at in range(len(payloads))], pa.int64()),
            "_raw": pa.array(payloads, pa.large_binary()),
            "_published": pa.repeat(PUBLISHED, len(payloads)),
            "_rows": pa.array(counts, pa.int32()),
        }
    )


def payload(format: Format, rows: pa.Table = GOOD, schema: RowSchema = ROW) -> bytes:
    """The first message of some rows."""
    return encode(rows, schema, format)["_raw"][0].as_py()  # type: ignore[no-any-return]


def stream(rows: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(rows)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def record(number: int, schema: Any, value: dict[str, Any]) -> bytes:
    """An Avro message, written by fastavro alone."""
    sink = io.BytesIO()
    fastavro.schemaless_writer(sink, fastavro.parse_schema(schema), value)
    return struct.pack(">bI", 0, number) + sink.getvalue()


def refused(decoded: Decoded) -> list[tuple[int, str, bytes]]:
    """Offset, reason and payload of each dead letter."""
    letters = [] if decoded.dead is None else decoded.dead.to_pylist()
    return [(letter["offset"], letter["reason"], letter["payload"]) for letter in letters]


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Schemas: of Row's own, and as 7 one with a word in every row."""
    Schemas(str(tmp_path)).add(avro_schema(ROW))
    (tmp_path / "7.avsc").write_text(json.dumps(AVRO))
    return str(tmp_path)


def messages(format: Format, folder: str, row: type = Row, **options: Any) -> Messages:
    return Messages(Decoder(RowSchema.of(row), "p", **options), format, folder)


def with_types(format: Format) -> bytes:
    """A message that is right in all but the type of n."""
    if format == "json":
        return b'{"n": "many", "word": "a"}'
    wrong = {"type": "record", "name": "Row", "fields": [{"name": "n", "type": "string"}]}
    return record(8, wrong, {"n": "many"}) if format == "avro" else stream(pa.table({"n": ["many"]}))


POISON: list[tuple[Format, str, bytes]] = [
    ("json", "invalid json", b"\x00"),
    ("json", "invalid json", b'{"n": 1'),
    ("json", "invalid json", b'{"n": 1}\n{"n": 2}'),
    ("json", "invalid json", b"\n"),
    ("json", "not an object", b"[1]\r\n"),
    ("json", "invalid utf-8", b'{"n": 1, "word": "\xff"}'),
    ("json", "invalid int in n", with_types("json")),
    ("json", "null in n", b"{}"),
    ("avro", "no schema id", b"\x00\x00\x00\x00"),
    ("avro", "no schema id", b"\x01\x00\x00\x00\x07\x02\x02a"),
    ("avro", "no schema id", b'{"n": 1, "word": "a"}'),
    ("avro", "unknown schema id", b"\x00\xff\xff\xff\xff\x02\x02a"),
    ("avro", "invalid avro", b"\x00\x00\x00\x00\x07"),
    ("avro", "invalid avro", b"\x00\x00\x00\x00\x07\x02\x04a"),
    ("avro", "invalid avro", b"\x00\x00\x00\x00\x07\x02\x01a"),
    ("avro", "invalid avro", b"\x00\x00\x00\x00\x07\x02\x02a!"),
    ("avro", "invalid str in word", b"\x00\x00\x00\x00\x07\x02\x02\xff"),
    ("avro", "invalid int in n", with_types("avro")),
    ("arrow", "invalid arrow", b'{"n": 1}'),
    ("arrow", "invalid arrow", b"\xff\xff\xff\xff" + b"\x7f" * 12),
    ("arrow", "invalid arrow", stream(GOOD)[:-200]),
    ("arrow", "invalid arrow", stream(GOOD.slice(0, 0))),
    ("arrow", "invalid arrow", stream(pa.table([[1], [2]], ["n", "n"]))),
]


@pytest.mark.parametrize(("format", "reason", "bad"), POISON)
def test_poison_is_refused_with_its_exact_bytes_and_the_rest_goes_on(
    format: Format, reason: str, bad: bytes, folder: str
) -> None:
    (Path(folder) / "8.avsc").write_text('{"type": "record", "name": "R", "fields": [{"name": "n", "type": "string"}]}')
    good = payload(format)
    count = 2 if format == "arrow" else 1
    decoded = messages(format, folder).decode(batch(good, bad, None, good, rows=[count, 1, 1, count]))
    at = 10 + count
    assert refused(decoded) == [(at, reason, bad), (at + 1, "empty message", b"")]
    places = [10, 13] if count == 1 else [10, 11, 14, 15]
    assert decoded.rows["_offset"].to_pylist() == places
    assert decoded.rows["n"].to_pylist() == [1, 1] if count == 1 else [1, 2, 1, 2]
    assert decoded.rows["_published"].unique().to_pylist() == [PUBLISHED.as_py()]
    assert decoded.read == len(places) + 2
    assert decoded.dead is not None
    assert decoded.dead["format"].unique().to_pylist() == [format]


@pytest.mark.parametrize("format", ["json", "avro", "arrow"])
def test_a_message_of_10_mb_is_refused_whatever_is_in_it(format: Format, folder: str) -> None:
    big = payload(format, pa.table({"n": [1], "word": ["x" * 10_000_000]}))
    decoded = messages(format, folder).decode(batch(payload(format, GOOD.slice(0, 1)), big))
    assert refused(decoded) == [(11, "message too large", big)]
    assert decoded.dead is not None
    assert decoded.dead["detail"].to_pylist() == [f"{len(big):,} bytes; at most {LARGEST:,}"]
    assert decoded.rows["n"].to_pylist() == [1]


def test_a_value_of_another_type_in_an_arrow_message_costs_its_row_alone(folder: str) -> None:
    bad = stream(pa.table({"n": ["1", "many", "3"]}))
    decoded = messages("arrow", folder).decode(batch(payload("arrow"), bad, rows=[2, 3]))
    assert decoded.rows["_offset"].to_pylist() == [10, 11, 12, 14]
    assert refused(decoded) == [(13, "invalid int in n", b'{"n":"many"}')]


def test_an_arrow_message_that_is_cut_off_is_never_taken_for_a_shorter_one(folder: str) -> None:
    whole = stream(pa.concat_tables([GOOD] * 3))
    without = whole[:-8]  # the mark of the end
    assert len(messages("arrow", folder).decode(batch(without, rows=[6])).rows) == 6
    for size in range(1, len(without), 13):
        decoded = messages("arrow", folder).decode(batch(whole[:size], rows=[6]))
        assert refused(decoded) == [(10, "invalid arrow", whole[:size])]
        assert not len(decoded.rows)


@pytest.mark.parametrize("compression", [None, "lz4"])
def test_whatever_bits_of_an_arrow_message_flip_it_is_read_or_refused(compression: str | None, folder: str) -> None:
    draw = random.Random(1)
    whole = stream(GOOD.append_column("c", pa.array([None, 1], pa.decimal128(38, 9))), compression=compression)
    reader = messages("arrow", folder, extra="keep")
    for _ in range(150):
        flipped = bytearray(whole)
        for _ in range(draw.choice([1, 3])):
            flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
        decoded = reader.decode(batch(payload("arrow"), bytes(flipped), rows=[2, 2]))
        assert decoded.rows["n"].to_pylist()[:2] == [1, 2]
        assert decoded.read == 4 or [letter[2] for letter in refused(decoded)] == [bytes(flipped)]
        decoded.rows.validate(full=True)


def test_a_decimal_whose_scale_no_power_of_ten_has_is_no_arrow_message(folder: str) -> None:
    whole = stream(pa.table({"n": pa.array([0], pa.decimal128(38, 9))}))
    bad = whole.replace(struct.pack("<i", 9), struct.pack("<i", 8_060_937))
    decoded = messages("arrow", folder).decode(batch(whole, bad))
    assert decoded.rows["n"].to_pylist() == [0]
    assert refused(decoded) == [(11, "invalid arrow", bad)]


@st.composite
def damaged(draw: st.DrawFn, format: Format) -> bytes:
    whole = bytearray(payload(format))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(whole)))
        whole[at : at + draw(st.integers(0, 4))] = draw(st.binary(max_size=3))
    return bytes(whole)


@pytest.mark.parametrize("extra", ["ignore", "keep"])
@given(data=st.data())
def test_damaged_json_is_read_or_refused_and_each_message_counts(extra: Extra, data: st.DataObject) -> None:
    bad = data.draw(st.lists(damaged("json"), min_size=1, max_size=4))
    reader = Messages(Decoder(ROW, "p", extra=extra), "json")
    decoded = reader.decode(batch(*bad, b'{"n": 5}'))
    assert decoded.read == len(bad) + 1
    assert decoded.rows["n"].to_pylist()[-1] == 5
    assert all(bad[offset - 10] == letter for offset, _, letter in refused(decoded))


@pytest.mark.parametrize("format", ["json", "avro", "arrow"])
@pytest.mark.parametrize("extra", ["ignore", "keep", "reject"])
def test_a_batch_of_nothing_but_poison_has_no_rows_but_their_columns(format: Format, extra: Extra, folder: str) -> None:
    reader = messages(format, folder, extra=extra)
    decoded = reader.decode(batch(b"x", b"y"))
    assert len(refused(decoded)) == 2
    assert decoded.rows.schema == reader.decode(batch(payload(format, GOOD.slice(0, 1)))).rows.schema
    assert decoded.rows.schema == reader.decode(batch()).rows.schema
    assert reader.decode(batch()).read == len(decoded.rows) == 0


DRIFT: list[tuple[str, dict[str, Any], dict[str, Any], Any]] = [
    ("a new field that may be null", {"city": ["null", "string"]}, {"n": 3, "word": "c", "city": None}, "c"),
    ("a field dropped that may be null", {"word": None}, {"n": 3}, None),
    ("null allowed from now on", {"word": ["null", "string"]}, {"n": 3, "word": None}, None),
    ("a wider number", {"n": "double"}, {"n": 3.0, "word": "c"}, "c"),
    ("a narrower number", {"n": "int"}, {"n": 3, "word": "c"}, "c"),
    ("a number as text", {"n": "string"}, {"n": "3", "word": "c"}, "c"),
    ("a field dropped that may not be null", {"n": None}, {"word": "c"}, "null in n"),
    ("a wider number that does not fit", {"n": "double"}, {"n": 3.5, "word": "c"}, "invalid int in n"),
]
ARROWS = {"int": pa.int32(), "long": pa.int64(), "double": pa.float64(), "string": pa.string()}


def drifted(format: Format, changes: dict[str, Any], row: dict[str, Any], folder: str) -> bytes:
    """A row as a producer with a changed schema sends it."""
    types = {name: kind for name, kind in ({"n": "long", "word": "string"} | changes).items() if kind is not None}
    if format == "json":
        return json.dumps(row).encode()
    if format == "arrow":
        kinds = {name: ARROWS[kind if isinstance(kind, str) else kind[1]] for name, kind in types.items()}
        return stream(pa.Table.from_pylist([row], pa.schema(list(kinds.items()))))
    schema = AVRO | {"fields": [{"name": name, "type": kind} for name, kind in types.items()]}
    return record(Schemas(folder).add(json.dumps(schema)), schema, row)


@pytest.mark.parametrize("format", ["json", "avro", "arrow"])
@pytest.mark.parametrize(
    ("changes", "row", "wanted"), [drift[1:] for drift in DRIFT], ids=[drift[0] for drift in DRIFT]
)
def test_a_schema_may_drift_while_messages_of_both_arrive(
    format: Format, changes: dict[str, Any], row: dict[str, Any], wanted: Any, folder: str
) -> None:
    old = payload(format, pa.table({"n": [1], "word": ["a"]}))
    new = drifted(format, changes, row, folder)
    decoded = messages(format, folder).decode(batch(old, new, old, new))
    if isinstance(wanted, str) and " in " in wanted:
        assert [letter[:2] for letter in refused(decoded)] == [(11, wanted), (13, wanted)]
        assert decoded.rows["_offset"].to_pylist() == [10, 12]
    else:
        assert refused(decoded) == []
        first, second = {"n": 1, "word": "a"}, {"n": 3, "word": wanted}
        assert decoded.rows.select(["n", "word"]).to_pylist() == [first, second, first, second]
        assert decoded.rows["_offset"].to_pylist() == [10, 11, 12, 13]


@pytest.mark.parametrize("format", ["json", "avro", "arrow"])
def test_new_fields_are_what_extra_says(format: Format, folder: str) -> None:
    old = payload(format, pa.table({"n": [1], "word": ["a"]}))
    new = drifted(format, {"city": "string"}, {"n": 3, "word": "c", "city": "Rome"}, folder)
    kept = messages(format, folder, extra="keep").decode(batch(old, new)).rows
    assert kept["_extra"].to_pylist() == [None, '{"city":"Rome"}']
    reject = messages(format, folder, extra="reject").decode(batch(old, new))
    assert [letter[:2] for letter in refused(reject)] == [(11, "extra column")]
    with pytest.raises(DataRefused, match=r"p: p0 at 11: Row does not declare city; Source\(extra='stop'\)"):
        messages(format, folder, extra="stop").decode(batch(old, new))


def test_a_schema_that_comes_later_is_found_then(folder: str) -> None:
    message = record(12, AVRO, {"n": 1, "word": "a"})
    reader = messages("avro", folder)
    assert [letter[1] for letter in refused(reader.decode(batch(message)))] == ["unknown schema id"]
    (Path(folder) / "12.avsc").write_text(json.dumps(AVRO))
    assert reader.decode(batch(message)).rows["n"].to_pylist() == [1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not the Avro schema of a record"),
        ('"long"', "not the Avro schema of a record"),
        ('{"type": "record", "name": "R", "fields": [{"name": "n"}]}', "not the Avro schema of a record"),
        (
            '{"type": "record", "name": "R", "fields": [{"name": "n", "type": "lnog"}]}',
            "not the Avro schema of a record",
        ),
        (
            '{"type": "record", "name": "a.R", "fields": [{"name": "n", "type": ["null", "R"]}]}',
            "type R is within itself",
        ),
        (
            '{"type": "record", "name": "R", "fields": [{"name": "n", "type": {"type": "map", "values": "R"}}]}',
            "type R is within itself",
        ),
    ],
)
def test_a_schema_file_that_is_none_is_the_users_mistake(text: str, said: str, folder: str) -> None:
    (Path(folder) / "12.avsc").write_text(text)
    with pytest.raises(UserError, match=rf"12\.avsc: {said}") as told:
        messages("avro", folder).decode(batch(b"\0\0\0\0\x0c\x02"))
    assert "\n" not in str(told.value)


def test_avro_without_a_folder_of_schemas_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="format=avro needs schemas=<folder>"):
        Messages(Decoder(ROW, "p"), "avro")
    with pytest.raises(UserError, match=r"schemas=.*gone: no such folder"):
        messages("avro", str(tmp_path / "gone")).decode(batch(b"\0\0\0\0\x0c\x02"))


def test_a_schema_has_one_id_whoever_adds_it(tmp_path: Path) -> None:
    schemas = Schemas(str(tmp_path / "made" / "here"))
    assert schemas.add(json.dumps(AVRO)) == schemas.add(json.dumps(AVRO, indent=1)) != schemas.add(avro_schema(ROW))
    assert sorted(len(schemas.find([int(found.stem)])) for found in (tmp_path / "made" / "here").iterdir()) == [1, 1]
