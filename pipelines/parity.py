"""``pipelines parity``: proves that the layers of a pipeline agree, on its own definition and history.

A history is sent to a log in seeded disorder: shuffled, late, repeated, with bad messages between. A speed layer takes
it in turns of random size, dies at random points and starts again from what is on disk. What it has given to the store
must be what one bounded pass over the same log gives, of the rows that are not late.
"""

import collections
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

from pipelines import live, samples
from pipelines.bounded import Bounded
from pipelines.definition import Pipeline
from pipelines.io.log import Bounds, Format, Log, open_log
from pipelines.io.store import LIVE, open_store
from pipelines.io.turns import Turn, Turns, forget
from pipelines.layer import layer
from pipelines.options import Deployment
from pipelines.progress import shown
from pipelines.replay import messages, written
from pipelines.report import grid, indent
from pipelines.run import mistake
from pipelines.runners import Engine, named
from pipelines.transforms import lateness, progress
from pipelines.transforms.avro_schemas import Schemas
from pipelines.transforms.conservation import Conservation
from pipelines.transforms.differences import Compared, Difference, compared
from pipelines.transforms.disorder import Disorder
from pipelines.transforms.encode import avro_schema, encode
from pipelines.transforms.intake import next_offset
from pipelines.transforms.protect import VARIABLE
from pipelines.transforms.windows import Duration

RESTARTS, TURNS, PARTITIONS = 8, 24, 4
"""By default: how often the speed layer dies, and about how many turns it takes; the log's partitions."""

LATE, DUPLICATE, CORRUPT, AGAIN = 0.02, 0.05, 0.01, 0.02
"""Shares of the rows: sent when late for every view, sent twice, and bad messages added; and how much of what was sent
is sent again at a time, as a producer does that was not answered."""

POINTS = (
    "before it reads",
    "before it writes state",
    "before it commits",
    "after it commits",
    "while it delivers",
    "after it delivers",
    "between turns",
)
"""Where a speed layer dies."""


SEVERAL = ("before it writes state", "while it delivers")
"""Of them, those that a turn passes several times."""


class Died(Exception):
    """What stands for a kill: nothing after it happens."""


class Mortal(Turns):
    """Turns whose process dies once, in whatever process: at a point of POINTS, when the file ``mark`` is there. It
    holds how often the point is passed before."""

    def __init__(self, uri: str, point: str, mark: str) -> None:
        super().__init__(uri)
        self.point, self.mark = point, mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Mortal, (self.uri, self.point, self.mark)

    def passed(self, point: str) -> None:
        """Raises Died where it is this turn's point."""
        if point != self.point or not os.path.exists(self.mark):
            return
        path = Path(self.mark)
        if left := int(path.read_text()):
            path.write_text(str(left - 1))
            return
        path.unlink()
        raise Died(f"died {point}")

    def intend(self, text: str) -> None:
        super().intend(text)
        self.passed("before it reads")

    def write(self, name: str, table: pa.Table) -> None:
        self.passed("before it writes state")
        super().write(name, table)

    def commit(self, turn: Turn) -> None:
        self.passed("before it commits")
        super().commit(turn)
        self.passed("after it commits")

    def sweep(self) -> None:
        self.passed("after it delivers")
        super().sweep()


class _Speed(live.SpeedLayer):
    def __init__(self, pipeline: Pipeline, deployment: Deployment, engine: Engine, flags: Sequence[str], point: str):
        super().__init__(pipeline, deployment, engine, flags, clock=lambda: 0.0)  # nothing is idle
        self.mark = Path(f"{deployment.state}/die")
        self.mortal = Mortal(self.layer.turns.uri, point, str(self.mark))
        self.layer = dataclasses.replace(self.layer, turns=self.mortal)

    def _deliver(self, kind: str, view: str, rows: pa.Table) -> None:
        self.mortal.passed("while it delivers")
        super()._deliver(kind, view, rows)


@dataclasses.dataclass
class _Trial:
    """One speed layer after the other, over a log that grows. All chance is of the seed."""

    pipeline: Pipeline
    deployment: Deployment
    engine: Engine
    flags: Sequence[str]
    sent: Log
    log: Log
    chance: np.random.Generator
    points: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    turns: int = 0

    def run(self, turns: int, restarts: int) -> Conservation:
        """Everything that was sent, in so many turns and some, with so many restarts; what was counted."""
        deaths = collections.Counter(self.chance.integers(0, turns, restarts).tolist())
        cuts = {name: self._cuts(bounds, turns) for name, bounds in self.sent.bounds().items()}
        speed = self._begun()
        for number in range(turns):
            given = {name: table for name, table in self._next(cuts, number).items() if len(table)}
            self.log.append(given)
            progress.advance(sum(map(len, given.values())))
            for _ in range(deaths[number]):
                speed = self._died(speed)
            while speed.turn():
                pass
        status = speed.status()
        assert status is not None
        self.turns = status.turn.number
        speed.close()
        return status.counts

    def _cuts(self, bounds: Bounds, turns: int) -> list[int]:
        between = self.chance.integers(bounds.start, bounds.end, turns - 1, endpoint=True)
        return [bounds.start, *sorted(between.tolist()), bounds.end]

    def _next(self, cuts: Mapping[str, list[int]], number: int) -> dict[str, pa.Table]:
        """The next messages of each partition, and now and then some of before once more."""
        given = {}
        for name, at in cuts.items():
            parts = [_read(self.sent, name, at[number], at[number + 1])]
            if self.chance.random() < 0.3:
                rows = at[-1] - at[0]
                start = max(at[0], at[number] - int(self.chance.exponential(0.1) * rows))
                parts.append(_read(self.sent, name, start, min(at[number], start + int(AGAIN * rows))))
            given[name] = pa.concat_tables(parts)
        return given

    def _begun(self) -> _Speed:
        """From what is on disk."""
        forget()
        point = str(self.chance.choice(POINTS))
        speed = _Speed(self.pipeline, self.deployment, self.engine, self.flags, point)
        speed.deliver()
        return speed

    def _died(self, speed: _Speed) -> _Speed:
        point = speed.mortal.point
        if point != "between turns":
            speed.mark.write_text(str(self.chance.integers(0, 4) if point in SEVERAL else 0))
            try:
                speed.turn()
            except Exception:
                if speed.mark.exists():
                    raise
        if speed.mark.exists():  # the turn did not come by there so often
            speed.mark.unlink()
            point = "between turns"
        self.points[point] += 1
        speed.close()
        return self._begun()


def _read(log: Log, partition: str, start: int, stop: int) -> pa.Table:
    parts = [log.read(partition, stop, stop)]
    while start < stop and len(messages := log.read(partition, start, stop)):
        parts.append(messages)
        start = next_offset(messages)
    return pa.concat_tables(parts).select(["_raw", "_rows"])


@dataclasses.dataclass(frozen=True)
class Report:
    """What a trial found. views: by what was compared, and view. counts: the source's, of the speed layer. points: how
    often it died where. wrong: counts that differ, by name, of the speed layer and of the bounded run."""

    pipeline: str
    runner: str
    seed: int
    disorder: Disorder
    turns: int
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
            f"{counts}; {self.turns} turns, {sum(self.points.values())} restarts{f' ({died})' if died else ''}",
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
    restarts: int = RESTARTS,
    turns: int | None = None,
    format: Format = "json",
    disorder: Disorder | None = None,
) -> Report:
    """Runs the trial in a folder of its own. history: files, or rows as files have them; None: rows are made up, and so
    are dimensions that are not given. Nothing depends on chance but the seed's.

    Raises UserError as the parts of a run do; differences are told in the report.
    """
    begun, engine = time.perf_counter(), named(runner)
    disorder = disorder or _disorder(pipeline, seed)
    chance = np.random.default_rng(seed % 2**64)
    with tempfile.TemporaryDirectory(prefix="parity-") as folder, _key():
        deployment = _deployment(pipeline, folder, format, dimensions or {}, seed)
        assert deployment.live and deployment.store
        given = samples.history(pipeline, seed) if history is None else history
        partitions = [str(number) for number in range(PARTITIONS)]
        if format == "avro":
            Schemas(f"{folder}/schemas").add(avro_schema(written(pipeline)))
        with open_log(deployment.live) as log, open_log(deployment.live.replace("/log.db", "/sent.db", 1)) as sent:
            with shown(f"{pipeline.name}: sends its history"):
                for piece in messages(pipeline, given, disorder, partitions=partitions, format=format):
                    sent.append(piece)
            trial = _Trial(pipeline, deployment, engine, flags, sent, log, chance)
            with shown(f"{pipeline.name}: live in turns"), _told():
                counts = trial.run(TURNS if turns is None else turns, restarts)
            tables = {of.name: live.dimension(of, deployment.dimensions[of.name]) for of in pipeline.dimensions}
            bounded = Bounded(pipeline, layer(pipeline, deployment, 1), log, tables)
            expected = bounded.timely()
            with open_store(deployment.store) as store:
                views = {
                    view.name: compared(view, store.scan(f"{pipeline.name}.{view.name}", generation=LIVE), answers)
                    for view, answers in zip(pipeline.plan(live=True).views, expected.views.values(), strict=True)
                }
        found, right = _counted(counts), _counted(expected.counts)
        wrong = {name: (found.get(name, 0), right.get(name, 0)) for name in sorted({*found, *right})}
        return Report(
            pipeline.name,
            runner,
            seed,
            disorder,
            trial.turns,
            dict(trial.points),
            dict(counts.rows),
            {name: pair for name, pair in wrong.items() if pair[0] != pair[1]},
            {"the speed layer, and a bounded run over the rows that are not late": views},
            time.perf_counter() - begun,
        )


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
    pipeline: Pipeline, folder: str, format: Format, dimensions: Mapping[str, str], seed: int
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
        store=f"{folder}/store.db",
        state=f"{folder}/state",
        dead_letters=f"{folder}/dead_letters",
    )


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What a worker raised for the user, raised as that."""
    try:
        yield
    except Exception as error:
        if (found := mistake(error)) is None:
            raise
        raise found from error


@contextlib.contextmanager
def _key() -> Iterator[None]:
    """The key of the environment; a key for this trial where there is none: nothing of it is kept."""
    if os.environ.get(VARIABLE) or os.environ.get(f"{VARIABLE}_FILE"):
        yield
        return
    os.environ[VARIABLE] = "00" * 32
    try:
        yield
    finally:
        del os.environ[VARIABLE]
