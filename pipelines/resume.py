"""Where a stream goes on: at the newest savepoint or checkpoint of its job, or at the log's first offset. Beam-free.

A stream that begins anew removes the live rows, dead letters and counts of before. One that is resumed goes on with
the epoch of its job: a version in the store is the rows that an answer is of, so what it counts again after a crash
replaces nothing until it knows more.
"""

import dataclasses
import datetime
import os
import secrets
import sys
from collections.abc import Mapping

from pipelines import job, running
from pipelines.io.log import open_log
from pipelines.job import FACTS, Job
from pipelines.layer import Layer, fingerprint
from pipelines.options import Deployment
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


def start(layer: Layer, deployment: Deployment, epoch: int, *, kept: bool = True) -> Start:
    """Looks where the stream of this layer is to go on, and makes everything ready for it. Hold ``layer.turns.own()``.

    epoch: the least for one that begins. kept: whether its engine keeps what can be gone on from. Raises UserError
    where it runs already, where what is kept is of another definition, and where it would have to begin at rows that
    the log no longer holds.
    """
    place, found = layer.place, job.read(layer.place)
    if found is not None:
        running.refuse(found, place)
    parts = _parts(layer)
    since = None
    if found is not None and kept and not deployment.rebuild:
        found.refuse_other(place, parts)
        since = None if found.ended else found.newest(place)
    if found is None or since is None:
        begun = _begun(layer, deployment, found, parts, epoch)
        job.write(place, begun)
        layer.forget(begun.anew, deployment.store, f"anew-{begun.epoch}")  # again if it dies without a checkpoint
        job.forget(f"{place}/{FACTS}")
        layer.turns.clear()
        made = Start(place, begun, None)
    else:
        made = Start(place, _resumed(place, found, deployment), since)
        job.write(place, made.job)
    job.sweep(place, made.job)
    if deployment.store:
        layer.resume(deployment.store, anew=since is None)
    return made


def _parts(layer: Layer) -> dict[str, str]:
    return {**fingerprint(layer), "format": layer.format, "release": str(job.STATE)}


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
                f"{layer.turns.uri}: {found.ended or 'nothing is kept of it'}, and the log no longer holds all of "
                f"partition {gone[0]}; --rebuild begins at what is left of it"
            )
    views = {*layer.views_of({} if found is None else found.fingerprint)}
    if found is not None:
        views |= {*found.anew}
        epoch = max(epoch, found.epoch + 1)
    at, ends = deployment.until, {name: held.end for name, held in bounds.items()}
    until = at.isoformat() if isinstance(at, datetime.datetime) else at and ends
    return _now(Job(layer.pipeline, deployment.runner, parts, epoch, first, sorted(views), started="", until=until))


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


def _now(of: Job) -> Job:
    """As it is of this run."""
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    name, command = f"{of.pipeline}-{of.epoch}-{secrets.token_hex(3)}", job.command(sys.argv)
    return dataclasses.replace(of, started=started, name=name, command=command, cwd=os.getcwd(), id=None, rest=None)
