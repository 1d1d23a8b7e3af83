"""``pipelines template build NAME``: a Flex Template's folder, or a classic template in Cloud Storage. Beam-free until
a graph is built.

A Flex Template is an image, and a file that names it with its parameters: at launch the image builds the graph, with
everything a parameter. A classic template is the graph itself, so only places can be parameters (and of a stream
nothing). Both take the workers' code with them.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipelines import arguments, runners
from pipelines.arguments import CONTEXT, option
from pipelines.transforms.errors import UserError

if TYPE_CHECKING:
    from pipelines.template_parameters import Parameter


@click.group(context_settings=CONTEXT)
def template() -> None:
    """Dataflow templates: a pipeline that others launch, with parameters."""


@template.command(context_settings={**CONTEXT, "ignore_unknown_options": True, "allow_extra_args": True})
@click.argument("name", metavar="NAME|FILE.py:OBJECT")
@option("--mode", type=click.Choice(["batch", "stream"]), default="batch", show_default=True, help="What it runs.")
@option(
    "--image", metavar="IMAGE", help="Flex: the image's name, such as europe-docker.pkg.dev/project/repo/flights:1."
)
@option("--folder", metavar="PATH", help="Flex: where the files go; templates/<pipeline>-<mode> by default.")
@option("--template_location", metavar="gs://…", help="Classic: where the template goes.")
@click.pass_context
def build(
    context: click.Context, name: str, mode: str, image: str | None, folder: str | None, template_location: str | None
) -> None:
    """Build a Flex Template's files (--image), or a classic template (--template_location).

    A classic template takes the flags of `pipelines run` and of Beam's Dataflow runner: its places are what it has
    where a launch gives none.
    """
    if (image is None) == (template_location is None):
        raise UserError("give --image=IMAGE for a Flex Template, or --template_location=gs://… for a classic one")
    if template_location is not None:
        for line in classic(name, mode, template_location, context.args):
            click.echo(line)
        return
    if context.args:
        raise UserError(f"{context.args[0]}: a Flex Template takes it at launch, as a parameter; leave it out")
    from pipelines import definition, template_files

    declared = definition.load(name)
    place = Path(folder or f"templates/{declared.name}-{mode}")
    files = template_files.Flex(name, declared, mode, str(image), flex_parameters(name, mode))
    files.write(place)
    click.echo(f"{declared.name}: {place}/README.md tells how to build the image and launch it")


def flex_parameters(name: str, mode: str) -> "list[Parameter]":
    """Of the template of a definition."""
    from pipelines import definition, template_parameters
    from pipelines.cli import cli

    return template_parameters.parameters(name, definition.load(name), cli.commands["run"].params, mode)


def launch(name: str, mode: str, given: Sequence[str]) -> None:
    """What runs in the image of a Flex Template: checks the parameters, and builds the graph. given: the launcher's
    flags, of which those that are no parameter are Beam's. Ends the process."""
    from pipelines import cli

    try:
        command = launched(name, mode, given)
    except UserError as error:
        click.echo(f"{name}: {error}", err=True)
        sys.exit(2)
    sys.argv = ["pipelines", *command]
    cli.process("run")


def launched(name: str, mode: str, given: Sequence[str]) -> list[str]:
    """The flags of ``pipelines run`` that a launch amounts to. Raises UserError for a parameter that cannot be.

    >>> launched("flights", "stream", ["--trigger=5", "--project=p"])
    Traceback (most recent call last):
    pipelines.transforms.errors.UserError: parameter trigger=5 does not match ^([1-9]\\d{0,8}(s|m|h|d|w))$: How often \
a live run gives results.
    """
    from pipelines import template_parameters

    known = {parameter.name: parameter for parameter in flex_parameters(name, mode)}
    pairs = [flag.removeprefix("--").partition("=")[::2] for flag in given]
    values = {key: value for key, value in pairs if key in known and value}
    template_parameters.check(values, list(known.values()))
    others = [flag for flag, (key, _) in zip(given, pairs, strict=True) if key not in known]
    ours = [f"{known[key].flag}{value}" for key, value in values.items()]
    if mode == "batch" and not {"history", "lake"} & set(values):
        raise UserError("the parameter history is missing, or lake in place of it: what to read")
    if "store" not in values:
        ours.append("--store=none")
    beams = [flag for flag in others if not flag.startswith("--runner=")]
    return [f"--pipeline={name}", f"--mode={mode}", "--runner=DataflowRunner", *ours, *beams]


def classic(name: str, mode: str, location: str, given: Sequence[str]) -> list[str]:
    """Stages the graph and writes the template, and beside it its metadata; what there is to say."""
    from pipelines import definition
    from pipelines.cli import cli

    run: Any = cli.commands["run"]
    here = click.get_current_context(silent=True)
    settings = (here.find_root().default_map or {}).get("run") if here is not None else None  # of pipelines.toml
    wanted = [f"--pipeline={name}", f"--mode={mode}", "--runner=DataflowRunner", *given]
    context = run.make_context("run", wanted, default_map=settings)
    flags = [*arguments.passed(context), f"--template_location={location}"]
    places = {key: value for key, value in context.params.items() if key not in ("pipeline", "parameters", "as_json")}
    places.pop("dry_run")
    declared = definition.load(name, **dict(context.params["parameters"]))
    deployment = arguments.deployment(name, declared, places)
    arguments.quiet()
    from pipelines import template_classic

    with runners.uncollected():
        known = template_classic.stage(declared, deployment, run.params, flags)
    told = {"name": f"{declared.name} {mode}", "description": declared.doc, "streaming": mode == "stream"}
    _write(f"{location}_metadata", json.dumps(told | {"parameters": [one.metadata() for one in known]}, indent=2))
    launch = f"gcloud dataflow jobs run {declared.name} --gcs-location={location} --region=REGION"
    asked = ",".join(f"{one.name}=…" for one in known if not one.optional)
    lines = [f"{declared.name}: the template is at {location}", f"{launch} --parameters={asked}" if asked else launch]
    return [*lines, *(f"  {one.name}  {one.help}  {one.default or ''}".rstrip() for one in known)]


def _write(uri: str, text: str) -> None:
    import fsspec

    with fsspec.open(uri, "wt", encoding="utf-8") as file:
        file.write(text)
