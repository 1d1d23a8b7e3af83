"""Live runs that are stopped, doubled, overtaken, begun anew or given another log: nothing lost, stale or skipped."""

import dataclasses
import json
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest

from pipelines import Count, Filter, Pipeline, Session, Tumbling, View
from pipelines.io.log import utc_now
from pipelines.io.sqlite import SqliteStore
from pipelines.io.sqlite_log import SqliteLog
from pipelines.io.store import LIVE, open_store
from pipelines.io.turns import Overtaken, Turns
from pipelines.live import SpeedLayer
from pipelines.run import mistake
from pipelines.transforms.errors import UserError
from tests.faults.live_oracle import Live, sale, sales

if TYPE_CHECKING:
    from tests.faults.conftest import Place

pytestmark = pytest.mark.slow

SENSORS = ("run", "--pipeline=sensors", "--mode=micro-batch", "--live=log.db")


def fed(folder: Path, **options: Any) -> Live:
    """A layer that has taken two turns, with a dead letter in each."""
    live = Live(folder, options=options)
    send(live, 0)
    live.turn()
    send(live, 10)
    live.turn()
    return live


def send(live: Live, first: int) -> None:
    """Ten rows of sessions that absorb each other, the least late, with a dead letter."""
    chance = random.Random(first)
    live.send("0", *(sale(first + n, first * 4 + chance.randrange(90), chance.choice("ab")) for n in range(10)), b"{")


def remote() -> str:
    """A folder that nobody can lock."""
    return f"memory://{uuid.uuid4()}/state"


# A process that was taken for dead


def test_a_process_that_was_taken_for_dead_commits_nothing_more(tmp_path: Path) -> None:
    live = fed(tmp_path, state=remote())
    stalled = live.speed
    live.restart()
    send(live, 20)
    live.turn()
    before = live.check().answers
    with pytest.raises(Overtaken, match="another process has committed turn 4; let only one run this pipeline"):
        stalled.turn()
    send(live, 30)
    with pytest.raises(Overtaken):
        stalled.turn()
    live.turn()
    assert live.check().answers != before


@pytest.mark.parametrize(
    ("at", "ahead"),
    [
        ((SqliteLog, "read"), 1),
        ((Turns, "write"), 1),
        ((Turns, "commit"), 3),
        ((SpeedLayer, "deliver"), 1),
        ((SpeedLayer, "deliver"), 3),
    ],
)
def test_whoever_goes_on_while_a_process_stalls_anywhere_in_a_turn_is_exact(
    tmp_path: Path, at: tuple[type, str], ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stalled one goes on where it was, after the other has taken turns; whether it may depends on where."""
    live = fed(tmp_path, state=remote())
    stalled = live.speed
    send(live, 20)
    stalling = threading.current_thread()
    owner, name = at
    whole: Callable[..., Any] = getattr(owner, name)

    def others() -> None:
        live.restart()
        live.speed.deliver()
        for n in range(ahead):
            send(live, 30 + n * 10)
            live.turn()

    def stall(*given: Any, **named: Any) -> Any:
        if threading.current_thread() is stalling:
            monkeypatch.setattr(owner, name, whole)
            other = threading.Thread(target=others)
            other.start()
            other.join()
        return whole(*given, **named)

    monkeypatch.setattr(owner, name, stall)
    fault = faulted(stalled.turn) or faulted(stalled.turn)
    assert fault is None or isinstance(mistake(fault), Overtaken), fault
    live.check()
    send(live, 90)
    live.turn()
    live.check()


def test_no_turn_is_made_of_two_processes_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other begins the same turn with more rows, and stalls too, while the first goes on to its end."""
    live = fed(tmp_path, state=remote())
    first, stalling = live.speed, threading.current_thread()
    send(live, 20)
    begun, over = threading.Event(), threading.Event()
    read, write, faults = SqliteLog.read, Turns.write, []

    def others() -> None:
        live.restart()
        send(live, 30)
        faults.append(faulted(live.speed.turn))
        begun.set()

    other = threading.Thread(target=others)

    def reading(log: SqliteLog, *given: Any, **named: Any) -> pa.Table:
        if threading.current_thread() is stalling and not other.ident:
            other.start()
            begun.wait()
        return read(log, *given, **named)

    def writing(turns: Turns, *given: Any) -> None:
        write(turns, *given)
        if threading.current_thread() is other:
            begun.set()
            over.wait()

    monkeypatch.setattr(SqliteLog, "read", reading)
    monkeypatch.setattr(Turns, "write", writing)
    faults.append(faulted(first.turn))
    over.set()
    other.join()
    assert sum(fault is not None for fault in faults) == 1
    assert all(fault is None or isinstance(mistake(fault), Overtaken) for fault in faults), faults
    send(live, 40)
    live.restart()
    live.speed.deliver()
    live.turn()
    live.check()


def faulted(work: Callable[[], object]) -> Exception | None:
    try:
        work()
    except Exception as error:
        return error
    return None


# Deliveries


def test_deliveries_that_are_repeated_in_any_order_change_nothing_and_give_the_same(tmp_path: Path) -> None:
    live, given = Live(tmp_path), []
    for n in range(6):
        send(live, n * 10)
        live.turn()
        assert live.speed.last
        given += [(live.speed.last.number, *delivered) for delivered in live.speed.delivered()]
    assert {kind for _, kind, *_ in given} == {"answers", "gone", "dead"}
    right = live.check().answers
    chance = random.Random(5)
    for order in range(5):
        chance.shuffle(given)
        with open_store(str(live.deployment.store)) as store, open_store(f"{tmp_path}/{order}.db") as other:
            for view in live.speed.layer.views:
                other.resume(f"sales.{view.plan.name}", view.plan.schema, (*view.plan.by, "window_start"))
            for number, kind, name, rows in given:
                for to in (store, other):
                    if kind == "answers":
                        to.upsert(f"sales.{name}", rows, generation=LIVE, version=number)
                    elif kind == "gone":
                        to.delete(f"sales.{name}", rows, generation=LIVE, version=number)
        assert {view: live.answers(view) for view in right} == right
        live.deployment, there = dataclasses.replace(live.deployment, store=f"{tmp_path}/{order}.db"), live.deployment
        assert {view: live.answers(view) for view in right} == right
        live.deployment = there


# A new beginning


def begun_anew(live: Live, **others: Any) -> None:
    live.deployment = dataclasses.replace(live.deployment, **others)
    live.restart()
    live.turn()


def test_however_many_turns_a_run_takes_it_keeps_the_files_of_two(tmp_path: Path) -> None:
    live = fed(tmp_path)
    for n in range(2, 6):
        send(live, n * 10)
        live.turn()
    turns = live.speed.layer.turns
    last = turns.last()
    assert last is not None
    named = {f"{name}.arrow" for turn in (last, turns.turn(last.number - 1)) for name in turn.files}
    there = {path.name for path in Path(turns.uri).iterdir()}
    assert {name for name in there if name.endswith(".arrow")} == named
    assert len([name for name in there if name.startswith("turn-")]) == 2


def test_rebuild_reads_the_log_again_and_leaves_nothing_of_before(tmp_path: Path) -> None:
    live = fed(tmp_path)
    right = live.check().answers
    begun_anew(live, rebuild=True)
    assert live.check().answers == right
    assert live.speed.last and live.speed.last.number == 5
    begun_anew(live, rebuild=False)
    live.check()


def test_without_its_state_a_run_begins_anew(tmp_path: Path) -> None:
    live = fed(tmp_path)
    shutil.rmtree(tmp_path / "state")
    begun_anew(live)
    live.check()
    assert live.speed.last and live.speed.last.number == 2
    send(live, 20)
    live.turn()
    live.check()


def test_rows_of_the_definition_before_are_gone_after_a_rebuild_that_died_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = fed(tmp_path)
    live.pipeline = dataclasses.replace(live.pipeline, views=live.pipeline.views[1:])
    drop, died = SqliteStore.drop, iter([True, True])

    def dropped(store: SqliteStore, view: str, generation: int) -> None:
        if next(died, False):
            raise InterruptedError
        drop(store, view, generation)

    monkeypatch.setattr(SqliteStore, "drop", dropped)
    live.deployment = dataclasses.replace(live.deployment, rebuild=True)
    for _ in range(2):
        with pytest.raises(InterruptedError):
            live.restart()
    begun_anew(live, rebuild=False)
    with sqlite3.connect(tmp_path / "store.db") as connection:
        assert sorted(connection.execute("SELECT view FROM generations")) == [("sales.sliding",), ("sales.visits",)]
    connection.close()
    assert len(live.letters()) == 2


def test_a_store_that_lacks_what_was_delivered_is_refused_until_a_rebuild(tmp_path: Path) -> None:
    live = fed(tmp_path)
    live.deployment = dataclasses.replace(live.deployment, store=f"{tmp_path}/other.db")
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"other\.db: has no live rows of sales\.minutes, they were given to another"
        ):
            live.restart()
    begun_anew(live, rebuild=True)
    live.check()


# Another definition


def with_views(*views: View) -> Pipeline:
    return dataclasses.replace(sales(), views=(*sales().views[:2], *views))


CHANGES = {
    "disorder": (sales(disorder="2m"), "source"),
    "identity": (sales(identity=("id", "shop")), "source"),
    "lateness": (sales(lateness="1m"), "view minutes"),
    "step": (dataclasses.replace(sales(), steps=(Filter("cents <> 8"),)), "steps"),
    "measure": (with_views(View("visits", by="shop", window=Session("20s"), n=Count())), "view visits"),
    "window": (with_views(View("visits", by="shop", window=Tumbling("20s"), n=Count())), "view visits"),
    "less": (with_views(), "view visits"),
    "more": (with_views(sales().views[2], View("all", n=Count())), "view all"),
}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Live:
    return fed(tmp_path_factory.mktemp("kept"))


@pytest.mark.parametrize("change", CHANGES)
def test_another_definition_is_refused_by_what_is_other(kept: Live, change: str) -> None:
    before = sorted(path.name for path in (kept.folder / "state/sales").iterdir())
    pipeline, named = CHANGES[change]
    kept.pipeline = pipeline
    with pytest.raises(UserError, match=f"its state is of another {named} than this definition's; .*--rebuild"):
        kept.restart()
    kept.pipeline = sales()
    assert sorted(path.name for path in (kept.folder / "state/sales").iterdir()) == before
    kept.restart()
    kept.check()


# Another log


def cut(log: SqliteLog) -> None:
    """Rows that nobody has read are trimmed, and others come."""
    rows(log, 5)
    log.trim(utc_now() + timedelta(days=1))
    rows(log, 5)


def replaced(log: SqliteLog) -> None:
    log.close()
    for path in Path(log.path).parent.glob("log.db*"):
        path.unlink()
    rows(log, 3)


def emptied(log: SqliteLog) -> None:
    replaced(log)
    log.close()
    Path(log.path).unlink()


def rows(log: SqliteLog, n: int) -> None:
    """Readings, a second apart."""
    at = "2024-05-01T12:00"
    told = [{"sensor": "a", "at": f"{at}:{second:02}Z", "sequence": 1, "celsius": 20.5} for second in range(n)]
    log.append({"0": pa.table({"_raw": pa.array([json.dumps(row).encode() for row in told], pa.large_binary())})})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (cut, "offset 20 of partition 0 is gone, the log starts at 25; "),
        (replaced, "offset 20 of partition 0 was never given, the log ends at 3: it is not the log that was read"),
        (emptied, "offset 20 of partition 0 was never given, the log ends at 0: it is not the log that was read"),
    ],
)
def test_a_log_that_lacks_what_was_not_read_is_refused_and_nothing_skipped(
    place: "Place", change: Callable[[SqliteLog], None], said: str
) -> None:
    log = SqliteLog("log.db")
    rows(log, 20)
    run = (*SENSORS, "--until=end")
    assert place.call(*run).code == 0
    before = (place.folder / "data/run.json").read_text()
    change(log)
    for _ in range(2):
        done = place.call(*run)
        assert done.code == 3
        assert done.refusal.startswith(f"log log.db: {said}")
    assert (place.folder / "data/run.json").read_text() == before
    log.close()


# Ctrl-C


def test_ctrl_c_ends_a_run_after_its_commit_and_the_next_goes_on_there(place: "Place") -> None:
    log = SqliteLog("log.db")
    rows(log, 20)
    command = [sys.executable, "-m", "pipelines.run", *SENSORS[1:]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        assert "watermark" in process.stderr.readline()
        second = place.call(*SENSORS)
        assert second.code == 2
        assert second.refusal == f"data/live/sensors: the pipeline is running as pid {process.pid}; end that first"
        rows(log, 30)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate()
    assert process.returncode == 0
    report = place.report()
    (offset,) = report["positions"].values()
    assert f"goes on at partition 0 at {offset}" in out
    last = max((place.folder / "data/live/sensors").glob("turn-*.json"))
    assert json.loads(last.read_text())["facts"]["positions"]["0"]["offset"] == offset
    assert place.call(*SENSORS, "--until=end").code == 0
    assert place.report()["positions"] == {"0": 50}
    assert place.report()["rows"]["kept"] + place.report()["rows"]["duplicate"] == 50
    log.close()
