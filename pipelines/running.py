"""Streams that run on an engine: found by ``<state>/<pipeline>/job.json``, asked about at their engine. Beam-free."""

import dataclasses
import time
from typing import Any, Protocol

import fsspec

from pipelines import drift, job
from pipelines.arguments import near
from pipelines.job import Job
from pipelines.runners import dataflow_jobs, flink_jobs
from pipelines.transforms.errors import UserError

ENDS = 60.0
"""Seconds that a job may take to end."""

GRACE = 5.0
"""Seconds in which the run that has started a job ends it, once its input is over."""

LOOK = 0.2


class Engine(Protocol):
    """A job as its engine is asked about it."""

    @property
    def id(self) -> str: ...

    def state(self) -> str: ...

    @property
    def lives(self) -> bool: ...

    def details(self) -> dict[str, Any]:
        """What there is to tell besides."""

    def stop(self, how: str) -> str | None:
        """how: "savepoint", "drain" or "now". Answers what it can be resumed from, as far as it is known."""

    def savepoint(self) -> str:
        """Takes one while it goes on; answers where it is."""


@dataclasses.dataclass(frozen=True)
class OnFlink:
    """A job on Flink. place: ``<state>/<pipeline>``."""

    rest: flink_jobs.Rest
    id: str
    job: Job
    place: str

    @property
    def folder(self) -> str:
        """Where its savepoints go."""
        return flink_jobs.location(f"{self.job.kept(self.place)}/savepoints")

    def state(self) -> str:
        return self.rest.state(self.id) or "gone"

    @property
    def lives(self) -> bool:
        try:
            return self.state() in flink_jobs.LIVING
        except flink_jobs.Unreachable:  # a Flink of one job ends with it
            return False

    def details(self) -> dict[str, Any]:
        told = self.rest.checkpoints(self.id)
        latest = (told.get("latest") or {}).get("completed") or {}
        failure = self.rest.failure(self.id)
        return {
            "at": f"{self.rest.url}/jobs/{self.id}",
            "checkpoints": (told.get("counts") or {}).get("completed"),
            "checkpoint bytes": latest.get("state_size"),
            "checkpoint ms": latest.get("end_to_end_duration"),
            "last failure": failure.splitlines()[0] if failure else None,
        }

    def stop(self, how: str) -> str | None:
        last = None
        if how == "now":
            self.rest.cancel(self.id)
        elif how == "drain":
            self._drain()
        else:
            last = self.rest.stop(self.id, self.folder)
        end = time.monotonic() + ENDS
        while self.lives and time.monotonic() < end:
            time.sleep(LOOK)
        return last

    def _drain(self) -> None:
        """Ends its input, waits until all of it is answered, and then ends the job, if the run that started it does
        not. Raises UserError where that takes too long: then it goes on."""
        with fsspec.open(self.job.drain(self.place), "wt") as file:
            file.write("")
        end = time.monotonic() + flink_jobs.PATIENCE
        while not drift.facts(f"{self.place}/{job.FACTS}").ended:
            if time.monotonic() > end or not self.lives:
                files, path = fsspec.url_to_fs(self.job.drain(self.place))
                files.rm(path)
                raise UserError(
                    f"{self.job.pipeline}: not drained within {flink_jobs.PATIENCE:.0f} s; stop it otherwise"
                )
            time.sleep(LOOK)
        end = time.monotonic() + GRACE
        while self.lives:
            if time.monotonic() > end:
                self.rest.stop(self.id, self.folder)
            time.sleep(LOOK)

    def savepoint(self) -> str:
        return self.rest.savepoint(self.id, self.folder)


@dataclasses.dataclass(frozen=True)
class OnDataflow:
    """A job on Dataflow."""

    region: dataflow_jobs.Region
    id: str

    def state(self) -> str:
        return self.region.job(self.id).state

    @property
    def lives(self) -> bool:
        return self.region.job(self.id).lives

    def details(self) -> dict[str, Any]:
        return {"at": self.region.job(self.id).console, "last failure": self.region.failure(self.id)}

    def stop(self, how: str) -> str | None:
        if how == "savepoint":
            raise UserError(f"job {self.id}: Dataflow takes no savepoint; stop it with --drain, or --now")
        if how == "drain":
            self.region.drain(self.id)
        else:
            self.region.stop(self.id)
        return None

    def savepoint(self) -> str:
        raise UserError(f"job {self.id}: Dataflow takes no savepoint that a run could go on from")


def found(pipeline: str, state: str) -> tuple[str, Job]:
    """A stream's folder, and its job. Raises UserError where there is none."""
    places = job.places(state)
    if pipeline not in places:
        raise UserError(f"no stream {pipeline!r} has run with --state={state}.{near(pipeline, [*places])}")
    read = job.read(places[pipeline])
    assert read is not None
    return places[pipeline], read


def living(pipeline: str, state: str) -> tuple[str, Job, Engine]:
    """As ``found``, and its engine. Raises UserError where it does not run."""
    place, read = found(pipeline, state)
    at = engine(read, place)
    if at is None or not at.lives:
        raise UserError(f"{pipeline}: does not run; the next run goes on from {_next(read, place)}")
    return place, read, at


def engine(of: Job, place: str) -> Engine | None:
    """Who is asked about a job; None where nobody knows it any more."""
    if of.runner == "DataflowRunner" and of.id:
        return OnDataflow(dataflow_jobs.Region(**of.at), of.id)
    at = of.found()
    return None if at is None else OnFlink(*at, of, place)


def refuse(of: Job, place: str) -> None:
    """Raises UserError where a job still runs: two of it would write the same answers."""
    if (at := engine(of, place)) is not None and at.lives:
        raise UserError(
            f"{of.pipeline}: already runs as job {at.id}; see `pipelines jobs show {of.pipeline}`, or end it with "
            f"`pipelines jobs stop {of.pipeline}`"
        )


def row(of: Job, place: str) -> dict[str, Any]:
    """A job in a list."""
    try:
        at = engine(of, place)
        state, id = ("gone", of.id) if at is None else (at.state(), at.id)
    except UserError as error:
        state, id = f"unknown: {error}", of.id
    return {
        "runner": of.runner,
        "job": id,
        "state": state.lower(),
        "since": of.started,
        "goes on from": _next(of, place),
    }


def far(place: str) -> dict[str, Any]:
    """How far a stream has told that it is."""
    facts = drift.facts(f"{place}/{job.FACTS}")
    told: dict[str, Any] = {"counts": facts.counts.equation(), "state rows": sum(facts.counts.held.values())}
    if facts.reached is not None:
        told |= {"complete through": facts.reached.complete_through, "next offsets": facts.reached.offsets}
    return told


def _next(of: Job, place: str) -> str:
    last = None if of.ended else of.newest(place)
    return last or f"the log's first offset{f' ({of.ended})' if of.ended else ''}"
