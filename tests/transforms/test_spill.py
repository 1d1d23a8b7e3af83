import fcntl
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from cryptography.exceptions import InvalidTag
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.transforms import spill as module
from pipelines.transforms.errors import UserError
from pipelines.transforms.spill import Segment, Shelf, Spill, Writer, partitions, shelved, size, spill_folder


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with spill_folder(tmp_path) as found:
        yield found


def rows(keys: list[str | None], source: str) -> pa.Table:
    return pa.table(
        {
            "id": pa.array(keys, pa.string()),
            "_source": pa.array([source] * len(keys)).dictionary_encode(),
            "_offset": pa.array(range(len(keys)), pa.int64()),
        }
    )


def write(spill: Spill, tables: list[pa.Table]) -> list[Segment]:
    writer = Writer(spill)
    for table in tables:
        writer.add(table)
    return writer.finish()


keys = st.lists(st.lists(st.none() | st.sampled_from([f"k{i}" for i in range(20)]), max_size=30), max_size=6)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keys, st.integers(1, 9), st.sampled_from([200, 600, 2000]))
def test_every_row_comes_back_once_and_an_identity_in_one_group(
    folder: Path, batches: list[list[str | None]], n: int, limit: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BATCH", limit)
        spill = Spill(folder, ("id",), n)
        tables = [rows(batch, str(number)) for number, batch in enumerate(batches)]
        groups = list(pickle.loads(pickle.dumps(spill)).read(write(spill, tables)))
    found = [(row["id"], row["_source"], row["_offset"]) for group in groups for row in group.to_pylist()]
    expected = [(key, str(number), at) for number, batch in enumerate(batches) for at, key in enumerate(batch)]
    assert sorted(found, key=repr) == sorted(expected, key=repr)
    owners = [key for group in groups for key in set(group["id"].to_pylist())]
    assert len(owners) == len(set(owners))


def test_what_outgrew_its_partition_is_read_in_shares(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spill, table = Spill(folder, ("id",), 1), rows([f"k{i}" for i in range(1000)], "a")
    segments = write(spill, [table])
    assert [len(group) for group in spill.read(segments)] == [1000]
    monkeypatch.setattr(module, "BATCH", table.nbytes // 8 + 1)
    shares = [len(group) for group in spill.read(segments)]
    assert sum(shares) == 1000
    assert len(shares) == 4
    assert max(shares) < 350


def test_small_partitions_are_read_together(folder: Path) -> None:
    spill = Spill(folder, ("id",), 64)
    assert len(list(spill.read(write(spill, [rows([str(i) for i in range(1000)], "a")])))) == 1


def test_nothing_readable_lies_on_disk(folder: Path) -> None:
    write(Spill(folder, ("id",), 2), [rows(["+33612345678", "+33687654321"], "a")])
    [file] = folder.iterdir()
    assert file.stat().st_size > 0
    assert b"+336" not in file.read_bytes()
    assert folder.stat().st_mode & 0o077 == file.stat().st_mode & 0o077 == 0


def test_the_folder_is_gone_at_the_end_and_after_a_failure(tmp_path: Path) -> None:
    with spill_folder(tmp_path) as folder:
        (folder / "rows").write_bytes(b"x")
    with pytest.raises(FileNotFoundError), spill_folder(tmp_path) as folder:
        (folder / "rows").rename(folder / "other" / "rows")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_but_not_what_a_living_one_has(tmp_path: Path) -> None:
    dead, living = tmp_path / "pipelines-spill-dead", tmp_path / "pipelines-spill-living"
    for left in (dead, living):
        left.mkdir()
        (left / "rows").write_bytes(b"x")
    descriptor = os.open(living, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with spill_folder(tmp_path) as folder:
        assert sorted(tmp_path.iterdir()) == sorted([living, folder])
    os.close(descriptor)


def test_a_full_disk_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.mkstemp", lambda dir: (os.open("/dev/full", os.O_WRONLY), "full"))
    with pytest.raises(UserError, match=f"cannot spill rows to {folder}: No space left on device; free some space"):
        write(Spill(folder, ("id",), 1), [rows(["a"], "a")])


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"cannot make a folder to spill rows in .*: No such file"),
        spill_folder(tmp_path / "x"),
    ):
        pass


def test_altered_bytes_do_not_come_back(folder: Path) -> None:
    spill = Spill(folder, ("id",), 1)
    segments = write(spill, [rows(["a"], "a")])
    [file] = folder.iterdir()
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)
    with pytest.raises(InvalidTag):
        list(spill.read(segments))


def test_partitions_grow_with_rows_and_bytes() -> None:
    assert partitions(0, 0) == partitions(336_776, 5 * 2**20) == 1
    assert partitions(300_000_000, 2**30) == 150
    assert partitions(None, 100 * 2**30) == 1024


@pytest.mark.parametrize("part", [1, 300, 1 << 20])
@pytest.mark.parametrize("n", [0, 1, 100])
def test_a_table_on_the_shelf_comes_back_as_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch, n: int, part: int
) -> None:
    monkeypatch.setattr(module, "PART", part)
    shelf, table = Shelf(folder), rows([f"secret {i}" for i in range(n)], "a")
    put = shelf.put(table)
    assert (shelved(put), size(put), shelved(table)) == (True, table.nbytes, False)
    assert shelf.put(put) is put
    assert pickle.loads(pickle.dumps(shelf)).get(put).combine_chunks().equals(table.combine_chunks())
    assert all(b"secret" not in path.read_bytes() for path in folder.iterdir())


def test_a_table_on_the_shelf_is_put_onto_another_as_often_as_it_takes(folder: Path) -> None:
    given: list[list[str | None]] = [["a", "b"], [None], ["c"]]
    shelf, tables = Shelf(folder), [rows(keys, "a") for keys in given]
    put = [shelf.put(tables[0])]
    for table in tables[1:]:
        put.append(shelf.put(table, put[-1]))
    again = shelf.put(tables[2], put[0])  # as when a step is tried again from where it began
    found = [shelf.get(place)["id"].to_pylist() for place in (*put, again)]
    assert found == [["a", "b"], ["a", "b", None], ["a", "b", None, "c"], ["a", "b", "c"]]
    assert size(put[2]) == sum(table.nbytes for table in tables)
    assert len(list(folder.iterdir())) == 1


def test_a_part_of_a_shelved_table_cannot_be_taken_for_another(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART", 1)
    shelf = Shelf(folder)
    put = shelf.put(rows(["a", "b"], "a"))
    (path,) = folder.iterdir()
    sealed, first = path.read_bytes(), put["_lengths"][0][0].as_py()
    path.write_bytes(sealed[first:] + sealed[:first])
    with pytest.raises(InvalidTag):
        shelf.get(put)


def test_what_is_dropped_leaves_the_disk(folder: Path) -> None:
    shelf, table = Shelf(folder), rows(["a"], "a")
    put = shelf.put(table)
    shelf.drop(put)
    shelf.drop(table)
    assert not list(folder.iterdir())
