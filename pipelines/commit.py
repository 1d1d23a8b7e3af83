"""The end of a bounded run: the conservation law, then every table and the store's pointers made new."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import apache_beam as beam
import fsspec
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.io.store import Pointer, open_store
from pipelines.io.table import STAGED, Replace, Table
from pipelines.options import Deployment
from pipelines.report import counted, iso
from pipelines.scope import hour_end
from pipelines.transforms.aggregate import ANSWERS
from pipelines.transforms.conservation import SPAN, Conservation, merge
from pipelines.transforms.errors import DataRefused


@dataclasses.dataclass(frozen=True)
class Output:
    """A table of this run: its name in the run, and what its commit will be."""

    name: str
    table: Table
    version: int
    replace: Replace
    note: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the commit step knows of what was read. ranged: whether only a part was computed. stop: µs, where a range of
    files ends. through: µs, how far the rows of a lake reach; None for files. spoken: boundaries of views of all time.
    endless: views of all time that speak to the end of the last hour that files have rows of. skipped: views that were
    left as they are. told: a line for the report. noted: whether the notes of the outputs are of this run, and not what
    they said before."""

    ranged: bool = False
    stop: int | None = None
    through: int | None = None
    spoken: Mapping[str, int] = dataclasses.field(default_factory=dict)
    endless: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    told: str | None = None
    noted: bool = True


@dataclasses.dataclass(frozen=True)
class _Answered:
    rows: int
    digest: int
    boundary: int | None


class Commit(beam.DoFn):  # type: ignore[misc]
    """Makes a run's results what readers see. Given all that the parts have counted and staged, as side inputs.

    Guarantee: exactly once. Every commit carries the run's token and version and is looked up before it is written, so
    a retried bundle, or a step tried again after an unknown outcome, commits nothing twice. Raises DataRefused, before
    anything is committed, if the law of conservation is broken or more rows were rejected than allowed.
    """

    def __init__(
        self,
        pipeline: str,
        token: str,
        outputs: tuple[Output, ...],
        generations: dict[str, int],
        deployment: Deployment,
        limits: Limits,
    ) -> None:
        self.pipeline, self.token, self.outputs, self.generations = pipeline, token, outputs, generations
        self.deployment, self.limits = deployment, limits

    def process(
        self,
        _: int,
        tallies: Any,
        spans: Any,
        answered: Any,
        written: Any,
        *staged: Any,
    ) -> None:
        counts = Conservation.of(merge(tallies))
        self._judge(counts)
        for output, parts in zip(self.outputs, staged, strict=True):
            every = pa.concat_tables([STAGED.empty_table(), *parts])
            output.table.commit(
                every, token=self.token, version=output.version, replace=output.replace, note=output.note
            )
        spans = pa.concat_tables([SPAN.empty_table(), *spans])
        views = self._answered(answered, pc.max(spans["last"]).as_py())
        self._flip(views)
        self._tell(counts, spans, views)

    def _flip(self, views: dict[str, _Answered]) -> None:
        """A recomputed range leaves the boundary where it is: what lies after it was carried over. Rows of the speed
        layer for which the lake's now speak go."""
        if not self.deployment.store:
            return
        with open_store(self.deployment.store) as store:
            pointers = {}
            for name, generation in self.generations.items():
                before = store.pointer(f"{self.pipeline}.{name}") if self.limits.ranged else None
                ends = [views[name].boundary, before.boundary if before else None]
                boundary = max((end for end in ends if end is not None), default=None)
                note = next(json.dumps(output.note) for output in self.outputs if output.name == name)
                former = None if before is None or self.limits.noted else before.note
                pointers[f"{self.pipeline}.{name}"] = Pointer(generation, boundary, former or note)
            store.flip(pointers)
            for name, pointer in pointers.items() if self.limits.through is not None else ():
                if pointer.boundary is not None:
                    store.prune(name, pointer.boundary)

    def _judge(self, counts: Conservation) -> None:
        violations = counts.violations()
        if violations:
            raise DataRefused(
                f"{self.pipeline}: the law of conservation is broken, nothing was committed: {'; '.join(violations)}"
            )
        allowed, read, rejected = self.deployment.max_rejected, counts.rows["read"], counts.rows["rejected"]
        if allowed is not None and read and rejected / read > allowed:
            worst = ", ".join(
                f"{reason} {n:,}" for reason, n in sorted(counts.reasons.items(), key=lambda item: -item[1])[:3]
            )
            raise DataRefused(
                f"{self.pipeline}: {rejected:,} of {read:,} rows were rejected ({rejected / read:.2%}), more than "
                f"--max_rejected={allowed}; nothing was committed. Most: {worst}"
            )

    def _answered(self, answered: list[pa.Table], last: int | None) -> dict[str, _Answered]:
        """last: µs, the greatest event time."""
        spoken = dict(self.limits.spoken)
        if last is not None:
            spoken |= dict.fromkeys(self.limits.endless, hour_end(last))
        found = {
            output.name: _Answered(0, 0, spoken.get(output.name, self.limits.stop))
            for output in self.outputs
            if output.name not in ("events", "dead letters")
        }
        for row in pa.concat_tables([ANSWERS.empty_table(), *answered]).to_pylist():
            before = found[row["view"]]
            ends = [end for end in (before.boundary, row["boundary"]) if end is not None]
            boundary = self.limits.stop if self.limits.stop is not None else max(ends, default=None)
            found[row["view"]] = _Answered(before.rows + row["rows"], (before.digest + row["digest"]) % 2**64, boundary)
        return found

    def _tell(self, counts: Conservation, spans: pa.Table, views: dict[str, _Answered]) -> None:
        boundaries = [view.boundary for view in views.values() if view.boundary is not None]
        facts: dict[str, Any] = {
            **counted(counts),
            "views": {
                name: {"rows": view.rows, "digest": f"{view.digest:016x}", "complete_through": iso(view.boundary)}
                for name, view in views.items()
            },
            "boundary": iso(min(boundaries, default=None)),
            "first": iso(pc.min(spans["first"]).as_py()),
            "last": iso(pc.max(spans["last"]).as_py()),
            "skipped": list(self.limits.skipped),
            "since": self.limits.told,
        }
        with fsspec.open(self.deployment.facts, "wt", encoding="utf-8") as file:
            json.dump(facts, file)
