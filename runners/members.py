"""The processes of local clusters: started, waited for, found again, and stopped. Beam is not imported for it.

A process is known by its id and its start, so none is ever taken for a member that got a member's id later.
"""

import contextlib
import dataclasses
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from pipelines.transforms.errors import UserError

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


POOL = "worker pool"

PRELOAD = "pipelines.graph,pipelines.stream,pipelines.turn"
"""What workers import, so that their pool does, once."""


def workers(port: int) -> Member:
    """A worker pool: of any engine."""
    command = (sys.executable, "-m", "pipelines.runners.worker_pool", f"--port={port}", f"--preload={PRELOAD}")
    return Member(POOL, command, {"OPENBLAS_NUM_THREADS": "1"}, port, "^ready at")


def scratch(place: Path, member: str) -> Path:
    """A folder for what a member need not find again: it is empty whenever that starts."""
    return place / "tmp" / member


class Died(Exception):
    """A member that was alive when it was looked at: it had been killed a moment before."""


def start(member: Member, place: Path) -> Running:
    """Starts a process of its own session, its log under ``place``. Raises UserError for a port that another has."""
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


def wait(waiting: list[tuple[Member, Running]], before: Sequence[Running]) -> None:
    """Until all are ready; then none is waiting. before: those that were not started now. Raises Died for one."""
    start = time.monotonic()
    while waiting:
        for member, running in list(waiting):
            process = running.process()
            if process is not None and _ready(member, process, Path(running.log)):
                waiting.remove((member, running))
            elif process is None and running in before:
                raise Died
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


def port_of(ports: dict[str, int], name: str) -> int:
    """The port of a name: a free one the first time, then always that."""
    if name not in ports:
        at = int.from_bytes(os.urandom(4), "big") % len(_PORTS)
        free = (port for port in (*_PORTS[at:], *_PORTS[:at]) if port not in ports.values() and not _taken(port))
        ports[name] = next(free)
    return ports[name]


def end(members: Sequence[Running]) -> None:
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


def size(process: psutil.Process) -> int:
    """Bytes of resident memory, with the children's."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                total += one.memory_info().rss
    return total
