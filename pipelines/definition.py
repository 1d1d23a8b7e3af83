"""A data product, declared: where its rows' meaning is, what is done to them, and the views that are kept of them.

A definition names no place and no engine. It is checked as it is constructed: every column, type and expression.
"""

import dataclasses
import hashlib
import importlib.util
import inspect
import pkgutil
import sys
import traceback
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, get_args

from pipelines import sql
from pipelines.transforms.conform import EXTRA
from pipelines.transforms.errors import UserError
from pipelines.transforms.expressions import DefinitionError, nearest
from pipelines.transforms.measures import Measure
from pipelines.transforms.schema import RESERVED, UTC_MICROS, Extra, Invalid, RowSchema
from pipelines.transforms.steps import Names, Sql, Step, declared_at, names
from pipelines.transforms.windows import Duration, Whole, Window

__all__ = ["DefinitionError", "Dimension", "Pipeline", "Source", "View", "load"]


def _name(kind: str, name: str) -> None:
    if not name.isidentifier() or name != name.lower() or name.startswith("_"):
        raise DefinitionError(f"{kind} name {name!r}: lower-case letters, digits and _, as in delays_by_carrier")


def _choice(what: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise DefinitionError(
            f"{what}={value!r}: one of {', '.join(get_args(choices))}.{nearest(value, get_args(choices))}"
        )


def _tuple(what: str, values: Any, kind: type) -> tuple[Any, ...]:
    every = tuple(values) if isinstance(values, Iterable) else (values,)
    for value in every:
        if not isinstance(value, kind):
            raise DefinitionError(f"{what}: {value!r} is no {kind.__name__}")
    return every


@dataclass(frozen=True)
class Source:
    """The events: their row class, and what their time, identity, disorder and lateness are. Says nothing about where.

    event_time: SQL of type TIMESTAMP WITH TIME ZONE. identity: columns that name an event; None: every row counts.
    disorder: how long to wait before a window is called complete. lateness: how long after that the speed layer takes
    corrections. extra: what to do with a column that the row class lacks. invalid: with a value of another type.
    """

    row: type
    _: KW_ONLY
    event_time: Sql
    identity: Names | None = None
    name: str = "events"
    disorder: str = "0s"
    lateness: str = "0s"
    extra: Extra = "ignore"
    invalid: Invalid = "reject"

    def __post_init__(self) -> None:
        _name("source", self.name)
        _choice("Source extra", self.extra, Extra)
        _choice("Source invalid", self.invalid, Invalid)
        Duration.fixed(self.disorder, "Source disorder")
        Duration.fixed(self.lateness, "Source lateness")
        for name in self.identities:
            if name not in self.schema.names:
                raise DefinitionError(
                    f"Source identity: no column {name!r} in {self.schema.name}.{nearest(name, self.schema.names)}"
                )

    @property
    def schema(self) -> RowSchema:
        return RowSchema.of(self.row)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of a row as it comes: the schema's and, where what it lacks is kept, ``_extra``."""
        return (*self.schema.names, *((EXTRA.name,) if self.extra == "keep" else ()))

    @property
    def identities(self) -> tuple[str, ...]:
        return () if self.identity is None else names(self.identity)


@dataclass(frozen=True, init=False)
class Dimension:
    """A table that rows are looked up in by ``key``; with ``valid_from`` it keeps history and joins as of a time."""

    name: str
    row: type
    key: tuple[str, ...]
    valid_from: str | None

    def __init__(self, name: str, row: type, *, key: Names, valid_from: str | None = None) -> None:
        _name("dimension", name)
        for field, value in {"name": name, "row": row, "key": names(key), "valid_from": valid_from}.items():
            object.__setattr__(self, field, value)
        for column in (*self.key, *((valid_from,) if valid_from else ())):
            if column not in self.schema.names:
                raise DefinitionError(
                    f"Dimension {name!r}: no column {column!r} in {row.__name__}.{nearest(column, self.schema.names)}"
                )
        for of in self.schema.fields:
            if of.name == valid_from and of.type != UTC_MICROS:
                raise DefinitionError(f"Dimension {name!r}: valid_from={valid_from!r} is {of.type}; a datetime, please")

    @property
    def schema(self) -> RowSchema:
        return RowSchema.of(self.row)


_WHOLE = Whole()


@dataclass(frozen=True, init=False)
class View:
    """A keyed, windowed aggregate. Answers: keys, window_start, window_end, measures.

    A measure that is SQL text is an expression over the keys and the measures before it, evaluated after every merge,
    so a ratio rolls up rightly. steps: for this view alone, after the shared ones.
    """

    name: str
    by: tuple[str, ...]
    window: Window
    steps: tuple[Step, ...]
    doc: str
    measures: tuple[tuple[str, Measure | Sql], ...]
    at: str = dataclasses.field(compare=False, repr=False)

    def __init__(
        self,
        name: str,
        *,
        by: Names = (),
        window: Window = _WHOLE,
        steps: tuple[Step, ...] = (),
        doc: str = "",
        **measures: Measure | Sql,
    ) -> None:
        _name("view", name)
        if name == "events":
            raise DefinitionError("view name 'events' is taken: the cleaned rows are kept as table <pipeline>.events")
        if not isinstance(window, Window):
            raise DefinitionError(f"view {name!r}: window={window!r}: Tumbling, Sliding, Session or Whole")
        if not measures:
            raise DefinitionError(f"view {name!r} measures nothing; add for example rows=Count()")
        taken = {*RESERVED} - {*names(by)}
        for column in (*names(by), *measures):
            if column.lower() in taken or column.startswith("_"):
                raise DefinitionError(f"view {name!r}: the name {column!r} is taken or reserved; choose another")
            taken.add(column.lower())
        for measure, value in measures.items():
            if not isinstance(value, Measure | str):
                raise DefinitionError(
                    f"view {name!r}, measure {measure}={value!r}: a measure such as Count(), or SQL text"
                )
        every = _tuple(f"view {name!r}: steps", steps, Step)
        values = (name, names(by), window, every, doc, tuple(measures.items()), declared_at())
        for field, given in zip(dataclasses.fields(self), values, strict=True):
            object.__setattr__(self, field.name, given)


@dataclass(frozen=True)
class Pipeline:
    """The declaration of a data product: source, steps, views. Not ``beam.Pipeline``.

    events: also keep the cleaned rows as table ``<name>.events``. Raises DefinitionError for anything that cannot run,
    with the text underlined, the nearest right name and the fix.
    """

    name: str
    _: KW_ONLY
    source: Source
    steps: tuple[Step, ...] = ()
    views: tuple[View, ...] = ()
    events: bool = True
    doc: str = ""

    def __post_init__(self) -> None:
        _name("pipeline", self.name)
        if not isinstance(self.source, Source):
            raise DefinitionError(f"pipeline {self.name!r}: source={self.source!r}: a Source(Row, event_time=…)")
        object.__setattr__(self, "steps", _tuple(f"pipeline {self.name!r}: steps", self.steps, Step))
        object.__setattr__(self, "views", _tuple(f"pipeline {self.name!r}: views", self.views, View))
        if not self.views and not self.events:
            raise DefinitionError(f"pipeline {self.name!r} keeps nothing: give it views, or events=True")
        for what, given in (
            ("view", [view.name for view in self.views]),
            ("dimension", [d.name for d in self.dimensions]),
        ):
            for name in given:
                if given.count(name) > 1:
                    raise DefinitionError(f"pipeline {self.name!r}: {what} {name!r} is declared twice")
        self.plan()

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        """Every dimension that a step looks up, once."""
        steps = (*self.steps, *(step for view in self.views for step in view.steps))
        return tuple(dict.fromkeys(step.dimension for step in steps if hasattr(step, "dimension")))

    def plan(self, *, live: bool = False) -> sql.Plan:
        """What the declaration compiles to; live: for the speed layer."""
        return sql.compile(self, live)


def load(path_or_name: str, **parameters: str) -> Pipeline:
    """A pipeline by built-in name, or as ``path/to/file.py:object``; a function is called with the parameters.

    Parameters given as text become the type of the function's annotation (int, float, bool). Raises DefinitionError.
    """
    path, _, attribute = path_or_name.partition(":")
    namespace, attribute = module(path_or_name), attribute or path
    found = namespace.get(attribute)
    if found is None:
        made = [name for name, value in namespace.items() if isinstance(value, Pipeline)]
        raise DefinitionError(
            f"{path_or_name}: no {attribute!r} there.{nearest(attribute, list(namespace))} "
            f"Pipelines there: {', '.join(made) or 'none'}"
        )
    if callable(found) and not isinstance(found, Pipeline):
        found = found(**_arguments(path_or_name, found, parameters))
    elif parameters:
        raise DefinitionError(f"{path_or_name} is not a function, so it takes no --set {next(iter(parameters))}=…")
    if not isinstance(found, Pipeline):
        raise DefinitionError(f"{path_or_name} is {type(found).__name__}, not a Pipeline")
    return found


def module(path_or_name: str) -> dict[str, Any]:
    """What the module of a definition holds: ``path/to/file.py`` or a built-in name, ``:object`` or not."""
    path = path_or_name.partition(":")[0]
    return _executed(path) if path.endswith(".py") else _builtin(path)


def _executed(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise DefinitionError(f"--pipeline={path}: no such file")
    name = "_definition_" + hashlib.blake2b(str(Path(path).resolve()).encode(), digest_size=6).hexdigest()
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # row classes are looked up by module when their annotations are read
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:
        line = next(
            (
                f":{frame.lineno}"
                for frame in reversed(traceback.extract_tb(error.__traceback__))
                if frame.filename == path
            ),
            "",
        )
        raise DefinitionError(f"{path}{line}: {type(error).__name__}: {error}") from error
    return vars(module)


def _builtin(name: str) -> dict[str, Any]:
    from pipelines import examples

    names = sorted(module.name for module in pkgutil.iter_modules(examples.__path__))
    if name not in names:
        raise DefinitionError(
            f"--pipeline={name}: no such built-in pipeline.{nearest(name, names)} "
            f"Built in: {', '.join(names)}; or path/to/file.py:object"
        )
    return vars(importlib.import_module(f"{examples.__name__}.{name}"))


def _arguments(name: str, function: Any, given: dict[str, str]) -> dict[str, Any]:
    parameters = inspect.signature(function, eval_str=True).parameters
    arguments: dict[str, Any] = {}
    for parameter, value in given.items():
        if parameter not in parameters:
            raise DefinitionError(
                f"{name} has no parameter {parameter!r}.{nearest(parameter, list(parameters))} "
                f"It has: {', '.join(parameters) or 'none'}"
            )
        kind = parameters[parameter].annotation
        arguments[parameter] = _typed(name, parameter, value, kind)
    return arguments


def _typed(name: str, parameter: str, value: Any, kind: Any) -> Any:
    if not isinstance(value, str) or kind not in (int, float, bool):
        return value
    try:
        return {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
    except (ValueError, KeyError):
        raise DefinitionError(f"{name}: --set {parameter}={value!r} is not {kind.__name__}") from None
