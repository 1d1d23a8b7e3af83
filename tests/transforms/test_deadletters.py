import json

import pyarrow as pa
import pytest

from pipelines.transforms.deadletters import DEAD_LETTERS, PURPOSE, payloads, refuse
from pipelines.transforms.errors import UserError
from pipelines.transforms.protect import Cipher, Key

KEY = Key.load({"PIPELINES_KEY": "0123456789abcdef" * 4})


def rows(**columns: pa.Array) -> pa.Table:
    source = pa.array(["a.csv", "b.csv"]).dictionary_encode().cast(pa.dictionary(pa.int32(), pa.string()))
    return pa.table({**columns, "_source": source, "_offset": pa.array([0, 2**40])})


def test_a_text_row_keeps_its_exact_bytes() -> None:
    table = rows(x=pa.array([1, 2])).append_column("_raw", pa.array([b"1,\xff", b""], pa.large_binary()))
    dead = refuse(
        table, pipeline="p", step="decode", reason=pa.array(["cast", "empty"]), detail="x is no integer", format="csv"
    )
    assert dead.schema == DEAD_LETTERS
    assert dead.to_pylist() == [
        {
            "pipeline": "p",
            "step": "decode",
            "reason": reason,
            "detail": "x is no integer",
            "source": source,
            "offset": offset,
            "format": "csv",
            "payload": payload,
            "key_id": None,
        }
        for reason, source, offset, payload in [("cast", "a.csv", 0, b"1,\xff"), ("empty", "b.csv", 2**40, b"")]
    ]


def test_a_message_keeps_even_its_line_end() -> None:
    raw = [b'{"x":1}\n', b"\r\n"]
    line = rows(x=pa.array([1, 2])).append_column("_raw", pa.array(raw, pa.large_binary()))
    messages = [line.append_column(name, pa.array([0, 0])) for name in ("_published", "_watermark")]
    for table, payload in [(line, [b'{"x":1}', b""]), *((message, raw) for message in messages)]:
        dead = refuse(table, pipeline="p", step="s", reason="r", detail="d", format="json")
        assert dead["payload"].to_pylist() == payload


def test_another_row_is_kept_as_json_without_the_bookkeeping() -> None:
    table = rows(
        name=pa.array(['é"\n', None]),
        number=pa.array([2**63 - 1, None]),
        lines=pa.array([[{"sku": "a", "price": 0.1}], []]),
        at=pa.array([1, None], pa.timestamp("us", tz="UTC")),
    )
    dead = refuse(table, pipeline="p", step="s", reason="r", detail="d", format="parquet")
    assert dead["format"].to_pylist() == ["json", "json"]
    assert [json.loads(payload) for payload in dead["payload"].to_pylist()] == [
        {
            "name": 'é"\n',
            "number": 2**63 - 1,
            "lines": [{"sku": "a", "price": 0.1}],
            "at": "1970-01-01 00:00:00.000001+00",
        },
        {"name": None, "number": None, "lines": [], "at": None},
    ]


def test_reason_and_detail_may_be_chunked_and_rows_may_be_none() -> None:
    table, texts = rows(x=pa.array([1, 2])), pa.chunked_array([["a"], ["b"]])
    dead = refuse(table, pipeline="p", step="s", reason=texts, detail=texts, format="avro")
    assert dead["reason"].to_pylist() == dead["detail"].to_pylist() == ["a", "b"]
    none = refuse(table.slice(0, 0), pipeline="p", step="s", reason="r", detail="d", format="avro")
    assert none.schema == DEAD_LETTERS
    assert none.num_rows == 0


def test_with_a_cipher_nothing_readable_is_left_and_the_key_brings_it_back() -> None:
    cipher = Cipher(KEY, PURPOSE)
    table = rows(caller=pa.array(["+33612345678"] * 2))
    clear = refuse(table, pipeline="p", step="s", reason="r", detail="d", format="json")
    sealed = refuse(table, pipeline="p", step="s", reason="r", detail="d", format="json", cipher=cipher)
    first, second = sealed["payload"].to_pylist()
    assert b"336" not in first
    assert first != second
    assert sealed["key_id"].to_pylist() == [KEY.id] * 2
    both = pa.concat_tables([sealed, clear])
    assert payloads(both, cipher).to_pylist() == clear["payload"].to_pylist() * 2
    assert payloads(clear) == clear["payload"]


def test_a_letter_that_was_moved_or_lacks_its_key_does_not_open() -> None:
    sealed = refuse(
        rows(x=pa.array([1, 2])),
        pipeline="p",
        step="s",
        reason="r",
        detail="d",
        format="json",
        cipher=Cipher(KEY, PURPOSE),
    )
    moved = sealed.set_column(DEAD_LETTERS.get_field_index("offset"), "offset", pa.array([5, 6]))
    with pytest.raises(UserError, match="cannot decrypt dead letters"):
        payloads(moved, Cipher(KEY, PURPOSE))
    with pytest.raises(UserError, match="encrypted with key"):
        payloads(sealed)
