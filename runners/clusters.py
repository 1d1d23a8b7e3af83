"""Local clusters: an engine as processes of this machine that outlive the command that starts them.

An engine's module (``flink_cluster`` …) says what its members are; here they are started, found again, replaced when
they died, and stopped. ``up`` may be repeated: it is the supervisor. What runs is told by ``cluster.json`` under
``.clusters/<engine>/`` (or PIPELINES_CLUSTERS), beside the members' logs. A process is known by its id and its start,
so none is ever taken for a member that got a member's id later. Beam is not imported for it.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import functools
import importlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import psutil

from pipelines.transforms.errors import UserError

MODULES = {"flink": "flink_cluster", "spark": "spark_cluster", "prism": "prism_cluster"}
"""The engines, each with the module that knows the members of its cluster."""

START, STOP = 120.0, 10.0
"""Seconds that a member may take to be ready, and to end."""

_SOMEBODY = "another process"

_PORTS = range(20_000, 32_000)
"""Where ports are looked for: below those that systems give to outgoing connections, which take a dead member's."""


@dataclasses.dataclass(frozen=True)
class Member:
    """A process to be. env: added to ours. Ready when its log has ``ready`` (a regular expression) and it, or a child
    of it, listens on ``port``. waits: until those before it are ready."""

    name: str
    command: Sequence[str]
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    port: int | None = None
    ready: str | None = None
    waits: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a cluster is to be. endpoint: of its job server, host:port. workers: its worker pool; None: it has none.
    facts: what else there is to know, for ``cluster.json``."""

    members: Sequence[Member]
    endpoint: str
    workers: str | None = None
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Engine(Protocol):
    """What an engine's module offers."""

    def plan(self, folder: Path, port: Callable[[str], int], tell: Callable[[str], None], **options: str) -> Plan:
        """The members, in the order of their start; also writes what they need under ``folder``. port: the port of a
        name, always the same. tell: takes lines for people. options: of ``pipelines cluster up``, where given."""

    def down(self, folder: Path) -> None:
        """Removes what the next cluster must not find; all members have ended."""


@dataclasses.dataclass(frozen=True)
class Running:
    """A member's process. created: when it started, seconds since 1970."""

    name: str
    pid: int
    created: float
    port: int | None
    log: str
    command: list[str]
    env: dict[str, str]

    def process(self) -> psutil.Process | None:
        """The process; None when it is dead, or its id another's by now."""
        with contextlib.suppress(psutil.Error):
            found = psutil.Process(self.pid)
            if abs(found.create_time() - self.created) < 2 and found.status() != psutil.STATUS_ZOMBIE:
                return found
        return None

    def runs(self, member: Member) -> bool:
        """Whether this is that member, alive."""
        same = (self.command, self.env, self.port) == ([*member.command], {**member.env}, member.port)
        return same and self.process() is not None


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A cluster as ``cluster.json`` tells it. cwd: where its workers live, and look for relative paths."""

    engine: str
    started: str
    cwd: str
    endpoint: str
    workers: str | None
    facts: dict[str, Any]
    ports: dict[str, int]
    options: dict[str, str]
    members: list[Running]

    @property
    def flags(self) -> list[str]:
        """What makes Beam use its workers."""
        return ["--environment_type=EXTERNAL", f"--environment_config={self.workers}"] if self.workers else []


POOL = "worker pool"

PRELOAD = "pipelines.graph,pipelines.stream,pipelines.turn"
"""What workers import, so that their pool does, once."""


def workers(port: int) -> Member:
    """A worker pool: of any engine."""
    command = (sys.executable, "-m", "pipelines.runners.worker_pool", f"--port={port}", f"--preload={PRELOAD}")
    return Member(POOL, command, {"OPENBLAS_NUM_THREADS": "1"}, port, "^ready at")


def folder(engine: str) -> Path:
    """Where an engine's programs and logs are."""
    return Path(os.environ.get("PIPELINES_CLUSTERS", ".clusters"), engine).absolute()


def scratch(place: Path, member: str) -> Path:
    """A folder for what a member need not find again: it is empty whenever that starts."""
    return place / "tmp" / member


def found(engine: str) -> Cluster | None:
    """The cluster of an engine, if all of its members are alive.

    Raises UserError where its workers would look for this process's relative paths in another folder, or would not
    have its key.
    """
    cluster = _read(engine)
    if cluster is None or not cluster.members or not all(one.process() for one in cluster.members):
        return None
    if cluster.cwd != os.getcwd():
        raise UserError(
            f"the {engine} cluster of {folder(engine)} was started in {cluster.cwd}, where its workers look for "
            f"relative paths: run from there, or `pipelines cluster down {engine}` and up here"
        )
    key = _key(os.environ)
    for one in cluster.members if key else ():
        process = one.process() if one.name == POOL else None
        if process is not None and (other := _key(process.environ())) != key:
            raise UserError(
                f"the {engine} cluster of {folder(engine)}: its workers have {'another' if other else 'no'} "
                f"PIPELINES_KEY: `pipelines cluster down {engine}`, and up with this one"
            )
    return cluster


def _key(environment: Mapping[str, str]) -> str | None:
    """Names the key of an environment; None where it has none."""
    from pipelines.transforms.protect import Key

    with contextlib.suppress(UserError):
        return Key.load(environment).id
    return None


def up(engine: str, tell: Callable[[str], None] = lambda line: None, **options: str) -> Cluster:
    """Starts what is missing or dead, or is to be another process than it is, and waits until all are ready.

    tell: takes lines for people. options: of the engine; those of the last ``up`` hold until others are given. Raises
    UserError for a member that does not start, and for a port that another process has.
    """
    _module(engine)
    place = folder(engine)
    place.mkdir(parents=True, exist_ok=True)
    with locked(place / "lock"):
        while True:
            with contextlib.suppress(_Died):
                return _up(engine, place, tell, options)


def _up(engine: str, place: Path, tell: Callable[[str], None], given: Mapping[str, str]) -> Cluster:
    before = _read(engine)
    ports = dict(before.ports) if before else {}
    options = {**(before.options if before else {}), **given}
    plan = _module(engine).plan(place, functools.partial(_port, ports), tell, **options)
    cluster = Cluster(
        engine=engine,
        started=before.started if before else datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        cwd=os.getcwd(),
        endpoint=plan.endpoint,
        workers=plan.workers,
        facts=dict(plan.facts),
        ports=ports,
        options=options,
        members=_kept(before, plan, tell) if before else [],
    )
    _fill(cluster, plan, place, tell)
    return cluster


class _Died(Exception):
    """A member that was alive when it was looked at: it had been killed a moment before."""


def _kept(before: Cluster, plan: Plan, tell: Callable[[str], None]) -> list[Running]:
    """What goes on as it is. The others are ended."""
    kept = []
    for one in before.members:
        if before.cwd == os.getcwd() and any(one.runs(member) for member in plan.members):
            kept.append(one)
            continue
        tell(f"{one.name}: {'other than it is to be' if one.process() else 'dead'}, it is started again")
        _end([one])
    return kept


def _fill(cluster: Cluster, plan: Plan, place: Path, tell: Callable[[str], None]) -> None:
    """Starts what lacks; the file tells of each as soon as it runs, so that it can be stopped."""
    names, before = [member.name for member in plan.members], [*cluster.members]
    waiting: list[tuple[Member, Running]] = []
    for member in plan.members:
        if kept := [one for one in cluster.members if one.name == member.name]:
            waiting.append((member, kept[0]))  # of an ``up`` that was interrupted, maybe
            continue
        if member.waits:
            _wait(waiting, before)
        started = _start(member, place)
        tell(f"{member.name}: started, pid {started.pid}{f', port {member.port}' if member.port else ''}")
        waiting.append((member, started))
        cluster.members.append(started)
        cluster.members.sort(key=lambda one: names.index(one.name))
        _write(cluster, place)
    _wait(waiting, before)
    _write(cluster, place)


def _start(member: Member, place: Path) -> Running:
    if member.port is not None and (taken := _freed(member.port)):
        raise UserError(f"port {member.port}, of {member.name}, belongs to {taken}; end it, or take the cluster down")
    log = place / f"{member.name}.log"
    if log.exists():
        log.replace(place / f"{member.name}.before.log")
    shutil.rmtree(scratch(place, member.name), ignore_errors=True)
    scratch(place, member.name).mkdir(parents=True)
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*member.command],
            env={**os.environ, **member.env},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    created = psutil.Process(process.pid).create_time()
    return Running(member.name, process.pid, created, member.port, str(log), [*member.command], {**member.env})


def _wait(waiting: list[tuple[Member, Running]], before: Sequence[Running]) -> None:
    """Until all are ready; then none is waiting. before: those that were not started now. Raises _Died for one."""
    start = time.monotonic()
    while waiting:
        for member, running in list(waiting):
            process = running.process()
            if process is not None and _ready(member, process, Path(running.log)):
                waiting.remove((member, running))
            elif process is None and running in before:
                raise _Died
            elif process is None or time.monotonic() - start > START:
                said = [line for line in Path(running.log).read_text(errors="replace").splitlines() if line[:1].strip()]
                last = said[-1] if said else "it says nothing"
                raise UserError(f"{member.name} does not start: {last} (all of it: {running.log})")
        time.sleep(0.05)


def _ready(member: Member, process: psutil.Process, log: Path) -> bool:
    said = member.ready is None or re.search(member.ready, log.read_text(errors="replace"), re.MULTILINE) is not None
    return said and (member.port is None or member.port in _listening(process))


def _listening(process: psutil.Process) -> set[int]:
    """The ports that a process and its children listen on."""
    ports = set()
    with contextlib.suppress(psutil.NoSuchProcess):
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                ports |= _ports(one)
    return ports


def _ports(process: psutil.Process) -> set[int]:
    found = process.net_connections(kind="tcp")
    return {each.laddr.port for each in found if each.status == psutil.CONN_LISTEN}


def _freed(port: int) -> str:
    """Who has a port: one that nobody is known to have is a dead member's, whose last threads end."""
    end = time.monotonic() + STOP
    while (taken := _taken(port)) == _SOMEBODY and time.monotonic() < end:
        time.sleep(0.05)
    return taken


def _taken(port: int) -> str:
    """Who has a port, for people; nothing where it is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a dead member's connections do not count
        with contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return ""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # gone, or not for us to see
            if port in _ports(process):
                return f"process {process.pid} ({process.name()})"
    return _SOMEBODY


def _port(ports: dict[str, int], name: str) -> int:
    """The port of a name: a free one the first time, then always that."""
    if name not in ports:
        at = int.from_bytes(os.urandom(4), "big") % len(_PORTS)
        free = (port for port in (*_PORTS[at:], *_PORTS[:at]) if port not in ports.values() and not _taken(port))
        ports[name] = next(free)
    return ports[name]


def down(engine: str) -> bool:
    """Stops all members, with their children. Answers whether there was any."""
    module, place = _module(engine), folder(engine)
    if not place.exists():
        return False
    with locked(place / "lock"):
        cluster = _read(engine)
        if cluster is None:
            return False
        _end(cluster.members[::-1])
        module.down(place)
        (place / "cluster.json").unlink()
        return True


def _end(members: Sequence[Running]) -> None:
    """Ends processes and their children: asks first, and kills what has not ended then."""
    every = [process for one in members if (process := one.process())]
    with contextlib.suppress(psutil.NoSuchProcess):
        every += [child for process in list(every) for child in process.children(recursive=True)]
    for process in every:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, left = psutil.wait_procs(every, STOP)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, STOP)
    for one in members:  # a dead member's children are still of its group, whose number nobody else has had since
        if not psutil.pid_exists(one.pid):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(one.pid, 9)


def status(engine: str) -> list[dict[str, Any]]:
    """What there is to tell of each member; nothing where the cluster is down. bytes: with its children."""
    told = []
    for one in cluster.members if (cluster := _read(engine)) else ():
        process = one.process()
        since = datetime.datetime.fromtimestamp(one.created, datetime.UTC).isoformat(timespec="seconds")
        told.append(
            {
                "engine": engine,
                "member": one.name,
                "state": "up" if process else "dead",
                "pid": one.pid,
                "since": since,
                "bytes": _bytes(process) if process else 0,
                "port": one.port,
                "log": one.log,
            }
        )
    return told


def _bytes(process: psutil.Process) -> int:
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                total += one.memory_info().rss
    return total


def _module(engine: str) -> Engine:
    if engine not in MODULES:
        raise UserError(f"{engine}: no cluster of that here; one of {', '.join(MODULES)}")
    return cast(Engine, importlib.import_module(f"pipelines.runners.{MODULES[engine]}"))


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """One process at a time."""
    with file.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def _read(engine: str) -> Cluster | None:
    try:
        told = json.loads((folder(engine) / "cluster.json").read_text())
    except FileNotFoundError:
        return None
    return Cluster(**{**told, "members": [Running(**one) for one in told["members"]]})


def _write(cluster: Cluster, place: Path) -> None:
    new = place / "cluster.new"
    new.write_text(json.dumps(dataclasses.asdict(cluster), indent=2))
    new.replace(place / "cluster.json")
