"""The end of a bounded run: the conservation law, then every table and the store's pointers made new."""

import dataclasses
import datetime
import json
from typing import Any

import apache_beam as beam
import fsspec
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.io.store import Pointer, open_store
from pipelines.io.table import STAGED, Replace, Table
from pipelines.options import Deployment
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
        stop: int | None,
        skipped: tuple[str, ...],
    ) -> None:
        self.pipeline, self.token, self.outputs, self.generations = pipeline, token, outputs, generations
        self.deployment, self.stop, self.skipped = deployment, stop, skipped

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
            output.table.commit(every, token=self.token, version=output.version, replace=output.replace)
        views = self._answered(answered)
        self._flip(views)
        self._tell(counts, pa.concat_tables([SPAN.empty_table(), *spans]), views)

    def _flip(self, views: dict[str, _Answered]) -> None:
        """A recomputed range leaves the boundary where it is: what lies after it was carried over."""
        if not self.deployment.store:
            return
        with open_store(self.deployment.store) as store:
            pointers = {}
            for name, generation in self.generations.items():
                before = store.pointer(f"{self.pipeline}.{name}") if self.stop is not None else None
                ends = [views[name].boundary, before.boundary if before else None]
                pointers[f"{self.pipeline}.{name}"] = Pointer(
                    generation, max((end for end in ends if end is not None), default=None)
                )
            store.flip(pointers)

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

    def _answered(self, answered: list[pa.Table]) -> dict[str, _Answered]:
        found = {
            output.name: _Answered(0, 0, self.stop)
            for output in self.outputs
            if output.name not in ("events", "dead letters")
        }
        for row in pa.concat_tables([ANSWERS.empty_table(), *answered]).to_pylist():
            before = found[row["view"]]
            ends = [end for end in (before.boundary, row["boundary"]) if end is not None]
            boundary = self.stop if self.stop is not None else max(ends, default=None)
            found[row["view"]] = _Answered(before.rows + row["rows"], (before.digest + row["digest"]) % 2**64, boundary)
        return found

    def _tell(self, counts: Conservation, spans: pa.Table, views: dict[str, _Answered]) -> None:
        boundaries = [view.boundary for view in views.values() if view.boundary is not None]
        facts: dict[str, Any] = {
            "rows": dict(counts.rows),
            "rejected": dict(counts.reasons),
            "dropped": {part: dict(reasons) for part, reasons in counts.dropped.items()},
            "unmatched": {
                name: {reason: n for reason, n in of.items() if n}
                for name, of in counts.unmatched.items()
                if any(of.values())
            },
            "views": {
                name: {"rows": view.rows, "digest": f"{view.digest:016x}", "complete_through": _iso(view.boundary)}
                for name, view in views.items()
            },
            "boundary": _iso(min(boundaries, default=None)),
            "first": _iso(pc.min(spans["first"]).as_py()),
            "last": _iso(pc.max(spans["last"]).as_py()),
            "skipped": list(self.skipped),
        }
        with fsspec.open(self.deployment.facts, "wt", encoding="utf-8") as file:
            json.dump(facts, file)


def _iso(micros: int | None) -> str | None:
    if micros is None:
        return None
    return (datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(microseconds=micros)).isoformat()
