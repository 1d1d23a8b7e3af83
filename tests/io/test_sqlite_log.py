import contextlib
import itertools
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipelines.io.log import Bounds, Options, open_log
from pipelines.io.sqlite import SqliteStore
from pipelines.io.sqlite_log import SqliteLog
from pipelines.io.sqlite_messages import SLICE
from pipelines.transforms.errors import UserError

ROOT = Path(__file__).parents[2]
MESSAGES = 50  # of an append of log_producers.py, to each of its two partitions


def of(payloads: Sequence[bytes]) -> pa.Table:
    return pa.table({"_raw": pa.array(payloads, pa.binary())})


def producers(*arguments: object) -> "subprocess.Popen[str]":
    script = Path(__file__).with_name("log_producers.py")
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)


def appends(log: SqliteLog, partition: str) -> list[tuple[int, int]]:
    """(producer, append) in the order of the log; whole, in a row, at offsets without a gap."""
    read = log.read(partition, 0, 1 << 40, max_bytes=1 << 40)
    assert read["_offset"].to_pylist() == list(range(read.num_rows))
    told = [tuple(map(int, payload.split()[:3])) for payload in read["_raw"].to_pylist()]
    found = [(producer, append) for producer, append, number in told if number == 0]
    assert told == [(*append, number) for append in found for number in range(MESSAGES)]
    return found


@pytest.mark.slow
def test_a_producer_killed_at_any_point_leaves_whole_appends_and_all_that_were_answered(tmp_path: Path) -> None:
    count = 30
    out, _ = producers("killed", tmp_path, 7, count).communicate()
    kills = [tuple(map(int, line.split())) for line in out.splitlines()]
    assert len(kills) == count
    assert {signal for _, signal in kills} == {9}
    assert len({answered for answered, _ in kills}) > 2
    for number, (answered, _) in enumerate(kills):
        with SqliteLog(tmp_path / f"{number}.db") as log:
            log.append({"1": of([])})
            held = log.bounds()
            if "0" not in held:  # killed before it made the partitions
                assert (answered, held) == (0, {"1": Bounds(0, 0)})
                continue
            there = appends(log, "0")
            assert there == appends(log, "1")
            assert there == [(0, append) for append in range(len(there))]
            assert len(there) in (answered, answered + 1)
            assert log._file.connection().execute("PRAGMA integrity_check").fetchall() == [("ok",)]


@pytest.mark.slow
def test_a_producer_killed_from_outside_while_it_writes_leaves_whole_appends(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    answered: list[tuple[int, int]] = []
    for producer in range(6):
        process = producers("endless", path, producer)
        assert process.stdout
        for _ in range(1 + 3 * producer):
            answered.append((producer, int(process.stdout.readline())))
        process.kill()
        answered += [(producer, int(line)) for line in process.stdout.read().splitlines()]
        process.wait()
        process.stdout.close()
        with SqliteLog(path) as log:
            there = appends(log, "0")
            assert there == appends(log, "1")
            assert set(answered) <= set(there)
            assert len(there) <= len(answered) + producer + 1
            answered = there


@pytest.mark.slow
def test_producers_of_several_processes_take_turns_and_readers_see_growing_prefixes(tmp_path: Path) -> None:
    count, each = 3, 8
    path = tmp_path / "new" / "log.db"
    process = producers("competing", path, count, each)
    seen: list[list[tuple[int, int]]] = [[]]
    with SqliteLog(path) as log:
        while process.poll() is None:
            seen.append(appends(log, "0"))
            assert len(appends(log, "1")) >= len(seen[-1])
        process.communicate()
        assert process.returncode == 0
        seen.append(appends(log, "0"))
        assert seen[-1] == appends(log, "1")
    assert all(later[: len(earlier)] == earlier for earlier, later in itertools.pairwise(seen))
    assert sorted(seen[-1]) == [(producer, append) for producer in range(count) for append in range(each)]
    for producer in range(count):
        assert [append for one, append in seen[-1] if one == producer] == list(range(each))


def test_a_reader_waits_for_no_producer_and_a_producer_for_no_reader(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    with SqliteLog(path, timeout=0) as one, SqliteLog(path, timeout=0) as two:
        one.append({"0": of([b"a"])})
        with one._file.transaction("IMMEDIATE"):
            assert two.read("0", 0, 9)["_raw"].to_pylist() == [b"a"]
        with two._file.transaction("DEFERRED") as reading:
            assert reading.execute("SELECT count(*) FROM batches").fetchone() == (1,)
            one.append({"0": of([b"b"])})
            assert reading.execute("SELECT count(*) FROM batches").fetchone() == (1,)
        assert two.bounds() == {"0": Bounds(0, 2)}


def test_a_partition_that_is_added_while_reading_is_found(tmp_path: Path) -> None:
    with SqliteLog(tmp_path / "log.db") as reader, SqliteLog(tmp_path / "log.db") as producer:
        producer.append({"0": of([b"a"])})
        assert list(reader.bounds()) == ["0"]
        thread = threading.Thread(target=lambda: producer.append({"1": of([b"b"])}))
        thread.start()
        thread.join()
        assert reader.bounds() == {"0": Bounds(0, 1), "1": Bounds(0, 1)}
        assert reader.read("1", 0, 1)["_raw"].to_pylist() == [b"b"]


def test_offsets_with_gaps(tmp_path: Path) -> None:
    """As a log has them whose messages were compacted, or that holds marks of transactions."""
    with SqliteLog(tmp_path / "log.db", Options("arrow")) as log:
        log.append({"0": pa.table({"_raw": [b"0", b"2"], "_rows": [2, 3]})})
        log._file.connection().execute('UPDATE partitions SET "end" = 100')
        log.append({"0": pa.table({"_raw": [b"100", b"101"], "_rows": [1, 9]})})
        assert log.bounds() == {"0": Bounds(0, 110)}
        read = log.read("0", 0, 200)
        assert read["_offset"].to_pylist() == [0, 2, 100, 101]
        assert read["_raw"].to_pylist() == [b"0", b"2", b"100", b"101"]
        assert log.read("0", 5, 100).num_rows == 0
        assert log.read("0", 50, 101)["_offset"].to_pylist() == [100]
        log._file.connection().execute("DELETE FROM batches WHERE start = 0")
        assert log.read("0", 0, 200)["_offset"].to_pylist() == [100, 101]


def test_an_append_of_many_megabytes_is_read_in_parts(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    sizes = [SLICE // 3, 0, SLICE, SLICE * 2 + 1, 5, SLICE // 2, SLICE - 5, 0]
    payloads = [generator.bytes(size) if size % 2 else b"\x07" * size for size in sizes]
    with SqliteLog(tmp_path / "log.db") as log:
        log.append({"0": of(payloads)})
        rows = log._file.connection().execute("SELECT size, length(payloads) FROM batches ORDER BY last").fetchall()
        assert sum(size for size, _ in rows) == sum(sizes)
        assert len(rows) > 3
        assert all(stored <= size for size, stored in rows)
        found: list[bytes] = []
        while len(found) < len(payloads):
            read = log.read("0", len(found), 99, max_bytes=SLICE)
            assert read["_offset"].to_pylist() == list(range(len(found), len(found) + read.num_rows))
            found += read["_raw"].to_pylist()
        assert found == payloads


def test_the_file_of_a_log_with_retention_stops_growing(tmp_path: Path) -> None:
    now = [datetime(2013, 1, 1, tzinfo=UTC)]
    noise = np.random.default_rng(1).bytes(300_000)
    with SqliteLog(tmp_path / "log.db", Options(retention=timedelta(seconds=5)), clock=lambda: now[0]) as log:
        sizes = []
        for _ in range(30):
            log.append({"0": of([noise])})
            log._file.connection().execute("PRAGMA wal_checkpoint(TRUNCATE)")
            sizes.append((tmp_path / "log.db").stat().st_size)
            now[0] += timedelta(seconds=1)
        assert log.bounds() == {"0": Bounds(24, 30)}
    assert sizes[-1] == sizes[10] < 10 * len(noise)


def test_what_is_appended_is_on_disk_before_it_is_answered(tmp_path: Path) -> None:
    with SqliteLog(tmp_path / "log.db") as log:
        connection = log._file.connection()
        assert log.format == "json"
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL: every commit waits for fsync
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_read_uses_the_key(tmp_path: Path) -> None:
    statements: list[str] = []
    with SqliteLog(tmp_path / "log.db") as log:
        log.append({"0": of([b"a", b"b"])})
        connection = log._file.connection()
        connection.set_trace_callback(statements.append)
        log.read("0", 1, 2)
        connection.set_trace_callback(None)
        [query] = [statement for statement in statements if "FROM batches" in statement]
        [(*_, detail)] = connection.execute(f"EXPLAIN QUERY PLAN {query}").fetchall()
    assert detail == "SEARCH batches USING INDEX sqlite_autoindex_batches_1 (partition=? AND last>?)"


@pytest.mark.parametrize(
    ("uri", "path", "options"),
    [
        ("data/log/flights.db", "data/log/flights.db", Options()),
        ("sqlite:///data/log.db?format=avro&schemas=a%20b", "data/log.db", Options("avro", schemas="a b")),
        ("sqlite:////log.db?format=arrow&partitions=4", "/log.db", Options("arrow", 4)),
        ("log.db?retention=2w", "log.db", Options(retention=timedelta(days=14))),
    ],
)
def test_uris(uri: str, path: str, options: Options) -> None:
    log = open_log(uri)
    assert isinstance(log, SqliteLog)
    assert (log.path, log.options) == (path, options)
    again = open_log(log.uri)
    assert isinstance(again, SqliteLog)
    assert (again.path, again.options) == (path, options)


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("kafka://host/topic", "no such log; give a path (data/log/flights.db) or sqlite:///path"),
        ("sqlite://host/log.db", "no such log; give a path (data/log/flights.db) or sqlite:///path"),
        ("?format=json", "no such log; give a path (data/log/flights.db) or sqlite:///path"),
        ("log.db?fromat=json", "no option 'fromat'. Nearest: format. Options: format, partitions, retention, schemas"),
        ("log.db?format=xml", "format='xml' must be one of json, avro, arrow"),
        ("log.db?partitions=-1", "partitions='-1' must be a number up to 10000"),
        ("log.db?partitions=²", "partitions='²' must be a number up to 10000"),
        ("log.db?retention=1mo", "retention='1mo' must be a whole number and a unit: s m h d w, as in 7d"),
        ("log.db?retention=0s", "retention='0s' must be a whole number and a unit: s m h d w, as in 7d"),
    ],
)
def test_a_uri_of_no_log_is_refused(uri: str, told: str) -> None:
    with pytest.raises(UserError) as raised:
        open_log(uri)
    assert str(raised.value) == f"--live={uri}: {told}"


def complaint(log: SqliteLog, payloads: Sequence[bytes] = (b"x",)) -> str:
    """The one line that the user gets."""
    with log, pytest.raises(UserError) as raised:
        log.append({"0": of(payloads)})
    message = str(raised.value)
    assert "\n" not in message
    return message.removeprefix(f"log {log.path}: ")


def test_a_place_that_is_no_log(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a database, but a text of some length" * 100)
    assert complaint(SqliteLog(tmp_path / "notes.txt")) == "not a SQLite database; name another file"
    assert complaint(SqliteLog(tmp_path)) == "cannot be opened; check that its folder exists and may be written"
    with SqliteStore(tmp_path / "store.db") as store:
        assert store.pointer("v") is None
    assert complaint(SqliteLog(tmp_path / "store.db")) == "a SQLite file, but not a log; name another file"
    with SqliteLog(tmp_path / "log.db") as log:
        assert log.bounds() == {}
    with pytest.raises(UserError, match=r"store .*log\.db: a SQLite file, but not a store; name another file"):
        SqliteStore(tmp_path / "log.db").pointer("v")
    with contextlib.closing(sqlite3.connect(tmp_path / "log.db")) as connection:
        connection.execute("PRAGMA user_version = 7")
    assert complaint(SqliteLog(tmp_path / "log.db")) == "of format 7, this release reads 1; name another file"


def test_a_log_that_another_process_holds_too_long(tmp_path: Path) -> None:
    log = SqliteLog(tmp_path / "log.db", timeout=0)
    log.append({"0": of([b"a"])})
    with SqliteLog(tmp_path / "log.db") as other, other._file.transaction("IMMEDIATE"):
        assert complaint(log) == "locked by another process for too long; let it finish and run again"


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    with SqliteLog(tmp_path / "log.db") as log:
        log.append({"0": of([b"old"])})
        log._file.connection().execute("PRAGMA max_page_count = 20")
        with pytest.raises(UserError, match="no space left"):
            log.append({"0": of([b"new"]), "1": of([np.random.default_rng(1).bytes(1_000_000)])})
        assert log.bounds() == {"0": Bounds(0, 1)}
        log._file.connection().execute("PRAGMA max_page_count = 100000")
        log.append({"0": of([b"new"])})
        assert log.read("0", 0, 9)["_raw"].to_pylist() == [b"old", b"new"]
