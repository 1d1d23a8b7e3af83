"""The steps of a definition: each one declared change to rows, and the SQL that it becomes.

An expression is SQL text, DuckDB dialect, over the columns of the row as the steps before it left them.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from pipelines.transforms import query
from pipelines.transforms.chain import FILTERED
from pipelines.transforms.errors import UserError
from pipelines.transforms.expressions import DefinitionError, arrow_types, quote
from pipelines.transforms.protect import Mask, Pseudonym
from pipelines.transforms.schema import RowSchema
from pipelines.transforms.stage import Builder, Rule
from pipelines.transforms.windows import Duration

Sql = str
Names = str | tuple[str, ...]
OnFail = Literal["reject", "flag", "stop"]


class StepError(UserError):
    """A step that is declared wrongly: says which, the value, and what it may be."""


def declared_at() -> str:
    """``file.py:31`` of the first caller outside this package: where a definition says it."""
    frame = sys._getframe(1)
    ours = ("pipelines.transforms", "pipelines.definition")
    while frame.f_back and (
        frame.f_globals.get("__name__", "").startswith(ours) or frame.f_code.co_filename == "<string>"
    ):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


@dataclass(frozen=True)
class Step:
    """One declared change to rows."""

    at: str = field(default_factory=declared_at, init=False, compare=False, repr=False)

    @property
    def label(self) -> str:
        return type(self).__name__

    def build(self, to: Builder) -> None:
        """Checks the step against the columns at hand, and adds its SQL. Raises DefinitionError."""
        raise NotImplementedError


def _named(kind: str, values: dict[str, Any], example: str) -> tuple[tuple[str, Any], ...]:
    if not values:
        raise StepError(f"{kind}() declares nothing; write {example}")
    for name in values:
        if name.startswith("_"):
            raise StepError(f"{kind}({name}=…): names that begin with _ are reserved")
    return tuple(values.items())


@dataclass(frozen=True, init=False)
class Check(Step):
    """Rules a row must meet; null passes, as in SQL's CHECK. The first rule that is false names the reason.

    on_fail: ``reject`` makes the row a dead letter; ``flag`` keeps it and adds a boolean column named as the rule,
    false where it failed; ``stop`` ends the run with exit 3.
    """

    rules: tuple[tuple[str, Sql], ...]
    on_fail: OnFail

    def __init__(self, *, on_fail: OnFail = "reject", **rules: Sql) -> None:
        if on_fail not in ("reject", "flag", "stop"):
            raise StepError(f"Check(on_fail={on_fail!r}): reject, flag or stop")
        _set(self, rules=_named("Check", rules, "Check(positive='amount > 0')"), on_fail=on_fail)

    def build(self, to: Builder) -> None:
        found = {name: to.check(sql, "BOOLEAN", name) for name, sql in self.rules}
        flags, rules = {}, []
        for name, rule in found.items():
            failed = to.reason(f"{name} failed", rule.sql, stop=self.on_fail == "stop")
            if self.on_fail == "flag":
                if name in to.scope.types:
                    raise DefinitionError(f"{to.where}: there is a column {name!r} already; give the rule another name")
                flags[to.free(name)] = to.guard(f"coalesce(({rule.sql}), true)")
                rules.append((rule.sql, Rule("false", FILTERED, failed)))
            else:
                code = to.reason(name, rule.sql, stop=self.on_fail == "stop")
                rules.append((rule.sql, Rule(f"NOT ({rule.sql})", code, failed)))
        sources = {name: to.scope.sources(rule) for name, rule in found.items()}
        to.select(flags, rules)
        for name in flags:
            to.scope.put(name, "BOOLEAN", sources[name])


@dataclass(frozen=True)
class Filter(Step):
    """Keeps only the rows for which ``keep`` is true; the others are counted as filtered, not rejected."""

    keep: Sql

    def build(self, to: Builder) -> None:
        keep = to.check(self.keep, "BOOLEAN").sql
        failed = to.reason("filter failed", keep)
        to.select({}, [(keep, Rule(f"({keep}) IS NOT TRUE", FILTERED, failed))])


@dataclass(frozen=True, init=False)
class Derive(Step):
    """Adds or replaces columns; each sees the columns before this step, not its siblings."""

    columns: tuple[tuple[str, Sql], ...]

    def __init__(self, **columns: Sql) -> None:
        _set(self, columns=_named("Derive", columns, "Derive(late='delay > 15')"))

    def build(self, to: Builder) -> None:
        found = {to.free(name): to.check(sql, name=name) for name, sql in self.columns}
        to.settle(found)
        cells = {name: to.guard(expression.sql) for name, expression in found.items()}
        sources = {name: to.scope.sources(expression) for name, expression in found.items()}
        to.select(cells, [(made.sql, to.failure(name, made.sql, made.type)) for name, made in found.items()])
        for name, expression in found.items():
            to.scope.put(name, expression.type, sources[name])


@dataclass(frozen=True, init=False)
class Drop(Step):
    """Removes columns."""

    columns: tuple[str, ...]

    def __init__(self, *columns: str) -> None:
        if not columns:
            raise StepError("Drop() declares nothing; write Drop('column')")
        _set(self, columns=columns)

    def build(self, to: Builder) -> None:
        to.settle(self.columns)
        for name in self.columns:
            if name == "event_time":
                raise DefinitionError(f"{to.where}: event_time is what windows go by; it stays")
            to.scope.drop(to.column(name))
        to.select()


@dataclass(frozen=True, init=False)
class Lookup(Step):
    """Adds columns of a dimension: the row with the same key, or with ``valid_from`` the last one at or before ``at``.

    on: columns that are the dimension's key, or {event column: key column}. take: the dimension's columns, or
    {new name: column}. at: event time by default. within: an older match counts as none. missing: null, or reject.
    """

    dimension: Any
    on: tuple[tuple[str, str], ...]
    take: tuple[tuple[str, str], ...]
    at_time: Sql | None
    within: str | None
    missing: Literal["null", "reject"]

    def __init__(
        self,
        dimension: Any,
        *,
        on: Names | dict[str, str],
        take: Names | dict[str, str],
        at: Sql | None = None,
        within: str | None = None,
        missing: Literal["null", "reject"] = "null",
    ) -> None:
        if not hasattr(dimension, "valid_from"):
            raise StepError(f"Lookup({dimension!r}): a Dimension, as in Dimension('airports', Airport, key='code')")
        if missing not in ("null", "reject"):
            raise StepError(f"Lookup(missing={missing!r}): null or reject")
        if within is not None:
            Duration.fixed(within, "Lookup within")
        pairs = tuple(on.items()) if isinstance(on, dict) else tuple(zip(names(on), dimension.key, strict=False))
        if not isinstance(on, dict) and len(names(on)) != len(dimension.key):
            raise StepError(f"Lookup({dimension.name!r}, on={on!r}): its key is {', '.join(dimension.key)}")
        taken = tuple(take.items()) if isinstance(take, dict) else tuple((name, name) for name in names(take))
        _set(self, dimension=dimension, on=pairs, take=taken, at_time=at, within=within, missing=missing)

    def build(self, to: Builder) -> None:
        dimension, types = self.dimension, arrow_types(self.dimension.schema.arrow)
        number = len(to.scope.types)
        to.joins(dimension.name)
        self._matches(to, types)
        pairs = [(f"_{number}k{n}", quote(event), quote(key)) for n, (event, key) in enumerate(self.on)]
        takes = [(f"_{number}t{n}", new, column) for n, (new, column) in enumerate(self.take)]
        for _, new, column in takes:
            if column not in types:
                raise DefinitionError(
                    f"{to.where}: no column {column!r} in {dimension.name}. It has {', '.join(types)}"
                )
            if to.free(new) in to.scope.types:
                raise DefinitionError(
                    f"{to.where}: there is a column {new!r} already; take={{'another_name': {column!r}}}"
                )
        at = to.check(self.at_time or "event_time", "TIMESTAMP WITH TIME ZONE", "at" if self.at_time else "").sql
        columns = [f"{key} AS {alias}" for alias, _, key in pairs] + [f"{quote(c)} AS {alias}" for alias, _, c in takes]
        columns += [f"{quote(dimension.valid_from)} AS _{number}from"] if dimension.valid_from else []
        right = f"(SELECT true AS _{number}hit, {', '.join(columns)} FROM dim_{dimension.name})"
        join = " AND ".join(f"{event} = {alias}" for alias, event, _ in pairs)
        hit = f"coalesce(_{number}hit, false)"
        if dimension.valid_from:
            join += f" AND _{number}at >= _{number}from"
        if self.within:
            age = f"epoch_us(_{number}at) - epoch_us(_{number}from)"
            hit = f"coalesce({age} <= {Duration.fixed(self.within, 'within')}, false)"

        def source(previous: str) -> str:
            if not dimension.valid_from:
                return f"{previous} LEFT JOIN {right} ON {join}"
            return f"(SELECT *, TRY({at}) AS _{number}at FROM {previous}) ASOF LEFT JOIN {right} ON {join}"

        rules = []
        if self.missing == "reject":
            code = to.reason(
                f"no {dimension.name}", f"no row of {dimension.name} for {', '.join(event for event, _ in self.on)}"
            )
            rules.append(("true", Rule(f"NOT {hit}", code, code)))
        else:
            to.miss(f"_miss{number}", dimension.name, f"older than {self.within}" if self.within else "")
        cells = {new: f"CASE WHEN {hit} THEN {alias} END" for alias, new, _ in takes}
        to.select(cells, rules, source, {} if rules else {f"_miss{number}": f"NOT {hit}"})
        for _, new, column in takes:
            to.scope.put(new, types[column], frozenset({f"{dimension.name}.{column}"}))

    def _matches(self, to: Builder, types: dict[str, str]) -> None:
        """Checks the columns that are joined."""
        for event, key in self.on:
            if key not in self.dimension.key:
                raise DefinitionError(
                    f"{to.where}: {key!r} is not in the key of {self.dimension.name} ({', '.join(self.dimension.key)})"
                )
            left, right = to.check(quote(to.column(event))).type, types[key]
            if left != right:
                raise DefinitionError(
                    f"{to.where}: {event} is {left}, {self.dimension.name}.{key} is {right}; "
                    "Derive one of the same type"
                )
        if len(self.on) != len(self.dimension.key):
            raise DefinitionError(
                f"{to.where}: on names {len(self.on)} of the key columns {', '.join(self.dimension.key)}"
            )
        if not self.dimension.valid_from and (self.at_time or self.within):
            raise DefinitionError(
                f"{to.where}: {self.dimension.name} keeps no history (valid_from), so at= and within= mean nothing"
            )


@dataclass(frozen=True)
class Explode(Step):
    """A list of structs becomes one row each; the struct's fields become columns. Without items there is no row."""

    column: str

    def build(self, to: Builder) -> None:
        kind = to.check(quote(to.column(self.column))).type
        if not kind.startswith("STRUCT(") or not kind.endswith("[]"):
            raise DefinitionError(f"{to.where}: {self.column} is {kind}; Explode takes a list of structs (list[Row])")
        to.close(exploded=True)
        fields = struct_fields(kind.removesuffix("[]"))
        sources = to.scope.lineage[self.column]
        to.scope.drop(self.column)
        for name in fields:
            if to.free(name) in to.scope.types:
                raise DefinitionError(
                    f"{to.where}: there is a column {name!r} already; Drop it, or Derive it under another name"
                )
        cells = {name: f"_item.{quote(name)}" for name in fields}
        to.select(cells, (), lambda previous: f"(SELECT *, unnest({quote(self.column)}) AS _item FROM {previous})")
        for name, of in fields.items():
            to.scope.put(name, of, sources)


@dataclass(frozen=True, init=False)
class Protect(Step):
    """Replaces personal values: ``Pseudonym()`` by a keyed HMAC, ``Mask()`` by a fixed text. After this step the
    columns are text, and nothing that follows sees the values."""

    columns: tuple[tuple[str, Pseudonym | Mask], ...]

    def __init__(self, **columns: Pseudonym | Mask) -> None:
        _set(self, columns=_named("Protect", columns, "Protect(caller=Pseudonym())"))

    def build(self, to: Builder) -> None:
        cells = {}
        for name, policy in self.columns:
            if name == "event_time" or not isinstance(policy, Pseudonym | Mask):
                raise DefinitionError(f"{to.where}: {name}={policy!r}: a column but event_time, Pseudonym() or Mask()")
            kind = to.check(quote(to.column(name))).type
            problem = policy.check(kind)
            if problem:
                raise DefinitionError(f"{to.where}, {name}: {problem}")
            cells[name] = to.guard(policy.sql(quote(name), kind))
            to.keyed |= isinstance(policy, Pseudonym)
        to.select(cells, certain=True)
        for name in cells:
            to.scope.types[name] = "VARCHAR"


@dataclass(frozen=True, init=False)
class Apply(Step):
    """A row-local function of an Arrow table: as many rows, in the same order, with the columns of ``adds`` (Python
    types as in a row class) set. ``pipelines.testing.run`` re-cuts its batches to see that it is row-local."""

    function: Callable[[pa.Table], pa.Table]
    adds: tuple[tuple[str, Any], ...]

    def __init__(self, function: Callable[[pa.Table], pa.Table], *, adds: dict[str, Any]) -> None:
        if not callable(function):
            raise StepError(f"Apply({function!r}): a function of a table, and adds={{name: type}} for its new columns")
        _set(self, function=function, adds=_named("Apply", adds, "Apply(function, adds={'score': float})"))

    def build(self, to: Builder) -> None:
        row = type("Adds", (), {"__annotations__": dict(self.adds)})
        to.python(self.function, arrow_types(RowSchema.of(row).arrow))


def struct_fields(kind: str) -> dict[str, str]:
    """The fields of a DuckDB STRUCT type, with their types.

    >>> struct_fields("STRUCT(sku VARCHAR, price DOUBLE)")
    {'sku': 'VARCHAR', 'price': 'DOUBLE'}
    """
    empty = query.run(f"SELECT unnest(NULL::{kind}) WHERE false", {})
    return arrow_types(empty.schema)


def names(value: Names) -> tuple[str, ...]:
    """One name or several, as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value)


def _set(step: Step, **values: Any) -> None:
    object.__setattr__(step, "at", declared_at())
    for name, value in values.items():
        object.__setattr__(step, name, value)
