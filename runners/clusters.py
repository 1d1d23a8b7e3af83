"""Local clusters: an engine as processes of this machine that outlive the command that starts them.

An engine's module (``flink_cluster`` …) says what its members are; here they are started, found again, replaced when
they died, and stopped (``members``). ``up`` may be repeated: it is the supervisor. What runs is told by
``cluster.json`` under ``.clusters/<engine>/`` (or PIPELINES_CLUSTERS), beside the members' logs. Beam is not imported.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import functools
import importlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from pipelines.runners.members import POOL, Died, Member, Running, end, port_of, size, start, wait
from pipelines.transforms.errors import UserError

MODULES = {"flink": "flink_cluster", "spark": "spark_cluster", "prism": "prism_cluster"}
"""The engines, each with the module that knows the members of its cluster."""


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


def folder(engine: str) -> Path:
    """Where an engine's programs and logs are."""
    return Path(os.environ.get("PIPELINES_CLUSTERS", ".clusters"), engine).absolute()


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
            with contextlib.suppress(Died):
                return _up(engine, place, tell, options)


def _up(engine: str, place: Path, tell: Callable[[str], None], given: Mapping[str, str]) -> Cluster:
    before = _read(engine)
    ports = dict(before.ports) if before else {}
    options = {**(before.options if before else {}), **given}
    plan = _module(engine).plan(place, functools.partial(port_of, ports), tell, **options)
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


def _kept(before: Cluster, plan: Plan, tell: Callable[[str], None]) -> list[Running]:
    """What goes on as it is. The others are ended."""
    kept = []
    for one in before.members:
        if before.cwd == os.getcwd() and any(one.runs(member) for member in plan.members):
            kept.append(one)
            continue
        tell(f"{one.name}: {'other than it is to be' if one.process() else 'dead'}, it is started again")
        end([one])
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
            wait(waiting, before)
        started = start(member, place)
        tell(f"{member.name}: started, pid {started.pid}{f', port {member.port}' if member.port else ''}")
        waiting.append((member, started))
        cluster.members.append(started)
        cluster.members.sort(key=lambda one: names.index(one.name))
        _write(cluster, place)
    wait(waiting, before)
    _write(cluster, place)


def down(engine: str) -> bool:
    """Stops all members, with their children. Answers whether there was any."""
    module, place = _module(engine), folder(engine)
    if not place.exists():
        return False
    with locked(place / "lock"):
        cluster = _read(engine)
        if cluster is None:
            return False
        end(cluster.members[::-1])
        module.down(place)
        (place / "cluster.json").unlink()
        return True


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
                "bytes": size(process) if process else 0,
                "port": one.port,
                "log": one.log,
            }
        )
    return told


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
