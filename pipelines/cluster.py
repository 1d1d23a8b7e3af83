"""``pipelines cluster up|down|status``: an engine as a real cluster of this machine's own. Beam is not imported."""

import json
from typing import Any

import click

from pipelines.arguments import CONTEXT, JSON, option
from pipelines.runners import clusters

_ENGINE = click.Choice([*clusters.MODULES])


@click.group(context_settings=CONTEXT)
def cluster() -> None:
    """A local cluster of an engine, all on 127.0.0.1. A run on its runner uses it while it is up."""


@cluster.command(context_settings=CONTEXT)
@click.argument("engine", type=_ENGINE)
@option("--job_server_jar", metavar="FILE|URL", help="Another job server than the one of this Beam version.")
@option("--prism_location", metavar="FILE", help="Another Prism than the one of this Beam version.")
def up(engine: str, **options: Any) -> None:
    """Start what is missing or dead. Repeat it after a crash: it replaces only what died."""
    given = {key: value for key, value in options.items() if value is not None}
    started = clusters.up(engine, lambda line: click.echo(f"{engine}: {line}", err=True), **given)
    click.echo(f"{engine}: up, at {started.endpoint}; its files: {clusters.folder(engine)}")


@cluster.command(context_settings=CONTEXT)
@click.argument("engine", type=_ENGINE, required=False)
def down(engine: str | None) -> None:
    """Stop a cluster, or all; jobs that run there end with it."""
    for one in [engine] if engine else clusters.MODULES:
        if (clusters.folder(one) / "cluster.json").exists() and clusters.down(one):
            click.echo(f"{one}: down")
        elif engine:
            click.echo(f"{one}: was not up")


@cluster.command(context_settings=CONTEXT)
@click.argument("engine", type=_ENGINE, required=False)
@JSON
def status(engine: str | None, as_json: bool) -> None:
    """Tell the members of a cluster, or of all."""
    told = [one for name in ([engine] if engine else clusters.MODULES) for one in clusters.status(name)]
    if as_json:
        click.echo(json.dumps(told, indent=2))
    elif told:
        from pipelines import report

        names = ("engine", "member", "state", "pid", "since", "MiB", "port", "log")
        rows = [[str({**one, "MiB": one["bytes"] >> 20}[name] or "") for name in names] for one in told]
        click.echo(report.grid(names, rows))
    else:
        click.echo("no cluster is up" if engine is None else f"{engine}: not up")
