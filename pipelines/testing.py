"""Try a definition on a few rows, without Beam: what a user's own tests call.

The rows are evaluated whole, one by one, and shuffled; if any answer differs, the definition is not fit for batches
and streams (an ``Apply`` that looks beyond its row, for one) and the run fails.
"""

import dataclasses
import datetime
import decimal
import math
import random
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipelines.definition import Pipeline
from pipelines.sql import Plan
from pipelines.transforms import conservation, query
from pipelines.transforms.deadletters import DEAD_LETTERS
from pipelines.transforms.decoder import Decoder
from pipelines.transforms.expressions import quote
from pipelines.transforms.identity import deduplicate
from pipelines.transforms.lookup import unique
from pipelines.transforms.protect import Cipher
from pipelines.transforms.schema import RowSchema, unpersonal
from pipelines.transforms.view import ViewPlan

_EPOCH = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)
_PLAIN: dict[Any, Any] = {
    str: "x",
    bytes: b"x",
    bool: False,
    int: 1,
    float: 1.0,
    decimal.Decimal: decimal.Decimal(1),
    datetime.datetime: _EPOCH,
    datetime.date: _EPOCH.date(),
}


@dataclasses.dataclass(frozen=True)
class Result:
    """What a definition made of rows. views: answers by name, without states, in key order. rejected: DEAD_LETTERS.
    rows: the cleaned rows. counts: read, kept, filtered, rejected, duplicate."""

    views: Mapping[str, pa.Table]
    rejected: pa.Table
    rows: pa.Table
    counts: Mapping[str, int]


def example(row: type, **values: Any) -> Any:
    """An object with the row class's fields: the given values, and plain ones for the rest (None where it may be).

    >>> class Reading:
    ...     sensor: str
    ...     celsius: float | None
    >>> vars(example(Reading, sensor="a"))
    {'sensor': 'a', 'celsius': None}
    """
    fields = typing.get_type_hints(row)
    for name in values:
        if name not in fields:
            raise TypeError(f"{row.__name__} has no field {name!r}; it has {', '.join(fields)}")
    return types.SimpleNamespace(**{name: values.get(name, _plain(hint)) if name not in values else values[name] for name, hint in fields.items()})


def run(pipeline: Pipeline, rows: Iterable[Any], *, dimensions: Mapping[str, Iterable[Any]] = {}) -> Result:
    """Runs a definition over rows (objects, mappings or a table) in batch.

    dimensions: the rows of each dimension by name; one that is not given is empty. Raises AssertionError when the answer
    depends on how rows are cut or ordered, and whatever a run raises.
    """
    plan = pipeline.plan()
    tables = {d.name: unique(d.name, d.key, d.valid_from, _table(d.schema, dimensions.get(d.name, ()))) for d in pipeline.dimensions}
    given = _positioned(_table(pipeline.source.schema, rows))
    whole = _evaluate(pipeline, plan, [given], tables)
    single = [given.slice(row, 1) for row in range(len(given))]
    shuffled = given.take(random.Random(len(given)).sample(range(len(given)), len(given)))
    half = len(given) // 2
    for how, cuts in {"one by one": single, "shuffled": [shuffled], "in two": [given.slice(half), given.slice(0, half)]}.items():
        _same(whole, _evaluate(pipeline, plan, cuts, tables), how, plan)
    return whole


def _evaluate(pipeline: Pipeline, plan: Plan, batches: Sequence[pa.Table], dimensions: Mapping[str, pa.Table]) -> Result:
    cipher = None
    source = pipeline.source
    decoder = Decoder(source.schema, pipeline.name, source.extra, source.invalid, None, cipher)
    decoded = [decoder.decode(batch) for batch in batches]
    dead = [part.dead for part in decoded if part.dead is not None]
    tallies = [conservation.tally("source", "read", sum(map(len, batches)))]
    tallies += [conservation.tally("source", "rejected", len(part)) for part in dead]
    good = [part.rows for part in decoded]
    if source.identities and good:
        found = deduplicate(pa.concat_tables(good), source.identities, tuple(source.schema.names))
        good = [found.rows.slice(row, 1) for row in range(len(found.rows))] if len(batches) > 2 else [found.rows]
        tallies.append(conservation.tally("source", "duplicate", found.duplicates))
        if len(found.conflicts):
            tallies.append(conservation.tally("source", "rejected", len(found.conflicts), "conflict"))
    outcomes = [plan.chain.run(part, dimensions, cipher) for part in good]
    dead += [outcome.dead for outcome in outcomes]
    tallies += [outcome.tallies for outcome in outcomes]
    views = {view.name: _view(view, [outcome.rows for outcome in outcomes], dimensions, dead, cipher) for view in plan.views}
    counts = conservation.Conservation.of(conservation.merge(tallies))
    assert not counts.violations(), counts.violations()
    rows = pa.concat_tables([plan.chain.schema.empty_table(), *(o.rows.select(plan.chain.schema.names) for o in outcomes)])
    return Result(views, pa.concat_tables([DEAD_LETTERS.empty_table(), *dead]), rows, counts.rows)


def _view(plan: ViewPlan, rows: list[pa.Table], dimensions: Mapping[str, pa.Table], dead: list[pa.Table], cipher: Cipher | None) -> pa.Table:
    if plan.chain is not None:
        outcomes = [plan.chain.run(part, dimensions, cipher) for part in rows]
        dead += [outcome.dead for outcome in outcomes]
        rows = [outcome.rows for outcome in outcomes]
    merged = plan.merged([plan.merged([plan.partials(part)]) for part in rows])
    answers = plan.finished(merged).select(plan.columns)
    return answers.sort_by([(name, "ascending") for name in (*plan.by, "window_start")])
