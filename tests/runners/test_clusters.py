import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from pipelines.runners import clusters, members
from pipelines.runners.clusters import Plan
from pipelines.runners.members import Member
from pipelines.transforms.errors import UserError

pytestmark = pytest.mark.slow

SERVER = """
import os, socket, sys, time
here = socket.create_server(("127.0.0.1", int(sys.argv[1])))
print("ready", flush=True)
time.sleep(600)
"""


class Tiny:
    """An engine of two servers."""

    def __init__(self) -> None:
        self.extra: tuple[str, ...] = ()
        self.server, self.gone = SERVER, False

    def plan(self, folder: Path, port: Callable[[str], int], tell: Callable[[str], None], **options: str) -> Plan:
        told = [options["word"]] if "word" in options else []
        members = [
            Member(
                name,
                (sys.executable, "-ISc", self.server, str(port(name)), *told),
                {"TINY": name},
                port(name),
                "^ready",
            )
            for name in ("first", "second", *self.extra)
        ]
        return Plan(members, f"127.0.0.1:{port('first')}", f"127.0.0.1:{port('second')}", {"rest": port("first")})

    def down(self, folder: Path) -> None:
        self.gone = True


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tiny]:
    monkeypatch.setenv("PIPELINES_CLUSTERS", str(tmp_path))
    monkeypatch.setitem(clusters.MODULES, "tiny", "tiny_cluster")
    engine = Tiny()
    module = SimpleNamespace(plan=engine.plan, down=engine.down)
    monkeypatch.setitem(sys.modules, "pipelines.runners.tiny_cluster", module)
    yield engine
    clusters.down("tiny")


def pids(cluster: clusters.Cluster) -> dict[str, int]:
    return {one.name: one.pid for one in cluster.members}


def test_up_starts_all_and_up_again_changes_nothing(tiny: Tiny, tmp_path: Path) -> None:
    assert clusters.found("tiny") is None
    first = clusters.up("tiny")
    assert clusters.found("tiny") == clusters.up("tiny") == first
    assert first.flags == ["--environment_type=EXTERNAL", f"--environment_config={first.workers}"]
    assert first.facts == {"rest": first.ports["first"]}
    for member in clusters.status("tiny"):
        assert member["state"] == "up" and member["bytes"] > 1_000_000
        assert Path(member["log"]).read_text() == "ready\n"
        socket.create_connection(("127.0.0.1", member["port"])).close()
        assert os.getpgid(member["pid"]) == member["pid"]


def test_a_dead_member_alone_is_replaced_on_its_port(tiny: Tiny) -> None:
    before = clusters.up("tiny")
    os.kill(pids(before)["second"], signal.SIGKILL)
    psutil.wait_procs([psutil.Process(pids(before)["second"])], 10)
    assert clusters.found("tiny") is None
    assert [one["state"] for one in clusters.status("tiny")] == ["up", "dead"]
    said: list[str] = []
    after = clusters.up("tiny", said.append)
    assert pids(after)["first"] == pids(before)["first"]
    assert pids(after)["second"] != pids(before)["second"]
    assert (after.ports, after.started) == (before.ports, before.started)
    assert said[0] == "second: dead, it is started again"
    assert [line.partition(":")[0] for line in said] == ["second", "second"]


def test_a_member_that_is_to_be_another_is_replaced_and_options_hold(tiny: Tiny) -> None:
    before = clusters.up("tiny")
    changed = clusters.up("tiny", word="x")
    assert not set(pids(before).values()) & set(pids(changed).values())
    assert clusters.up("tiny") == changed
    tiny.extra = ("third",)
    more = clusters.up("tiny")
    assert {**pids(more), **pids(changed)} == pids(more) and len(more.members) == 3


def test_a_process_that_got_a_members_id_is_none_of_ours(tiny: Tiny, tmp_path: Path) -> None:
    cluster = clusters.up("tiny")
    file = tmp_path / "tiny" / "cluster.json"
    ours = pids(cluster)["second"]
    told = file.read_text()
    changed = json.loads(told)
    changed["members"][1]["created"] = 1.0
    file.write_text(json.dumps(changed))
    assert clusters.found("tiny") is None
    members.end([clusters._read("tiny").members[1]])  # type: ignore[union-attr]
    os.kill(ours, 0)
    with pytest.raises(UserError, match=rf"port {cluster.ports['second']}, of second, belongs to process {ours} \(py"):
        clusters.up("tiny")
    file.write_text(told)


def test_a_member_that_dies_while_it_is_looked_at_is_replaced(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    before, ready = clusters.up("tiny"), members._ready
    (second,) = (psutil.Process(pid) for name, pid in pids(before).items() if name == "second")

    def look(member: Member, process: psutil.Process, log: Path) -> bool:
        if process == second:
            process.kill()
            process.wait()
            return False
        return ready(member, process, log)

    monkeypatch.setattr(members, "_ready", look)
    after = clusters.up("tiny")
    assert pids(after)["first"] == pids(before)["first"]
    assert pids(after)["second"] != second.pid and clusters.found("tiny") == after


def test_a_dead_members_port_is_waited_for(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    before, asked = clusters.up("tiny"), list[int]()

    def taken(port: int) -> str:
        asked.append(port)
        return members._SOMEBODY if asked.count(port) < 3 else ""

    os.kill(pids(before)["second"], signal.SIGKILL)
    psutil.wait_procs([psutil.Process(pids(before)["second"])], 10)
    monkeypatch.setattr(members, "_taken", taken)
    assert clusters.up("tiny").ports == before.ports
    assert asked == [before.ports["second"]] * 3


def test_a_cluster_of_another_folder_is_not_used(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = clusters.up("tiny")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="relative paths"):
        clusters.found("tiny")
    assert not set(pids(before).values()) & set(pids(clusters.up("tiny")).values())


def test_a_cluster_whose_workers_have_not_the_runs_key_is_not_used(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.extra = (members.POOL,)
    monkeypatch.setenv("PIPELINES_KEY", "00" * 32)
    clusters.up("tiny")
    assert clusters.found("tiny") is not None
    monkeypatch.setenv("PIPELINES_KEY", "11" * 32)
    with pytest.raises(UserError, match="its workers have another PIPELINES_KEY: `pipelines cluster down tiny`"):
        clusters.found("tiny")
    monkeypatch.delenv("PIPELINES_KEY")
    assert clusters.found("tiny") is not None
    clusters.down("tiny")
    clusters.up("tiny")
    monkeypatch.setenv("PIPELINES_KEY", "11" * 32)
    with pytest.raises(UserError, match="its workers have no PIPELINES_KEY"):
        clusters.found("tiny")


def test_what_does_not_start_is_told_with_its_log_and_can_be_stopped(tiny: Tiny) -> None:
    tiny.server = SERVER.replace("time.sleep", "sys.exit('no memory'); time.sleep")
    with pytest.raises(UserError, match=r"does not start: no memory .*first\.log"):
        clusters.up("tiny")
    assert clusters.down("tiny")
    assert clusters.status("tiny") == []


def test_down_ends_members_and_their_children(tiny: Tiny) -> None:
    tiny.server = "import subprocess; child = subprocess.Popen(['sleep', '600'])\n" + SERVER
    cluster = clusters.up("tiny")
    every = [
        process for pid in pids(cluster).values() for process in [psutil.Process(pid), *psutil.Process(pid).children()]
    ]
    assert len(every) == 4
    orphan = every[3]
    os.kill(pids(cluster)["second"], signal.SIGKILL)  # its child is left
    psutil.wait_procs([every[2]], 10)
    assert orphan.is_running()
    assert clusters.down("tiny")
    assert tiny.gone
    _, alive = psutil.wait_procs(every, 10)
    assert not alive
    assert not clusters.down("tiny")


def test_an_engine_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match="storm: no cluster of that here; one of flink, spark, prism"):
        clusters.up("storm")
