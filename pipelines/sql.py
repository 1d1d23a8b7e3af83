"""Definitions to SQL: the shared steps become a chain of queries, each view a partial, a merge and a result.

Nothing here runs over data; types and errors are DuckDB's own, asked for over empty tables.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipelines.transforms import lateness, query
from pipelines.transforms.chain import YEARS, Chain
from pipelines.transforms.conform import EXTRA
from pipelines.transforms.dating import Dating
from pipelines.transforms.expressions import DefinitionError, arrow_types, check, quote, underlined
from pipelines.transforms.gather import numbered, sketches
from pipelines.transforms.measures import Measure
from pipelines.transforms.sketches import NUMBER
from pipelines.transforms.stage import Builder, Rule, Scope
from pipelines.transforms.states import State
from pipelines.transforms.view import ViewPlan
from pipelines.transforms.windows import Session, Sliding, Window, floor_sql

if TYPE_CHECKING:
    from pipelines.definition import Pipeline, Source, View
    from pipelines.transforms.schema import RowSchema

TIME = "TIMESTAMP WITH TIME ZONE"
Lineage = dict[str, frozenset[str]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a pipeline compiles to. columns: the source's columns that a run must read. event_time: SQL over them.
    dating: refuses the rows without one, where rows are compared before ``chain`` refuses them. lineage: by table, each
    column's source columns (``column``, or ``dimension.column``)."""

    columns: tuple[str, ...]
    event_time: str
    dating: Dating
    chain: Chain
    views: tuple[ViewPlan, ...]
    lineage: dict[str, Lineage]

    @property
    def chains(self) -> tuple[Chain, ...]:
        """The shared steps and those of views."""
        return (self.chain, *(view.chain for view in self.views if view.chain is not None))

    @property
    def keyed(self) -> bool:
        """Whether a step needs the key of PIPELINES_KEY."""
        return any(chain.keyed for chain in self.chains)

    def read(self, source: "Source") -> "RowSchema":
        """The source's schema of what a run must read: all of it where an unused column would be one not known."""
        used = tuple(f for f in source.schema.fields if f.name in self.columns or source.extra != "ignore")
        return dataclasses.replace(source.schema, fields=used)


@functools.lru_cache(maxsize=256)
def compile(pipeline: "Pipeline", live: bool = False) -> Plan:
    """The plan of a pipeline: a function of the declaration alone, so it is made once.

    live: for the speed layer, whose rows are of a log (WATERMARK), and whose views are kept by ``lateness.live``: those
    of sliding windows tell rows apart by SINCE. Raises DefinitionError at the first thing that cannot run.
    """
    types = arrow_types(pipeline.source.schema.arrow)
    if pipeline.source.extra == "keep":
        types[EXTRA.name] = "VARCHAR"
    builder, guard = (
        Builder(pipeline.name, Scope(dict(types), {name: frozenset({name}) for name in types}), "source")
        for _ in range(2)
    )
    event_time = _event_time(builder, pipeline.source.event_time)
    _event_time(guard, pipeline.source.event_time)
    dating = Dating(f"coalesce(TRY(NOT ({_outside(event_time)})), false)", guard.chain(shared=False))
    _steps(builder, pipeline)
    chain = builder.chain(shared=True)
    if pipeline.events:
        _kept(chain.schema, f"pipeline {pipeline.name!r}, events=True")
    lineage, plans, used = {"events": dict(builder.scope.lineage)}, [], set(builder.used)
    for view in pipeline.views:
        plan, sources, needed = _view(pipeline, view, builder.scope.copy(), live)
        plans.append(plan)
        used |= needed
        lineage[view.name] = sources
    every = tuple(pipeline.source.schema.names)
    whole = pipeline.events or pipeline.source.identity is not None
    columns = every if whole else tuple(name for name in every if name in used)
    return Plan(columns, event_time, dating, chain, tuple(plans), lineage)


def _event_time(to: Builder, sql: str) -> str:
    to.where = f"{to.where} event_time"
    found = to.check(sql, TIME)
    code = to.reason("null event time", sql)
    sources = to.scope.sources(found)
    far = to.reason("event time out of range", f"{sql}: the years {YEARS[0]} to {YEARS[1]}")
    rules = [
        (found.sql, Rule(f"({found.sql}) IS NULL", code, code)),
        (found.sql, Rule(_outside(found.sql), far, far)),
    ]
    to.select({"event_time": found.sql}, rules)
    to.scope.put("event_time", TIME, sources)
    if sql in found.columns:
        to.alias(sql)
    return found.sql


def _outside(time: str) -> str:
    return f"year({time}) NOT BETWEEN {YEARS[0]} AND {YEARS[1]} OR isinf({time})"


def _steps(to: Builder, owner: "Pipeline | View") -> None:
    of = f" of view {owner.name!r}" if to.part.startswith("view:") else ""
    for number, step in enumerate(owner.steps, 1):
        to.changed()
        to.label = f"step {number} ({step.label}){of}"
        to.where = f"pipeline {to.pipeline!r}, {to.label}, {step.at}"
        step.build(to)


def _view(pipeline: "Pipeline", view: "View", scope: Scope, live: bool) -> tuple[ViewPlan, Lineage, set[str]]:
    to = Builder(pipeline.name, scope, f"view:{view.name}")
    _steps(to, view)
    chain = to.chain(shared=False) if view.steps else None
    to.where = f"pipeline {pipeline.name!r}, view {view.name!r}, {view.at}"
    keys = {to.column(name): to.scope.types[name] for name in view.by}
    for name, kind in keys.items():
        if not _scalar(kind):
            raise DefinitionError(f"{to.where}: key {name} is {kind}; Derive a column of one value from it")
    lineage = {name: to.scope.lineage[name] for name in view.by} | dict.fromkeys(
        ("window_start", "window_end"), to.scope.lineage["event_time"]
    )
    to.label = f"view {view.name!r}"
    measures: list[_Measured] = []
    answers = keys | dict.fromkeys(("window_start", "window_end"), TIME)
    for name, measure in view.measures:
        to.where = f"pipeline {pipeline.name!r}, view {view.name!r}, measure {name}=, {view.at}"
        made = _measure(name, measure, to, answers)
        answers[name] = made.type
        lineage[name] = made.sources.union(*(lineage[column] for column in made.columns))
        measures.append(made)
    needed = to.used.union(*lineage.values(), to.scope.lineage["event_time"])
    to.select({}, [(made.value, to.failure(made.name, made.value)) for made in measures if made.value])
    plan = _plan(view, chain, to.scope, measures, to.chain(shared=False).tried(), live)
    _kept(plan.schema, f"pipeline {pipeline.name!r}, view {view.name!r}, {view.at}")
    return plan, lineage, set(needed)


@dataclasses.dataclass(frozen=True)
class _Measured:
    """A measure over states or, where ``derived``, an expression over the answers before it (``columns``).

    value: what it aggregates, if anything; that may fail in a row. reads: the columns of the row that it is of."""

    name: str
    sql: str
    type: str
    states: tuple[State, ...] = ()
    exact: str = "true"
    derived: bool = False
    sources: frozenset[str] = frozenset()
    columns: frozenset[str] = frozenset()
    reads: frozenset[str] = frozenset()
    value: str = ""


def _measure(name: str, measure: Measure | str, to: Builder, answers: dict[str, str]) -> _Measured:
    if isinstance(measure, str):
        found = check(measure, answers, to.where)
        return _Measured(name, f"TRY({found.sql})", found.type, derived=True, columns=found.columns)
    texts = {name: getattr(measure, name, None) for name in ("expr", "where")}
    value, where = (
        None if sql is None else to.check(sql, kind)
        for sql, kind in zip(texts.values(), (None, "BOOLEAN"), strict=True)
    )
    kind = value.type if value else ""
    problem = measure.check(kind)
    if problem:
        raise DefinitionError(f"{to.where}: {problem}" if value is None else underlined(value.sql, to.where, problem))
    checked: dict[str, Any] = {name: of.sql for name, of in zip(texts, (value, where), strict=True) if of}
    measure = dataclasses.replace(measure, **checked)
    states = measure.states(kind)
    given = [expression for expression in (value, where) if expression]
    sources, reads = to.scope.sources(*given), frozenset[str]().union(*(read.columns for read in given))
    what = value.sql if value else "true"
    what = f"CASE WHEN ({where.sql}) THEN ({what}) END" if where else what
    made = measure.result(kind), measure.type(kind), states, measure.exact(kind)
    return _Measured(name, *made, sources=sources, reads=reads, value=what if sources else "")


def _plan(
    view: "View", chain: Chain | None, scope: Scope, measures: list[_Measured], guard: Chain, live: bool
) -> ViewPlan:
    keys = [quote(name) for name in view.by]
    window = lateness.live(view.window) if live else view.window
    read = frozenset[str]().union(*(measure.reads for measure in measures))
    states = tuple(dict.fromkeys(state for measure in measures for state in measure.states))
    columns = {name: kind for state in states for name, kind in state.columns().items()}
    since = [lateness.SINCE.name] if live and isinstance(window, Sliding) else []
    place = ["_start", "_last"] if isinstance(window, Session) else ["_tile", *since]
    partial = _partial(window, keys, states, since)
    merge = _merge(window, keys, states, since)
    cells = ["_rows", *(f"{name}::{kind} AS {name}" for name, kind in columns.items())]
    held = [*keys, *(f"{name}::BIGINT AS {name}" for name in place), *cells]
    first = (
        held if isinstance(window, Session) else [*keys, f"{window.tile_start_sql('_tile')} AS _tile", *since, *cells]
    )
    partial = f"SELECT {', '.join(first)} FROM (\n{partial})"
    empty = scope.arrow.empty_table()
    if since:
        empty = empty.append_column(lateness.SINCE, pa.array([], lateness.SINCE.type))
    schema = query.run(f"{partial} LIMIT 0", {"batch": numbered(empty)}).schema
    result = _result(view, keys, list(columns), measures)
    windowed = _windowed(window, keys, states, since)
    answers = query.run(windowed, {"batch": numbered(schema.empty_table())}).schema
    return ViewPlan(
        name=view.name,
        by=view.by,
        window=window,
        chain=chain,
        guard=guard,
        states=states,
        partial=partial,
        merge=f"SELECT {', '.join(held)} FROM (\n{merge})",
        windowed=windowed,
        result=result,
        digest=_digest(view, measures),
        partial_schema=schema,
        schema=query.run(result, {"batch": answers.empty_table()}).schema,
        measures=tuple(measure.name for measure in measures),
        coded=tuple(name for name in view.by if scope.types[name] == "VARCHAR" and not read & {name}),
    )


def _partial(window: Window, keys: list[str], states: tuple[State, ...], since: list[str]) -> str:
    aggregates = [
        "count(*)::BIGINT AS _rows",
        *(f"{sql} AS {name}" for state in states for name, sql in state.partial("_t").items()),
    ]
    rows = "(SELECT *, epoch_us(event_time) AS _t FROM batch)"
    if not isinstance(window, Session):
        tile = f"{window.tile_sql('_t')} AS _tile"
        return f"SELECT {', '.join([*keys, tile, *since, *aggregates])}\nFROM {rows} GROUP BY ALL"
    millis = floor_sql("_t", 1000)
    rows = window.islands_sql(f"(SELECT *, {millis} AS _start, {millis} AS _last FROM {rows})", tuple(keys))
    return _grouped(
        [*keys, "min(_start) AS _start", "max(_last) AS _last", *aggregates], f"({rows})", [*keys, "_island"]
    )


def _merge(window: Window, keys: list[str], states: tuple[State, ...], since: list[str]) -> str:
    if not isinstance(window, Session):
        return _grouped([*keys, "_tile", *since, *_merges(states)], "batch", [*keys, "_tile", *since])
    rows = window.islands_sql("batch", tuple(keys))
    return _grouped(
        [*keys, "min(_start) AS _start", "max(_last) AS _last", *_merges(states)], f"({rows})", [*keys, "_island"]
    )


def _windowed(window: Window, keys: list[str], states: tuple[State, ...], since: list[str]) -> str:
    """Merged states by window: tiles become the windows that they are part of."""
    windows = f"({window.windows_sql('batch')})"
    if since:
        windows = f"(SELECT * FROM {windows} WHERE coalesce(window_start >= {since[0]}, true))"
    group = [*keys, "window_start", "window_end"]
    kinds = {name: kind for state in states for name, kind in state.columns().items()}
    cells = {name: name for name in kinds}
    if window.overlapping:
        windows = f"({_grouped([*group, *_merges(states)], windows, group)})"
    else:
        cells |= {name: sql for state in sketches(states) for name, sql in state.numbers(f"[{NUMBER}]").items()}
    columns = [
        *keys,
        "make_timestamptz(window_start) AS window_start",
        "make_timestamptz(window_end) AS window_end",
        "_rows",
    ]
    columns += [f"{cells[name]}::{kind} AS {name}" for name, kind in kinds.items()]
    return f"SELECT {', '.join(columns)}\nFROM {windows}"


def _merges(states: tuple[State, ...]) -> list[str]:
    return [
        "sum(_rows)::BIGINT AS _rows",
        *(f"{sql} AS {name}" for state in states for name, sql in state.merge().items()),
    ]


def _grouped(columns: list[str], rows: str, group: list[str]) -> str:
    return f"SELECT {', '.join(columns)}\nFROM {rows} GROUP BY {', '.join(group)}"


def _result(view: "View", keys: list[str], columns: list[str], measures: list[_Measured]) -> str:
    """Answers from the states of windows: the measures, then each SQL measure over those before it."""
    cells = [f"({m.sql})::{m.type} AS {quote(m.name)}" for m in measures if not m.derived]
    ctes = [f"SELECT {', '.join(['*', *cells])} FROM batch"]
    for m in measures:
        if m.derived:
            ctes.append(f"SELECT *, ({m.sql})::{m.type} AS {quote(m.name)} FROM v{len(ctes) - 1}")
    texts = ",\n".join(f"v{n} AS ({cte})" for n, cte in enumerate(ctes))
    named = [*keys, "window_start", "window_end", *(quote(m.name) for m in measures), "_rows", *columns]
    return f"WITH {texts}\nSELECT {', '.join(named)} FROM v{len(ctes) - 1}"


def _digest(view: "View", measures: list[_Measured]) -> str:
    """What the digest of an answer is of: keys, window and the measures that are exact there, nested ones as text."""
    exact = {m.name: m.exact for m in measures if not m.derived}
    for m in measures:
        if m.derived:
            exact[m.name] = " AND ".join(sorted({exact.get(column, "true") for column in m.columns})) or "true"
    cells = [quote(name) for name in (*view.by, "window_start", "window_end")]
    for m in measures:
        plain = quote(m.name) if _scalar(m.type) else f"{quote(m.name)}::VARCHAR"
        cells.append(f"CASE WHEN {exact[m.name]} THEN {plain} END AS {quote(m.name)}")
    return f"SELECT {', '.join(cells)} FROM batch"


def _kept(schema: pa.Schema, where: str) -> None:
    """Refuses what no table can hold."""
    for field in schema:
        if not _storable(field.type):
            raise DefinitionError(
                f"{where}: column {field.name} is {field.type}, which no table holds; cast or Drop it"
            )


def _storable(kind: pa.DataType) -> bool:
    if pa.types.is_nested(kind) and not pa.types.is_union(kind):
        return all(_storable(kind.field(part).type) for part in range(kind.num_fields))
    odd = pa.types.is_interval, pa.types.is_time, pa.types.is_duration, pa.types.is_union, pa.types.is_null
    timed = pa.types.is_timestamp(kind) and kind.unit != "us"
    return not timed and not isinstance(kind, pa.BaseExtensionType) and not any(test(kind) for test in odd)


def _scalar(kind: str) -> bool:
    return not kind.endswith("]") and not kind.startswith(("STRUCT", "MAP"))
