"""The parameters of a template, made of the flags of ``pipelines run`` and of a definition.

One source for the metadata, the README and the check at launch. Beam-free.
"""

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click

from pipelines import definition
from pipelines.definition import Pipeline
from pipelines.options import masked
from pipelines.remote import local
from pipelines.transforms.errors import UserError

BATCH = (
    *("history", "warehouse", "dead_letters", "store", "report", "lake"),
    *("from", "to", "since", "max_rejected", "buckets"),
)
STREAM = ("live", "state", "dead_letters", "store", "trigger", "until", "ahead", "refresh", "buckets")
_REQUIRED = ("warehouse", "dead_letters", "report", "live", "state")

_TIME = r"\d{4}-\d{2}-\d{2}([T ]\d{2}:\d{2}(:\d{2}(\.\d{1,6})?)?)?(Z|[+-]\d{2}:\d{2})?"
_FILES, _SYSTEM = r"(gs|s3)://\S+", r"[a-z][a-z0-9+.-]*://\S+"
_VALUES = {
    "TIME": _TIME,
    "end|TIME": f"end|{_TIME}",
    "DURATION": r"[1-9]\d{0,8}(s|m|h|d|w)",
    "float": r"0(\.\d+)?|1(\.0+)?",
    "integer": r"[1-9]\d*",
    "int": r"-?\d+",
    "bool": "true|false",
    "str": r".+",
}
_NUMBER = r"-?\d+(\.\d+)?([eE][+-]?\d+)?"
_FACTS = "What was counted goes beside this name: for run.json to run.facts.json."
_PLACES = {"store": f"none|{_SYSTEM}", "live": _SYSTEM}


@dataclasses.dataclass(frozen=True)
class Parameter:
    """regex: what all of a value must match. default: None: there is none. flag: how ``pipelines run`` is told it."""

    name: str
    help: str
    regex: str
    flag: str
    optional: bool = True
    default: str | None = None

    def check(self, value: str) -> None:
        """Raises UserError for a value that the regex does not take.

        >>> Parameter("trigger", "how often", "^([1-9][0-9]*s)$", "--trigger=").check("soon")
        Traceback (most recent call last):
        pipelines.transforms.errors.UserError: parameter trigger=soon does not match ^([1-9][0-9]*s)$: how often
        """
        if re.fullmatch(self.regex, value) is None:
            raise UserError(f"parameter {self.name}={masked(value)} does not match {self.regex}: {self.help}")

    def metadata(self) -> dict[str, Any]:
        """As Dataflow has it."""
        told: dict[str, Any] = {"name": self.name, "label": self.name.replace("_", " "), "helpText": self.help}
        told |= {"isOptional": self.optional, "regexes": [self.regex], "paramType": "TEXT"}
        return told if self.default is None else told | {"defaultValue": self.default}


def parameters(name: str, pipeline: Pipeline, flags: Sequence[click.Parameter], mode: str) -> list[Parameter]:
    """Of a Flex Template, required ones first. name: what the definition is loaded by. flags: of ``pipelines run``."""
    wanted, known = BATCH if mode == "batch" else STREAM, {param.opts[0][2:]: param for param in flags}
    found = [_of(flag, known[flag]) for flag in wanted]
    found += [_dimension(one.name) for one in pipeline.dimensions]
    found += _declared(name)
    return sorted(found, key=lambda parameter: parameter.optional)


def classic(defaults: Mapping[str, str | None], flags: Sequence[click.Parameter]) -> list[Parameter]:
    """Of a classic template. defaults: its parameters, with the values that they have without one."""
    known = {param.opts[0][2:]: param for param in flags}
    found = [_of(name, known[name]) if name in known else _dimension(name[10:]) for name in defaults]
    return [
        dataclasses.replace(one, optional=defaults[one.name] is not None, default=defaults[one.name]) for one in found
    ]


def check(given: Mapping[str, str], known: Sequence[Parameter]) -> None:
    """Raises UserError for a parameter that is missing or has a value that its regex does not take."""
    for parameter in known:
        if parameter.name in given:
            parameter.check(given[parameter.name])
    for parameter in known:
        if parameter.name not in given and not parameter.optional:
            raise UserError(f"the parameter {parameter.name} is missing: {parameter.help}")


def _of(flag: str, param: click.Parameter) -> Parameter:
    assert isinstance(param, click.Option)
    if isinstance(param.type, click.Choice):
        values = "|".join(map(str, param.type.choices))
    else:
        values = _VALUES.get(param.type.name) or _PLACES.get(flag, _FILES)
    default = param.default if isinstance(param.default, str) else None
    if param.type.name == "text" and default is not None and local(default):
        default = "none" if flag == "store" else None
    about = _FACTS if flag == "report" else param.help or ""
    return Parameter(flag, about, f"^({values})$", f"--{flag}=", flag not in _REQUIRED, default)


def _dimension(name: str) -> Parameter:
    about = f"The files of the look-up {name}."
    return Parameter(f"dimension_{name}", about, f"^({_FILES})$", f"--dimension={name}=", optional=False)


def _declared(name: str) -> Iterator[Parameter]:
    """The parameters of a definition that is a function."""
    path, _, attribute = name.partition(":")
    found = definition.module(name)[attribute or path]
    if isinstance(found, Pipeline):
        return
    for one in inspect.signature(found, eval_str=True).parameters.values():
        kind = getattr(one.annotation, "__name__", "str")
        values = _NUMBER if kind == "float" else _VALUES.get(kind, _VALUES["str"])
        default = None if one.default is one.empty else str(one.default).lower() if kind == "bool" else str(one.default)
        about = f"Of the definition: {one.name}, {kind}."
        yield Parameter(f"set_{one.name}", about, f"^({values})$", f"--set={one.name}=", default is not None, default)
