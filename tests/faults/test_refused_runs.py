"""Runs that are refused, or that find no space: exit 2 or 3 and one line, and readers stay on the old answer."""

import dataclasses
import itertools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest

from pipelines.io import sqlite_file
from pipelines.transforms.buckets import split
from pipelines.transforms.identity import deduplicate

if TYPE_CHECKING:
    from tests.faults.conftest import Place

pytestmark = pytest.mark.slow

HEADER = "sensor,at,celsius,count,price,code\n"
OLD = "".join(f"old {n},2024-01-0{n}T00:10:00Z,10,{n},1.5,1\n" for n in (1, 2, 3))
NEW = "".join(f"new {n},2024-01-0{n}T00:10:00Z,10,{n},1.5,1\n" for n in (1, 2, 3))
BAD = "bad,yesterday,1,1,1,1\n"
IDENTITY = "--set=identity=true"


@pytest.fixture
def standing(place: "Place") -> "Place":
    """A place where readers have an answer, and where rows.csv says something new."""
    place.write("rows.csv", HEADER + OLD)
    place.done("readings", "rows.csv", IDENTITY)
    place.write("rows.csv", HEADER + NEW + BAD)
    return place


@pytest.fixture
def same(standing: "Place") -> Iterator[Callable[[], None]]:
    """Checks that readers still have the old answer; and at the end that a run then makes it the new one."""
    before = standing.answers("readings", "by_sensor")

    def check() -> None:
        assert standing.answers("readings", "by_sensor") == before

    yield check
    report = standing.done("readings", "rows.csv", IDENTITY)
    assert report["rows"]["kept"] == 3
    letters, events, view, stored = standing.answers("readings", "by_sensor")
    assert [letter["payload"] for letter in letters] == [BAD.strip().encode()]
    for rows in (events, view, stored):
        assert [row["sensor"] for row in rows] == ["new 1", "new 2", "new 3"]


def test_past_max_rejected_nothing_is_committed(standing: "Place", same: Callable[[], None]) -> None:
    done = standing.run("readings", "rows.csv", IDENTITY, "--max_rejected=0.24")
    assert done.code == 3
    assert done.refusal == (
        "readings: 1 of 4 rows were rejected (25.00%), more than --max_rejected=0.24; nothing was committed. "
        "Most: invalid datetime in at 1"
    )
    same()
    assert standing.run("readings", "rows.csv", IDENTITY, "--max_rejected=0.25").code == 0


def test_a_part_that_loses_a_row_is_found_out(
    standing: "Place", same: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lossy(*arguments: Any) -> Any:
        found = deduplicate(*arguments)
        return dataclasses.replace(found, rows=found.rows.slice(1))

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.transforms.dedupe.deduplicate", lossy)
        done = standing.run("readings", "rows.csv", IDENTITY)
    assert done.code == 3
    assert done.refusal == (
        "readings: the law of conservation is broken, nothing was committed: "
        "read 4 = kept 2 + filtered 0 + rejected 1 + late 0 + duplicate 0 is off by 1: rows were lost"
    )
    same()


def test_a_view_that_counts_a_row_twice_is_found_out(
    standing: "Place", same: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(states: pa.Table, *arguments: Any) -> Any:
        return split(pa.concat_tables([states, states.slice(0, 1)]), *arguments)

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.transforms.aggregate.split", twice)
        done = standing.run("readings", "rows.csv", IDENTITY)
    assert done.code == 3
    assert done.refusal.endswith("view by_sensor: rows in 3 = rows out 4 is off by 1: rows were counted twice")
    same()


# No space


def full(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """The device that is always full in the place of the files of some part."""
    if what == "spill":
        monkeypatch.setattr(
            "pipelines.transforms.spill.tempfile.mkstemp", lambda **_: (os.open("/dev/full", os.O_WRONLY), "full")
        )
    elif what == "store":
        monkeypatch.setattr(sqlite_file, "_SETTINGS", (*sqlite_file._SETTINGS, "max_page_count = 1"))
    else:
        opened = pa.OSFile
        monkeypatch.setattr("pipelines.io.parquet.pa.OSFile", lambda _, mode: opened("/dev/full", mode))


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("spill", "No space left on device; free some space there, or set another TMPDIR"),
        ("store", "store data/store.db: no space left; free some and run again"),
        ("stage", "no space left on the disk; free some or name another place, and run again"),
    ],
)
def test_a_full_disk_is_told_and_costs_nothing(
    standing: "Place", same: Callable[[], None], monkeypatch: pytest.MonkeyPatch, what: str, told: str
) -> None:
    with monkeypatch.context() as patch:
        full(patch, what)
        done = standing.run("readings", "rows.csv", IDENTITY)
    assert done.code == 2
    assert told in done.refusal
    same()
    assert not list(standing.folder.glob("data/**/.part-*"))


def test_a_report_that_finds_no_space_is_told_and_the_run_is_done(standing: "Place") -> None:
    (standing.folder / "data/run.json").unlink()
    (standing.folder / "data/run.json").symlink_to("/dev/full")
    done = standing.run("readings", "rows.csv", IDENTITY)
    assert done.code == 2
    assert done.refusal == (
        "--report=data/run.json: the run is done and committed, but this cannot be written: "
        "[Errno 28] No space left on device"
    )
    assert [row["sensor"] for row in standing.rows("readings", "by_sensor")] == ["new 1", "new 2", "new 3"]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of 3 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("no right to mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize("store", ["store.db", "none"])
def test_wherever_a_disk_gets_full_readers_have_one_whole_answer(place: "Place", small: Path, store: str) -> None:
    """From no space left on: each run has a little more, until one has enough."""
    place.write("rows.csv", HEADER + OLD)
    (place.folder / "data").symlink_to(small)
    flags = (IDENTITY, f"--store={store if store == 'none' else f'data/{store}'}", "--report=run.json")
    views = ("by_sensor",) if store != "none" else ()
    assert place.run("readings", "rows.csv", *flags).code == 0
    before = place.answers("readings", *views), place.rows("readings", "by_sensor")
    place.write("rows.csv", HEADER + NEW + BAD)
    told = set()
    for left in itertools.count(0, 4096 if store == "none" else 5 * 4096):
        with (small / "filler").open("wb") as filler:
            filler.write(bytes(max(0, shutil.disk_usage(small).free - left)))
        done = place.run("readings", "rows.csv", *flags)
        (small / "filler").unlink()
        if done.code == 0:
            break
        assert done.code == 2
        told.add(done.refusal)
        seen = place.answers("readings", *views), place.rows("readings", "by_sensor")
        for now, old in zip([*seen[0][1:], seen[1]], [*before[0][1:], before[1]], strict=True):
            assert now == old or [row["sensor"] for row in now] == ["new 1", "new 2", "new 3"]
    first = "store data/store.db" if views else "table data/dead_letters/readings"
    assert {line.partition(":")[0] for line in told} >= {first}
    for rows in (*place.answers("readings", *views)[1:], place.rows("readings", "by_sensor")):
        assert [row["sensor"] for row in rows] == ["new 1", "new 2", "new 3"]


# Ranges


def test_the_same_range_again_refuses_nothing_twice(standing: "Place") -> None:
    second = ("--from=2024-01-02", "--to=2024-01-03")
    for _ in range(2):
        report = standing.done("readings", "rows.csv", IDENTITY, *second)
        assert report["rows"]["rejected"] == 1
        assert [letter["payload"] for letter in standing.letters("readings")] == [BAD.strip().encode()]
    sensors = [row["sensor"] for row in standing.rows("readings", "by_sensor")]
    assert sensors == ["new 2", "old 1", "old 3"]


def test_what_a_range_refuses_is_added_to_what_others_did(standing: "Place") -> None:
    more = BAD.replace("bad", "more")
    standing.done("readings", "rows.csv", IDENTITY, "--from=2024-01-02", "--to=2024-01-03")
    standing.write("rows-2.csv", HEADER + BAD + more)
    standing.write("rows.csv", HEADER + NEW + more + BAD)  # other bytes where the old letter stood: another letter
    standing.done("readings", "*.csv", IDENTITY, "--from=2024-01-03")
    found = [(letter["source"], letter["payload"].decode() + "\n") for letter in standing.letters("readings")]
    assert sorted(found) == sorted(
        [("rows-2.csv", BAD), ("rows-2.csv", more), ("rows.csv", BAD), ("rows.csv", more), ("rows.csv", BAD)]
    )
