"""The command line: ``pipelines run parity test query …``. Beam is not imported until a graph is built.

Values come as flags > environment (``PIPELINES_WAREHOUSE``) > ``pipelines.toml`` of the current folder > defaults.
``_`` and ``-`` are the same, abbreviations are not accepted. Exit codes: 0 done, 1 our fault (a traceback), 2 the
user's mistake (a line on stderr), 3 data refused.
"""

import json
import os
import pkgutil
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from pipelines import arguments, beside, cluster, examples, jobs, options, runners, template
from pipelines.arguments import CONTEXT, JSON, PIPELINE, SET, WAREHOUSE, Instant, Length, Pair, Until, option
from pipelines.transforms.errors import DataRefused, UserError

SETTINGS = Path("pipelines.toml")


@click.group(context_settings=CONTEXT)
def cli() -> None:
    """Data products: declared once, run in batch or live, asked with SQL.

    PIPELINE is a built-in name (`pipelines list`), or path/to/file.py:object.
    """


@cli.command(context_settings={**CONTEXT, "ignore_unknown_options": True, "allow_extra_args": True})
@option("--pipeline", metavar="NAME|FILE.py:OBJECT", required=True, help="What to run.")
@option("--mode", type=click.Choice(options.MODES), default="batch", show_default=True, help="How to run it.")
@option("--runner", default=options.Deployment.runner, show_default=True, metavar="NAME", help="What executes it.")
@option("--history", metavar="URI", help="The files to read: a path, a glob, s3:// or gs://.")
@option("--dimension", "dimensions", multiple=True, type=Pair(), help="NAME=URI of a look-up; repeatable.")
@WAREHOUSE
@option("--store", default=options.Deployment.store, show_default=True, metavar="URI|none", help="For look-ups by key.")
@option(
    "--dead_letters", default=options.Deployment.dead_letters, show_default=True, metavar="URI", help="Refused rows."
)
@option("--from", "from_", type=Instant(), help="Recompute from this event time on; UTC unless it has an offset.")
@option("--to", type=Instant(), help="Recompute up to this event time, exclusive.")
@option("--live", metavar="URI", help="The log to follow: data/log/<pipeline>.db by default.")
@option("--lake", metavar="URI", help="Where what was live is archived; batch reads it in place of a history.")
@option("--state", default=options.Deployment.state, show_default=True, metavar="URI", help="Turns of micro-batch.")
@option("--trigger", type=Length(), default="1s", show_default=True, help="How often a live run gives results.")
@option("--until", type=Until(), help="End a live run: at the end of the log, or at an event time.")
@option("--since", type=click.Choice(["last"]), help="Batch: only the windows of what the lake has new since then.")
@option("--ahead", type=Length(), default="1h", show_default=True, help="How far an event time may be in the future.")
@option("--refresh", type=Length(), default="1m", show_default=True, help="How old dimensions of a live run get.")
@option("--rebuild", is_flag=True, help="Forget the live state, and read the log again from its first offset.")
@SET
@option("--max_rejected", type=float, metavar="SHARE", help="Refuse the data past this share of rejected rows.")
@option("--buckets", type=int, metavar="N", help="Parts of a view's merge (with sketches 8 times as many).")
@option("--report", default=options.Deployment.report, show_default=True, metavar="URI", help="Where run.json goes.")
@option("--dry_run", is_flag=True, help="Check everything, read every header, run nothing.")
@JSON
@click.pass_context
def run(
    context: click.Context,
    /,
    pipeline: str,
    parameters: Sequence[tuple[str, str]],
    dry_run: bool,
    as_json: bool,
    **places: Any,
) -> None:
    """Run a pipeline. Options that are not listed go to Apache Beam, which must know them."""
    flags = arguments.passed(context)
    with runners.uncollected():
        from pipelines import definition
        from pipelines import run as runs

        declared = definition.load(pipeline, **dict(parameters))
    deployment = arguments.deployment(pipeline, declared, places)
    arguments.quiet()
    if dry_run:
        runs.dry_run(declared, deployment)
        click.echo(f"{declared.name}: everything is in place; nothing was run")
        return
    try:
        report = runs.run(declared, deployment, flags)
    except runners.Detached as left:
        click.echo(f"{declared.name}: {left}")
        sys.exit(left.code)
    if as_json:
        click.echo(report.json())
        return
    from pipelines import progress, warehouse

    click.echo(report.head())
    rows: Iterable[str] = ()
    if deployment.mode == "batch":
        if deployment.runner not in runners.REMOTE:
            progress.last()
        rows = warehouse.sample(declared, deployment.warehouse)
    for part in (report.counts(), "", report.views(), *rows, report.foot()):
        click.echo(part)


@cli.command(context_settings=CONTEXT)
@option("--pipeline", metavar="NAME|FILE.py:OBJECT", required=True, help="Whose history.")
@option("--history", metavar="URI", help="The files to send: a path, a glob, s3:// or gs://.")
@option("--live", metavar="URI", help="The log to send them to: data/log/<pipeline>.db by default.")
@option("--rate", type=float, metavar="ROWS/S", help="Rows a second; by default as many as the log takes.")
@option("--speedup", type=float, metavar="FACTOR", help="Seconds of event time a second.")
@option("--shuffle", default="0s", show_default=True, metavar="DURATION", help="Displace rows by up to this.")
@option("--late", type=float, default=0.0, metavar="SHARE", help="Of the rows, sent when they are late for all views.")
@option("--duplicate", type=float, default=0.0, metavar="SHARE", help="Of the rows, sent again a little later.")
@option("--corrupt", type=float, default=0.0, metavar="SHARE", help="Bad messages to add, as a share of the rows.")
@option("--seed", type=int, default=0, metavar="N", help="Another seed disorders other rows; the same one the same.")
@option("--from", "from_", type=Instant(), help="Send from this event time on; UTC unless it has an offset.")
@option("--to", type=Instant(), help="Send up to this event time, exclusive.")
@option("--partitions", type=int, metavar="N", help="Partitions 0 to N-1; by default those of the log, else 4.")
@SET
@JSON
def replay(
    pipeline: str,
    history: str | None,
    live: str | None,
    shuffle: str,
    late: float,
    duplicate: float,
    corrupt: float,
    seed: int,
    parameters: Sequence[tuple[str, str]],
    as_json: bool,
    **settings: Any,
) -> None:
    """Send a pipeline's history to a log, in event-time order and at any pace. Ctrl-C stops it."""
    from pipelines import definition, send
    from pipelines.transforms.disorder import Disorder

    declared = definition.load(pipeline, **dict(parameters))
    disorder = Disorder(shuffle, late, duplicate, corrupt, seed)
    report = send.send(
        declared,
        options.expand(history or arguments.history(pipeline, declared)),
        options.expand(live or arguments.log(declared)),
        disorder,
        start=settings.pop("from_"),
        stop=settings.pop("to"),
        **settings,
    )
    click.echo(report.json() if as_json else report.text())


@cli.command(context_settings=CONTEXT)
@option("--pipeline", metavar="NAME|FILE.py:OBJECT", required=True, help="Whose log.")
@option("--live", metavar="URI", help="The log: data/log/<pipeline>.db by default.")
@option("--lake", metavar="URI", required=True, help="Where to.")
@option("--ahead", type=Length(), default="1h", show_default=True, help="How far an event time may be in the future.")
@SET
def archive(pipeline: str, live: str | None, lake: str, ahead: int, parameters: Sequence[tuple[str, str]]) -> None:
    """Archive what a log holds now into the lake, once, and compact it. A live run with --lake does so by itself."""
    from pipelines import archive as archiving
    from pipelines import definition

    declared = definition.load(pipeline, **dict(parameters))
    places = options.Deployment(
        live=options.expand(live or arguments.log(declared)), lake=options.expand(lake), ahead=ahead
    )
    done = archiving.archive(declared, places)
    fewer = archiving.lake(declared, f"{places.lake}").compact()
    click.echo(f"{declared.name}: {done.rows:,} rows archived, {done.undated:,} without an event time; {_held(done)}")
    if fewer:
        click.echo(f"{declared.name}: {fewer} small files fewer")


@cli.command(context_settings={**CONTEXT, "ignore_unknown_options": True, "allow_extra_args": True})
@option("--pipeline", metavar="NAME|FILE.py:OBJECT", required=True, help="What to try.")
@option("--runner", default=options.Deployment.runner, show_default=True, metavar="NAME", help="What executes it.")
@option("--history", metavar="URI", help="The rows to try it on; a built-in example's own, else rows are made up.")
@option("--dimension", "dimensions", multiple=True, type=Pair(), help="NAME=URI of a look-up; repeatable.")
@option("--seed", type=int, default=0, metavar="N", help="Another seed, another disorder; the same one the same.")
@option("--restarts", type=click.IntRange(0), metavar="N", help="Of the speed layer: 8 in turns, 2 of a graph.")
@SET
@JSON
@click.pass_context
def parity(
    context: click.Context,
    /,
    pipeline: str,
    runner: str,
    history: str | None,
    dimensions: Sequence[tuple[str, str]],
    seed: int,
    restarts: int | None,
    parameters: Sequence[tuple[str, str]],
    as_json: bool,
) -> None:
    """Prove that the layers agree: exit 3 where they do not, with the first windows that differ.

    The pipeline runs live, in turns or as its engine's unbounded graph, over a log in disorder, with late, repeated and
    bad messages, and dies at random points; then what it gave to the store is compared with a bounded run, value by
    value. All is temporary.
    """
    flags = arguments.passed(context)
    from pipelines import definition
    from pipelines import parity as trial

    declared = definition.load(pipeline, **dict(parameters))
    if history is None and ":" not in pipeline and "HISTORY" in definition.module(pipeline):
        history = arguments.history(pipeline, declared)
    arguments.quiet()
    report = trial.parity(
        declared,
        None if history is None else options.expand(history),
        runner,
        dimensions=arguments.dimensions(pipeline, declared, dimensions, made_up=history is None),
        flags=flags,
        seed=seed,
        restarts=restarts,
    )
    click.echo(report.json() if as_json else report.text())
    if report.different:
        raise DataRefused(f"{declared.name}: the layers differ, with seed {seed}")


@cli.command(context_settings=CONTEXT)
@PIPELINE
@SET
def check(pipelines: Sequence[str], parameters: Sequence[tuple[str, str]]) -> None:
    """Validate definitions: every column, type and expression."""
    from pipelines import definition

    for name in pipelines:
        declared = definition.load(name, **dict(parameters))
        views = ", ".join(view.name for view in declared.views) or "no views"
        click.echo(f"{declared.name}: fine. Steps: {len(declared.steps)}. Views: {views}")


@cli.command(context_settings=CONTEXT)
@PIPELINE
def test(pipelines: Sequence[str]) -> None:
    """Run the tests that stand beside definitions: functions test_… of their modules."""
    from pipelines import definition

    failed = 0
    for path in pipelines:
        module = definition.module(path)
        found = [(name, function) for name, function in module.items() if name.startswith("test_")]
        for name, function in found:
            fault = beside.fault(function)
            failed += bool(fault)
            click.echo(f"{path}: {name[5:].replace('_', ' ')}: {fault or 'ok'}")
        if not found:
            click.echo(f"{path}: no tests beside it; write functions test_… with pipelines.testing")
    if failed:
        raise UserError(f"{failed} failed")


@cli.command(name="list", context_settings=CONTEXT)
def list_() -> None:
    """List the built-in definitions."""
    from pipelines import definition, report

    loaded = [definition.load(module.name) for module in pkgutil.iter_modules(examples.__path__)]
    told = [(one.name, ", ".join(view.name for view in one.views), one.doc) for one in loaded]
    click.echo(report.grid(("pipeline", "views", ""), told))


@cli.command(context_settings=CONTEXT)
@click.argument("pipeline")
@SET
@JSON
def describe(pipeline: str, parameters: Sequence[tuple[str, str]], as_json: bool) -> None:
    """Tell a definition: schema, steps, the SQL they become, and the source columns of every column."""
    from pipelines import definition
    from pipelines import describe as telling

    declared = definition.load(pipeline, **dict(parameters))
    told = json.dumps(telling.facts(declared), indent=2, ensure_ascii=False) if as_json else telling.describe(declared)
    click.echo(told)


@cli.command(context_settings=CONTEXT)
@click.argument("sql")
@WAREHOUSE
@JSON
def query(sql: str, warehouse: str, as_json: bool) -> None:
    """Ask the warehouse with SQL (DuckDB's), over tables <pipeline>.<view> and <pipeline>.events. Writes nothing."""
    from pipelines import warehouse as tables

    answer = tables.ask(sql, options.expand(warehouse))
    click.echo(tables.as_json(answer) if as_json else tables.as_text(answer))


cli.add_command(cluster.cluster)
cli.add_command(jobs.jobs)
cli.add_command(template.template)


def _held(done: Any) -> str:
    offsets = ", ".join(f"{offset:,} of partition {name}" for name, offset in done.extent.offsets.items())
    return f"the lake now reaches offset {offsets}" if offsets else "the log is empty"


def _settings(commands: Mapping[str, click.Command]) -> dict[str, dict[str, Any]]:
    """The values of pipelines.toml for each command. Raises UserError for a key that is no flag of any."""
    if not SETTINGS.exists():
        return {}
    try:
        given = tomllib.loads(SETTINGS.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{SETTINGS}: {error}") from None
    names = {
        command: {option[2:]: param.name for param in found.params for option in param.opts if option[:2] == "--"}
        for command, found in commands.items()
    }
    every = sorted({option for known in names.values() for option in known})
    for key in given:
        if key.replace("-", "_") not in every:
            raise UserError(f"{SETTINGS}: no option {key!r}.{arguments.near(key, every)}")
    plain = {key.replace("-", "_"): _pairs(value) for key, value in given.items()}
    return {
        command: {known[key]: value for key, value in plain.items() if key in known} for command, known in names.items()
    }


def _pairs(value: Any) -> Any:
    return list(value.items()) if isinstance(value, dict) else value


def main(command: str | None = None) -> NoReturn:
    """Runs a command line and exits. command: one verb alone, which then is the whole program."""
    program: click.Command = cli.commands[command] if command else cli
    name = f"python -m pipelines.{command}" if command else "pipelines"
    try:
        settings = _settings(cli.commands)
        values = settings.get(command, {}) if command else settings
        sys.exit(program.main(prog_name=name, standalone_mode=False, default_map=values) or 0)
    except click.exceptions.Exit as exit:
        sys.exit(exit.exit_code)
    except click.ClickException as error:
        _fail(name, error.format_message(), 2)
    except click.Abort:
        _fail(name, "interrupted", 130)
    except UserError as error:
        _fail(name, str(error), 2)
    except DataRefused as error:
        _fail(name, str(error), 3)


def process(command: str | None = None) -> NoReturn:
    """``main`` as a process of its own: once all is written it ends at once, without taking the interpreter apart. That
    costs 0.3 CPU-s once Beam was imported. Whatever must be closed or removed is so before ``main`` ends."""
    try:
        main(command)
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))


def _fail(name: str, message: str, code: int) -> NoReturn:
    click.echo(f"{name}: {options.masked(message)}", err=True)
    sys.exit(code)
