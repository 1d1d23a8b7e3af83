from pathlib import Path

import apache_beam as beam
import pyarrow as pa
import pytest
from apache_beam.transforms.window import FixedWindows, GlobalWindow, IntervalWindow, TimestampedValue

from pipelines.io import upsert
from pipelines.io.sqlite import SqliteStore
from pipelines.io.store import LIVE, StoreConflict
from pipelines.io.upsert import WRITTEN, WriteStore

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
