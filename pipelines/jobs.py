"""``pipelines jobs list|show|stop|savepoint|resume``: streams that run on an engine, with or without the process that
started them. Beam is not imported.
"""

import dataclasses
import json
import subprocess
import sys

import click

from pipelines.arguments import CONTEXT, JSON, option
from pipelines.options import Deployment, expand
from pipelines.transforms.errors import UserError

STATE = option("--state", default=Deployment.state, show_default=True, metavar="URI", help="Where streams keep theirs.")
_NAME = click.argument("pipeline")


@click.group(context_settings=CONTEXT)
def jobs() -> None:
    """Streams that run on an engine. PIPELINE: the name of a definition that has run with --mode=stream."""


@jobs.command(name="list", context_settings=CONTEXT)
@STATE
@JSON
def list_(state: str, as_json: bool) -> None:
    """List them, with what their engines call their state."""
    from pipelines import job as jobs
    from pipelines import running

    found = {name: running.found(name, expand(state)) for name in jobs.places(expand(state))}
    told = [{"pipeline": name, **running.row(job, place)} for name, (place, job) in found.items()]
    if as_json:
        click.echo(json.dumps(told, indent=2))
    elif told:
        from pipelines import report

        click.echo(report.grid([*told[0]], [[str(value or "") for value in one.values()] for one in told]))
    else:
        click.echo(f"no stream has run with --state={state}")


@jobs.command(context_settings=CONTEXT)
@_NAME
@STATE
@JSON
def show(pipeline: str, state: str, as_json: bool) -> None:
    """Tell all that is known of one: how far it is, its checkpoints, its last failure, the command that started it."""
    from pipelines import running

    place, job = running.found(pipeline, expand(state))
    told = {"pipeline": pipeline, **running.row(job, place), **running.far(place)}
    if (engine := running.engine(job, place)) is not None:
        told |= engine.details()
    told |= {"folder": job.cwd, "command": " ".join(["pipelines run", *job.command]) if job.command else None}
    if as_json:
        click.echo(json.dumps(told, indent=2))
        return
    width = max(map(len, told))
    for name, value in told.items():
        if value is not None:
            click.echo(f"{name:{width}}  {value}")


@jobs.command(context_settings=CONTEXT)
@_NAME
@STATE
@click.option("--drain", "how", flag_value="drain", help="End its input, so that it closes its open windows, early.")
@click.option("--now", "how", flag_value="now", help="Cancel it; it can go on from its last checkpoint.")
def stop(pipeline: str, state: str, how: str | None) -> None:
    """Stop one, with a savepoint: the next run goes on there."""
    from pipelines import job as jobs
    from pipelines import running

    place, job, engine = running.living(pipeline, expand(state))
    if how == "drain":
        through = running.far(place).get("complete through")
        said = f"drained: windows that end after {through or 'its watermark'} were closed early and are incomplete"
        jobs.write(place, dataclasses.replace(job, ended=said))  # before it has ended: whoever waits for that asks why
        try:
            engine.stop(how)
        except UserError:
            jobs.write(place, job)
            raise
        click.echo(f"{pipeline}: {said}; the next run reads the log again from its first offset")
        return
    last = engine.stop(how or "savepoint") or job.newest(place)
    click.echo(f"{pipeline}: stopped; the next run goes on from {last or 'its first offset'}")


@jobs.command(context_settings=CONTEXT)
@_NAME
@STATE
def savepoint(pipeline: str, state: str) -> None:
    """Take a savepoint of one that goes on; a run would resume there until there is a newer checkpoint."""
    from pipelines import running

    *_, engine = running.living(pipeline, expand(state))
    click.echo(f"{pipeline}: {engine.savepoint()}")


@jobs.command(context_settings=CONTEXT)
@_NAME
@STATE
def resume(pipeline: str, state: str) -> None:
    """Run again the command that one was started with: it goes on where it was stopped or died."""
    from pipelines import running

    place, job = running.found(pipeline, expand(state))
    running.refuse(job, place)
    if not job.command:
        raise UserError(f"{pipeline}: it was not started by a command; start it as it was started")
    command = " ".join(["pipelines run", *job.command])
    if "***" in command:
        raise UserError(f"{pipeline}: its command had a secret, which is not kept; run it yourself: {command}")
    click.echo(f"{pipeline}: {command}", err=True)
    sys.exit(subprocess.run([sys.executable, "-m", "pipelines.run", *job.command], cwd=job.cwd).returncode)
