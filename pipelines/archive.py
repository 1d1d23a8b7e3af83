"""Archiving a pipeline's log into its lake: what a definition and a deployment come to there. Beam-free."""

import dataclasses

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


def lake(pipeline: Pipeline, uri: str) -> Lake:
    """The lake of a pipeline at ``<uri>/<pipeline>``. Raises UserError without the key that personal columns need."""
    source = pipeline.source
    cipher = Cipher(Key.load(), PURPOSE) if source.schema.personal else None
    said = pipeline.plan().lineage["events"]["event_time"] <= set(source.identities)
    return Lake(f"{uri}/{pipeline.name}", cipher, () if said else source.identities)


def archive(pipeline: Pipeline, deployment: Deployment) -> Archived:
    """Archives what the log at ``deployment.live`` holds and the lake does not, exactly once; see ``Lake.archive``."""
    if deployment.live is None or deployment.lake is None:
        raise UserError(f"{pipeline.name}: say what to archive and where to, with --live=URI and --lake=URI")
    with open_log(deployment.live) as log:
        return lake(pipeline, deployment.lake).archive(log, dating(pipeline, log, deployment.ahead))


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
