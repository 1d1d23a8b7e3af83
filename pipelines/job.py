"""The job of a stream, as ``<state>/<pipeline>/job.json`` tells it: how it is found again, and what it may resume.

A stream that begins anew has an epoch of its own, and keeps what it can be resumed from in ``flink/<epoch>`` beside the
file. So what an earlier epoch has left is never taken for it, wherever a process dies. Beam-free.
"""

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa

from pipelines.io.exclusive import folder
from pipelines.options import masked
from pipelines.runners import clusters, flink_jobs
from pipelines.transforms.errors import UserError

FILE = "job.json"
FACTS = "stream.json"
"""Beside it: what the stream has counted, and how far it is."""

STATE = 1
"""Of what a stream keeps: another number, another layout, and nothing is resumed."""


@dataclasses.dataclass(frozen=True)
class Job:
    """runner: of --runner. name: of the job at its engine, and id there; rest: where that is asked, all once it runs.
    command: flags of ``pipelines run``, secrets masked; cwd: where it ran. fingerprint: of the definition, by part.
    epoch: what versions in the store begin with. first: the offset of each partition at which it began. until: when it
    is to end: at an offset of each partition, or at a time. anew: views whose rows of before had to go. started: ISO
    8601. ended: why it cannot be resumed, if so. at: what else its engine must be told to find it."""

    pipeline: str
    runner: str
    fingerprint: dict[str, str]
    epoch: int
    first: dict[str, int]
    anew: list[str]
    started: str
    until: dict[str, int] | str | None = None
    name: str = ""
    command: list[str] = dataclasses.field(default_factory=list)
    cwd: str = ""
    id: str | None = None
    rest: str | None = None
    ended: str | None = None
    at: dict[str, str] = dataclasses.field(default_factory=dict)

    def state(self) -> str:
        """What its engine calls it; "gone" where no engine knows it any more."""
        found = self.found()
        return "gone" if found is None else found[0].state(found[1]) or "gone"

    @property
    def lives(self) -> bool:
        """Whether it may still write."""
        return self.state() in flink_jobs.LIVING

    def found(self) -> tuple[flink_jobs.Rest, str] | None:
        """The engine that knows it, where it was submitted or as the cluster of this machine, and its id there. A
        process that died as it submitted it knew its name alone."""
        for url in dict.fromkeys((self.rest, _cluster() if self.runner == "FlinkRunner" else None)):
            with contextlib.suppress(UserError):
                rest = flink_jobs.Rest(url or "")
                if url and (id := self.id or rest.named(self.name)) and rest.state(id) is not None:
                    return rest, id
        return None

    def kept(self, place: str) -> str:
        """Where it keeps what it can be resumed from. place: ``<state>/<pipeline>``."""
        return f"{place}/flink/{self.epoch}"

    def drain(self, place: str) -> str:
        """The file that ends its input."""
        return f"{place}/drain-{self.epoch}"

    def newest(self, place: str) -> str | None:
        """What it would be resumed from."""
        return flink_jobs.newest(self.kept(place))

    def refuse_other(self, place: str, now: Mapping[str, str]) -> None:
        """Raises UserError where its state is of another definition."""
        for part in {**self.fingerprint, **now}:
            if self.fingerprint.get(part) != now.get(part):
                raise UserError(
                    f"{place}: its state is of another {part} than this run's; start it again with --rebuild, "
                    "which reads the log from its first offset"
                )


def _cluster() -> str | None:
    """Where the Flink of this machine's cluster is asked."""
    with contextlib.suppress(UserError):
        cluster = clusters.found("flink")
        return None if cluster is None else cluster.facts.get("rest")
    return None


def read(place: str) -> Job | None:
    """The job of a folder ``<state>/<pipeline>``; None where none ever ran. Raises UserError for a damaged file."""
    try:
        told = json.loads(folder(place).read(FILE).to_pybytes())
        return Job(**told)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError(f"{place}/{FILE}: damaged ({error}); remove {place} to start anew from the log") from None


def write(place: str, job: Job) -> None:
    """Makes it the job of the folder."""
    told = json.dumps(dataclasses.asdict(job), indent=1, ensure_ascii=False)
    folder(place).write(FILE, pa.py_buffer(told.encode()))


def forget(uri: str) -> None:
    """Removes a file, or a folder, if it is there."""
    files, path = fsspec.url_to_fs(uri)
    if files.exists(path):
        files.rm(path, recursive=True)


def remove(place: str) -> None:
    """Removes a stream that has ended: all that it kept, its job last."""
    for name in ("flink", FACTS, FILE):
        forget(f"{place}/{name}")


def sweep(place: str, job: Job) -> None:
    """Removes what earlier epochs have left, and of this one all but what it would be resumed from."""
    files, path = fsspec.url_to_fs(job.kept(place))
    last = job.newest(place)
    keep = None if last is None else files._strip_protocol(last)
    for found in files.ls(files._parent(path), detail=False) if files.exists(files._parent(path)) else []:
        if found != path:
            files.rm(found, recursive=True)
    if keep is not None:
        for found in files.ls(path, detail=False):
            if not keep.startswith(f"{found}/"):
                files.rm(found, recursive=True)


def command(argv: list[str]) -> list[str]:
    """The flags of the run that a process was started as, but --rebuild, secrets masked; none where it is no run.

    >>> command(["/venv/bin/pipelines", "run", "--store=redis://me:secret@host"])
    ['--store=redis://me:***@host']
    """
    program = Path(argv[0]).stem if argv else ""
    if program == "run":
        given = argv[1:]
    elif program in ("pipelines", "__main__") and argv[1:2] == ["run"]:
        given = argv[2:]
    else:
        return []
    return [masked(flag) for flag in given if flag != "--rebuild"]


def places(state: str) -> dict[str, str]:
    """The folders of all jobs under --state, by pipeline."""
    files, path = fsspec.url_to_fs(state)
    found: list[Any] = sorted(files.glob(f"{path}/*/{FILE}"))
    return {Path(name).parent.name: f"{state.rstrip('/')}/{Path(name).parent.name}" for name in found}
