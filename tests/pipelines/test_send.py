import json
import signal
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines import cli
from pipelines.io.log import open_log
from pipelines.io.sqlite_log import SqliteLog
from pipelines.transforms import progress

DEFINITION = """
from datetime import datetime
from pipelines import Count, Pipeline, Source, View

class Reading:
    sensor: str
    seen: datetime

def readings(window: str = "") -> Pipeline:
    return Pipeline("readings", source=Source(Reading, event_time="seen"), views=(View("all", n=Count()),))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a definition and 600 rows are, the later ones first."""
    lines = [f"s{n % 3},2024-01-01T00:{n // 60:02d}:{n % 60:02d}Z\n" for n in reversed(range(600))]
    (tmp_path / "rows.csv").write_text("".join(["sensor,seen\n", *lines]))
    (tmp_path / "defs.py").write_text(DEFINITION)
    monkeypatch.chdir(tmp_path)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    given = ["pipelines", "replay", "--pipeline=defs.py:readings", "--history=rows.csv", *arguments]
    monkeypatch.setattr("sys.argv", given)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def read(uri: str) -> dict[str, list[bytes]]:
    with open_log(uri) as log:
        return {name: log.read(name, at.start, at.end)["_raw"].to_pylist() for name, at in log.bounds().items()}


def test_the_log_has_what_the_report_tells(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    disorder = ("--shuffle=5s", "--duplicate=0.1", "--corrupt=0.1", "--seed=7", "--partitions=2", "--json")
    assert call(monkeypatch, *disorder) == 0
    told = json.loads(capsys.readouterr().out)
    there = read("data/log/readings.db")
    assert {name: len(rows) for name, rows in there.items()} == {n: p["rows"] for n, p in told["partitions"].items()}
    assert told["rows"] == told["total"] == 600 + told["duplicates"] + told["corrupt"] and told["corrupt"] > 30
    assert (told["first"], told["reached"]) == ("2024-01-01T00:00:00+00:00", "2024-01-01T00:09:59+00:00")
    assert call(monkeypatch, "--live=again.db", *disorder) == 0
    assert read("again.db") == there


def test_a_person_reads_what_was_sent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "--live=x.db?partitions=3&format=arrow", "--late=0.2", "--to=2024-01-01T00:01") == 0
    out = capsys.readouterr().out
    assert out.startswith("readings · rows.csv → x.db · arrow\n\npartition  rows  late  duplicates")
    assert "all          60     0" in out and "event times 2024-01-01 00:00 to 2024-01-01 00:00:59 UTC" in out
    assert "No row became late" in out
    assert call(monkeypatch, "--from=2025-01-01") == 0
    assert "The history has no row in this range" in capsys.readouterr().out


def test_ctrl_c_stops_after_a_whole_append_and_says_where(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    append = SqliteLog.append

    def interrupted(log: SqliteLog, piece: Mapping[str, pa.Table]) -> None:
        signal.raise_signal(signal.SIGINT)
        append(log, piece)

    monkeypatch.setattr(SqliteLog, "append", interrupted)
    assert call(monkeypatch, "--live=x.db", "--partitions=1", "--speedup=0.001", "--from=2024-01-01T00:05") == 0
    out = capsys.readouterr().out
    assert "Stopped with 299 rows not sent: --from=2024-01-01T00:05:00+00:00 goes on from about there." in out
    assert len(read("x.db")["0"]) == 1
    assert (progress.now().rows, progress.now().total, progress.now().reached) == (1, 300, 1704067500000000)


def test_avro_has_its_schema_beside_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "--live=x.db?format=avro") == 2
    assert "format=avro needs a folder for its schemas" in capsys.readouterr().err
    assert call(monkeypatch, "--live=x.db?format=avro&schemas=schemas", "--json") == 0
    (schema,) = Path("schemas").iterdir()
    first = next(rows[0] for rows in read("x.db?format=avro").values() if rows)
    assert int.from_bytes(first[1:5], "big") == int(schema.stem)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--late=2",), "--late=2: a share of the rows"),
        (("--partitions=0",), "--partitions=0: at least 1"),
        (("--rate=1", "--speedup=1"), "--rate and --speedup: one of them"),
        (("--from=2024-02-01", "--to=2024-01-01"), "is not before --to"),
        (("--history=nowhere.csv",), "nowhere.csv: no such file"),
        (("--live=kafka://x/y",), "no such log"),
        (("--live=rows.csv",), "rows.csv"),
    ],
)
def test_mistakes_are_told_in_a_line(
    arguments: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *arguments) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1
