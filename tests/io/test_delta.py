"""Delta beyond the contract: deaths, rivals, disks, other programs' tables."""

import errno
import json
import os
import random
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deltalake
import pyarrow as pa
import pytest
from deltalake.exceptions import CommitFailedError
from deltalake.transaction import AddAction

from pipelines.io import parquet
from pipelines.io.delta import Delta
from pipelines.io.table import Between, Commit, Replace, open_table
from pipelines.transforms.errors import UserError
from pipelines.transforms.ranges import Range

SCHEMA = pa.schema([("t", pa.timestamp("us", tz="UTC")), ("v", pa.int64())])


@pytest.fixture
def table(tmp_path: Path) -> Delta:
    return Delta.open(str(tmp_path / "table"), SCHEMA)


def rows(*times: int, v: int = 0) -> pa.Table:
    return pa.table([list(times), [v] * len(times)], schema=SCHEMA)


def stage(table: Delta, data: pa.Table, token: str = "run") -> pa.Table:
    staging = table.stage("u", token=token, version=table.next_version())
    staging.add(data)
    return staging.finish()


def put(table: Delta, data: pa.Table, replace: Replace = "nothing", token: str = "run") -> Commit:
    return table.commit(stage(table, data, token), token=token, version=table.next_version(), replace=replace)


def content(table: Delta) -> list[tuple[int, int]]:
    found = table.dataset().to_table()
    return sorted(zip(found["t"].cast(pa.int64()).to_pylist(), found["v"].to_pylist(), strict=True))


def named(folder: Path) -> set[str]:
    """Every file that any commit of the log added."""
    actions = [json.loads(line) for log in folder.glob("_delta_log/*.json") for line in log.read_text().splitlines()]
    return {action["add"]["path"] for action in actions if "add" in action}


def present(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


# Deaths: a process that imports once forks a child for each run, which kills itself at its n-th line of ours (after the
# last line it has not begun), or in the midst of native code by a timer.

RUNS = """
import json, os, signal, sys
import pyarrow as pa
from pipelines.io import delta, parquet
from pipelines.io.table import Between
from pipelines.transforms.ranges import Range

def run(uri, replace, version, line, micros):
    seen = 0
    def trace(frame, event, _):
        nonlocal seen
        if frame.f_code.co_filename not in (delta.__file__, parquet.__file__):
            return None
        seen += event == "line"
        if event == "line" and seen == line:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace
    if micros:
        signal.setitimer(signal.ITIMER_REAL, micros / 1e6)
    sys.settrace(trace)
    schema = pa.schema([("t", pa.timestamp("us", tz="UTC")), ("v", pa.int64())])
    table = delta.Delta.open(uri, schema)
    version = version or table.next_version()
    staged = []
    for unit in range(2):
        staging = table.stage(f"unit-{unit}", token="run", version=version)
        staging.add(pa.table([[4 + unit], [7]], schema=schema))
        staged.append(staging.finish())
    replace = Between("t", tuple(Range(*ends) for ends in replace)) if isinstance(replace, list) else replace
    table.commit(pa.concat_tables(staged), token="run", version=version, replace=replace)
    return seen

for request in sys.stdin:
    inbox, outbox = os.pipe()
    if not (child := os.fork()):
        os.write(outbox, str(run(*json.loads(request))).encode())
        os._exit(0)
    os.close(outbox)
    status = os.waitpid(child, 0)[1]
    print(json.dumps([os.waitstatus_to_exitcode(status), os.read(inbox, 99).decode()]), flush=True)
    os.close(inbox)
"""

Run = Callable[[Path, Replace, int | None, int, int], tuple[int, str]]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    process = subprocess.Popen([sys.executable, "-c", RUNS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    send, receive = process.stdin, process.stdout

    def run(folder: Path, replace: Replace, version: int | None, line: int, micros: int) -> tuple[int, str]:
        what = [[part.start, part.stop] for part in replace.ranges] if isinstance(replace, Between) else replace
        print(json.dumps([str(folder), what, version, line, micros]), file=send, flush=True)
        code, said = json.loads(receive.readline())
        return code, said

    yield run
    send.close()
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("kills", [3, pytest.param(25, marks=pytest.mark.slow)])
@pytest.mark.parametrize("replace", ["nothing", "everything", Between("t", (Range(3, 7),))])
@pytest.mark.parametrize("empty", [False, True])
def test_a_killed_run_is_made_good_by_its_rerun(
    run: Run, tmp_path: Path, replace: Replace, empty: bool, kills: int
) -> None:
    template = tmp_path / "template"
    template.mkdir()
    if not empty:
        put(Delta.open(str(template), SCHEMA), rows(*range(10)))
    old = [] if empty else [(t, 0) for t in range(10)]
    kept = {"nothing": old, "everything": []}.get(str(replace), [row for row in old if not 3 <= row[0] < 7])
    new = sorted([*kept, (4, 7), (5, 7)])
    # An append that is run again must ask for its own version; what replaces may be another run.
    version = (1 if empty else 2) if replace == "nothing" else None

    shutil.copytree(template, tmp_path / "whole")
    code, lines = run(tmp_path / "whole", replace, version, 0, 0)
    assert (code, content(Delta(str(tmp_path / "whole")))) == (0, new)

    chance, dead = random.Random(f"{replace} {empty}"), 0
    for kill in range(kills):
        folder = tmp_path / str(kill)
        shutil.copytree(template, folder)
        line, micros = (chance.randrange(1, int(lines)), 0) if kill % 3 else (0, chance.randrange(1000, 60_000))
        dead += run(folder, replace, version, line, micros)[0] != 0
        table = Delta.open(str(folder), SCHEMA)
        assert (content(table) if table.history() else []) in (old, new), (line, micros)

        assert run(folder, replace, version, 0, 0)[0] == 0, (line, micros)

        assert content(table) == new, (line, micros)
        assert present(folder) == named(folder), (line, micros)
    assert dead


# Rivals


def interrupted(monkeypatch: pytest.MonkeyPatch, *, before: Callable[[], object], times: int = 1) -> None:
    """Let something happen between a commit's look at the table and its write."""
    write, left = deltalake.DeltaTable.create_write_transaction, [times]

    def late(self: deltalake.DeltaTable, *args: Any, **kwargs: Any) -> None:
        if left[0]:
            left[0] -= 1
            before()
        write(self, *args, **kwargs)

    monkeypatch.setattr(deltalake.DeltaTable, "create_write_transaction", late)


def foreign(table: Delta, *times: int) -> None:
    deltalake.write_deltalake(table.uri, rows(*times, v=9), mode="append")


@pytest.mark.parametrize(
    ("replace", "expected"),
    [
        ("nothing", [(0, 0), (4, 0), (4, 9), (5, 1), (8, 9)]),
        ("everything", [(5, 1)]),
        (Between("t", (Range(3, 7),)), [(0, 0), (5, 1), (8, 9)]),
    ],
)
def test_what_another_program_committed_meanwhile_counts_as_there_before(
    table: Delta, monkeypatch: pytest.MonkeyPatch, replace: Replace, expected: list[tuple[int, int]]
) -> None:
    put(table, rows(0, 4))
    interrupted(monkeypatch, before=lambda: foreign(table, 4, 8))
    put(table, rows(5, v=1), replace)
    assert content(table) == expected


def test_a_run_that_committed_meanwhile_wins(table: Delta, monkeypatch: pytest.MonkeyPatch) -> None:
    put(table, rows(0))
    mine, theirs = stage(table, rows(1)), stage(table, rows(2), "theirs")
    interrupted(monkeypatch, before=lambda: table.commit(theirs, token="theirs", version=2, replace="nothing") and None)
    with pytest.raises(UserError, match="another run committed version 2 meanwhile"):
        table.commit(mine, token="run", version=2, replace="nothing")
    assert content(table) == [(0, 0), (2, 0)]


def test_without_an_end_to_the_rivals_it_gives_up(table: Delta, monkeypatch: pytest.MonkeyPatch) -> None:
    put(table, rows(0))
    interrupted(monkeypatch, before=lambda: foreign(table, 8), times=99)
    with pytest.raises(UserError, match=r"10 times over\. Run again"):
        put(table, rows(1))
    assert [v for _, v in content(table)].count(0) == 1


def test_the_last_try_counts(table: Delta, monkeypatch: pytest.MonkeyPatch) -> None:
    put(table, rows(0))
    interrupted(monkeypatch, before=lambda: foreign(table, 8), times=9)
    put(table, rows(1))
    assert [v for _, v in content(table)].count(0) == 2


def test_two_that_create_the_table_at_once(table: Delta, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, load = stage(table, rows(1)), Delta._load

    def nothing_yet(_: Delta) -> None:
        monkeypatch.undo()
        foreign(table, 2)

    monkeypatch.setattr(Delta, "_load", nothing_yet)
    assert table.commit(mine, token="run", version=1, replace="nothing").version == 1
    assert Delta._load is load
    assert content(table) == [(1, 0), (2, 9)]


@pytest.mark.parametrize("error", [CommitFailedError("timeout"), OSError("connection reset"), KeyError("any")])
@pytest.mark.parametrize("first", [True, False])
def test_an_error_after_the_commit_landed_is_no_error(
    table: Delta, monkeypatch: pytest.MonkeyPatch, error: Exception, first: bool
) -> None:
    if not first:
        put(table, rows(0))

    def landing(write: Callable[..., None]) -> Callable[..., None]:
        def written(*args: Any, **kwargs: Any) -> None:
            write(*args, **kwargs)
            raise error

        return written

    name = "pipelines.io.delta.create_table_with_add_actions"
    monkeypatch.setattr(name, landing(deltalake.transaction.create_table_with_add_actions))
    monkeypatch.setattr(
        deltalake.DeltaTable, "create_write_transaction", landing(deltalake.DeltaTable.create_write_transaction)
    )
    put(table, rows(1))
    assert content(table) == ([(1, 0)] if first else [(0, 0), (1, 0)])


def test_an_error_before_it_landed_is_told_at_once(table: Delta, monkeypatch: pytest.MonkeyPatch) -> None:
    put(table, rows(0))
    tries = []

    def fail(*args: Any, **kwargs: Any) -> None:
        tries.append(1)
        raise CommitFailedError("no answer")

    monkeypatch.setattr(deltalake.DeltaTable, "create_write_transaction", fail)
    with pytest.raises(CommitFailedError, match="no answer"):
        put(table, rows(1))
    assert (len(tries), content(table)) == (1, [(0, 0)])


def test_times_that_another_program_cut_to_milliseconds_are_found_and_replaced(table: Delta) -> None:
    foreign(table, 4, 1999)
    at = pa.scalar(1999, SCHEMA.field("t").type)
    assert table.dataset().count_rows(filter=pa.compute.field("t") == at) == 1
    put(table, rows(1999, v=1), Between("t", (Range(1999, 2000),)))
    assert content(table) == [(4, 9), (1999, 1)]


# Files


def test_a_range_rewrites_only_the_files_across_its_edges(table: Delta) -> None:
    for t in range(0, 40, 10):
        put(table, rows(*range(t, t + 10)))
    untouched = Delta(table.uri).files()
    put(table, rows(15, v=1), Between("t", (Range(12, 25),)))

    assert content(table) == [(t, 0) for t in range(12)] + [(15, 1)] + [(t, 0) for t in range(25, 40)]
    assert len(set(untouched) & set(table.files())) == 2
    written = present(Path(table.uri)) - {Path(file).name for file in untouched}
    assert len(written) == 3  # ours, and the neighbours before and after


def test_the_next_range_finds_files_that_end_where_it_begins(table: Delta) -> None:
    put(table, rows(*range(30)))
    put(table, rows(12, v=1), Between("t", (Range(10, 20),)))
    before = set(table.files())
    put(table, rows(22, v=1), Between("t", (Range(20, 30),)))
    assert len(before - set(table.files())) == 1


def test_replaced_files_stay_for_a_week(table: Delta, monkeypatch: pytest.MonkeyPatch) -> None:
    put(table, rows(0))
    first = present(Path(table.uri))
    week = 7 * 24 * 3600 * 10**9
    with monkeypatch.context() as past:
        now = __import__("time").time_ns() - week - 10**9
        past.setattr("pipelines.io.delta.time.time_ns", lambda: now)
        put(table, rows(0, v=1), Between("t", (Range(0, 1),)))
    second = present(Path(table.uri)) - first
    put(table, rows(0, v=2), Between("t", (Range(0, 1),)))
    assert not first & present(Path(table.uri))
    assert second <= present(Path(table.uri))


def test_a_file_that_died_unnamed_after_the_last_commit_goes_with_the_next(table: Delta) -> None:
    put(table, rows(0))
    late = table.stage("late", token="run", version=1)
    late.add(rows(1))
    (name,) = late.finish()["path"].to_pylist()
    put(table, rows(2))
    assert name not in present(Path(table.uri))
    assert content(table) == [(0, 0), (2, 0)]


def test_what_another_program_compacted_stays_for_its_readers(table: Delta) -> None:
    for t in (0, 1):
        put(table, rows(t))
    old = table.dataset()
    assert deltalake.DeltaTable(table.uri).optimize.compact()["numFilesRemoved"] == 2
    put(table, rows(2))
    assert old.count_rows() == 2
    assert content(table) == [(0, 0), (1, 0), (2, 0)]


def test_a_long_unit_goes_on_in_another_file(table: Delta, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "FILE_BYTES", 1)
    monkeypatch.setattr(parquet, "ROW_GROUP", 2)
    staging = table.stage("u", token="run", version=1)
    for t in range(5):
        staging.add(rows(t))
    staged = staging.finish()
    assert staged["rows"].to_pylist() == [2, 2, 1]
    table.commit(staged, token="run", version=1, replace="everything")
    assert content(table) == [(t, 0) for t in range(5)]


# Places


@pytest.mark.parametrize("many", [1, 300_000])
def test_a_full_disk_is_told_in_one_line_and_leaves_no_file(
    table: Delta, monkeypatch: pytest.MonkeyPatch, many: int
) -> None:
    monkeypatch.setattr(secrets, "token_hex", lambda _: "full")
    folder = Path(table.uri)
    folder.mkdir()
    (folder / ".part-00000001-run-u-0-full").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"table .*/table: no space left on the disk; free some .*run again$") as told:
        stage(table, pa.concat_tables([rows(*range(many))]))
    assert "\n" not in str(told.value)
    assert not present(folder)


def test_a_disk_that_is_full_at_the_commit(table: Delta, monkeypatch: pytest.MonkeyPatch) -> None:
    put(table, rows(0))

    def full(*args: Any, **kwargs: Any) -> None:
        raise CommitFailedError("Generic LocalFileSystem error: No space left on device (os error 28)")

    monkeypatch.setattr(deltalake.DeltaTable, "create_write_transaction", full)
    with pytest.raises(UserError, match="no space left on the disk"):
        put(table, rows(1))
    assert content(table) == [(0, 0)]


@pytest.mark.parametrize(
    ("code", "message"),
    [(errno.EACCES, "not allowed to read and write"), (errno.EROFS, "read-only"), (errno.EDQUOT, "quota is used up")],
)
def test_a_disk_that_refuses(table: Delta, monkeypatch: pytest.MonkeyPatch, code: int, message: str) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(UserError, match=message):
        stage(table, rows(1))


@pytest.mark.parametrize("below", ["", "/deeper"])
def test_a_table_cannot_be_where_a_file_is(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file"):
        put(Delta.open(f"{tmp_path}/file{below}", SCHEMA), rows(1))


def test_a_table_that_is_not_there_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is none"):
        Delta.open(str(tmp_path / "none"))
    assert not list(tmp_path.iterdir())


def test_an_unknown_system_is_refused() -> None:
    with pytest.raises(UserError, match="no system 'iceberg' is known"):
        open_table("iceberg://warehouse/x", SCHEMA)


def test_an_object_store_that_refuses_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("Generic S3 error\n   \x1b[31m↳\x1b[0m status 404")

    monkeypatch.setattr(deltalake, "DeltaTable", refuse)
    with pytest.raises(UserError, match=r"^table s3://b/x: check its name, .* It said: Generic S3 error status 404$"):
        open_table("s3://b/x")


def test_a_file_uri_and_a_path_are_the_same_place(tmp_path: Path) -> None:
    put(Delta.open(f"file://{tmp_path}/table", SCHEMA), rows(1))
    assert content(Delta.open(str(tmp_path / "table"))) == [(1, 0)]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"configuration": {"delta.enableDeletionVectors": "true"}}, "deletionVectors"),
        ({"partition_by": ["v"]}, "partitions"),
    ],
)
def test_what_would_be_misread_is_refused(tmp_path: Path, options: dict[str, Any], what: str) -> None:
    deltalake.write_deltalake(str(tmp_path), rows(1), **options)
    with pytest.raises(UserError, match=f"has {what}, so another program made it"):
        Delta.open(str(tmp_path), SCHEMA).check("nothing")


def test_a_column_that_delta_cannot_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"column h is time64\[us\], which Delta cannot store"):
        Delta.open(str(tmp_path), pa.schema([("h", pa.time64("us"))]))


def test_files_of_others_without_statistics_are_read_and_replaced(table: Delta, tmp_path: Path) -> None:
    put(table, rows(1))
    pa.parquet.write_table(rows(2, 5), Path(table.uri) / "plain.parquet")
    size = (Path(table.uri) / "plain.parquet").stat().st_size
    deltalake.DeltaTable(table.uri).create_write_transaction(
        [AddAction("plain.parquet", size, {}, 0, True, "{}")], "append", deltalake.Schema.from_arrow(SCHEMA)
    )
    assert table.dataset().count_rows(filter=pa.compute.field("v") == 0) == 3
    put(table, rows(5, v=1), Between("t", (Range(4, 6),)))
    assert content(table) == [(1, 0), (2, 0), (5, 1)]
