"""SIGKILLs of a live run in every phase of its turns, while its log grows: what it gives is what a whole run gives.

``LIVE_KILLS=200`` in the environment kills that often, at least once in each of the phases; by default it is 20 times.
"""

import json
import math
import os
import sqlite3
import statistics
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest

from pipelines.io.log import open_log
from pipelines.io.store import LIVE, open_store
from pipelines.io.table import open_table
from pipelines.transforms.conservation import TALLY, Conservation
from tests.faults.histories import NAMES

KILLS = int(os.environ.get("LIVE_KILLS", "20"))
ROOT = Path(__file__).parent.parent.parent

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300 + 15 * KILLS)]

Versions = dict[tuple[Any, ...], int]


def start(*arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-W", "ignore", "-m", "tests.faults.dying_live", *map(str, arguments)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PIPELINES_KEY": "5e" * 32},
    )


def turns(folder: Path) -> dict[int, dict[str, Any]]:
    """Those that are there. Reads the files, not by ``Turns``."""
    return {int(path.stem[5:]): json.loads(path.read_bytes()) for path in (folder / "state").glob("*/turn-*.json")}


def versions(folder: Path) -> Versions:
    """Of every live row of the store, deleted ones too. Reads the file, not by ``Store``."""
    found: Versions = {}
    if not (folder / "store.db").exists():
        return found
    with sqlite3.connect(folder / "store.db") as connection:
        for view in views(folder):
            rows = connection.execute(f'SELECT * FROM "{view}#{LIVE}"')
            names = [column[0] for column in rows.description]
            keys = names[: names.index("window_start") + 1]
            at = names.index("_version")
            found |= {(view, *row[: len(keys)]): row[at] for row in rows}
    connection.close()
    return found


def views(folder: Path) -> list[str]:
    """The views with live rows."""
    with sqlite3.connect(folder / "store.db") as connection:
        tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        asked = "SELECT view FROM generations WHERE generation = ?"
        found = connection.execute(asked, (LIVE,)).fetchall() if "generations" in tables else []
    connection.close()
    return sorted(view for (view,) in found)


def gone(folder: Path) -> int:
    """Sessions that others have absorbed."""
    with sqlite3.connect(folder / "store.db") as connection:
        asked = "SELECT sum(_deleted) FROM "
        found = sum(connection.execute(f'{asked} "{view}#{LIVE}"').fetchone()[0] for view in views(folder))
    connection.close()
    return int(found)


def answers(folder: Path, view: str, generation: int | None = LIVE) -> dict[tuple[Any, ...], dict[str, Any]]:
    """A view's rows by key, without states."""
    with open_store(f"{folder}/store.db") as store:
        rows = store.scan(view, generation=generation)
    shown = [name for name in rows.column_names if not name.startswith("_") or name == "_rows"]
    keys = shown[: shown.index("window_start") + 1]
    return {tuple(row[key] for key in keys): row for row in rows.select(shown).to_pylist()}


def same(found: dict[tuple[Any, ...], dict[str, Any]], right: dict[tuple[Any, ...], dict[str, Any]]) -> list[str]:
    """What differs. Floats may in the last digits: a deviation's depend on the order of its rows."""
    told = [f"{key}: {found.get(key)} not {right.get(key)}" for key in found.keys() ^ right.keys()]
    for key in found.keys() & right.keys():
        for name, value in right[key].items():
            near = isinstance(value, float) and math.isclose(value, found[key][name] or 0, rel_tol=1e-9, abs_tol=1e-9)
            if found[key][name] != value and not near:
                told.append(f"{key} {name}: {found[key][name]} not {value}")
    return told[:5]


def letters(folder: Path) -> list[tuple[Any, ...]]:
    (table,) = (folder / "dead").glob("*.live")
    rows = open_table(str(table)).dataset().to_table().to_pylist()
    return sorted(tuple(map(str, row.values())) for row in rows)


def leftovers(folder: Path) -> list[str]:
    """Files that nothing names."""
    (state,) = (folder / "state").iterdir()
    there = turns(folder)
    named = {f"{file}.arrow" for turn in there.values() for file in turn["files"]} | {"owner.lock", "next.json"}
    found = [path.name for path in state.iterdir() if path.name not in named and not path.name.startswith("turn-")]
    (dead,) = (folder / "dead").glob("*.live")
    kept = {Path(name).name for name in open_table(str(dead)).files()}
    return found + [path.name for path in dead.iterdir() if path.is_file() and path.name not in kept]


def whole(folder: Path) -> Conservation:
    """Everything is exactly what a run makes of the log that nobody killed."""
    last, right = turns(folder), turns(folder / "whole")
    assert max(right) == 2, "one turn after the first, empty one"
    assert max(last) > 3
    counted, expected = (
        {(row["part"], row["counter"], row["reason"]): row["n"] for row in there[max(there)]["facts"]["tallies"]}
        for there in (last, right)
    )
    assert {key: n for key, n in counted.items() if key[1] != "results"} == {
        key: n for key, n in expected.items() if key[1] != "results"
    }
    conservation = Conservation.of(pa.Table.from_pylist(last[max(last)]["facts"]["tallies"], TALLY))
    assert conservation.violations() == []
    with open_log(f"{folder}/log.db") as log:
        assert conservation.rows["read"] == sum(bound.end - bound.start for bound in log.bounds().values())
    assert views(folder) == views(folder / "whole")
    for view in views(folder):
        assert answers(folder, view)
        assert same(answers(folder, view), answers(folder / "whole", view)) == [], view
    assert letters(folder) == letters(folder / "whole")
    assert letters(folder)
    assert leftovers(folder) == []
    return conservation


def as_batch(folder: Path) -> None:
    """No row is late, so a batch run over the same rows has the same answers."""
    for view in views(folder):
        assert same(answers(folder, view), answers(folder / "whole", view, None)) == [], view


def flights(folder: Path) -> dict[tuple[Any, ...], int]:
    """The flights of an hour, by DuckDB alone."""
    told = [line.decode() for line in (folder / "history.jsonl").read_bytes().splitlines() if is_flight(line)]
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        connection.register("lines", pa.table({"line": told}))
        cells = "row->>'origin' AS origin, row->>'carrier' AS carrier, (row->>'time_hour')::TIMESTAMPTZ AS hour"
        fine = "origin IN ('EWR', 'JFK', 'LGA') AND coalesce((row->>'distance')::INT * 60 / air < 600, true)"
        lines = "SELECT DISTINCT line::JSON AS row FROM lines"
        rows = f"SELECT {cells}, nullif((row->>'air_time')::INT, 0) AS air, row FROM ({lines})"
        found = connection.sql(f"SELECT origin, carrier, hour, count(*) FROM ({rows}) WHERE {fine} GROUP BY ALL")
        counts = found.fetchall()
    return {tuple(row[:3]): row[3] for row in counts}


def is_flight(line: bytes) -> bool:
    """Whether a message is a flight."""
    try:
        return isinstance(flight := json.loads(line), dict) and isinstance(flight["time_hour"], str)
    except (ValueError, KeyError):
        return False


def test_after_kills_in_every_phase_the_store_holds_what_a_whole_run_and_batch_give(tmp_path: Path) -> None:
    last: Counter[str] = Counter()
    held: dict[str, Versions] = defaultdict(dict)
    killed: Counter[str] = Counter()
    recoveries: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    done = []
    with start("killed", tmp_path, 2013, KILLS) as process:
        assert process.stdin and process.stdout
        for line in process.stdout:
            told = json.loads(line)
            if "done" in told:
                done.append(told["done"])
            else:
                name, where = told["name"], f"{told['name']}, {told['point']}"
                assert told["signal"] == 9 or (told["signal"], told["code"]) == (0, 0), f"{where}: {told['said']}"
                assert told["turns"] == list(range(last[name] + 1, last[name] + 1 + len(told["turns"]))), where
                promised = last[name] + len(told["turns"])
                last[name] = max(turns(tmp_path / name), default=0)
                assert last[name] in (promised, promised + 1), f"{where}: {promised} was committed"
                now = versions(tmp_path / name)
                assert {key for key, version in held[name].items() if now.get(key, -1) < version} == set(), where
                assert max(now.values(), default=0) <= last[name], where
                held[name] = now
                killed[told["phase"]] += told["signal"] == 9
                if told["recovery"] and told["turns"][0] > 1:  # the first turn only says that there is one
                    recoveries[told["fresh"]].append(told["recovery"])
            process.stdin.write("\n")
            process.stdin.flush()
    assert process.returncode == 0
    assert done == [*NAMES]
    counts = {name: whole(tmp_path / name) for name in done}
    for name in ("flights", "sales"):
        assert counts[name].rows["late"] == 0
        as_batch(tmp_path / name)
    assert counts["calls"].rows["late"] > 0 and counts["sensors"].rows["late"] > 0
    hours = answers(tmp_path / "flights", "flights.delays_by_carrier")
    assert {key: row["flights"] for key, row in hours.items()} == flights(tmp_path / "flights")
    assert gone(tmp_path / "sales") and gone(tmp_path / "sensors")
    assert killed.total() == KILLS
    assert KILLS < 200 or len(+killed) == 11
    recovered(killed, recoveries)


def recovered(killed: Counter[str], recoveries: dict[bool, list[tuple[float, float]]]) -> None:
    """Within ten seconds, of CPU: others may use this machine too."""
    print(f"{killed.total()} kills: {dict(+killed)}")
    for fresh, found in recoveries.items():
        for what, seconds in zip(("wall", "CPU"), zip(*found, strict=True), strict=False):
            told = f"median {statistics.median(seconds):.2f} s, max {max(seconds):.2f} s of {len(seconds)}"
            print(f"to the first commit of {'a new process' if fresh else 'a fork'}, {what}: {told}")
        assert all(cpu < 10 for _, cpu in found)
