"""Personal values: sealed in dead letters, pseudonyms and masks in what is published, and readable nowhere."""

import re
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.io.table import open_table
from pipelines.transforms.deadletters import PURPOSE, payloads
from pipelines.transforms.errors import UserError
from pipelines.transforms.protect import Cipher, Key

if TYPE_CHECKING:
    from tests.faults.conftest import Place

pytestmark = pytest.mark.slow

KEY = "5e" * 32
GOOD = b"1,2024-01-01T00:10:00Z,+4915550001,Ottilie,5"
FAULTS = [
    (b"2,2024-01-01T00:10:00Z,4915550002,Ottilie,5", "e164"),
    (b"3,2024-01-01T00:10:00Z,+4915550003,Ottilie,0", "rate failed"),
    (b"4,2024-01-01T00:10:00Z,+4915550004,Ottilie,9000", "short"),
    (b"1,2024-01-01T00:10:00Z,+4915550005,Ottilie,5", "conflict"),
    (b"5,2024-01-01T00:10:00Z,+4915550006,Ottilie", "too few fields"),
    (b"6,2024-01-01T00:10:00Z,Ottilie,+4915550007,+4915550007x", "invalid int in seconds"),
    (b"Ottilie,2024-01-01T00:10:00Z,+4915550008,Ottilie,5", "invalid int in id"),
    (b"8,Ottilie,+4915550009,Ottilie,5", "invalid datetime in at"),
    (b"9,2024-01-01T00:10:00Z,+4915550010,\xe9Ottilie,5", "invalid utf-8"),
    (b'10,2024-01-01T00:10:00Z,+4915550011,"Ottilie,5', "unterminated quote"),
    (b"11,,+4915550012,Ottilie,5", "null in at"),
]
SEEN = b"12,2024-01-01T00:10:00Z,+4915550013,Ottilie,7"
"""Its view fails, and refuses it behind its protection."""
PLAIN = re.compile(rb"49155500\d\d|ttilie|Ottili")


def readable(folder: Path) -> list[str]:
    """The files of a folder in which a personal value can be read: as bytes, or as what they hold."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            if path.suffix == ".parquet":
                rows = pq.read_table(path).to_pylist()
                content += repr(rows).encode() + b"".join(
                    v for row in rows for v in row.values() if isinstance(v, bytes)
                )
            if path.suffix == ".db":
                with sqlite3.connect(path) as connection:
                    content += "\n".join(connection.iterdump()).encode()
            if match := PLAIN.search(content):
                found.append(f"{path.relative_to(folder)}: {match[0]!r}")
    return found


@pytest.fixture
def kept(place: "Place", monkeypatch: pytest.MonkeyPatch) -> Iterator["Place"]:
    """A place with a key, where what lies in the temporary folder is not removed."""
    monkeypatch.setenv("PIPELINES_KEY", KEY)
    (place.folder / "data/tmp").mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(place.folder / "data/tmp"))
    monkeypatch.setattr("pipelines.transforms.spill.shutil.rmtree", lambda *_, **__: None)
    yield place
    monkeypatch.undo()
    shutil.rmtree(place.folder / "data/tmp")


def test_refused_rows_are_sealed_and_no_personal_value_is_readable_anywhere(kept: "Place") -> None:
    content = b"\n".join([b"id,at,caller,name,seconds", GOOD, *(line for line, _ in FAULTS), SEEN]) + b"\n"
    kept.write("rows.csv", content)
    done = kept.run("calls", "rows.csv")
    assert (done.code, done.told) == (0, [])
    assert kept.report()["rejected"] == {reason: 1 for _, reason in FAULTS}
    letters = open_table(str(kept.folder / "data/dead_letters/calls")).dataset().to_table().sort_by("offset")
    *lines, seen = letters.to_pylist()
    opened = payloads(letters, Cipher(Key.load(), PURPOSE)).to_pylist()
    for letter, payload, (line, reason) in zip(lines, opened, FAULTS, strict=False):
        assert (letter["reason"], payload) == (reason, line)
        assert content[letter["offset"] :].startswith(line + b"\n")
        assert letter["key_id"] == Key.load().id
    assert len(opened) == len(FAULTS) + 1
    assert (seen["reason"], seen["step"]) == ("even failed", "step 1 (Derive) of view 'callers'")
    assert not PLAIN.search(opened[-1])  # a view never sees what was protected before it
    assert any((kept.folder / "data/tmp").rglob("*")), "nothing was spilled"
    assert readable(kept.folder) == ["rows.csv: b'4915550001'"]
    assert not PLAIN.search((done.out + "".join(done.told)).encode())
    (row,) = [row for row in kept.rows("calls", "events") if row["id"] == 1]
    assert row["name"] == "***e"
    assert re.fullmatch("[0-9a-f]{32}", row["caller"])


def test_sealed_letters_need_their_key(kept: "Place", monkeypatch: pytest.MonkeyPatch) -> None:
    kept.write("rows.csv", b"id,at,caller,name,seconds\n" + FAULTS[0][0] + b"\n")
    kept.done("calls", "rows.csv")
    letters = open_table(str(kept.folder / "data/dead_letters/calls")).dataset().to_table()
    with pytest.raises(UserError, match=r"dead letters are encrypted with key .*: set PIPELINES_KEY_FILE"):
        payloads(letters)
    monkeypatch.setenv("PIPELINES_KEY", "00" * 32)
    with pytest.raises(UserError, match=r"cannot decrypt dead letters with key .*: another key, or altered bytes"):
        payloads(letters, Cipher(Key.load(), PURPOSE))


def test_typed_rows_are_sealed_as_well(kept: "Place") -> None:
    bad = {"id": ["x"], "at": ["2024-01-01T00:10:00Z"], "caller": ["+4915550002"], "name": ["Ottilie"], "seconds": [1]}
    pq.write_table(pa.table(bad), kept.folder / "rows.parquet")
    kept.done("calls", "rows.parquet")
    letters = open_table(str(kept.folder / "data/dead_letters/calls")).dataset().to_table()
    assert b'"caller":"+4915550002","name":"Ottilie"' in payloads(letters, Cipher(Key.load(), PURPOSE))[0].as_py()
    assert [found.partition(":")[0] for found in readable(kept.folder)] == ["rows.parquet"]


@pytest.mark.parametrize(
    ("rows", "subscribers", "code"),
    [
        (b"8,Ottilie,+4915550009,Ottilie,5", b"+4915550009,basic", 3),
        (GOOD, b"+4915550001,basic\n+4915550001,plus", 2),
        (GOOD, b"+4915550001,basic,plus", 2),
        (GOOD, b"+4915550001\xe9,basic", 2),
    ],
)
def test_what_stops_a_run_tells_no_personal_value(kept: "Place", rows: bytes, subscribers: bytes, code: int) -> None:
    kept.write("rows.csv", b"id,at,caller,name,seconds\n" + rows + b"\n")
    kept.write("subscribers.csv", b"number,plan\n" + subscribers + b"\n")
    if code == 3:
        done = kept.run("calls", "rows.csv", "--set=invalid=stop")
    else:
        done = kept.run("subscribed", "rows.csv", "--dimension=subscribers=subscribers.csv")
    assert done.code == code
    assert not PLAIN.search(done.refusal.encode())
    assert readable(kept.folder / "data") == []
