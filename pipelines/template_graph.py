"""The graph of a classic template: built once, launched often, each time with places of its own.

Its first step does at launch what a run otherwise does before there is a graph: it looks at the places, plans the files
and takes table versions and store generations. Only values can be left for later, not what the graph is made of: so the
definition, the mode, the number of buckets and the format of the history are the template's, and it is of whole runs.
A range (``--from``, ``--to``), ``--since`` and a lake change the graph; a Flex Template takes them all, as it builds
its graph as it is launched.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.options.value_provider import RuntimeValueProvider

from pipelines import graph
from pipelines.begin import Begun, First
from pipelines.definition import Pipeline
from pipelines.io import files
from pipelines.io.places import FORMATS
from pipelines.options import Deployment
from pipelines.reading import Reading
from pipelines.remote import local
from pipelines.scope import Scope
from pipelines.template_parameters import Parameter, check
from pipelines.transforms.errors import UserError

PLACES = ("history", "warehouse", "dead_letters", "store", "report")
"""What a classic template can be launched with, beside ``dimension_<name>``."""

ASSUMED = 4 << 30
"""Bytes of a history that nobody knows yet: they give the number of buckets and of partitions."""


@dataclasses.dataclass(frozen=True)
class Named:
    """Files that are named as the template is launched, of one format: a History."""

    format: str
    splits: tuple[Any, ...] = ()
    rows: int | None = None
    bytes: int = ASSUMED

    def read(self, split: Any) -> Iterator[pa.Table]:
        return files.read(split)


@dataclasses.dataclass(frozen=True)
class Beginning:
    """What the first step does. format: of the history that the graph can read. known: the parameters."""

    pipeline: Pipeline
    format: str
    known: tuple[Parameter, ...] = ()

    def __call__(self, deployment: Deployment) -> tuple[Begun, Mapping[str, Any]]:
        given = {name: getattr(deployment, name) for name in PLACES}
        given |= {f"dimension_{name}": uri for name, uri in deployment.dimensions.items()}
        check({name: value for name, value in given.items() if value}, self.known)
        run = graph.prepare(self.pipeline, deployment)
        if run.history.format != self.format:
            raise UserError(
                f"history={deployment.history}: {run.history.format}, and the template reads {self.format}; "
                "name files of that format, or build a template of this one"
            )
        return run.begin(), {"history": run.history.splits} | {n: plan.splits for n, plan in run.dimensions.items()}


def refuse(deployment: Deployment) -> None:
    """Raises UserError for what a classic template cannot have."""
    given = {"from": deployment.from_, "to": deployment.to, "since": deployment.since, "lake": deployment.lake}
    for flag, value in given.items():
        if value is not None:
            raise UserError(
                f"--{flag}: a classic template is of whole runs over files; leave it out, or build a Flex Template "
                "(--image), which takes it as a parameter"
            )


def reached(deployment: Deployment) -> Deployment:
    """The deployment without the places that only this machine has: they are to be given at launch. What has no store
    now has none then, as writing one is a part of the graph."""
    found: dict[str, Any] = {name: _reached(getattr(deployment, name)) for name in PLACES if name != "history"}
    dimensions = {name: uri for name, uri in deployment.dimensions.items() if not local(uri)}
    return dataclasses.replace(deployment, dimensions=dimensions, **found)


def _reached(uri: str | None) -> str | None:
    return None if uri is None or local(uri) else uri


def format_of(history: str) -> str:
    """The format of a history by its name alone. Raises UserError where that does not tell.

    >>> format_of("gs://bucket/flights.csv.zip?null=NA"), format_of("gs://bucket/*?format=avro")
    ('csv', 'avro')
    """
    place, _, query = history.partition("?")
    given = dict(part.partition("=")[::2] for part in query.split("&")).get("format")
    suffixes = [suffix.lower() for suffix in PurePosixPath(place).suffixes]
    found = given or next((FORMATS[suffix] for suffix in reversed(suffixes) if suffix in FORMATS), None)
    if found is None:
        raise UserError(f"--history={history}: its name does not tell its format; add ?format=csv (or json, …)")
    return found


def options(pipeline: Pipeline, deployment: Deployment) -> type[PipelineOptions]:
    """The parameters as Beam has them; what the deployment says is what they are without a value."""

    def declare(_: type[PipelineOptions], parser: Any) -> None:
        for name, value in defaults(pipeline, deployment).items():
            parser.add_value_provider_argument(f"--{name}", type=str, default=value)

    return type("TemplateOptions", (PipelineOptions,), {"_add_argparse_args": classmethod(declare)})


def defaults(pipeline: Pipeline, deployment: Deployment) -> dict[str, str | None]:
    """The parameters of a classic template, with their values where a launch gives none."""
    places = {name: _reached(getattr(deployment, name)) for name in PLACES if name != "store" or deployment.store}
    return places | {f"dimension_{one.name}": deployment.dimensions.get(one.name) for one in pipeline.dimensions}


def build(root: beam.Pipeline, pipeline: Pipeline, deployment: Deployment, known: Sequence[Parameter] = ()) -> None:
    """Puts the graph on an empty pipeline; looks at no place. deployment: as of ``reached``. known: the parameters,
    which are checked at launch."""
    refuse(deployment)
    plan, named = pipeline.plan(), Named(format_of(deployment.history or ""))
    values = {name: RuntimeValueProvider(name, str, value) for name, value in defaults(pipeline, deployment).items()}
    dimensions = {one.name: values.pop(f"dimension_{one.name}") for one in pipeline.dimensions}
    tables = ("dead letters", *(["events"] if pipeline.events else []), *(view.name for view in plan.views))
    read = Reading(named, graph.decoding(pipeline, plan), Scope())
    lookups = dict.fromkeys(dimensions, Named("csv"))
    shape = graph.Shape(pipeline, deployment, plan, read, lookups, tables, plan.views)
    first = First(deployment, values, dimensions, Beginning(pipeline, named.format, tuple(known)))
    begun = (
        root
        | "begin" >> beam.Create([0])
        | "first" >> beam.ParDo(first).with_outputs("history", *dimensions, main="begun")
    )
    splits = {name: begun[name] | f"{name} splits" >> beam.Reshuffle() for name in dimensions}
    run = beam.pvalue.AsSingleton(begun.begun | "begun" >> beam.Reshuffle())  # once given, it stays
    graph.lay(root, shape, run, {"history": begun.history, **splits})
