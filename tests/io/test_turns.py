import errno
import fcntl
import json
import os
import pickle
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest

from pipelines.io import turns as module
from pipelines.io.turns import Overtaken, Turn, Turns
from pipelines.transforms.errors import UserError


@pytest.fixture(params=["local", "memory"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "live/flights") if request.param == "local" else f"memory://{uuid.uuid4()}/live"


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> module._Kept:
    """A memory of its own for each test."""
    fresh = module._Kept(1 << 20)
    monkeypatch.setattr(module, "_KEPT", fresh)
    return fresh


def rows(n: int) -> pa.Table:
    return pa.table({"n": list(range(n))})


def names(uri: str) -> list[str]:
    files, path = fsspec.url_to_fs(uri)
    found = (name.rpartition("/")[2] for name in files.find(path))
    return sorted(name for name in found if name != "owner.lock")


def commit(turns: Turns, number: int, *written: str, keep: tuple[str, ...] = ()) -> Turn:
    for name in written:
        turns.write(name, rows(number))
    turn = Turn(number, (*written, *keep), {"offset": number * 10})
    turns.commit(turn)
    return turn


def test_the_last_turn_is_what_was_committed_last(uri: str) -> None:
    turns = Turns(uri)
    assert turns.last() is None
    commit(turns, 1, "a-1")
    second = commit(turns, 2, "a-2", keep=("a-1",))
    assert turns.last() == Turns(uri).last() == second
    assert turns.read("a-2").equals(rows(2))


def test_another_process_reads_what_was_written(uri: str, kept: module._Kept) -> None:
    commit(Turns(uri), 1, "a-1")
    kept.drop((uri, "a-1"))
    other = pickle.loads(pickle.dumps(Turns(uri)))
    assert other.read("a-1").equals(rows(1))


def test_every_kind_of_column_comes_back(tmp_path: Path, kept: module._Kept) -> None:
    pieces = [pa.array(["a", "b"]).dictionary_encode(), pa.array(["c", None]).dictionary_encode()]
    table = pa.table(
        {
            "source": pa.chunked_array(pieces),
            "sum": pa.array([1, None, 2**100, -1], pa.decimal128(38, 0)),
            "list": pa.array([[{"v": 1.5}], [], None, [{"v": float("inf")}]]),
            "at": pa.array([0, 1, None, 2], pa.timestamp("us", "UTC")),
        }
    ).replace_schema_metadata({"a": "b"})
    turns = Turns(str(tmp_path))
    for name, part in {"all": table, "slice": table.slice(1, 2), "none": table.slice(0, 0)}.items():
        turns.write(name, part)
        kept.drop((turns.uri, name))
        found = turns.read(name)
        assert found.to_pylist() == part.to_pylist() and found.schema.equals(part.schema, check_metadata=True)


def test_the_same_turn_again_does_nothing(uri: str) -> None:
    turns = Turns(uri)
    commit(turns, 1, "a-1")
    before = names(uri)
    turns.commit(Turn(1, ("a-1",), {"offset": 10}))
    assert names(uri) == before == ["a-1.arrow", "turn-0000000001.json"]


def test_a_turn_that_another_process_has_committed_is_refused(uri: str) -> None:
    one, other = Turns(uri), Turns(uri)
    commit(one, 1, "a-1")
    assert other.last() == one.last()
    commit(one, 2, "a-2")
    with pytest.raises(Overtaken, match="another process has committed turn 2") as refused:
        commit(other, 2, "b-2")
    assert "\n" not in str(refused.value)
    assert (found := one.last()) is not None and found.files == ("a-2",)


def test_a_turn_long_swept_away_is_refused_all_the_same(uri: str) -> None:
    one, other = Turns(uri), Turns(uri)
    for number in range(1, 6):
        last = commit(one, number, f"a-{number}")
        one.sweep()
    with pytest.raises(Overtaken, match="turn 2"):
        commit(other, 2, "b-2")
    assert one.last() == last
    commit(one, 6, "a-6")
    one.sweep()
    assert names(uri) == ["a-5.arrow", "a-6.arrow", "turn-0000000005.json", "turn-0000000006.json"]


def test_of_many_who_commit_a_turn_at_once_one_succeeds(tmp_path: Path) -> None:
    def attempt(who: int) -> int:
        try:
            Turns(str(tmp_path)).commit(Turn(1, (), {"who": who}))
        except Overtaken:
            return -1
        return who

    with ThreadPoolExecutor(16) as pool:
        done = [who for who in pool.map(attempt, range(64)) if who >= 0]
    assert (last := Turns(str(tmp_path)).last()) is not None and [last.facts["who"]] == done
    assert names(str(tmp_path)) == ["turn-0000000001.json"]


def test_turns_follow_each_other(uri: str) -> None:
    turns = Turns(uri)
    commit(turns, 7)
    with pytest.raises(ValueError, match="turn 9 does not follow turn 7"):
        commit(turns, 9)


def test_sweep_keeps_two_turns_and_what_is_not_ours(tmp_path: Path) -> None:
    turns = Turns(str(tmp_path))
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".new-abc123").write_bytes(b"torn")
    commit(turns, 1, "a-1", "b-1")
    commit(turns, 2, "a-2", keep=("b-1",))
    turns.write("never-named", rows(1))
    third = commit(turns, 3, "a-3", keep=("b-1",))
    turns.sweep()
    turns.sweep()
    left = ["a-2.arrow", "a-3.arrow", "b-1.arrow", "notes.txt", "turn-0000000002.json", "turn-0000000003.json"]
    assert names(str(tmp_path)) == left
    assert turns.last() == third
    with pytest.raises(UserError, match=r"a-1\.arrow: missing"):
        turns.read("a-1")


def test_a_sweep_before_the_first_turn(uri: str, tmp_path: Path) -> None:
    Turns(uri).sweep()
    Turns(str(tmp_path)).write("a", rows(1))
    Turns(str(tmp_path)).sweep()
    assert [path for path in tmp_path.iterdir() if path.is_file()] == []


def test_a_sweep_leaves_what_is_being_written(uri: str) -> None:
    turns = Turns(uri)
    turns.write("dead", rows(1))
    commit(turns, 1, "a-1")
    turns.write("a-2", rows(2))
    turns.sweep()
    assert names(uri) == ["a-1.arrow", "a-2.arrow", "turn-0000000001.json"]
    commit(turns, 2, keep=("a-2",))
    commit(turns, 3)
    turns.write("a-4", rows(4))
    turns.sweep()
    assert names(uri) == ["a-2.arrow", "a-4.arrow", "turn-0000000002.json", "turn-0000000003.json"]


def test_where_nobody_is_alone_a_sweep_leaves_what_another_may_yet_commit() -> None:
    uri = f"memory://{uuid.uuid4()}/live"
    one, other = Turns(uri), Turns(uri)
    one.write("dead", rows(1))
    commit(one, 1, "a-1")
    other.write("b-2", rows(2))
    one.sweep()
    other.sweep()
    assert names(uri) == ["a-1.arrow", "b-2.arrow", "turn-0000000001.json"]
    commit(one, 2, "a-2")
    one.sweep()
    assert names(uri) == ["a-1.arrow", "a-2.arrow", "turn-0000000001.json", "turn-0000000002.json"]
    with pytest.raises(Overtaken):
        other.commit(Turn(2, ("b-2",), {}))


@pytest.mark.parametrize("left", [0, 1, 40, -1])
def test_a_torn_file_is_told_in_a_line(left: int, tmp_path: Path, kept: module._Kept) -> None:
    turns = Turns(str(tmp_path))
    commit(turns, 1, "a")
    for name in names(str(tmp_path)):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:left])
    kept.drop((turns.uri, "a"))
    for name, look in {"a.arrow": lambda: turns.read("a"), "turn-0000000001.json": turns.last}.items():
        with pytest.raises(UserError, match=f"{name}: damaged .*; restore it, or remove ") as told:
            look()
        assert "\n" not in str(told.value)


def test_a_turn_of_another_release_is_refused(tmp_path: Path) -> None:
    (tmp_path / "turn-0000000001.json").write_text(json.dumps({"format": 2}))
    with pytest.raises(UserError, match="format 2, of another release"):
        Turns(str(tmp_path)).last()


@pytest.mark.parametrize("name", ["", ".a", "a/b", "../a", "a b", "a\n"])
def test_names_stay_in_the_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="state file"):
        Turns(str(tmp_path)).write(name, rows(1))


def test_facts_are_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        Turns(str(tmp_path)).commit(Turn(1, (), {"n": float("nan")}))


def test_memory_is_bounded_and_forgets_what_was_used_longest_ago(uri: str, kept: module._Kept) -> None:
    turns = Turns(uri)
    for number in range(4):
        turns.write(f"a-{number}", rows(100))
    size = kept.size // 4
    kept.limit = 3 * size
    turns.read("a-0")
    turns.write("a-4", rows(100))
    assert kept.size == 3 * size
    assert [name for _, name in kept._tables] == ["a-3", "a-0", "a-4"]
    turns.write("large", rows(10_000))
    assert kept.size == 0
    assert turns.read("large").equals(rows(10_000))


def test_a_slice_keeps_no_more_than_itself_in_memory(tmp_path: Path, kept: module._Kept) -> None:
    large = rows(1_000_000)
    Turns(str(tmp_path)).write("a", large.slice(5, 10))
    (table, size), *_ = kept._tables.values()
    assert table.equals(large.slice(5, 10)) and size < 2_000
    assert sum(buffer.size for buffer in table["n"].chunk(0).buffers() if buffer) < 2_000


# Durability: what is synced, and before what


class Disk:
    """What was synced, linked and named, in order; each file by the name it has at the end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, int]] = []
        sync, link, replace = os.fsync, os.link, Path.replace

        def fsync(descriptor: int) -> None:
            sync(descriptor)
            self.events.append(("sync", os.fstat(descriptor).st_ino))

        def linked(source: Any, target: Any) -> None:
            link(source, target)
            self.events.append(("link", os.stat(target).st_ino))

        def replaced(source: Path, target: Path) -> Path:
            done = replace(source, target)
            self.events.append(("name", target.stat().st_ino))
            return done

        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(os, "link", linked)
        monkeypatch.setattr(Path, "replace", replaced)

    def taken(self, folder: Path) -> list[str]:
        files = {path.stat().st_ino: path.name for path in [*folder.iterdir()]} | {folder.stat().st_ino: "folder"}
        events, self.events = [f"{what} {files[inode]}" for what, inode in self.events], []
        return events


def test_files_are_synced_before_their_turn_has_its_name_and_the_folder_once_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, turns = Disk(monkeypatch), Turns(str(tmp_path))
    commit(turns, 1, "a", "b")
    first = disk.taken(tmp_path)
    assert first[:2] == ["name a.arrow", "name b.arrow"]
    assert sorted(first[2:5]) == ["sync a.arrow", "sync b.arrow", "sync turn-0000000001.json"]
    assert first[5:] == ["link turn-0000000001.json", "sync folder"]
    commit(turns, 2, "c", keep=("a",))
    assert sorted(disk.taken(tmp_path)[1:3]) == ["sync c.arrow", "sync turn-0000000002.json"]
    resumed = Turns(str(tmp_path))
    assert resumed.last() is not None
    commit(resumed, 3, keep=("a", "c"))
    assert disk.taken(tmp_path) == ["sync turn-0000000003.json", "link turn-0000000003.json", "sync folder"]


def test_a_file_that_a_turn_names_is_replaced_only_by_one_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = Turns(str(tmp_path))
    commit(turns, 1, "a")
    disk = Disk(monkeypatch)
    turns.write("a", rows(1))
    assert disk.taken(tmp_path) == ["sync a.arrow", "name a.arrow"]


def test_a_disk_that_fails_commits_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns(str(tmp_path))
    turns.write("a", rows(1))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        turns.commit(Turn(1, ("a",), {}))
    assert turns.last() is None
    assert names(str(tmp_path)) == ["a.arrow"]


# One process


def test_the_second_owner_is_refused_in_a_line(tmp_path: Path) -> None:
    with Turns(str(tmp_path)).own():
        with (
            pytest.raises(UserError, match=f"running as pid {os.getpid()}; end that first") as refused,
            Turns(str(tmp_path)).own(),
        ):
            raise AssertionError
        assert "\n" not in str(refused.value)
    with Turns(str(tmp_path)).own():
        pass


def test_a_program_that_the_owner_starts_does_not_own(tmp_path: Path) -> None:
    with Turns(str(tmp_path)).own():
        command = [sys.executable, "-S", "-c", "print('here', flush=True); input()"]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False)
    assert child.stdout and child.stdout.readline() == b"here\n"
    try:
        with open(tmp_path / "owner.lock") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        child.communicate(b"\n")


def test_a_place_that_cannot_be_a_folder_is_told_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="cannot be written: Not a directory"),
        Turns(f"{tmp_path}/file/live").own(),
    ):
        raise AssertionError


# Elsewhere


@pytest.mark.parametrize("uri", ["ftp://host/live", "hdfs://host/live", "http://host/live", "nonsense://x"])
def test_what_cannot_create_exclusively_is_refused_in_a_line(uri: str) -> None:
    with pytest.raises(UserError, match=r"cannot create a file exclusively.*use a local folder, s3") as told:
        Turns(uri)
    assert "\n" not in str(told.value)


def test_a_store_that_only_says_that_it_creates_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns(f"memory://{uuid.uuid4()}")
    with turns.own():
        commit(turns, 1)
    system: Any = type(fsspec.filesystem("memory"))
    pipe = system.pipe_file
    monkeypatch.setattr(system, "pipe_file", lambda self, path, value, mode="": pipe(self, path, value))
    with pytest.raises(UserError, match="this store replaces a file that was to be created"), turns.own():
        raise AssertionError
    assert names(turns.uri) == ["turn-0000000001.json"]


def test_a_local_folder_may_be_told_as_a_uri(tmp_path: Path) -> None:
    commit(Turns(f"file://{tmp_path}/live"), 1)
    assert Turns(f"{tmp_path}/live/").last() == Turn(1, (), {"offset": 10})
