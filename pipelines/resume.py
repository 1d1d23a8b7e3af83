"""Where a stream goes on: at the newest savepoint or checkpoint of its job, or at the log's first offset. Beam-free.

A stream that begins anew removes the live rows and dead letters of before, as a run in turns does with --rebuild. One
that is resumed goes on with the epoch of its job: a version in the store is the rows that an answer is of, so what it
counts again after a crash replaces nothing until it knows more.
"""

import dataclasses
import datetime
import os
import secrets
import sys
from collections.abc import Mapping

import fsspec

from pipelines import job as jobs
from pipelines.io.log import open_log
from pipelines.io.store import LIVE, StoreConflict, open_store
from pipelines.job import Job
from pipelines.layer import Layer, fingerprint
from pipelines.options import Deployment, masked
from pipelines.transforms.errors import UserError


@dataclasses.dataclass(frozen=True)
class Start:
    """What a stream starts with. place: ``<state>/<pipeline>``. since: what it resumes; None: it begins anew."""

    place: str
    job: Job
    since: str | None

    @property
    def until(self) -> Mapping[str, int] | int | None:
        """When its source ends: at an offset of each partition, at a watermark, or never."""
        if isinstance(self.job.until, str):
            return int(datetime.datetime.fromisoformat(self.job.until).timestamp() * 1_000_000)
        return self.job.until


def start(layer: Layer, deployment: Deployment, epoch: int) -> Start:
    """Looks where the stream of this layer is to go on, and makes everything ready for it. Hold ``layer.turns.own()``.

    epoch: the least for one that begins. Raises UserError where it runs already, where what is kept is of another
    definition, and where it would have to begin at rows that the log no longer holds.
    """
    place, found = layer.turns.uri, jobs.read(layer.turns.uri)
    if found is not None:
        found.refuse_running()
    parts = _parts(layer)
    since = None
    if found is not None and not deployment.rebuild:
        found.refuse_other(place, parts)
        since = None if found.ended else found.newest(place)
    if found is None or since is None:
        begun = _begun(layer, deployment, found, parts, epoch)
        jobs.write(place, begun)
        _forget(layer, deployment, begun)
        made = Start(place, begun, None)
    else:
        made = Start(place, _resumed(place, found, deployment), since)
        jobs.write(place, made.job)
    jobs.sweep(place, made.job)
    _stored(layer, deployment, made)
    return made


def detached(layer: Layer, runner: str, epoch: int, job: Mapping[str, str]) -> Job:
    """A job that its engine runs without us. job: as the engine's module finds it again: its id as ``job``."""
    at = {name: value for name, value in job.items() if name != "job"}
    made = Job(layer.pipeline, runner, _parts(layer), epoch, {}, [], started="")
    return dataclasses.replace(_now(made), id=job["job"], at=at)


def _parts(layer: Layer) -> dict[str, str]:
    return {**fingerprint(layer), "format": layer.format, "release": str(jobs.STATE)}


def _begun(layer: Layer, deployment: Deployment, found: Job | None, parts: dict[str, str], epoch: int) -> Job:
    with open_log(layer.log) as log:
        bounds = log.bounds()
    first = {name: held.start for name, held in bounds.items()}
    if not deployment.rebuild:
        if found is None and layer.turns.last() is not None:
            raise UserError(
                f"{layer.turns.uri}: its state is of --mode=micro-batch; go on with that, name another --state, "
                "or start again with --rebuild"
            )
        before = {} if found is None else found.first
        gone = [name for name, offset in before.items() if name in first and first[name] > offset]
        if found is not None and gone:
            raise UserError(
                f"{layer.turns.uri}: {found.ended or 'its checkpoints are gone'}, and the log no longer holds all of "
                f"partition {gone[0]}; --rebuild begins at what is left of it"
            )
    views = {part.removeprefix("view ") for part in parts if part.startswith("view ")}
    if found is not None:
        views |= {*found.anew, *(part.removeprefix("view ") for part in found.fingerprint if part.startswith("view "))}
        epoch = max(epoch, found.epoch + 1)
    at, ends = deployment.until, {name: held.end for name, held in bounds.items()}
    until = at.isoformat() if isinstance(at, datetime.datetime) else at and ends
    job = Job(layer.pipeline, deployment.runner, parts, epoch, first, sorted(views), started="", until=until)
    return _now(job)


def _resumed(place: str, found: Job, deployment: Deployment) -> Job:
    """The same job, as it is started again. What was to end may have ended in parts, so it must end as it was to."""
    if found.until is None and deployment.until == "end":
        assert deployment.live
        with open_log(deployment.live) as log:
            return _now(dataclasses.replace(found, until={name: held.end for name, held in log.bounds().items()}))
    at = deployment.until
    now = at.isoformat() if isinstance(at, datetime.datetime) else at
    was = "end" if isinstance(found.until, dict) else found.until
    if was is not None and now != was:
        raise UserError(f"{place}: its job was to run with --until={was}; give that again, or start it with --rebuild")
    return _now(dataclasses.replace(found, until=found.until if was is not None else now))


def _now(job: Job) -> Job:
    """As it is of this run."""
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    name, command = f"{job.pipeline}-{job.epoch}-{secrets.token_hex(3)}", jobs.command(sys.argv)
    return dataclasses.replace(job, started=started, name=name, command=command, cwd=os.getcwd(), id=None, rest=None)


def _forget(layer: Layer, deployment: Deployment, job: Job) -> None:
    """Removes what earlier streams have delivered, and counted. Done again if this process dies before it has a
    checkpoint."""
    if deployment.store:
        with open_store(deployment.store) as store:
            for view in job.anew:
                store.drop(f"{layer.pipeline}.{view}", LIVE)
    letters, token = layer.dead_letters, f"anew-{job.epoch}"
    if (last := letters.last()) is not None and last.token != token:
        version = letters.next_version()
        nothing = letters.stage("stream", token=token, version=version).finish()
        letters.commit(nothing, token=token, version=version, replace="everything")
    files, path = fsspec.url_to_fs(f"{layer.turns.uri}/stream.json")
    if files.exists(path):
        files.rm(path)
    layer.turns.clear()


def _stored(layer: Layer, deployment: Deployment, start: Start) -> None:
    """Makes the store ready. Raises UserError where a stream that is resumed has given its answers to another."""
    if not deployment.store:
        return
    with open_store(deployment.store) as store:
        for view in layer.views:
            name, keys = layer.named(view), (*view.plan.by, "window_start")
            if start.since is not None:
                try:
                    store.get(name, view.plan.schema.empty_table().select(keys), generation=LIVE)
                except StoreConflict:
                    raise UserError(
                        f"--store={masked(deployment.store)}: has no live rows of {name}, they were given to another; "
                        "name that one, or start again with --rebuild, which reads the log from its first offset"
                    ) from None
            store.resume(name, view.plan.schema, keys)
