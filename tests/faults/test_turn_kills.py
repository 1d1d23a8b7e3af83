"""SIGKILLs while turns are written: the last is whole, what was committed stays, and after a sweep nothing is left."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines.io.turns import Turns
from pipelines.transforms.errors import UserError

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("dying_turns.py")
KILLS = 300


def start(*arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-W", "ignore", str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def committed(folder: Path) -> dict[int, dict[str, Any]]:
    """The turns there are, by number, each with files that hold what they should. Reads the files, not by ``Turns``."""
    found = {}
    for path in folder.glob("turn-*.json"):
        shown = json.loads(path.read_bytes())
        assert path.name == f"turn-{shown['number']:010d}.json"
        found[shown["number"]] = shown
    for number in found:
        expected = [f"view-{of}-{part}" for of in (number - 1, number) if of for part in range(3)]
        assert found[number]["files"] == expected and found[number]["facts"] == {"offset": number * 100}
        for name in expected:
            rows = pa.ipc.open_file(folder / f"{name}.arrow").read_all()
            assert rows.to_pydict() == {"name": [name] * 50, "n": list(range(50))}
    return found


def after_sweep(folder: Path) -> None:
    """Two turns, their files, the lock, and nothing else."""
    Turns(str(folder)).sweep()
    turns = committed(folder)
    named = {f"{name}.arrow" for turn in turns.values() for name in turn["files"]}
    assert len(turns) <= 2
    assert {path.name for path in folder.iterdir()} - {"owner.lock"} == named | {
        f"turn-{number:010d}.json" for number in turns
    }


def test_kills_leave_the_last_turn_whole_and_nothing_after_a_sweep(tmp_path: Path) -> None:
    last: Counter[str] = Counter()
    ended: Counter[int] = Counter()
    begun: Counter[int] = Counter()
    with start("killed", tmp_path, 2013, KILLS) as process:
        assert process.stdin and process.stdout
        for kill in range(KILLS):
            told = json.loads(process.stdout.readline())
            folder, where = Path(told["folder"]), f"kill {kill} at {told['point']}"
            said = [int(line) for line in told["said"].splitlines() if not line.startswith("points ")]
            assert said == list(range(last[told["folder"]] + 1, last[told["folder"]] + 1 + len(said))), where
            number = max(committed(folder), default=0)
            promised = last[told["folder"]] + len(said)
            assert number in (promised, promised + 1), f"{where}: {promised} was committed, {number} is there"
            assert (resumed := Turns(str(folder)).last()) is None or resumed.number == number
            if kill % 3 == 0:
                after_sweep(folder)
            last[told["folder"]] = number
            ended[told["signal"]] += 1
            begun[len(said)] += 1
            process.stdin.write("\n")
            process.stdin.flush()
    assert process.returncode == 0
    for folder in {Path(name) for name in last}:
        after_sweep(folder)
    assert ended[9] >= KILLS * 9 // 10
    assert min(begun[0], begun[1], begun[2]) >= KILLS // 10  # in every turn of a process


def test_processes_that_compete_commit_each_turn_once(tmp_path: Path) -> None:
    out, _ = start("competing", tmp_path, 4, 60).communicate()
    mine = [json.loads(line) for line in out.splitlines()]
    assert len(mine) == 4
    assert (done := [number for _, numbers in mine for number in numbers]) and len(set(done)) == len(done)
    shown = [json.loads(path.read_bytes()) for path in sorted(tmp_path.glob("turn-*.json"))]
    assert [turn["number"] for turn in shown] == list(range(1, 61))
    for turn in shown:
        (name,) = turn["files"]
        assert pa.ipc.open_file(tmp_path / f"{name}.arrow").read_all()["name"][0].as_py() == name
    for who, numbers in mine:
        assert set(numbers) <= {turn["number"] for turn in shown if turn["facts"]["who"] == who}


def test_the_second_process_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    with start("owning", tmp_path) as process:
        assert process.stdin and process.stdout
        assert process.stdout.readline() == "mine\n"
        with (
            pytest.raises(UserError, match=f"running as pid {process.pid}; end that first"),
            Turns(str(tmp_path)).own(),
        ):
            raise AssertionError
        process.kill()
    with Turns(str(tmp_path)).own():
        pass
