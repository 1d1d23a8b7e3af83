"""The bounded graph of a pipeline: read, decode, dedupe, steps, views, write, and one commit at the end.

Workers stage files and rows that no reader sees. The commit step looks at what every part has counted, and only if
nothing was lost makes the tables and then the store's pointers new, each in one transaction.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from operator import methodcaller
from pathlib import Path
from typing import Any

import apache_beam as beam
import pyarrow as pa

from pipelines.begin import Begun, Later, begin
from pipelines.commit import Output
from pipelines.definition import Dimension, Pipeline
from pipelines.io import files
from pipelines.io.history import History
from pipelines.io.read import ReadFiles
from pipelines.io.table import Between as Replaced
from pipelines.io.table import Replace, Table, open_table
from pipelines.options import Deployment
from pipelines.reading import Reading, reading
from pipelines.sql import Plan
from pipelines.transforms import progress, tables
from pipelines.transforms.aggregate import Aggregate
from pipelines.transforms.chain import SqlStage
from pipelines.transforms.clean import Between, Clean, Dated
from pipelines.transforms.deadletters import DEAD_LETTERS, PURPOSE, unheld
from pipelines.transforms.decode import Decode
from pipelines.transforms.decoder import Decoder
from pipelines.transforms.dedupe import Dedupe
from pipelines.transforms.errors import UserError
from pipelines.transforms.lookup import unique
from pipelines.transforms.protect import Cipher, Key
from pipelines.transforms.ranges import EVERYTHING, Range, Ranges
from pipelines.transforms.spill import Shelf, Spill, partitions
from pipelines.transforms.view import ViewPlan

BUCKET_ROWS, BUCKET_BYTES, BUCKETS = 4_000_000, 256 * 2**20, 16
"""A view's merge has a bucket for so many rows, or bytes of files, up to so many: each costs some ms, and together they
bound what a merge holds at once."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a graph is made of. tables: the names of those that are written. views: those that are computed."""

    pipeline: Pipeline
    deployment: Deployment
    plan: Plan
    reading: Reading
    dimensions: Mapping[str, History]
    tables: tuple[str, ...]
    views: tuple[ViewPlan, ...]

    @property
    def history(self) -> History:
        return self.reading.history


@dataclasses.dataclass(frozen=True)
class Prepared(Shape):
    """A pipeline and its places, looked at and found in order; nothing is written yet.

    outputs: the tables. token: names this run by its definition, files and range.
    """

    outputs: Mapping[str, Output]
    token: str

    def begin(self) -> Begun:
        """Takes what the run needs of the store. Raises UserError."""
        views = [(view, self.reading.scope.of(view.name)) for view in self.views]
        name, limits = self.pipeline.name, self.reading.limits
        return begin(name, self.deployment, token=self.token, outputs=self.outputs, views=views, limits=limits)


def prepare(pipeline: Pipeline, deployment: Deployment) -> Prepared:
    """Plans the files, opens the tables, checks what the user can mend. Raises UserError; writes nothing."""
    plan, source = pipeline.plan(), pipeline.source
    if source.schema.personal or plan.keyed:
        Key.load()  # a run that would end without it had better not begin
    decoder = decoding(pipeline, plan)
    warehouse = f"{deployment.warehouse}/{pipeline.name}"
    tables_ = {"dead letters": open_table(f"{deployment.dead_letters}/{pipeline.name}", DEAD_LETTERS)}
    tables_ |= {"events": open_table(f"{warehouse}/events", plan.chain.schema)} if pipeline.events else {}
    tables_ |= {view.name: open_table(f"{warehouse}/{view.name}", view.schema) for view in plan.views}
    definition = _digest(*_said(plan))
    read = reading(pipeline, plan, deployment, decoder, tables_, definition)
    dimensions = {
        d.name: files.plan(deployment.dimensions[d.name], d.schema, invalid="stop") for d in pipeline.dimensions
    }
    outputs = {name: _output(name, table, read) for name, table in tables_.items() if name not in read.scope.skipped}
    views = tuple(view for view in plan.views if view.name in outputs and read.scope.of(view.name))
    token = _digest(*_said(plan), read.history.splits, dimensions, read.scope)
    return Prepared(pipeline, deployment, plan, read, dimensions, tuple(outputs), views, outputs, token)


def decoding(pipeline: Pipeline, plan: Plan) -> Decoder:
    """What makes rows of what is read."""
    source = pipeline.source
    cipher = Cipher(Key.load(), PURPOSE) if source.schema.personal else None
    asked = all(isinstance(stage, SqlStage) for chain in plan.chains for stage in chain.stages)  # by queries alone
    coded = asked and not (source.identities or pipeline.events)
    return Decoder(plan.read(source), pipeline.name, source.extra, source.invalid, None, cipher, coded)


def _output(name: str, table: Table, read: Reading) -> Output:
    last = table.last()
    ranges = read.scope.of(name) if read.scope.ranged and name != "dead letters" else ()
    replace: Replace = "nothing" if read.scope.ranged else "everything"
    if ranges:
        replace = Replaced("event_time" if name == "events" else "window_start", ranges)
    table.check(replace)
    note = read.note if read.note is not None else {} if last is None else last.note
    return Output(name, table, table.next_version(), replace, note)


def _said(plan: Plan) -> tuple[object, ...]:
    stages = [stage for chain in plan.chains for stage in chain.stages]
    steps = [stage.sql if isinstance(stage, SqlStage) else stage.label for stage in stages]
    return steps, [(view.partial, view.result) for view in plan.views]


def _digest(*said: object) -> str:
    return hashlib.blake2b(repr(said).encode(), digest_size=8).hexdigest()


def build(root: beam.Pipeline, run: Prepared, *, spill: Path | None = None) -> None:
    """Puts the graph on an empty Beam pipeline. From here on the store holds a new generation, which nobody reads yet.

    spill: where the one process of DirectRunner may keep rows and states on disk; None on engines, which shuffle them.
    """
    progress.expect(run.history.rows if run.history.rows is not None else run.history.bytes)
    lay(root, run, run.begin(), spill=spill)


def lay(
    root: beam.Pipeline,
    run: Shape,
    begun: Begun | beam.pvalue.AsSingleton,
    splits: Mapping[str, beam.PCollection] | None = None,
    *,
    spill: Path | None = None,
) -> None:
    """Puts the parts on a pipeline. begun: the run, or where the parts hear of it. splits: what is to be read, of
    "history" and of each dimension; None: it is known."""
    source, deployment, read_ = run.pipeline.source, run.deployment, run.reading
    cipher = Cipher(Key.load(), PURPOSE) if source.schema.personal else None
    given = splits or {}
    sides = {d.name: _dimension(given.get(d.name, root), d, run.dimensions[d.name]) for d in run.pipeline.dimensions}
    read = given.get("history", root) | "read" >> ReadFiles(run.history, distributed=spill is None, shown=True)
    decoded = read.rows | "decode" >> Decode(read_.decoder)
    rows, dead, tallies = decoded.rows, [decoded.dead], [read.tallies, decoded.tallies]
    if source.identities:
        dated = rows | "dated" >> Dated(run.plan.dating, run.history.format, cipher)
        rows, dead, tallies = dated.rows, [*dead, dated.dead], [*tallies, dated.tallies]
        first = rows | "dedupe" >> _dedupe(run, spill, cipher)
        rows, dead, tallies = first.rows, [*dead, first.dead], [*tallies, first.tallies]
    chain = dataclasses.replace(run.plan.chain, format=run.history.format)
    within = Between(run.plan.event_time, read_.scope.rows)
    clean = rows | "clean" >> Clean(chain, within, sides, cipher)
    dead.append(clean.dead)
    tallies.append(clean.tallies)
    staged: dict[str, beam.PCollection] = {}
    shelf = None if spill is None else Shelf(spill)
    if run.pipeline.events:
        staged["events"] = _stage(_inside(clean.rows, run), "events", begun)
    answered, written = [], []
    for view in run.views:
        buckets = deployment.buckets or _buckets(run.history)
        aggregate = Aggregate(view, buckets, sides, cipher, read_.scope.of(view.name), read_.through, shelf)
        answers = _spoken(clean.rows, view, read_) | aggregate
        dead.append(answers["dead"])
        tallies.append(answers["tallies"])
        answered.append(answers["answered"])
        staged[view.name] = _stage(answers["main"], view.name, begun)
        if deployment.store:
            write = _part(begun, "store", view.name).with_output_types(pa.Table)
            written.append(answers["main"] | f"store {view.name}" >> write)
    letters = dead | "dead letters" >> beam.Flatten()
    if isinstance(begun, Begun) and (held := begun.held) is not None:
        new = beam.Map(lambda dead: _unheld(dead, held)).with_output_types(pa.Table)
        letters = letters | "not held yet" >> new
    staged["dead letters"] = _stage(letters, "dead letters", begun)
    lists = [
        tallies,
        [clean.spans],
        answered,
        written,
        *([staged[name]] if name in staged else [] for name in run.tables),
    ]
    gathered = [_list(root, parts, number) for number, parts in enumerate(lists)]
    _ = root | "once" >> beam.Create([0]) | "commit" >> _part(begun, "commit", sides=gathered)


def _dedupe(run: Shape, folder: Path | None, cipher: Cipher | None) -> Dedupe:
    identity = run.pipeline.source.identities
    parts = partitions(run.history.rows, run.history.bytes)
    return Dedupe(
        identity,
        run.pipeline.source.columns,
        pipeline=run.pipeline.name,
        format=run.history.format,
        spill=None if folder is None else Spill(folder, identity, parts),
        buckets=parts,
        cipher=cipher,
    )


def _buckets(history: History) -> int:
    size = history.bytes // BUCKET_BYTES if history.rows is None else history.rows // BUCKET_ROWS
    return max(1, min(BUCKETS, size))


def _list(root: beam.Pipeline, parts: list[beam.PCollection], number: int) -> beam.pvalue.AsList:
    tables_ = tuple(parts) | f"gather {number}" >> beam.Flatten(pipeline=root)
    return beam.pvalue.AsList(tables_)


def _inside(rows: beam.PCollection, run: Shape) -> beam.PCollection:
    ranges = run.reading.scope.of("events")
    return rows if EVERYTHING in ranges else _between(rows, "events inside", ranges)


def _spoken(rows: beam.PCollection, view: ViewPlan, read: Reading) -> beam.PCollection:
    """Of a view of all time the rows that the batch layer speaks for: what is behind them the speed layer adds."""
    if view.name not in read.spoken:
        return rows
    return _between(rows, f"{view.name} inside", (Range(None, read.spoken[view.name]),))


def _between(rows: beam.PCollection, label: str, ranges: Ranges) -> beam.PCollection:
    inside = Between("event_time", ranges)
    return rows | label >> beam.Map(lambda table: inside.split(table)[0]).with_output_types(pa.Table)


def _stage(rows: beam.PCollection, name: str, begun: Begun | beam.pvalue.AsSingleton) -> beam.PCollection:
    return rows | f"stage {name}" >> _part(begun, "stage", name).with_output_types(pa.Table)


def _part(begun: Begun | beam.pvalue.AsSingleton, which: str, *names: str, sides: Iterable[Any] = ()) -> beam.ParDo:
    """A method of the run that has begun, or that will have when the part runs."""
    made = methodcaller(which, *names)
    return beam.ParDo(made(begun), *sides) if isinstance(begun, Begun) else beam.ParDo(Later(made), begun, *sides)


def _dimension(start: beam.Pipeline | beam.PCollection, dimension: Dimension, plan: History) -> beam.PCollection:
    """The whole dimension as one table, its keys checked. A row that cannot be read refuses the run."""
    read = start | f"read {dimension.name}" >> ReadFiles(plan)
    decoded = read.rows | f"decode {dimension.name}" >> Decode(Decoder(dimension.schema, dimension.name))
    _ = decoded.dead | f"refuse {dimension.name}" >> beam.Map(_refuse, dimension.name).with_output_types(pa.Table)
    return decoded.rows | f"gather {dimension.name}" >> beam.CombineGlobally(_Gather(dimension)).with_output_types(
        pa.Table
    )


def _refuse(dead: pa.Table, name: str) -> pa.Table:
    first = dead.slice(0, 1).to_pylist()[0]
    what = first["detail"] if first["reason"] in first["detail"] else f"{first['reason']}, {first['detail']}"
    where = f"dimension {name}: {first['source']} at {first['offset']}"
    raise UserError(f"{where}: {what}; look-ups need every row, so mend or remove it")


def _unheld(dead: pa.Table, table: Table) -> pa.Table:
    return unheld(dead, table.dataset()) if len(dead) else dead


@beam.typehints.with_input_types(pa.Table)
@beam.typehints.with_output_types(pa.Table)
class _Gather(beam.CombineFn):  # type: ignore[misc]
    def __init__(self, dimension: Dimension) -> None:
        self._name, self._key, self._from = dimension.name, dimension.key, dimension.valid_from
        self._schema, self._personal = dimension.schema.arrow, dimension.schema.personal

    def create_accumulator(self) -> list[pa.Table]:
        return [self._schema.empty_table()]

    def add_input(self, accumulator: list[pa.Table], rows: pa.Table) -> list[pa.Table]:
        return [*accumulator, rows.select(self._schema.names)]

    def merge_accumulators(self, accumulators: Iterable[list[pa.Table]]) -> list[pa.Table]:
        return [table for accumulator in accumulators for table in accumulator]

    def extract_output(self, accumulator: list[pa.Table]) -> pa.Table:
        return unique(self._name, self._key, self._from, pa.concat_tables(accumulator), self._personal)

    def get_accumulator_coder(self) -> beam.coders.Coder:
        return tables.TABLES
