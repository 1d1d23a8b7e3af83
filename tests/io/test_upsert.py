from pathlib import Path

import apache_beam as beam
import pyarrow as pa
import pytest
from apache_beam.transforms.window import FixedWindows, GlobalWindow, IntervalWindow, TimestampedValue

from pipelines.io import upsert
from pipelines.io.sqlite import SqliteStore
from pipelines.io.store import LIVE, StoreConflict
from pipelines.io.upsert import WRITTEN, Deliver, WriteStore

KEYS = ("sensor", "window_start")
SCHEMA = pa.schema([("sensor", pa.string()), ("window_start", pa.timestamp("us", "UTC")), ("n", pa.int64())])


def table(*rows: tuple[str, int, int]) -> pa.Table:
    return pa.Table.from_pylist([dict(zip(SCHEMA.names, row, strict=True)) for row in rows], schema=SCHEMA)


def bundle(write: WriteStore, *elements: pa.Table, window: object = GlobalWindow()) -> list[dict[str, object]]:
    write.start_bundle()
    for element in elements:
        write.process(element, window)
    return [row for value in write.finish_bundle() for row in value.value.to_pylist()]


def test_a_bundle_is_written_at_once_and_a_retry_changes_nothing(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "store.db")
    generation = store.begin("v", SCHEMA, KEYS)
    write = WriteStore(store.path, "v", generation)
    write.setup()
    elements = (table(("a", 0, 1), ("b", 0, 2)), table(("a", 1, 3)))
    assert bundle(write, *elements) == [{"view": "v", "rows": 3, "newer": 3}]
    assert bundle(write, *elements) == [{"view": "v", "rows": 3, "newer": 0}]
    assert bundle(write) == []
    assert store.scan("v", generation=generation).equals(table(("a", 0, 1), ("a", 1, 3), ("b", 0, 2)))
    store.begin("v", SCHEMA, KEYS)
    with pytest.raises(StoreConflict, match="another run"):
        bundle(write, table(("c", 0, 1)))
    write.teardown()
    store.close()


def test_a_large_bundle_is_written_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upsert, "_ENOUGH", 1)
    with SqliteStore(tmp_path / "store.db") as store:
        store.resume("v", SCHEMA, KEYS)
        write = WriteStore(store.path, "v", LIVE, version=3)
        write.setup()
        write.start_bundle()
        write.process(table(("a", 0, 1)), GlobalWindow())
        assert store.scan("v", generation=LIVE).num_rows == 1
        write.process(table(("b", 0, 1)), GlobalWindow())
        [written] = [value.value.to_pylist() for value in write.finish_bundle()]
        assert written == [{"view": "v", "rows": 2, "newer": 2}]
        write.teardown()


SESSIONS = pa.schema(
    [
        ("shop", pa.string()),
        ("window_start", pa.timestamp("us", "UTC")),
        ("window_end", pa.timestamp("us", "UTC")),
        ("_rows", pa.int64()),
    ]
)


def test_parts_of_a_session_that_were_told_before_a_crash_go_with_it(tmp_path: Path) -> None:
    def sessions(*rows: tuple[str | None, int, int, int]) -> pa.Table:
        return pa.Table.from_pylist([dict(zip(SESSIONS.names, row, strict=True)) for row in rows], schema=SESSIONS)

    def deliver(rows: pa.Table, at: float = 0.0) -> None:
        now = iter((0.0, at))
        write = Deliver(store.path, "v", ("shop", "window_start"), 1, sessions=True, clock=lambda: next(now))
        write.setup()
        write.start_bundle()
        write.process(rows)
        write.finish_bundle()
        write.teardown()

    with SqliteStore(tmp_path / "store.db") as store:
        store.resume("v", SESSIONS, ("shop", "window_start"))
        deliver(sessions(("a", 5, 15, 1), ("b", 5, 15, 1), (None, 5, 15, 1), ("a", 30, 40, 1)))
        whole = sessions(("a", 0, 15, 2), (None, 5, 15, 1), ("a", 15, 25, 1))
        deliver(whole)
        left = sessions((None, 5, 15, 1), ("a", 0, 15, 2), ("a", 15, 25, 1), ("a", 30, 40, 1), ("b", 5, 15, 1))
        assert sorted(store.scan("v", generation=LIVE).to_pylist(), key=repr) == sorted(left.to_pylist(), key=repr)
        deliver(sessions(("a", 5, 15, 1)))  # a pane that is cut as before the crash
        assert store.scan("v", generation=LIVE).num_rows == 5
        deliver(sessions(("b", 0, 15, 2)), at=upsert.AGAIN)
        assert store.scan("v", generation=LIVE).num_rows == 6


def test_in_a_pipeline_each_window_hears_of_its_own_rows(tmp_path: Path) -> None:
    with SqliteStore(tmp_path / "store.db") as store:
        generation = store.begin("v", SCHEMA, KEYS)

        def check(found: list[pa.Table]) -> None:
            assert all(part.schema == WRITTEN for part in found)
            assert sum(part["rows"][0].as_py() for part in found) == 3

        with beam.Pipeline("FnApiRunner") as pipeline:
            elements = [(0, table(("a", 0, 1), ("b", 0, 2))), (15, table(("a", 1, 3)))]
            written = (
                pipeline
                | beam.Create(elements)
                | beam.MapTuple(lambda second, rows: TimestampedValue(rows, second)).with_output_types(pa.Table)
                | beam.WindowInto(FixedWindows(10))
                | beam.ParDo(WriteStore(store.path, "v", generation))
            )
            assert written.element_type is pa.Table
            _ = written | beam.Map(_in_its_window)
        assert store.scan("v", generation=generation).num_rows == 3


def _in_its_window(written: pa.Table, window: IntervalWindow = beam.DoFn.WindowParam) -> None:
    assert written["rows"].to_pylist() == [2 if window.start == 0 else 1]
