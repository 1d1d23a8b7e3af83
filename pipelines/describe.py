"""A definition told in words: schema, steps, the SQL they become, and where each column comes from."""

import dataclasses
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipelines.definition import Dimension, Pipeline, View
from pipelines.report import grid, indent
from pipelines.sql import Lineage
from pipelines.transforms.chain import Chain, PythonStage
from pipelines.transforms.schema import RowSchema
from pipelines.transforms.steps import Step
from pipelines.transforms.view import ViewPlan

_PARTS = ("samples", "partial", "merge", "windowed", "result")
_WIDTH = 100
_CLAUSES = ("SELECT", "FROM", "WHERE", "GROUP", "ORDER", "ASOF", "LEFT")
_TOKEN = re.compile(r"""'(?:[^']|'')*'|"(?:[^"]|"")*"|--[^\n]*\n?|/\*.*?\*/|\w+|\s+|.""", re.DOTALL)


def describe(pipeline: Pipeline) -> str:
    """The whole pipeline. Its SQL is exactly what workers run, over the tables ``batch`` and ``dim_<name>``."""
    plan = pipeline.plan()
    parts = [_title(pipeline), *_source(pipeline)]
    for dimension in pipeline.dimensions:
        parts += [_heading(f"dimension {dimension.name}", _keyed(dimension)), _schema(dimension.schema)]
    parts += _steps("steps", pipeline.steps, plan.chain)
    if pipeline.events:
        parts += [_heading(f"table {pipeline.name}.events"), _columns(plan.chain.schema, plan.lineage["events"])]
    for view, compiled in zip(pipeline.views, plan.views, strict=True):
        parts += _view(pipeline, view, compiled, plan.lineage[view.name])
    return "\n".join(parts)


def facts(pipeline: Pipeline) -> dict[str, Any]:
    """The same, to be written as JSON."""
    plan, source = pipeline.plan(), pipeline.source
    views = {}
    for view, compiled in zip(pipeline.views, plan.views, strict=True):
        answers = [compiled.schema.field(name) for name in compiled.columns]
        views[view.name] = {
            "doc": view.doc,
            "by": list(view.by),
            "window": _written(view.window),
            "steps": [f"{step.label} {_said(step)}" for step in view.steps],
            "measures": {name: _written(measure) for name, measure in view.measures},
            "columns": _traced(answers, plan.lineage[view.name]),
            "sql": {"steps": _texts(compiled.chain), **{name: getattr(compiled, name) for name in _PARTS}},
        }
    return {
        "pipeline": pipeline.name,
        "doc": pipeline.doc,
        "source": {
            **{
                name: getattr(source, name)
                for name in ("name", "event_time", "disorder", "lateness", "extra", "invalid")
            },
            "identity": list(source.identities),
            "columns": _fields(source.schema),
        },
        "dimensions": {
            d.name: {"key": list(d.key), "valid_from": d.valid_from, "columns": _fields(d.schema)}
            for d in pipeline.dimensions
        },
        "steps": [f"{step.label} {_said(step)}" for step in pipeline.steps],
        "sql": _texts(plan.chain),
        "events": _traced(plan.chain.schema, plan.lineage["events"]) if pipeline.events else None,
        "views": views,
    }


def _fields(schema: RowSchema) -> dict[str, Any]:
    return {
        field.name: {"type": str(field.type), "nullable": field.nullable, **dataclasses.asdict(field.column)}
        for field in schema.fields
    }


def _traced(fields: Iterable[pa.Field], lineage: Lineage) -> dict[str, Any]:
    return {field.name: {"type": str(field.type), "from": sorted(lineage[field.name])} for field in fields}


def _texts(chain: Chain | None) -> list[str]:
    return [stage.label if isinstance(stage, PythonStage) else stage.sql for stage in chain.stages] if chain else []


def _title(pipeline: Pipeline) -> str:
    return f"{pipeline.name}: {pipeline.doc}" if pipeline.doc else pipeline.name


def _heading(name: str, said: str = "") -> str:
    return f"\n{name}" + (f": {said}" if said else "")


def _source(pipeline: Pipeline) -> Iterator[str]:
    source = pipeline.source
    identity = f"identity {', '.join(source.identities)}" if source.identities else "every row counts"
    waits = f"disorder {source.disorder}, lateness {source.lateness}"
    rules = f"another column: {source.extra}, another type: {source.invalid}"
    yield _heading(f"source {source.name}", f"event time {source.event_time}, {identity}, {waits}; {rules}")
    yield _schema(source.schema)


def _keyed(dimension: Dimension) -> str:
    since = f", valid from {dimension.valid_from}" if dimension.valid_from else ""
    return f"key {', '.join(dimension.key)}{since}"


def _schema(schema: RowSchema) -> str:
    rows = [
        (
            field.name,
            str(field.type),
            "" if field.nullable else "not null",
            field.column.unit or "",
            f"personal: {field.column.personal}" if field.column.personal else "",
            field.column.doc,
        )
        for field in schema.fields
    ]
    return indent(_without_empty(("column", "type", "null", "unit", "personal", ""), rows))


def _without_empty(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    kept = [index for index in range(len(names)) if index < 2 or any(row[index] for row in rows)]
    return grid([names[index] for index in kept], [[row[index] for index in kept] for row in rows])


def _steps(name: str, steps: tuple[Step, ...], chain: Chain) -> Iterator[str]:
    if steps:
        yield _heading(name)
        yield from (f"  {number} {step.label} {_said(step)}".rstrip() for number, step in enumerate(steps, 1))
    for stage in chain.stages:
        if isinstance(stage, PythonStage):
            yield _heading(f"{name}, a function", stage.label)
        else:
            yield f"{_heading(f'{name}, SQL')}\n{indent(laid_out(stage.sql))}"


def _said(step: Step) -> str:
    """What a step declares, as name=value."""
    values = {field.name: getattr(step, field.name) for field in dataclasses.fields(step) if field.name != "at"}
    return " ".join(_value(name, value) for name, value in values.items() if value not in (None, ()))


def _value(name: str, value: Any) -> str:
    if isinstance(value, Dimension):
        return value.name
    if isinstance(value, Mapping):
        value = tuple(value.items())
    if isinstance(value, tuple) and all(isinstance(pair, tuple) for pair in value):
        told = ", ".join(key if key == to else f"{key}={getattr(to, '__name__', to)}" for key, to in value)
        return told if name in ("rules", "columns") else f"{name}: {told}"
    if isinstance(value, tuple):
        return ", ".join(value)
    return f"{name}: {getattr(value, '__name__', value)}"


def _view(pipeline: Pipeline, view: View, plan: ViewPlan, lineage: Lineage) -> Iterator[str]:
    keys = f"by {', '.join(view.by)}" if view.by else "one row"
    yield _heading(
        f"view {pipeline.name}.{view.name}", f"{keys}, {_written(view.window)}{f'. {view.doc}' if view.doc else ''}"
    )
    answers = pa.schema([plan.schema.field(name) for name in plan.columns])
    yield _columns(answers, lineage, {name: _written(measure) for name, measure in view.measures})
    if plan.chain:
        yield from _steps(f"view {view.name}, steps", view.steps, plan.chain)
    for name in _PARTS:
        if getattr(plan, name):
            yield f"{_heading(f'view {view.name}, SQL, {name}')}\n{indent(laid_out(getattr(plan, name)))}"


def _written(value: Any) -> str:
    """A measure or a window as a definition has it; SQL text as it is."""
    if isinstance(value, str):
        return value
    arguments = []
    for name, parameter in inspect.signature(type(value)).parameters.items():
        given = getattr(value, name)
        if given != parameter.default:
            positional = parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            arguments.append(repr(given) if positional else f"{name}={given!r}")
    return f"{type(value).__name__}({', '.join(arguments)})"


def _columns(schema: pa.Schema, lineage: Lineage, measures: Mapping[str, str] = {}) -> str:
    rows = [
        (field.name, str(field.type), measures.get(field.name, ""), ", ".join(sorted(lineage[field.name])))
        for field in schema
    ]
    return indent(_without_empty(("column", "type", "measure", "from"), rows))


def laid_out(sql: str) -> str:
    """The same SQL on lines that can be read: queries indented, clauses on lines of their own, long lists broken.

    >>> print(laid_out("SELECT a, trim(both from b) FROM (SELECT * FROM batch) WHERE c"))
    SELECT a, trim(both from b)
    FROM (
      SELECT *
      FROM batch)
    WHERE c
    """
    lines: list[str] = []
    line, last, queries = "", "", [True]
    tokens = [token if token.strip() else " " for token in _TOKEN.findall(sql.strip())]

    def broken(width: int) -> None:
        nonlocal line
        lines.append(line.rstrip())
        line = "  " * width

    for place, token in enumerate(tokens):
        depth = sum(queries) - 1
        clause = queries[-1] and token in _CLAUSES and last != "ASOF"
        if line.endswith("\n") or (clause and line.strip()):
            broken(depth)
        line += token if line.strip() or token != " " else ""
        if token == "(":
            queries.append(any(word in ("SELECT", "WITH") for word in tokens[place + 1 : place + 3]))
            if queries[-1]:
                broken(depth + 1)
        elif token == "," and queries[-1] and (last == "query)" or len(line) > _WIDTH):
            broken(depth + (last != "query)"))
        last = last if token == " " else "query)" if token == ")" and queries.pop() else token
    return "\n".join([*lines, line.rstrip()])
