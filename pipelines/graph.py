"""The bounded graph of a pipeline: read, decode, dedupe, steps, views, write, and one commit at the end.

Workers stage files and rows that no reader sees. The commit step looks at what every part has counted, and only if
nothing was lost makes the tables and then the store's pointers new, each in one transaction.
"""

import dataclasses
import hashlib
from collections.abc import Iterable
from pathlib import Path

import apache_beam as beam
import pyarrow as pa

from pipelines.commit import Commit, Output
from pipelines.definition import Dimension, Pipeline
from pipelines.io import files
from pipelines.io.read import ReadFiles
from pipelines.io.store import open_store
from pipelines.io.table import Between as Replaced
from pipelines.io.table import Replace, Table, open_table
from pipelines.io.upsert import WriteStore
from pipelines.io.write import StageTable
from pipelines.options import Deployment
from pipelines.sql import Plan
from pipelines.transforms import progress, tables
from pipelines.transforms.aggregate import Aggregate
from pipelines.transforms.chain import SqlStage
from pipelines.transforms.clean import Between, Clean
from pipelines.transforms.deadletters import DEAD_LETTERS, PURPOSE, unheld
from pipelines.transforms.decode import Decode
from pipelines.transforms.decoder import Decoder
from pipelines.transforms.dedupe import Dedupe
from pipelines.transforms.errors import UserError
from pipelines.transforms.lookup import unique
from pipelines.transforms.protect import Cipher, Key
from pipelines.transforms.ranges import Range
from pipelines.transforms.schema import RowSchema
from pipelines.transforms.spill import Shelf, Spill, partitions
from pipelines.transforms.view import ViewPlan

BUCKET_ROWS, BUCKET_BYTES, BUCKETS = 4_000_000, 256 * 2**20, 16
"""A view's merge has a bucket for so many rows, or bytes of files, up to so many: each costs some ms, and together they
bound what a merge holds at once."""
_DAY = 86_400_000_000


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A pipeline and its places, looked at and found in order; nothing is written yet.

    start, stop: µs UTC, the windows that are recomputed are those that start in [start, stop). token: names this run by
    its definition, files and range.
    """

    pipeline: Pipeline
    deployment: Deployment
    plan: Plan
    history: files.Plan
    dimensions: dict[str, files.Plan]
    outputs: dict[str, Output]
    views: tuple[ViewPlan, ...]
    skipped: tuple[str, ...]
    start: int | None
    stop: int | None
    token: str
    schema: RowSchema


def prepare(pipeline: Pipeline, deployment: Deployment) -> Prepared:
    """Plans the files, opens the tables, checks what the user can mend. Raises UserError; writes nothing."""
    plan, source = pipeline.plan(), pipeline.source
    chains = (plan.chain, *(view.chain for view in plan.views if view.chain is not None))
    if source.schema.personal or any(chain.keyed for chain in chains):
        Key.load()  # a run that would end without it had better not begin
    start, stop = (None if at is None else int(at.timestamp() * 1_000_000) for at in (deployment.from_, deployment.to))
    ranged = start is not None or stop is not None
    used = tuple(f for f in source.schema.fields if f.name in plan.columns or source.extra != "ignore")
    schema = dataclasses.replace(source.schema, fields=used)  # an unused column would be one that we do not know
    history = files.plan(deployment.history or "", schema, extra=source.extra, invalid=source.invalid)
    _format(history)
    dimensions = {
        d.name: files.plan(deployment.dimensions[d.name], d.schema, invalid="stop") for d in pipeline.dimensions
    }
    views = tuple(view for view in plan.views if not ranged or view.window.longest is not None)
    warehouse = f"{deployment.warehouse}/{pipeline.name}"
    outputs = {
        "dead letters": _output(
            "dead letters",
            f"{deployment.dead_letters}/{pipeline.name}",
            DEAD_LETTERS,
            "nothing" if ranged else "everything",
        )
    }
    if pipeline.events:
        outputs["events"] = _output(
            "events",
            f"{warehouse}/events",
            plan.chain.schema,
            Replaced("event_time", (Range(start, stop),)) if ranged else "everything",
        )
    for view in views:
        replace: Replace = Replaced("window_start", (Range(start, stop),)) if ranged else "everything"
        outputs[view.name] = _output(view.name, f"{warehouse}/{view.name}", view.schema, replace)
    skipped = tuple(view.name for view in plan.views if view not in views)
    token = _token(plan, history, dimensions, start, stop)
    return Prepared(
        pipeline, deployment, plan, history, dimensions, outputs, views, skipped, start, stop, token, schema
    )


def _output(name: str, uri: str, schema: pa.Schema, replace: Replace) -> Output:
    table = open_table(uri, schema)
    table.check(replace)
    return Output(name, table, table.next_version(), replace)


def _token(plan: Plan, history: files.Plan, dimensions: dict[str, files.Plan], *bounds: int | None) -> str:
    chains = (plan.chain, *(view.chain for view in plan.views if view.chain is not None))
    stages = [stage for chain in chains for stage in chain.stages]
    steps = [stage.sql if isinstance(stage, SqlStage) else stage.label for stage in stages]
    said = repr((steps, [(view.partial, view.result) for view in plan.views], history.splits, dimensions, bounds))
    return hashlib.blake2b(said.encode(), digest_size=8).hexdigest()


def build(root: beam.Pipeline, run: Prepared, *, spill: Path | None = None) -> None:
    """Puts the graph on an empty Beam pipeline. From here on the store holds a new generation, which nobody reads yet.

    spill: where the one process of DirectRunner may keep rows and states on disk; None on engines, which shuffle them.
    """
    source, deployment = run.pipeline.source, run.deployment
    cipher = Cipher(Key.load(), PURPOSE) if source.schema.personal else None
    sides = {d.name: _dimension(root, d, run.dimensions[d.name]) for d in run.pipeline.dimensions}
    progress.expect(run.history.rows if run.history.rows is not None else run.history.bytes)
    read = root | "read" >> ReadFiles(run.history, distributed=spill is None, shown=True)
    decoder = Decoder(run.schema, run.pipeline.name, source.extra, source.invalid, None, cipher)
    decoded = read.rows | "decode" >> Decode(decoder)
    rows, dead, tallies = decoded.rows, [decoded.dead], [read.tallies, decoded.tallies]
    if source.identities:
        first = rows | "dedupe" >> _dedupe(run, spill, cipher)
        rows, dead, tallies = first.rows, [*dead, first.dead], [*tallies, first.tallies]
    chain = dataclasses.replace(run.plan.chain, format=_format(run.history))
    clean = rows | "clean" >> Clean(chain, _read_range(run), sides, cipher)
    dead.append(clean.dead)
    tallies.append(clean.tallies)
    staged: dict[str, beam.PCollection] = {}
    shelf = None if spill is None else Shelf(spill)
    if run.pipeline.events:
        staged["events"] = _stage(_inside(clean.rows, run), "events", run)
    answered, written, generations = [], [], {}
    for view in run.views:
        buckets = deployment.buckets or _buckets(run.history)
        answers = clean.rows | Aggregate(view, buckets, sides, cipher, run.start, run.stop, shelf)
        dead.append(answers["dead"])
        tallies.append(answers["tallies"])
        answered.append(answers["answered"])
        staged[view.name] = _stage(answers["main"], view.name, run)
        if deployment.store:
            generations[view.name] = _begin(run, view)
            name = f"{run.pipeline.name}.{view.name}"
            write = WriteStore(deployment.store, name, generations[view.name])
            written.append(answers["main"] | f"store {view.name}" >> beam.ParDo(write))
    letters = dead | "dead letters" >> beam.Flatten()
    held = run.outputs["dead letters"]
    if held.replace == "nothing" and held.version > 1:
        new = beam.Map(lambda dead: _unheld(dead, held.table)).with_output_types(pa.Table)
        letters = letters | "not held yet" >> new
    staged["dead letters"] = _stage(letters, "dead letters", run)
    outputs = tuple(run.outputs.values())
    commit = Commit(run.pipeline.name, run.token, outputs, generations, deployment, run.stop, run.skipped)
    lists = [tallies, [clean.spans], answered, written, *([staged[output.name]] for output in outputs)]
    gathered = [_list(root, parts, number) for number, parts in enumerate(lists)]
    _ = root | "once" >> beam.Create([0]) | "commit" >> beam.ParDo(commit, *gathered)


def _dedupe(run: Prepared, folder: Path | None, cipher: Cipher | None) -> Dedupe:
    identity = run.pipeline.source.identities
    parts = partitions(run.history.rows, run.history.bytes)
    return Dedupe(
        identity,
        run.pipeline.source.columns,
        pipeline=run.pipeline.name,
        format=_format(run.history),
        spill=None if folder is None else Spill(folder, identity, parts),
        buckets=parts,
        cipher=cipher,
    )


def _format(history: files.Plan) -> str:
    """How the bytes of a refused row are read: in one way for all. Raises UserError for files of several formats."""
    formats = {split.format: split.file.source for split in history.splits}
    if len(formats) > 1:
        (one, first), (other, second), *_ = formats.items()
        raise UserError(
            f"{first} is {one}, {second} is {other}; a history has one format: name fewer files or convert some"
        )
    return next(iter(formats), "json")


def _buckets(history: files.Plan) -> int:
    size = history.bytes // BUCKET_BYTES if history.rows is None else history.rows // BUCKET_ROWS
    return max(1, min(BUCKETS, size))


def _list(root: beam.Pipeline, parts: list[beam.PCollection], number: int) -> beam.pvalue.AsList:
    tables_ = tuple(parts) | f"gather {number}" >> beam.Flatten(pipeline=root)
    return beam.pvalue.AsList(tables_)


def _read_range(run: Prepared) -> Between:
    """Rows of the windows that start in the range: those of the last of them may lie behind its end."""
    longest = max((view.window.longest or 0 for view in run.views), default=0)
    return Between(run.plan.event_time, run.start, None if run.stop is None else run.stop + longest)


def _inside(rows: beam.PCollection, run: Prepared) -> beam.PCollection:
    if run.stop is None:
        return rows
    inside = Between("event_time", run.start, run.stop)
    return rows | "events inside" >> beam.Map(lambda table: inside.split(table)[0]).with_output_types(pa.Table)


def _stage(rows: beam.PCollection, name: str, run: Prepared) -> beam.PCollection:
    output = run.outputs[name]
    return rows | f"stage {name}" >> beam.ParDo(StageTable(output.table, token=run.token, version=output.version))


def _begin(run: Prepared, view: ViewPlan) -> int:
    assert run.deployment.store
    keys = (*view.by, "window_start")
    with open_store(run.deployment.store) as store:
        return store.begin(f"{run.pipeline.name}.{view.name}", view.schema, keys, (Range(run.start, run.stop),))


def _dimension(root: beam.Pipeline, dimension: Dimension, plan: files.Plan) -> beam.PCollection:
    """The whole dimension as one table, its keys checked. A row that cannot be read refuses the run."""
    read = root | f"read {dimension.name}" >> ReadFiles(plan)
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
