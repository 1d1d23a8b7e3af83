from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from benchmarks import data


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> data.Dataset:
    monkeypatch.setattr(data, "ROOT", tmp_path)
    monkeypatch.setattr(data, "ROW_GROUP", 1_000)
    monkeypatch.setattr(data, "FILE", 2_000)
    return data.Dataset("small", 3_500, keys=7)


def rows(dataset: data.Dataset) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted(dataset.folder.glob("*.parquet")))


def test_a_dataset_has_its_rows_in_files_and_row_groups(small: data.Dataset) -> None:
    small.make()
    groups = [pq.ParquetFile(path).num_row_groups for path in sorted(small.folder.glob("*.parquet"))]
    assert groups == [2, 2]
    table = rows(small)
    assert (len(table), table.schema) == (3_500, data.SCHEMA)
    assert (pc.count_distinct(table["key"]).as_py(), pc.count_distinct(table["id"]).as_py()) == (7, 3_500)


def test_the_same_rows_every_time_and_a_larger_size_begins_with_the_smaller(small: data.Dataset) -> None:
    small.make()
    larger = data.Dataset("larger", 6_000, keys=7)
    larger.make()
    assert rows(larger).slice(0, 3_000).equals(rows(small).slice(0, 3_000))


def test_a_file_that_is_there_is_not_written_again(small: data.Dataset) -> None:
    small.make()
    path = small.folder / "rows-000.parquet"
    path.write_bytes(b"kept")
    small.make()
    assert path.read_bytes() == b"kept"
