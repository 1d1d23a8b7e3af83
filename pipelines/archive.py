"""Archiving a pipeline's log into its lake: what a definition and a deployment come to there. Beam-free."""

import contextlib
import dataclasses
import sys
import threading
from collections.abc import Iterator

from pipelines.definition import Pipeline
from pipelines.io.lake import PURPOSE, Archived, Lake
from pipelines.io.log import Log, open_log
from pipelines.options import Deployment
from pipelines.transforms.decoder import Decoder
from pipelines.transforms.errors import UserError
from pipelines.transforms.intake import Intake
from pipelines.transforms.messages import Messages
from pipelines.transforms.protect import Cipher, Key
from pipelines.transforms.windows import Duration

EVERY = 10.0
"""Seconds between two commits to the lake: each makes a file for each event date it has rows of."""

COMPACTED = 30
"""Commits after which small files are made one."""


def lake(pipeline: Pipeline, uri: str) -> Lake:
    """The lake of a pipeline at ``<uri>/<pipeline>``. Raises UserError without the key that personal columns need."""
    source = pipeline.source
    cipher = Cipher(Key.load(), PURPOSE) if source.schema.personal else None
    said = pipeline.plan().lineage["events"]["event_time"] <= set(source.identities)
    return Lake(f"{uri}/{pipeline.name}", cipher, () if said else source.identities)


def archive(pipeline: Pipeline, deployment: Deployment, stop: threading.Event | None = None) -> Archived:
    """Archives what the log at ``deployment.live`` holds and the lake does not, exactly once; see ``Lake.archive``."""
    if deployment.live is None or deployment.lake is None:
        raise UserError(f"{pipeline.name}: say what to archive and where to, with --live=URI and --lake=URI")
    with open_log(deployment.live) as log:
        return lake(pipeline, deployment.lake).archive(log, dating(pipeline, log, deployment.ahead), stop=stop)


@contextlib.contextmanager
def along(pipeline: Pipeline, deployment: Deployment, every: float = EVERY) -> Iterator[None]:
    """Archives, every so many seconds, while a live run goes on; nothing where the deployment has no lake.

    In a thread of its own, and as independent of the run as in a process of its own. A run that has an end
    (``deployment.until``) leaves all that the log holds then in the lake. What fails is told at once, ends the
    archiving and is raised when the run is over.
    """
    if deployment.lake is None:
        yield
        return
    lake(pipeline, deployment.lake)  # a run without the key had better not begin
    ended, failed = threading.Event(), list[Exception]()
    thread = threading.Thread(target=_follow, args=(pipeline, deployment, every, ended, failed), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    if not failed and deployment.until is not None:
        archive(pipeline, deployment)
    if failed:
        raise failed[0]


def _follow(
    pipeline: Pipeline, deployment: Deployment, every: float, ended: threading.Event, failed: list[Exception]
) -> None:
    assert deployment.lake
    commits = 0
    try:
        while not ended.wait(every):
            commits += archive(pipeline, deployment, ended).commits
            if commits >= COMPACTED and not ended.is_set():
                lake(pipeline, deployment.lake).compact()
                commits = 0
    except Exception as error:
        failed.append(error)
        print(f"{pipeline.name}: no longer archived: {error}", file=sys.stderr)


def dating(pipeline: Pipeline, log: Log, ahead: int) -> Intake:
    """What finds the event times of a log's messages: of JSON and Avro by the columns alone that they are made of, so a
    row that is refused later for another column has its time."""
    source, plan = pipeline.source, pipeline.plan()
    schema = source.schema
    if log.format != "arrow":
        used = plan.lineage["events"]["event_time"].union(source.identities)
        schema = dataclasses.replace(schema, fields=tuple(field for field in schema.fields if field.name in used))
    decoder = Decoder(schema, pipeline.name, extra="keep" if log.format == "arrow" else "ignore")
    messages = Messages(decoder, log.format, log.schemas)
    return Intake(messages, plan.event_time, Duration.fixed(source.disorder, "disorder"), ahead)
