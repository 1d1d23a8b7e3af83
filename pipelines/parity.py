"""``pipelines parity``: proves that the layers of a pipeline agree, on its own definition and history.

A history is sent to a log in seeded disorder: shuffled, late, repeated, with bad messages between. A speed layer takes
it, in turns of random size or as an unbounded graph, dies at random points and starts again. What it has given to the
store must be what one bounded pass over the same log gives, of the rows that are not late.
"""

import contextlib
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines import samples
from pipelines.bounded import Bounded
from pipelines.definition import Pipeline
from pipelines.dimensions import whole
from pipelines.io.log import Format, open_log
from pipelines.io.store import open_store
from pipelines.layer import layer
from pipelines.options import Deployment
from pipelines.progress import shown
from pipelines.replay import messages, written
from pipelines.report import grid, indent
from pipelines.run import told
from pipelines.runners import MODULES, Engine, clusters, named
from pipelines.transforms import lateness
from pipelines.transforms.avro_schemas import Schemas
from pipelines.transforms.conservation import SOURCE, Conservation
from pipelines.transforms.differences import Compared, Difference
from pipelines.transforms.disorder import Disorder
from pipelines.transforms.encode import avro_schema, encode
from pipelines.transforms.errors import UserError
from pipelines.transforms.protect import VARIABLE
from pipelines.transforms.windows import Duration
from pipelines.trial import Trial

RESTARTS, JOBS, TURNS, PARTITIONS = 8, 2, 24, 4
"""By default: how often a speed layer in turns dies, and one of jobs; about how many turns it takes; the log's
partitions."""

BUCKETS = 3
"""Of every other seed: parts of the state, as engines with many workers have them."""

LATE, DUPLICATE, CORRUPT = 0.02, 0.05, 0.01
"""Shares of the rows: sent when late for every view, sent twice, and bad messages added."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What a trial found. told: what the speed layer did. views: by what was compared, and view. counts: the source's,
    of the speed layer. points: how often it died where. wrong: counts that differ, by name, of the speed layer and of
    the bounded run."""

    pipeline: str
    runner: str
    seed: int
    disorder: Disorder
    told: str
    points: Mapping[str, int]
    counts: Mapping[str, int]
    wrong: Mapping[str, tuple[Any, Any]]
    views: Mapping[str, Mapping[str, Compared]]
    seconds: float

    @property
    def different(self) -> int:
        """Windows, and counts."""
        return len(self.wrong) + sum(one.different for views in self.views.values() for one in views.values())

    def json(self) -> str:
        """All of it as JSON."""
        facts = {**dataclasses.asdict(self), "different": self.different, "seconds": round(self.seconds, 3)}
        return json.dumps(facts, indent=2, ensure_ascii=False, default=str)

    def text(self) -> str:
        """For people."""
        counts = ", ".join(f"{name} {n:,}" for name, n in self.counts.items() if n)
        died = ", ".join(f"{n} {point}" for point, n in sorted(self.points.items()))
        lines = [
            f"{self.pipeline} · {self.runner} · seed {self.seed}",
            f"{counts}; {self.told}, {sum(self.points.values())} restarts{f' ({died})' if died else ''}",
        ]
        for what, views in self.views.items():
            rows = [(name, f"{one.windows:,}", f"{one.different:,}") for name, one in views.items()]
            lines += ["", what, indent(grid(("view", "windows", "different"), rows))]
        differences = [
            (what, name, _keys(one), one.measure, str(one.found), str(one.expected))
            for what, views in self.views.items()
            for name, view in views.items()
            for one in view.first
        ]
        differences += [("counts", "", "", name, str(found), str(right)) for name, (found, right) in self.wrong.items()]
        if differences:
            lines += ["", grid(("", "view", "window", "measure", "found", "bounded run"), differences)]
        lines += ["", f"{'They differ' if self.different else 'They agree'}, in {self.seconds:,.1f} s."]
        return "\n".join(lines)


def _keys(of: Difference) -> str:
    return " ".join(f"{name}={value}" for name, value in of.keys.items())


def parity(
    pipeline: Pipeline,
    history: str | pa.Table | None,
    runner: str = Deployment.runner,
    *,
    dimensions: Mapping[str, str] | None = None,
    flags: Sequence[str] = (),
    seed: int = 0,
    restarts: int | None = None,
    turns: int | None = None,
    format: Format = "json",
    disorder: Disorder | None = None,
) -> Report:
    """Runs the trial in a folder of its own. history: files, or rows as files have them; None: rows are made up, and so
    are dimensions that are not given. Nothing depends on chance but the seed's. A runner of unbounded graphs runs one,
    in the main thread; another takes turns.

    Raises UserError as the parts of a run do; differences are told in the report.
    """
    begun, disorder = time.perf_counter(), disorder or _disorder(pipeline, seed)
    with (
        told(),
        prepared(
            pipeline,
            history,
            disorder,
            runner,
            dimensions=dimensions,
            flags=flags,
            restarts=restarts,
            turns=TURNS if turns is None else turns,
            format=format,
        ) as trial,
    ):
        found, views = _tried(trial)
        wrong = {name: (n, right) for name, (n, right) in found.items() if n != right}
        return Report(
            pipeline.name,
            runner,
            seed,
            disorder,
            trial.told,
            dict(trial.points),
            {name: found[f"source {name}"][0] for name in SOURCE},
            wrong,
            views,
            time.perf_counter() - begun,
        )


@contextlib.contextmanager
def prepared(
    pipeline: Pipeline,
    history: str | pa.Table | None,
    disorder: Disorder,
    runner: str = Deployment.runner,
    *,
    turns: int,
    restarts: int | None,
    dimensions: Mapping[str, str] | None = None,
    flags: Sequence[str] = (),
    format: Format = "json",
) -> Iterator[Trial]:
    """A trial that has taken nothing yet, in a folder that goes with it. The history is sent."""
    seed, engine = disorder.seed, named(runner)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="parity-"))
        made = stack.enter_context(_key(pipeline))
        deployment = _deployment(pipeline, folder, runner, format, dimensions or {}, seed)
        assert deployment.live and deployment.store
        given = samples.history(pipeline, seed) if history is None else history
        partitions = [str(number) for number in range(PARTITIONS)]
        if format == "avro":
            Schemas(f"{folder}/schemas").add(avro_schema(written(pipeline)))
        log = stack.enter_context(open_log(deployment.live))
        sent = stack.enter_context(open_log(deployment.live.replace("/log.db", "/sent.db", 1)))
        with shown(f"{pipeline.name}: sends its history"):
            for piece in messages(pipeline, given, disorder, partitions=partitions, format=format):
                sent.append(piece)
        if not any(bounds.end for bounds in sent.bounds().values()):
            raise UserError(f"{pipeline.name}: its history has no rows to try it on; name another with --history=URI")
        tables = {of.name: whole(of, deployment.dimensions[of.name]) for of in pipeline.dimensions}
        trial = _kind(engine)(
            pipeline,
            deployment,
            engine,
            stack.enter_context(_served(runner, engine, flags, alone=made)),
            sent,
            log,
            stack.enter_context(open_store(deployment.store)),
            Bounded(pipeline, layer(pipeline, deployment, 1), log, tables),
            np.random.default_rng(seed % 2**64),
            turns,
            (JOBS if engine.UNBOUNDED else RESTARTS) if restarts is None else restarts,
        )
        stack.callback(trial.close)
        yield trial


def _kind(engine: Engine) -> type[Trial]:
    if engine.UNBOUNDED:
        from pipelines.trial_stream import Streamed

        return Streamed
    from pipelines.trial_turns import InTurns

    return InTurns


@contextlib.contextmanager
def _served(runner: str, engine: Engine, flags: Sequence[str], alone: bool) -> Iterator[Sequence[str]]:
    """Flags with the one job server that all runs of a trial share, where an engine has such and no cluster runs.

    alone: without a cluster.
    """
    serving, given = getattr(engine, "serving", None), {flag.partition("=")[0] for flag in flags}
    alone = alone or bool(given & {"--flink_master", "--spark_master_url"})
    here = not alone and clusters.found(MODULES[runner]) is not None
    if serving is None or "--job_endpoint" in given or here:
        yield flags
        return
    from apache_beam.options.pipeline_options import PipelineOptions

    with serving(PipelineOptions(list(flags))) as endpoint:
        yield [*flags, f"--job_endpoint={endpoint}"]


def _tried(trial: Trial) -> tuple[dict[str, tuple[int, int]], dict[str, dict[str, Compared]]]:
    """Counts, of the speed layer and of a bounded pass; and views, by what was compared."""
    views, name = {}, trial.pipeline.name
    middle = int(trial.chance.integers(trial.turns // 3, trial.turns * 2 // 3, endpoint=True))
    with shown(f"{name}: live"):
        trial.take(0, middle)
    views["the speed layer in the middle = bounded over the rows in time"] = trial.speed_layer(trial.bounded.timely())
    trial.cut_over()
    with shown(f"{name}: live"):
        trial.take(middle, trial.turns)
    timely = trial.bounded.timely()
    views["the speed layer at the end = bounded over the rows in time"] = trial.speed_layer(timely)
    views["batch to the middle + speed = bounded"] = trial.both_layers(timely)
    if not trial.cut_over(since="last"):
        views["batch of what is new + speed = bounded over all rows"] = trial.both_layers(timely)
        trial.cut_over()
    views["batch + speed = bounded over all rows"] = trial.both_layers(timely)
    found, right = _counted(trial.counts), _counted(timely.counts)
    return {name: (found.get(name, 0), right.get(name, 0)) for name in sorted({*found, *right})}, views


def _counted(counts: Conservation) -> dict[str, int]:
    """Every count that a bounded run has too, by a name."""
    found = {f"source {name}": n for name, n in counts.rows.items()}
    found |= {f"rejected {reason}": n for reason, n in counts.reasons.items()}
    for part, of in {**counts.dropped, **counts.unmatched}.items():
        found |= {f"{part} {reason}": n for reason, n in of.items()}
    return found | {f"view {name} rows": taken for name, (taken, _, _) in counts.views.items()}


def _disorder(pipeline: Pipeline, seed: int) -> Disorder:
    """Rows are displaced so far that some are late for the shortest windows, or some windows, and not for others."""
    source = pipeline.source
    waits = sum(Duration.fixed(text, "Source") for text in (source.disorder, source.lateness))
    sizes = [
        getattr(window, "micros", window.longest) for window in (lateness.live(of.window) for of in pipeline.views)
    ]
    shuffle = waits + min((size for size in sizes if size), default=60_000_000) // 2
    return Disorder(f"{max(1, shuffle // 1_000_000)}s", LATE, DUPLICATE, CORRUPT, seed)


def _deployment(
    pipeline: Pipeline, folder: str, runner: str, format: Format, dimensions: Mapping[str, str], seed: int
) -> Deployment:
    """All places in a folder. Dimensions that are not given are made up."""
    places = dict(dimensions)
    for of in pipeline.dimensions:
        if of.name not in places:
            places[of.name] = f"{folder}/{of.name}.jsonl"
            rows = samples.dimension(of, seed)
            rows = rows.rename_columns(of.schema.names).cast(of.schema.arrow)
            lines = encode(rows, of.schema, "json")["_raw"].to_pylist()
            Path(places[of.name]).write_bytes(b"\n".join(lines) + b"\n")
    schemas = f"&schemas={folder}/schemas" if format == "avro" else ""
    return Deployment(
        dimensions=places,
        live=f"{folder}/log.db?format={format}&partitions={PARTITIONS}{schemas}",
        lake=f"{folder}/lake",
        warehouse=f"{folder}/warehouse",
        store=f"{folder}/store.db",
        report=f"{folder}/run.json",
        runner=runner,
        state=f"{folder}/state",
        dead_letters=f"{folder}/dead_letters",
        buckets=BUCKETS if seed % 2 else None,
    )


@contextlib.contextmanager
def _key(pipeline: Pipeline) -> Iterator[bool]:
    """The key of the environment; a key for this trial where one is needed and there is none: nothing of it is kept.
    Whether it was made, so that a cluster's workers do not have it."""
    schemas = (pipeline.source.schema, *(of.schema for of in pipeline.dimensions))
    needed = pipeline.plan(live=True).keyed or any(schema.personal for schema in schemas)
    if not needed or os.environ.get(VARIABLE) or os.environ.get(f"{VARIABLE}_FILE"):
        yield False
        return
    os.environ[VARIABLE] = "00" * 32
    try:
        yield True
    finally:
        del os.environ[VARIABLE]
