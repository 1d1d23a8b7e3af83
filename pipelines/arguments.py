"""What the command line's flags are and mean, shared by its verbs. Beam is not imported for it."""

import datetime
import difflib
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import click

from pipelines import options
from pipelines.transforms.errors import UserError

CONTEXT: dict[str, Any] = {
    "auto_envvar_prefix": "PIPELINES",
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda token: token.replace("-", "_"),
    "max_content_width": 120,
}


class Pair(click.ParamType[tuple[str, str]]):
    """NAME=VALUE."""

    name = "NAME=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return cast(tuple[str, str], value)
        name, equals, text = value.partition("=")
        if not equals or not name.isidentifier():
            self.fail(f"{value!r} is not NAME=VALUE", param, ctx)
        return name, text


class Instant(click.ParamType[datetime.datetime]):
    """A time, UTC unless it has an offset."""

    name = "TIME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime.datetime:
        return options.instant(value) if isinstance(value, str) else value


class Length(click.ParamType[int]):
    """A duration, in µs."""

    name = "DURATION"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from pipelines.transforms.windows import Duration

        return Duration.fixed(value, param.opts[0] if param else "") if isinstance(value, str) else value


class Until(Instant):
    """The end of the log, or a time."""

    name = "end|TIME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == "end" else super().convert(value, param, ctx)


def option(*names: str, **settings: Any) -> Callable[[Any], Any]:
    """An option whose environment variable is named as the flag is, whatever the parameter's name in Python."""
    return click.option(*names, envvar="PIPELINES_" + names[0][2:].upper(), **settings)


PIPELINE = click.argument("pipelines", metavar="PIPELINE...", nargs=-1, required=True)
SET = option("--set", "parameters", multiple=True, type=Pair(), help="A parameter of the definition; repeatable.")
JSON = option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
WAREHOUSE = option(
    "--warehouse", default=options.Deployment.warehouse, show_default=True, metavar="URI", help="Views and events."
)


def passed(context: click.Context) -> list[str]:
    """What is left for Beam. Beam is imported only if there is something."""
    if not context.args:
        return []
    quiet()
    from pipelines.runners import flags

    ours = [name for param in context.command.params for name in param.opts]
    return flags.accepted(context.args, ours)


def deployment(name: str, declared: Any, places: dict[str, Any]) -> options.Deployment:
    """The places as given; of a built-in example also where its own data is: HISTORY and DIMENSIONS of its module."""
    given = dimensions(name, declared, places.pop("dimensions"))
    if places["mode"] != "batch":
        places["live"] = places["live"] or log(declared)
    elif not places["history"] and not places["lake"]:
        places["history"] = history(name, declared)
    if places["store"] == "none":
        places["store"] = None
    expanded: dict[str, Any] = {
        key: options.expand(value) if isinstance(value, str) else value for key, value in places.items()
    }
    return options.Deployment(dimensions=given, **expanded)


def dimensions(name: str, declared: Any, pairs: Iterable[tuple[str, str]], made_up: bool = False) -> dict[str, str]:
    """Where the dimensions are: as given, else DIMENSIONS of a built-in example. made_up: some may lack."""
    from pipelines import definition

    module = {} if ":" in name else definition.module(name)
    known, given = [dimension.name for dimension in declared.dimensions], dict(pairs)
    for dimension in given:
        if dimension not in known:
            raise UserError(f"--dimension {dimension}=…: not looked up by {declared.name}.{near(dimension, known)}")
    missing = [dimension for dimension in known if dimension not in given]
    if missing and not made_up:
        embedded = module["DIMENSIONS"]() if "DIMENSIONS" in module else {}
        if lacking := [dimension for dimension in missing if dimension not in embedded]:
            raise UserError(f"{declared.name} looks up {lacking[0]}: say where it is with --dimension {lacking[0]}=URI")
        given.update({dimension: embedded[dimension] for dimension in missing})
    return {key: options.expand(uri) for key, uri in given.items()}


def history(name: str, declared: Any) -> str:
    """Where the history of a built-in example is: HISTORY of its module."""
    from pipelines import definition

    module = {} if ":" in name else definition.module(name)
    if "HISTORY" not in module:
        raise UserError(f"{declared.name}: say what to read with --history=URI (a path, a glob, s3:// or gs://)")
    return cast(str, module["HISTORY"]())


def log(declared: Any) -> str:
    """The embedded log of a pipeline."""
    return f"data/log/{declared.name}.db"


def near(name: str, names: Sequence[str]) -> str:
    """The end of a refusal: what may have been meant."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    return f" Nearest: {close[0]}" if close else ""


def quiet() -> None:
    """Beam logs what it also raises, and warns of what it lacks and nobody asked for."""
    logging.basicConfig(level=logging.ERROR)
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)
