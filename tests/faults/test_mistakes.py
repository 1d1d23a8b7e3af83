"""The user's mistakes, by the command line: one line that says what, where and the fix; exit 2; nothing is written."""

import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pyarrow as pa
import pytest

from pipelines.io import places

if TYPE_CHECKING:
    from tests.faults.conftest import Place

HEADER = "sensor,at,celsius,count,price,code\n"
GOOD = "a,2024-01-01T00:10:00Z,10,1,1.5,1\n"
AT = datetime(2024, 1, 1, 0, 10, tzinfo=UTC)


def cut_off(place: "Place") -> str:
    return place.write("cut.parquet", (place.folder / place.parquet()).read_bytes()[:-20])


def file(name: str, content: str | bytes) -> Callable[["Place"], str]:
    return lambda place: place.write(name, content)


MISTAKES: dict[str, tuple[Callable[["Place"], str], str]] = {
    "missing": (lambda _: "row.csv", "row.csv: no such file. Nearest: ./rows.csv"),
    "missing folder": (lambda _: "none/rows.csv", "none/rows.csv: no such file, nor a readable folder none"),
    "no match": (lambda _: "*.parquet", "*.parquet: no file matches"),
    "folder": (lambda place: str(place.folder), "{}: a folder; name its files, such as {}/*.parquet"),
    "empty": (file("none.csv", ""), "none.csv: the file is empty (0 bytes)"),
    "cut off": (cut_off, "cut.parquet: damaged or cut-off Parquet ("),
    "magic": (file("text.parquet", HEADER + GOOD), "text.parquet: not parquet: it starts with b'sens'"),
    "gzip": (file("text.csv.gz", HEADER + GOOD), "text.csv.gz: not gzip data (it starts with b'sens'"),
    "format": (file("rows.txt", HEADER + GOOD), "rows.txt: format of 'rows.txt' unknown; add ?format=csv"),
    "option": (lambda _: "rows.csv?nul=NA", "rows.csv?nul=NA: no option 'nul'. Nearest: null. Options: "),
    "binary header": (file("binary.csv", b"s\xe9nsor,at\n"), "binary.csv: the header is not UTF-8 text; is this csv?"),
    "column missing": (
        file("less.csv", "Sensor,at,celsius,count,price,code\n" + GOOD),
        "less.csv: no column 'sensor', which Reading declares. Nearest: Sensor. Columns: Sensor, at, celsius",
    ),
    "column twice": (file("more.csv", HEADER.replace("code", "at") + GOOD), "more.csv: 2 columns are named 'at'; "),
    "column of another type": (
        lambda place: place.parquet(at=pa.array([5])),
        "rows.parquet: column at is int64, Reading declares datetime",
    ),
    "naive column": (
        lambda place: place.parquet(at=pa.array([AT.replace(tzinfo=None)])),
        "rows.parquet: column at is timestamp[us], Reading declares datetime with an offset: name the zone of its "
        "times, Column(timezone='UTC')",
    ),
}


def test_files_of_two_formats_are_told_in_one_line(place: "Place") -> None:
    place.write("rows.csv", HEADER + GOOD)
    done = place.run("readings", f"{place.parquet().partition('.')[0]}.*")
    assert done.code == 2
    assert done.refusal == (
        "rows.csv is csv, rows.parquet is parquet; a history has one format: name fewer files or convert some"
    )


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_history_that_cannot_be_read_is_told_in_one_line(place: "Place", mistake: str) -> None:
    make, told = MISTAKES[mistake]
    place.write("rows.csv", HEADER + GOOD)
    done = place.run("readings", make(place))
    assert done.code == 2
    assert done.refusal.startswith(told.format(place.folder, place.folder))
    assert not list(place.folder.glob("data/*/*"))


def test_a_history_that_may_not_be_read_is_told_in_one_line(place: "Place", monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    place.write("rows.csv", HEADER + GOOD)
    monkeypatch.setattr(places, "open", denied, raising=False)
    done = place.run("readings", "rows.csv")
    assert done.code == 2
    assert done.refusal == "rows.csv: cannot be read: PermissionError: [Errno 13] Permission denied"


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--report=.", "--report=.: a folder; name a file in it, such as run.json"),
        ("--warehouse=rows.csv", "table rows.csv/readings/events: part of that path is a file, and "),
        ("--dead_letters=rows.csv", "table rows.csv/readings: part of that path is a file, and a table is a folder"),
        ("--store=rows.csv", "store rows.csv: not a SQLite database; name another file"),
        ("--store=.", "store .: cannot be opened; check that its folder exists and may be written"),
        ("--max_rejected=2", "--max_rejected=2.0: a share of the read rows, from 0 to 1"),
        ("--from=soon", "'soon' is not a time; write 2013-01-31 or 2013-01-31T10:00"),
        ("--set=extra=all", "Source extra='all': one of ignore, keep, reject, stop."),
        ("--set=more=1", "readings has no parameter 'more'. "),
    ],
)
def test_a_place_or_flag_that_cannot_be_is_told_in_one_line(place: "Place", flag: str, told: str) -> None:
    place.write("rows.csv", HEADER + GOOD)
    done = place.run("readings", "rows.csv", flag)
    assert done.code == 2
    assert done.refusal.removeprefix(f"{place.DIRTY}:").startswith(told)


@pytest.mark.parametrize("pipeline", ["calls", "pseudonyms"])
def test_a_key_that_is_missing_is_told_before_anything_is_read(place: "Place", pipeline: str) -> None:
    done = place.run(pipeline, "none.csv")
    assert done.code == 2
    assert done.refusal.startswith("personal columns need a key, and neither PIPELINES_KEY nor PIPELINES_KEY_FILE is ")
    assert not list(place.folder.glob("data/*/*"))


def test_a_function_that_raises_is_told_in_one_line(place: "Place") -> None:
    place.write("rows.csv", HEADER + GOOD)
    done = place.run("broken", "rows.csv")
    assert done.code == 2
    assert re.fullmatch(r"step 1 \(Apply\): its function failed at dirty.py:\d+: KeyError: 'a'", done.refusal)
