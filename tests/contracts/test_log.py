"""What every Log keeps: one line per implementation in LOGS."""

import datetime
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.io.log import MESSAGES, Bounds, Clock, Log, Options, open_log, utc_now
from pipelines.io.sqlite_log import SqliteLog
from pipelines.transforms.errors import DataRefused, UserError

Make = Callable[..., Log]

LOGS: dict[str, Callable[[Path, Options, Clock], Log]] = {
    "sqlite": lambda folder, options, clock: SqliteLog(folder / "log.db", options, clock=clock),
}

START = datetime.datetime(2013, 1, 1, tzinfo=datetime.UTC)
DAY = datetime.timedelta(days=1)


@pytest.fixture(params=LOGS)
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    """The log of a test, opened once more at every call."""
    opened: list[Log] = []

    def once(clock: Clock = utc_now, **options: Any) -> Log:
        opened.append(LOGS[request.param](tmp_path, Options(**options), clock))
        return opened[-1]

    yield once
    for log in opened:
        log.close()


def of(*payloads: bytes, rows: Sequence[int] | None = None) -> pa.Table:
    table = pa.table({"_raw": pa.array(payloads, pa.binary())})
    return table if rows is None else table.append_column("_rows", pa.array(rows, pa.int32()))


def content(read: pa.Table) -> list[tuple[int, bytes]]:
    """(offset, payload) of what was read."""
    return list(zip(read["_offset"].to_pylist(), read["_raw"].to_pylist(), strict=True))


def whole(log: Log, partition: str, max_bytes: int = 16 << 20, step: int = 1 << 40) -> list[tuple[int, bytes, int]]:
    """(offset, payload, rows) of all there is, read as a consumer does, ``step`` offsets at most at a time."""
    held, found = log.bounds()[partition], []
    position = held.start
    while position < held.end:
        read = log.read(partition, position, position + step, max_bytes=max_bytes)
        assert read.schema.equals(MESSAGES)
        read.validate(full=True)
        assert all(column.num_chunks == 1 for column in read.columns)
        rows = [tuple(row[name] for name in ("_offset", "_raw", "_rows")) for row in read.to_pylist()]
        assert rows or step < held.end
        found += rows
        position = found[-1][0] + found[-1][2] if rows else position + step
    return found


def test_messages_come_back_in_order_with_their_offset_partition_and_time(make: Make) -> None:
    times = iter([START, START + DAY])
    log = make(clock=lambda: next(times))
    log.append({"b": of(b"1", b"", b"\x00\xff"), "a": of(b"4")})
    log.append({"b": of(b"5")})
    assert log.bounds() == {"a": Bounds(0, 1), "b": Bounds(0, 4)}
    assert list(log.bounds()) == ["a", "b"]
    read = log.read("b", 0, 4)
    assert read.schema.equals(MESSAGES)
    assert content(read) == [(0, b"1"), (1, b""), (2, b"\x00\xff"), (3, b"5")]
    assert read["_source"].to_pylist() == ["b"] * 4
    assert read["_rows"].to_pylist() == [1] * 4
    assert read["_published"].to_pylist() == [START, START, START, START + DAY]


def test_a_range_is_of_the_messages_that_begin_in_it(make: Make) -> None:
    log = make(format="arrow")
    log.append({"p": of(b"0-2", b"3", rows=[3, 1])})
    log.append({"p": of(b"4-8", rows=[5])})
    assert log.bounds() == {"p": Bounds(0, 9)}
    expected = {0: b"0-2", 3: b"3", 4: b"4-8"}
    for start in range(10):
        for stop in range(start, 12):
            wanted = [(offset, raw) for offset, raw in expected.items() if start <= offset < stop]
            assert content(log.read("p", start, stop)) == wanted
    assert log.read("p", 0, 9)["_rows"].to_pylist() == [3, 1, 5]


_APPENDS = st.lists(
    st.dictionaries(
        st.sampled_from(["0", "1", "émile"]),
        st.lists(st.tuples(st.binary(max_size=40), st.integers(1, 4)), max_size=6),
        min_size=1,
    ),
    max_size=6,
)


@settings(max_examples=15, deadline=None)
@given(appends=_APPENDS, max_bytes=st.integers(1, 90), step=st.integers(1, 9))
def test_any_cut_of_a_log_gives_every_message_once(
    tmp_path_factory: pytest.TempPathFactory,
    appends: list[dict[str, list[tuple[bytes, int]]]],
    max_bytes: int,
    step: int,
) -> None:
    expected: dict[str, list[tuple[int, bytes, int]]] = {}
    ends: dict[str, int] = {}
    for open_one in LOGS.values():
        with open_one(tmp_path_factory.mktemp("log"), Options(format="arrow"), utc_now) as log:
            for append in appends:
                log.append({name: of(*(m[0] for m in new), rows=[m[1] for m in new]) for name, new in append.items()})
                for name, new in append.items():
                    for payload, rows in new:
                        expected.setdefault(name, []).append((ends.get(name, 0), payload, rows))
                        ends[name] = ends.get(name, 0) + rows
                    ends.setdefault(name, 0)
            assert log.bounds() == {name: Bounds(0, ends[name]) for name in sorted(ends)}
            for name in ends:
                assert whole(log, name) == expected.get(name, [])
                assert whole(log, name, max_bytes, step) == expected.get(name, [])


def test_a_read_ends_before_the_message_that_would_be_too_much(make: Make) -> None:
    log = make()
    for payloads in ((b"aa", b"bbb"), (b"cccc", b"d"), (b"",)):
        log.append({"p": of(*payloads)})
    sizes = {1: 1, 2: 1, 4: 1, 5: 2, 8: 2, 9: 3, 10: 5, 99: 5}
    assert {most: log.read("p", 0, 5, max_bytes=most).num_rows for most in sizes} == sizes
    assert content(log.read("p", 2, 5, max_bytes=0)) == [(2, b"cccc")]
    for payload in (b"x" * 10_000_000, b"y"):
        log.append({"p": of(payload)})
    assert log.read("p", 5, 7, max_bytes=1000)["_raw"].to_pylist() == [b"x" * 10_000_000]


def test_where_nothing_is_there_is_nothing_to_read(make: Make) -> None:
    log = make()
    assert log.bounds() == {}
    log.append({"p": of(b"1"), "none": of()})
    assert log.bounds() == {"none": Bounds(0, 0), "p": Bounds(0, 1)}
    for partition, start, stop in (("p", 1, 9), ("p", 0, 0), ("none", 0, 9), ("unknown", 0, 9)):
        read = log.read(partition, start, stop)
        assert (read.num_rows, read.schema.equals(MESSAGES)) == (0, True)


def test_offsets_that_are_gone_are_refused_and_never_given_again(make: Make) -> None:
    now = [START]
    log = make(clock=lambda: now[0])
    for payload in (b"0", b"1", b"2"):
        log.append({"p": of(payload), "q": of()})
        now[0] += DAY
    log.append({"q": of(b"new")})
    log.trim(START)
    assert whole(log, "p") == [(0, b"0", 1), (1, b"1", 1), (2, b"2", 1)]
    log.trim(START + 2 * DAY)
    assert log.bounds() == {"p": Bounds(2, 3), "q": Bounds(0, 1)}
    assert content(log.read("p", 2, 3)) == [(2, b"2")]
    with pytest.raises(DataRefused, match=r"offset 1 of partition p is gone, the log starts at 2; recompute .* lake"):
        log.read("p", 1, 3)
    log.trim(START + 9 * DAY)
    assert log.bounds() == {"p": Bounds(3, 3), "q": Bounds(1, 1)}
    assert log.read("p", 3, 9).num_rows == 0
    log.append({"p": of(b"3")})
    assert whole(log, "p") == [(3, b"3", 1)]


def test_a_position_that_the_log_never_gave_is_refused(make: Make) -> None:
    log = make()
    log.append({"p": of(b"0")})
    assert log.read("p", 1, 5).num_rows == 0
    for partition, offset in (("p", 2), ("elsewhere", 1)):
        with pytest.raises(DataRefused, match=f"offset {offset} of partition {partition} was never given"):
            log.read(partition, offset, 5)


def test_retention_removes_what_is_older_as_messages_come(make: Make) -> None:
    now = [START]
    log = make(clock=lambda: now[0], retention=2 * DAY)
    for number in range(5):
        log.append({"p": of(b"%d" % number)})
        now[0] += DAY
    assert log.bounds() == {"p": Bounds(2, 5)}
    assert make(clock=lambda: now[0]).bounds() == {"p": Bounds(2, 5)}


def test_an_append_with_a_fault_leaves_nothing_in_any_partition(make: Make) -> None:
    log = make(format="arrow")
    log.append({"p": of(b"0", rows=[1])})
    faults = {
        "Arrow messages need _rows": of(b"x"),
        "at least 1": of(b"x", b"y", rows=[2, 0]),
        "null": pa.table({"_raw": pa.array([b"x", None]), "_rows": [1, 1]}),
        "_rows of a message is null": pa.table({"_raw": [b"x"], "_rows": pa.array([None], pa.int32())}),
        r"not \['key'\]": pa.table({"_raw": [b"x"], "_rows": [1], "key": ["k"]}),
    }
    for told, fault in faults.items():
        with pytest.raises(ValueError, match=told):
            log.append({"p": of(b"1", rows=[1]), "q": fault})
    assert log.bounds() == {"p": Bounds(0, 1)}


def test_a_message_that_is_no_arrow_takes_one_offset(make: Make) -> None:
    for log in (make(), make(format="json")):
        with pytest.raises(ValueError, match="_rows of a message in format json is 1"):
            log.append({"p": of(b"x", rows=[2])})
        log.append({"p": of(b"x", rows=[1])})
    assert log.bounds() == {"p": Bounds(0, 2)}


def test_payloads_of_any_arrow_layout(make: Make) -> None:
    log = make()
    values = [b"left out", b"a", b"", b"ccc", b"left out"]
    for kind in (pa.binary(), pa.large_binary(), pa.string(), pa.binary_view(), pa.dictionary(pa.int32(), pa.binary())):
        array = pa.array(values, pa.binary())
        array = array.dictionary_encode() if pa.types.is_dictionary(kind) else array.cast(kind)
        chunks = pa.chunked_array([array.slice(1, 1), array.slice(2, 2)])
        log.append({str(kind): pa.table({"_raw": chunks})})
        assert content(log.read(str(kind), 0, 3)) == [(0, b"a"), (1, b""), (2, b"ccc")]


def test_a_log_keeps_the_format_it_was_made_with(make: Make) -> None:
    assert make(format="avro").format == "avro"
    assert make().format == "avro"
    uses: list[Callable[[Log], object]] = [
        lambda log: log.format,
        lambda log: log.bounds(),
        lambda log: log.read("p", 0, 1),
        lambda log: log.append({"p": of(b"x")}),
    ]
    for use in uses:
        with pytest.raises(UserError, match="holds avro messages, its URI says format=json; say format=avro"):
            use(make(format="json"))
    assert make(format="avro").bounds() == {}


def test_partitions_of_a_uri_are_there_before_any_message_and_more_may_be_added(make: Make) -> None:
    log = make(partitions=2)
    assert log.bounds() == {"0": Bounds(0, 0), "1": Bounds(0, 0)}
    log.append({"1": of(b"x")})
    assert make(partitions=3).bounds() == {"0": Bounds(0, 0), "1": Bounds(0, 1), "2": Bounds(0, 0)}
    assert list(log.bounds()) == list(make(partitions=1).bounds()) == ["0", "1", "2"]


def test_a_log_goes_to_a_worker_and_is_found_by_its_uri(make: Make) -> None:
    log = make(format="arrow", retention=DAY, schemas="a folder & more")
    log.append({"p": of(b"x", rows=[7])})
    for other in (pickle.loads(pickle.dumps(log)), open_log(log.uri)):
        with other:
            assert (other.uri, other.format, other.schemas) == (log.uri, "arrow", "a folder & more")
            assert whole(other, "p") == [(0, b"x", 7)]


def test_a_closed_log_opens_again(make: Make) -> None:
    log = make()
    log.append({"p": of(b"x")})
    log.close()
    assert log.bounds() == {"p": Bounds(0, 1)}


def test_threads_share_a_log_and_their_appends_do_not_mix(make: Make) -> None:
    log = make()

    def produce(name: bytes) -> None:
        for _ in range(5):
            log.append({"p": of(*[name] * 3)})

    threads = [threading.Thread(target=produce, args=(b"%d" % number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    payloads = log.read("p", 0, 99)["_raw"].to_pylist()
    assert len(payloads) == 45
    assert all(len(set(payloads[at : at + 3])) == 1 for at in range(0, 45, 3))


def test_a_read_keeps_its_bytes_when_the_log_moves_on(make: Make) -> None:
    log = make()
    log.append({"p": of(b"first" * 1000)})
    read = log.read("p", 0, 1)
    log.trim(utc_now() + DAY)
    log.append({"p": of(b"other" * 1000)})
    log.close()
    assert content(read) == [(0, b"first" * 1000)]
