"""The command line: ``pipelines run parity test query …``. Beam is not imported until a graph is built.

Values come as flags > environment (``PIPELINES_WAREHOUSE``) > ``pipelines.toml`` of the current folder > defaults.
``_`` and ``-`` are the same, abbreviations are not accepted. Exit codes: 0 done, 1 our fault (a traceback), 2 the
user's mistake (a line on stderr), 3 data refused.
"""

import ast
import datetime
import difflib
import inspect
import json
import logging
import os
import pkgutil
import sys
import textwrap
import tomllib
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

import click

from pipelines import examples, options
from pipelines.transforms.errors import DataRefused, UserError

SETTINGS = Path("pipelines.toml")
_CONTEXT: dict[str, Any] = {
    "auto_envvar_prefix": "PIPELINES",
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda token: token.replace("-", "_"),
    "max_content_width": 120,
}


class _Pair(click.ParamType[tuple[str, str]]):
    """NAME=VALUE."""

    name = "NAME=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return cast(tuple[str, str], value)
        name, equals, text = value.partition("=")
        if not equals or not name.isidentifier():
            self.fail(f"{value!r} is not NAME=VALUE", param, ctx)
        return name, text


class _Instant(click.ParamType[datetime.datetime]):
    name = "TIME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime.datetime:
        return options.instant(value) if isinstance(value, str) else value


class _Length(click.ParamType[int]):
    """A duration, in µs."""

    name = "DURATION"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from pipelines.transforms.windows import Duration

        return Duration.fixed(value, param.opts[0] if param else "") if isinstance(value, str) else value


class _Until(_Instant):
    name = "end|TIME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == "end" else super().convert(value, param, ctx)


def _option(*names: str, **settings: Any) -> Callable[[Any], Any]:
    """An option whose environment variable is named as the flag is, whatever the parameter's name in Python."""
    return click.option(*names, envvar="PIPELINES_" + names[0][2:].upper(), **settings)


_PIPELINE = click.argument("pipelines", metavar="PIPELINE...", nargs=-1, required=True)
_SET = _option("--set", "parameters", multiple=True, type=_Pair(), help="A parameter of the definition; repeatable.")
_JSON = _option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
_WAREHOUSE = _option(
    "--warehouse", default=options.Deployment.warehouse, show_default=True, metavar="URI", help="Views and events."
)


@click.group(context_settings=_CONTEXT)
def cli() -> None:
    """Data products: declared once, run in batch or live, asked with SQL.

    PIPELINE is a built-in name (`pipelines list`), or path/to/file.py:object.
    """


@cli.command(context_settings={**_CONTEXT, "ignore_unknown_options": True, "allow_extra_args": True})
@_option("--pipeline", metavar="NAME|FILE.py:OBJECT", required=True, help="What to run.")
@_option("--mode", type=click.Choice(options.MODES), default="batch", show_default=True, help="How to run it.")
@_option("--runner", default=options.Deployment.runner, show_default=True, metavar="NAME", help="What executes it.")
@_option("--history", metavar="URI", help="The files to read: a path, a glob, s3:// or gs://.")
@_option("--dimension", "dimensions", multiple=True, type=_Pair(), help="NAME=URI of a look-up; repeatable.")
@_WAREHOUSE
@_option(
    "--store", default=options.Deployment.store, show_default=True, metavar="URI|none", help="For look-ups by key."
)
@_option(
    "--dead_letters", default=options.Deployment.dead_letters, show_default=True, metavar="URI", help="Refused rows."
)
@_option("--from", "from_", type=_Instant(), help="Recompute from this event time on; UTC unless it has an offset.")
@_option("--to", type=_Instant(), help="Recompute up to this event time, exclusive.")
@_option("--live", metavar="URI", help="The log to follow: data/log/<pipeline>.db by default.")
@_option("--lake", metavar="URI", help="Where what was live is archived; batch reads it in place of a history.")
@_option("--state", default=options.Deployment.state, show_default=True, metavar="URI", help="Turns of micro-batch.")
@_option("--trigger", type=_Length(), default="1s", show_default=True, help="How often a live run gives results.")
@_option("--until", type=_Until(), help="End a live run: at the end of the log, or at an event time.")
@_option("--since", type=click.Choice(["last"]), help="Batch: only the windows of what the lake has new since then.")
@_option("--ahead", type=_Length(), default="1h", show_default=True, help="How far an event time may be in the future.")
@_option("--refresh", type=_Length(), default="1m", show_default=True, help="How old dimensions of a live run get.")
@_option("--rebuild", is_flag=True, help="Forget the live state, and read the log again from its first offset.")
@_SET
@_option("--max_rejected", type=float, metavar="SHARE", help="Refuse the data past this share of rejected rows.")
@_option("--buckets", type=int, metavar="N", help="Parts of a view's merge; by default what suits the runner.")
@_option("--report", default=options.Deployment.report, show_default=True, metavar="URI", help="Where run.json goes.")
@_option("--dry_run", is_flag=True, help="Check everything, read every header, run nothing.")
@_JSON
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
    flags = _passed(context)
    from pipelines import definition
    from pipelines import run as runs

    declared = definition.load(pipeline, **dict(parameters))
    deployment = _deployment(pipeline, declared, places)
    _quiet()
    if dry_run:
        runs.dry_run(declared, deployment)
        click.echo(f"{declared.name}: everything is in place; nothing was run")
        return
    report = runs.run(declared, deployment, flags)
    if as_json:
        click.echo(report.json())
        return
    from pipelines import progress, warehouse

    click.echo(report.head())
    rows: Iterable[str] = ()
    if deployment.mode == "batch":
        progress.last()
        rows = warehouse.sample(declared, deployment.warehouse)
    for part in (report.counts(), "", report.views(), *rows, report.foot()):
        click.echo(part)


@cli.command(context_settings=_CONTEXT)
@_option("--pipeline", metavar="NAME|FILE.py:OBJECT", required=True, help="Whose history.")
@_option("--history", metavar="URI", help="The files to send: a path, a glob, s3:// or gs://.")
@_option("--live", metavar="URI", help="The log to send them to: data/log/<pipeline>.db by default.")
@_option("--rate", type=float, metavar="ROWS/S", help="Rows a second; by default as many as the log takes.")
@_option("--speedup", type=float, metavar="FACTOR", help="Seconds of event time a second.")
@_option("--shuffle", default="0s", show_default=True, metavar="DURATION", help="Displace rows by up to this.")
@_option("--late", type=float, default=0.0, metavar="SHARE", help="Of the rows, sent when they are late for all views.")
@_option("--duplicate", type=float, default=0.0, metavar="SHARE", help="Of the rows, sent again a little later.")
@_option("--corrupt", type=float, default=0.0, metavar="SHARE", help="Bad messages to add, as a share of the rows.")
@_option("--seed", type=int, default=0, metavar="N", help="Another seed disorders other rows; the same one the same.")
@_option("--from", "from_", type=_Instant(), help="Send from this event time on; UTC unless it has an offset.")
@_option("--to", type=_Instant(), help="Send up to this event time, exclusive.")
@_option("--partitions", type=int, metavar="N", help="Partitions 0 to N-1; by default those of the log, else 4.")
@_SET
@_JSON
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
        options.expand(history or _history(pipeline, declared)),
        options.expand(live or _log(declared)),
        disorder,
        start=settings.pop("from_"),
        stop=settings.pop("to"),
        **settings,
    )
    click.echo(report.json() if as_json else report.text())


@cli.command(context_settings=_CONTEXT)
@_option("--pipeline", metavar="NAME|FILE.py:OBJECT", required=True, help="Whose log.")
@_option("--live", metavar="URI", help="The log: data/log/<pipeline>.db by default.")
@_option("--lake", metavar="URI", required=True, help="Where to.")
@_option("--ahead", type=_Length(), default="1h", show_default=True, help="How far an event time may be in the future.")
@_SET
def archive(pipeline: str, live: str | None, lake: str, ahead: int, parameters: Sequence[tuple[str, str]]) -> None:
    """Archive what a log holds now into the lake, once, and compact it. A live run with --lake does so by itself."""
    from pipelines import archive as archiving
    from pipelines import definition

    declared = definition.load(pipeline, **dict(parameters))
    places = options.Deployment(live=options.expand(live or _log(declared)), lake=options.expand(lake), ahead=ahead)
    done = archiving.archive(declared, places)
    fewer = archiving.lake(declared, f"{places.lake}").compact()
    click.echo(f"{declared.name}: {done.rows:,} rows archived, {done.undated:,} without an event time; {_held(done)}")
    if fewer:
        click.echo(f"{declared.name}: {fewer} small files fewer")


@cli.command(context_settings={**_CONTEXT, "ignore_unknown_options": True, "allow_extra_args": True})
@_option("--pipeline", metavar="NAME|FILE.py:OBJECT", required=True, help="What to try.")
@_option("--runner", default=options.Deployment.runner, show_default=True, metavar="NAME", help="What executes it.")
@_option("--history", metavar="URI", help="The rows to try it on; a built-in example's own, else rows are made up.")
@_option("--dimension", "dimensions", multiple=True, type=_Pair(), help="NAME=URI of a look-up; repeatable.")
@_option("--seed", type=int, default=0, metavar="N", help="Another seed, another disorder; the same one the same.")
@_option("--restarts", type=click.IntRange(0), default=8, show_default=True, metavar="N", help="Of the speed layer.")
@_SET
@_JSON
@click.pass_context
def parity(
    context: click.Context,
    /,
    pipeline: str,
    runner: str,
    history: str | None,
    dimensions: Sequence[tuple[str, str]],
    seed: int,
    restarts: int,
    parameters: Sequence[tuple[str, str]],
    as_json: bool,
) -> None:
    """Prove that the layers agree: exit 3 where they do not, with the first windows that differ.

    The pipeline runs live in turns, over a log in disorder, with late, repeated and bad messages, and dies at random
    points; then what it gave to the store is compared with a bounded run, value by value. All is temporary.
    """
    flags = _passed(context)
    from pipelines import definition
    from pipelines import parity as trial

    declared = definition.load(pipeline, **dict(parameters))
    if history is None and ":" not in pipeline and "HISTORY" in definition.module(pipeline):
        history = _history(pipeline, declared)
    _quiet()
    report = trial.parity(
        declared,
        None if history is None else options.expand(history),
        runner,
        dimensions=_dimensions(pipeline, declared, dimensions, made_up=history is None),
        flags=flags,
        seed=seed,
        restarts=restarts,
    )
    click.echo(report.json() if as_json else report.text())
    if report.different:
        raise DataRefused(f"{declared.name}: the layers differ, with seed {seed}")


@cli.command(context_settings=_CONTEXT)
@_PIPELINE
@_SET
def check(pipelines: Sequence[str], parameters: Sequence[tuple[str, str]]) -> None:
    """Validate definitions: every column, type and expression."""
    from pipelines import definition

    for name in pipelines:
        declared = definition.load(name, **dict(parameters))
        views = ", ".join(view.name for view in declared.views) or "no views"
        click.echo(f"{declared.name}: fine. Steps: {len(declared.steps)}. Views: {views}")


@cli.command(context_settings=_CONTEXT)
@_PIPELINE
def test(pipelines: Sequence[str]) -> None:
    """Run the tests that stand beside definitions: functions test_… of their modules."""
    from pipelines import definition

    failed = 0
    for path in pipelines:
        module = definition.module(path)
        found = [(name, function) for name, function in module.items() if name.startswith("test_")]
        for name, function in found:
            fault = _fault(function)
            failed += bool(fault)
            click.echo(f"{path}: {name[5:].replace('_', ' ')}: {fault or 'ok'}")
        if not found:
            click.echo(f"{path}: no tests beside it; write functions test_… with pipelines.testing")
    if failed:
        raise UserError(f"{failed} failed")


@cli.command(name="list", context_settings=_CONTEXT)
def list_() -> None:
    """List the built-in definitions."""
    from pipelines import definition, report

    loaded = [definition.load(module.name) for module in pkgutil.iter_modules(examples.__path__)]
    told = [(one.name, ", ".join(view.name for view in one.views), one.doc) for one in loaded]
    click.echo(report.grid(("pipeline", "views", ""), told))


@cli.command(context_settings=_CONTEXT)
@click.argument("pipeline")
@_SET
@_JSON
def describe(pipeline: str, parameters: Sequence[tuple[str, str]], as_json: bool) -> None:
    """Tell a definition: schema, steps, the SQL they become, and the source columns of every column."""
    from pipelines import definition
    from pipelines import describe as telling

    declared = definition.load(pipeline, **dict(parameters))
    told = json.dumps(telling.facts(declared), indent=2, ensure_ascii=False) if as_json else telling.describe(declared)
    click.echo(told)


@cli.command(context_settings=_CONTEXT)
@click.argument("sql")
@_WAREHOUSE
@_JSON
def query(sql: str, warehouse: str, as_json: bool) -> None:
    """Ask the warehouse with SQL (DuckDB's), over tables <pipeline>.<view> and <pipeline>.events. Writes nothing."""
    from pipelines import warehouse as tables

    answer = tables.ask(sql, options.expand(warehouse))
    click.echo(tables.as_json(answer) if as_json else tables.as_text(answer))


def _passed(context: click.Context) -> list[str]:
    """What is left for Beam. Beam is imported only if there is something."""
    if not context.args:
        return []
    _quiet()
    from pipelines.runners import flags

    ours = [name for param in context.command.params for name in param.opts]
    return flags.accepted(context.args, ours)


def _deployment(name: str, declared: Any, places: dict[str, Any]) -> options.Deployment:
    """The places as given; of a built-in example also where its own data is: HISTORY and DIMENSIONS of its module."""
    given = _dimensions(name, declared, places.pop("dimensions"))
    if places["mode"] != "batch":
        places["live"] = places["live"] or _log(declared)
    elif not places["history"] and not places["lake"]:
        places["history"] = _history(name, declared)
    if places["store"] == "none":
        places["store"] = None
    expanded: dict[str, Any] = {
        key: options.expand(value) if isinstance(value, str) else value for key, value in places.items()
    }
    return options.Deployment(dimensions=given, **expanded)


def _dimensions(name: str, declared: Any, pairs: Iterable[tuple[str, str]], made_up: bool = False) -> dict[str, str]:
    """Where the dimensions are: as given, else DIMENSIONS of a built-in example. made_up: some may lack."""
    from pipelines import definition

    module = {} if ":" in name else definition.module(name)
    known, given = [dimension.name for dimension in declared.dimensions], dict(pairs)
    for dimension in given:
        if dimension not in known:
            raise UserError(f"--dimension {dimension}=…: not looked up by {declared.name}.{_near(dimension, known)}")
    missing = [dimension for dimension in known if dimension not in given]
    if missing and not made_up:
        embedded = module["DIMENSIONS"]() if "DIMENSIONS" in module else {}
        if lacking := [dimension for dimension in missing if dimension not in embedded]:
            raise UserError(f"{declared.name} looks up {lacking[0]}: say where it is with --dimension {lacking[0]}=URI")
        given.update({dimension: embedded[dimension] for dimension in missing})
    return {key: options.expand(uri) for key, uri in given.items()}


def _held(done: Any) -> str:
    offsets = ", ".join(f"{offset:,} of partition {name}" for name, offset in done.extent.offsets.items())
    return f"the lake now reaches offset {offsets}" if offsets else "the log is empty"


def _history(name: str, declared: Any) -> str:
    """Where the history of a built-in example is: HISTORY of its module."""
    from pipelines import definition

    module = {} if ":" in name else definition.module(name)
    if "HISTORY" not in module:
        raise UserError(f"{declared.name}: say what to read with --history=URI (a path, a glob, s3:// or gs://)")
    return cast(str, module["HISTORY"]())


def _log(declared: Any) -> str:
    return f"data/log/{declared.name}.db"


def _fault(test: Callable[[], None]) -> str:
    """Why a test fails: the place and the words of what it raises; nothing if it passes."""
    try:
        test()
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[1:2]
        where = "".join(f"{Path(frame.filename).name}:{frame.lineno}: {frame.line}: " for frame in place)
        return f"FAILED {where}{type(error).__name__} {error}".rstrip() + _sides(error)
    return ""


def _sides(error: Exception) -> str:
    """What the two sides of a failed ``assert … == …`` of a test were, computed again; nothing for other errors."""
    trace = error.__traceback__ and error.__traceback__.tb_next
    if trace is None or trace.tb_next is not None or not isinstance(error, AssertionError) or error.args:
        return ""
    frame = trace.tb_frame
    at = trace.tb_lineno - frame.f_code.co_firstlineno + 1
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(frame.f_code)))):
        if not isinstance(node, ast.Assert) or not node.lineno <= at <= (node.end_lineno or at):
            continue
        if isinstance(node.test, ast.Compare):
            sides = {"found": node.test.left, "expected": node.test.comparators[0]}
            values = {name: eval(ast.unparse(side), frame.f_globals, frame.f_locals) for name, side in sides.items()}
            return "".join(f"\n    {name:8} {value!r}" for name, value in values.items())
    return ""


def _near(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    return f" Nearest: {close[0]}" if close else ""


def _quiet() -> None:
    """Beam logs what it also raises, and warns of what it lacks and nobody asked for."""
    logging.basicConfig(level=logging.ERROR)
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)


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
            raise UserError(f"{SETTINGS}: no option {key!r}.{_near(key, every)}")
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
