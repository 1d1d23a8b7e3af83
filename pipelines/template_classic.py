"""Staging a classic template: the graph of a bounded run whose places come at launch, or a stream's as it is."""

import contextlib
from collections.abc import Sequence

import click

from pipelines import remote, runners, streaming, template_graph, template_parameters
from pipelines.definition import Pipeline
from pipelines.options import Deployment
from pipelines.template_parameters import Parameter


def stage(
    pipeline: Pipeline, deployment: Deployment, params: Sequence[click.Parameter], flags: Sequence[str]
) -> list[Parameter]:
    """Builds the graph and gives it to Dataflow's runner, which writes the template; its parameters. params: those of
    ``pipelines run``. Raises UserError."""
    engine = runners.named("DataflowRunner")
    if deployment.mode == "stream":
        remote.check(deployment)
        with contextlib.suppress(runners.Detached):
            streaming.run(pipeline, deployment, engine, flags)
        return []
    reached = template_graph.reached(deployment)
    known = template_parameters.classic(template_graph.defaults(pipeline, reached), params)
    kept = template_graph.options(pipeline, reached)  # a class that Beam finds as long as it lives
    with contextlib.suppress(runners.Detached):
        engine.run(lambda root: template_graph.build(root, pipeline, reached, known), flags)
    del kept
    return known
