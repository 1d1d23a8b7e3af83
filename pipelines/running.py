"""Streams that run on an engine: found by ``<state>/<pipeline>/job.json``, asked about at their engine. Beam-free."""

import dataclasses
import time
from typing import Any, Protocol

from pipelines import drift, job
from pipelines.arguments import near
from pipelines.job import Job
from pipelines.runners import dataflow_jobs, flink_jobs
from pipelines.transforms.errors import UserError

ENDS = 60.0
"""Seconds that a job may take to end."""


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
    """A job on Flink. folder: where its savepoints go."""

    rest: flink_jobs.Rest
    id: str
    folder: str

    def state(self) -> str:
        return self.rest.state(self.id) or "gone"

    @property
    def lives(self) -> bool:
        return self.state() in flink_jobs.LIVING

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
        place = None
        if how == "now":
            self.rest.cancel(self.id)
        else:
            place = self.rest.stop(self.id, flink_jobs.location(self.folder), drain=how == "drain")
        end = time.monotonic() + ENDS
        while time.monotonic() < end:
            try:
                if not self.lives:
                    break
            except flink_jobs.Unreachable:  # a Flink of one job ends with it
                break
            time.sleep(0.2)
        return place

    def savepoint(self) -> str:
        return self.rest.savepoint(self.id, flink_jobs.location(self.folder))


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
    return None if at is None else OnFlink(*at, f"{of.kept(place)}/savepoints")


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
    facts = drift.facts(f"{place}/stream.json")
    told: dict[str, Any] = {"counts": facts.counts.equation(), "state rows": sum(facts.counts.held.values())}
    if facts.reached is not None:
        told |= {"complete through": facts.reached.complete_through, "next offsets": facts.reached.offsets}
    return told


def _next(of: Job, place: str) -> str:
    last = None if of.ended else of.newest(place)
    return last or f"the log's first offset{f' ({of.ended})' if of.ended else ''}"
