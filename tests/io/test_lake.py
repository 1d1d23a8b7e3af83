"""The lake against a list of what was sent: nothing twice, nothing lost, whoever archives and however it ends."""

import datetime
import json
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from pipelines import Column, Count, Pipeline, Source, View
from pipelines.archive import dating, lake
from pipelines.io.lake import FEW, Lake
from pipelines.io.log import Log, Options
from pipelines.io.sqlite_log import SqliteLog
from pipelines.transforms.encode import encode
from pipelines.transforms.errors import DataRefused, UserError
from pipelines.transforms.protect import Cipher, Key
from pipelines.transforms.query import run

NOON = datetime.datetime(2024, 5, 1, 12, tzinfo=datetime.UTC)
DAY = datetime.timedelta(days=1)
HOUR = 3_600_000_000


class Sale:
    """A row of the test's log."""

    id: int
    at: datetime.datetime
    cents: int


SALES = Pipeline("sales", source=Source(Sale, event_time="at", disorder="1m"), views=(View("all", sales=Count()),))


def sale(number: int, day: int = 0, **values: Any) -> dict[str, Any]:
    return {"id": number, "at": NOON + day * DAY + datetime.timedelta(seconds=number), "cents": number} | values


def json_of(*rows: dict[str, Any] | bytes) -> pa.Table:
    raw = [row if isinstance(row, bytes) else json.dumps(row, default=str).encode() for row in rows]
    return pa.table({"_raw": pa.array(raw, pa.large_binary())})


@pytest.fixture
def log(tmp_path: Path) -> Iterator[SqliteLog]:
    with SqliteLog(tmp_path / "log.db", clock=lambda: NOON + 30 * DAY) as log:
        yield log


def archived(place: Lake, log: Log, pipeline: Pipeline = SALES, **settings: Any) -> Any:
    return place.archive(log, dating(pipeline, log, HOUR), **settings)


def held(place: Lake) -> list[tuple[Any, ...]]:
    """partition, offset, payload of all rows."""
    rows = place.table.dataset().to_table().sort_by([("partition", "ascending"), ("offset", "ascending")])
    return list(zip(*(rows[name].to_pylist() for name in ("partition", "offset", "payload")), strict=True))


def sent(log: Log) -> list[tuple[Any, ...]]:
    return [
        (name, row["_offset"], row["_raw"])
        for name, bounds in log.bounds().items()
        for row in log.read(name, bounds.start, bounds.end, max_bytes=1 << 30).to_pylist()
    ]


def test_each_message_is_there_once_with_its_bytes_its_time_and_its_place(log: SqliteLog, tmp_path: Path) -> None:
    place = Lake(str(tmp_path / "lake/sales"))
    assert (place.extent().version, place.extent().through(0)) == (0, None)
    log.append({"0": json_of(sale(1), b"{", sale(2, 1), b'{"id": 3}'), "1": json_of(sale(5, 100, cents="x"), sale(4))})
    done = archived(place, log)
    assert (done.rows, done.undated, done.commits) == (6, 3, 1)
    assert archived(place, log).rows == 0
    rows = place.table.dataset().to_table().sort_by([("partition", "ascending"), ("offset", "ascending")])
    assert held(place) == sent(log)
    times = [NOON + datetime.timedelta(seconds=1), None, NOON + DAY + datetime.timedelta(seconds=2), None, None]
    assert rows["event_time"].to_pylist() == [*times, NOON + datetime.timedelta(seconds=4)]
    assert rows["event_date"].to_pylist() == [at and at.date() for at in rows["event_time"].to_pylist()]
    assert set(rows["published"].to_pylist()) == {NOON + 30 * DAY}
    extent = place.extent()
    assert (extent.offsets, extent.version) == ({"0": 4, "1": 2}, 1)
    seconds = (NOON + datetime.timedelta(seconds=4)).timestamp()
    assert extent.through(1_000_000) == int(seconds - 1) * 1_000_000


def test_it_goes_on_where_the_last_commit_ended_in_commits_of_a_size(log: SqliteLog, tmp_path: Path) -> None:
    place, commits = Lake(str(tmp_path / "lake/sales")), 0
    for start in (0, 100):
        for part in range(start, start + 100, 50):
            log.append({str(part % 3): json_of(*[sale(number) for number in range(part, part + 50)])})
        done = archived(place, log, commit=2500)
        commits += done.commits
        assert done.rows == 100
        assert held(place) == sent(log)
    assert commits == place.extent().version
    assert commits > 2


def test_a_commit_has_a_file_for_each_date_and_another_for_what_has_none(log: SqliteLog, tmp_path: Path) -> None:
    place = Lake(str(tmp_path / "lake/sales"))
    log.append({"0": json_of(*[sale(number, number % 3) for number in range(30)], b"")})
    archived(place, log)
    dates = [(part.least.get("event_date"), part.greatest.get("event_date")) for part in place.table.parts()]
    assert sorted(dates, key=str) == [(None, None), *[((NOON + day * DAY).date(),) * 2 for day in range(3)]]
    some = pc.field("event_date") == pa.scalar((NOON + DAY).date())
    assert len(list(place.table.dataset().get_fragments(filter=some))) == 2


def test_small_files_become_one_and_nothing_else_changes(log: SqliteLog, tmp_path: Path) -> None:
    place = Lake(str(tmp_path / "lake/sales"))
    for number in range(2 * FEW):
        log.append({str(number % 2): json_of(sale(number, number % 2), b"x" if number == 3 else sale(100 + number))})
        archived(place, log)
    before, rows, extent = len(place.table.parts()), held(place), place.extent()
    fewer = place.compact()
    assert fewer > 0
    assert len(place.table.parts()) == before - fewer
    assert held(place) == rows == sent(log)
    assert (place.extent().offsets, place.extent().greatest) == (extent.offsets, extent.greatest)
    assert place.compact() == 0
    log.append({"0": json_of(sale(7))})
    assert archived(place, log).rows == 1
    assert held(place) == sent(log)


def test_rows_of_arrow_messages_become_payloads_of_their_own(tmp_path: Path) -> None:
    place = Lake(str(tmp_path / "lake/sales"))
    schema = SALES.source.schema
    with SqliteLog(tmp_path / "log.db", Options(format="arrow"), clock=lambda: NOON + 30 * DAY) as log:
        rows = pa.Table.from_pylist([sale(number) for number in range(5)], schema.arrow)
        spoilt = rows.set_column(2, "cents", pa.array(["1", "2", "x", "4", "5"]))
        spoilt = spoilt.append_column("shop", pa.array(["a", None, "c", "d", "e"]))
        later = pa.Table.from_pylist([sale(1, day=99)], schema.arrow)
        poison = pa.table({"_raw": pa.array([b"poison"], pa.large_binary()), "_rows": pa.array([1], pa.int32())})
        stream = pa.BufferOutputStream()
        with pa.ipc.new_stream(stream, spoilt.schema) as writer:
            writer.write_table(spoilt)
        raw = pa.array([stream.getvalue().to_pybytes()], pa.large_binary())
        mixed = pa.table({"_raw": raw, "_rows": pa.array([5], pa.int32())})
        log.append(
            {"0": pa.concat_tables([encode(rows, schema, "arrow"), poison, mixed, encode(later, schema, "arrow")])}
        )
        done = archived(place, log)
    assert (done.rows, done.undated, done.extent.offsets) == (12, 3, {"0": 12})
    found = place.table.dataset().to_table().sort_by("offset")
    assert found["offset"].to_pylist() == list(range(12))
    assert found["format"].to_pylist() == ["json"] * 5 + ["arrow"] + ["json"] * 6
    payloads = [json.loads(raw) if raw != b"poison" else {} for raw in found["payload"].to_pylist()]
    assert [payload.get("id") for payload in payloads] == [*range(5), None, *range(5), 1]
    assert [payload.get("shop") for payload in payloads[6:11]] == ["a", None, "c", "d", "e"]
    assert str(payloads[8]["cents"]) == "x"
    wrong = [at for at, time in enumerate(found["event_time"].to_pylist()) if time is None]
    assert wrong == [5, 8, 11]


class Person:
    """A row with a personal column."""

    at: datetime.datetime
    phone: Annotated[str, Column(personal="phone")]


def test_payloads_of_a_source_with_personal_columns_are_encrypted(
    log: SqliteLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Pipeline("calls", source=Source(Person, event_time="at"), views=(View("all", n=Count()),))
    with pytest.raises(UserError, match="personal columns need a key"):
        lake(calls, str(tmp_path / "lake"))
    monkeypatch.setenv("PIPELINES_KEY", "00" * 32)
    place = lake(calls, str(tmp_path / "lake"))
    log.append({"0": json_of({"at": NOON, "phone": "+33123"}, b"+33999 is no JSON")})
    assert archived(place, log, calls).rows == 2
    rows = place.table.dataset().to_table()
    assert set(rows["key_id"].to_pylist()) == {Key.load().id}
    assert not any(b"+33" in file.read_bytes() for file in (tmp_path / "lake/calls").rglob("*") if file.is_file())
    opened = Cipher(Key.load(), "lake").decrypt(
        rows["payload"], [f"0\n{at}".encode() for at in rows["offset"].to_pylist()]
    )
    assert sorted(opened.to_pylist()) == sorted(raw for _, _, raw in sent(log))


def test_rows_that_the_log_dropped_before_they_were_archived_are_told(log: SqliteLog, tmp_path: Path) -> None:
    place = Lake(str(tmp_path / "lake/sales"))
    times = iter([NOON, NOON + DAY, NOON + 2 * DAY])
    log = SqliteLog(tmp_path / "kept.db", clock=lambda: next(times))
    log.append({"0": json_of(sale(1))})
    archived(place, log)
    log.append({"0": json_of(sale(2))})
    log.append({"0": json_of(sale(3))})
    log.trim(NOON + DAY + DAY)
    with pytest.raises(DataRefused, match="offsets 1 to 1 of partition 0 are gone from the log and were not archived"):
        archived(place, log)
    with pytest.raises(DataRefused, match="it is another log, or it was emptied"):
        archived(place, SqliteLog(tmp_path / "other.db"))
    assert len(held(place)) == 1


def test_two_archivers_at_once_store_each_row_once(log: SqliteLog, tmp_path: Path) -> None:
    place = Lake(str(tmp_path / "lake/sales"))
    for part in range(3):
        log.append({str(part): json_of(*[sale(number) for number in range(20)])})
    gate, failed, done = threading.Barrier(3), [], []

    def work(commit: int) -> None:
        gate.wait()
        try:
            done.append(archived(place, log, commit=commit).rows)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(size,)) for size in (1000, 1000, 2000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert held(place) == sent(log)


# Deaths: a process that imports once forks a child for each run, which kills itself at its n-th line of ours.

RUNS = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_lake
from pipelines.io import delta, lake, parquet
from pipelines.io.lake import Lake
from pipelines.io.sqlite_log import SqliteLog

def run(folder, line, compact):
    seen = 0
    def trace(frame, event, _):
        nonlocal seen
        if frame.f_code.co_filename not in (delta.__file__, lake.__file__, parquet.__file__):
            return None
        seen += event == "line"
        if event == "line" and seen == line:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace
    place, log = Lake(folder + "/lake/sales"), SqliteLog(folder + "/log.db")
    sys.settrace(trace)
    if compact:
        place.compact()
    else:
        test_lake.archived(place, log, commit=2000)
    return seen

for request in sys.stdin:
    folder, line, compact = request.split()
    inbox, outbox = os.pipe()
    if not (child := os.fork()):
        os.write(outbox, str(run(folder, int(line), compact == "1")).encode())
        os._exit(0)
    os.close(outbox)
    status = os.waitpid(child, 0)[1]
    print(os.waitstatus_to_exitcode(status), os.read(inbox, 99).decode() or 0, flush=True)
    os.close(inbox)
"""


@pytest.mark.slow
def test_forty_killed_archivers_leave_nothing_twice_and_nothing_out(log: SqliteLog, tmp_path: Path) -> None:
    chance, place = random.Random(7), Lake(str(tmp_path / "lake/sales"))
    command = [sys.executable, "-W", "ignore", "-c", RUNS, str(Path(__file__).parent)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def run(line: int, compact: bool) -> list[int]:
            assert process.stdin is not None
            assert process.stdout is not None
            print(tmp_path, line, int(compact), file=process.stdin, flush=True)
            return [int(word) for word in process.stdout.readline().split()]

        lines = {False: 0, True: 0}
        for number in range(42):
            log.append({str(n % 2): json_of(*[sale(10 * number + n, n % 2) for n in range(5)]) for n in range(2)})
            compact = number % 4 == 3
            if lines[compact]:
                code, _ = run(chance.randrange(1, lines[compact]), compact)
                assert code in (-signal.SIGKILL, 0)
            rows = held(place) if place.extent().version else []
            assert rows == [row for row in sent(log) if row in rows]
            code, seen = run(0, compact)
            assert code == 0
            lines[compact] = max(lines[compact], seen)
            if not compact:
                assert held(place) == sent(log)
        process.stdin.close()


def test_duckdb_reads_it(log: SqliteLog, tmp_path: Path) -> None:
    place = Lake(str(tmp_path / "lake/sales"))
    log.append({"0": json_of(*[sale(number) for number in range(10)])})
    archived(place, log)
    sql = "SELECT sum((decode(payload)::JSON ->> 'cents')::INT)::INT AS cents FROM lake"
    assert run(sql, {"lake": place.table.dataset().to_table()})["cents"].to_pylist() == [45]
