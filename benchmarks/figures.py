"""The figures of all runs, as JSON: the one source of the page's tables and chart."""

import dataclasses
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.measure import Measured
from benchmarks.verify import Accuracy

FIGURES = Path("docs/benchmarks.json")


@dataclasses.dataclass(frozen=True)
class Run(Measured):
    """One run of one program. Runs of the same ``session`` and ``number`` stood side by side: they make a pair.

    ``load``: how many processes wanted a core when it started (1-minute mean). ``accuracy``: of the first run only.
    """

    job: str
    dataset: str
    rows: int
    peer: str
    session: str
    number: int
    load: float
    accuracy: Accuracy | None = None

    @property
    def case(self) -> tuple[str, str]:
        return self.job, self.dataset


@dataclasses.dataclass
class Figures:
    """All runs, and what they ran on."""

    machine: dict[str, str]
    runs: list[Run]
    profiles: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    """By job and rows (base-30M): the CPU-seconds of each part of our own run."""

    @classmethod
    def load(cls, path: Path) -> "Figures":
        """Those of a file; none when it is not there."""
        if not path.exists():
            return cls({}, [])
        stored = json.loads(path.read_text(encoding="utf-8"))
        return cls(stored["machine"], [_run(fields) for fields in stored["runs"]], stored["profiles"])

    def save(self, path: Path) -> None:
        runs = ",\n".join(json.dumps(dataclasses.asdict(run)) for run in self.runs)
        machine, profiles = json.dumps(self.machine, indent=1), json.dumps(self.profiles, indent=1)
        text = f'{{"machine": {machine},\n"profiles": {profiles},\n"runs": [\n{runs}\n]}}\n'
        path.write_text(text, encoding="utf-8")

    def add(self, run: Run) -> None:
        """Adds a run; those of an earlier session of the same program in the same case give way."""
        same = (run.case, run.peer)
        self.runs = [old for old in self.runs if (old.case, old.peer) != same or old.session == run.session]
        self.runs.append(run)

    def of(self, job: str, dataset: str, peer: str) -> list[Run]:
        return [run for run in self.runs if (run.job, run.dataset, run.peer) == (job, dataset, peer)]

    def median(self, job: str, dataset: str, peer: str, field: str) -> float | None:
        """The median of a field over the runs; None when there is none."""
        values = [getattr(run, field) for run in self.of(job, dataset, peer)]
        return statistics.median(values) if values else None

    def ratio(self, job: str, dataset: str, peer: str, other: str) -> float | None:
        """The median, over the pairs, of one program's CPU-seconds by the other's."""
        others = {(run.session, run.number): run.cpu for run in self.of(job, dataset, other)}
        mine = self.of(job, dataset, peer)
        ratios = [run.cpu / others[pair] for run in mine if (pair := (run.session, run.number)) in others]
        return statistics.median(ratios) if ratios else None

    def speed(self, job: str, peer: str) -> float:
        """Rows per CPU-second at the greatest of 3M and 30M rows that it was measured at; 0 when at none."""
        for dataset in ("30M", "3M"):
            if runs := self.of(job, dataset, peer):
                return runs[0].rows / statistics.median(run.cpu for run in runs)
        return 0.0

    def peers(self, job: str, datasets: Iterable[str]) -> list[str]:
        """The programs measured in the job over any of the datasets, in the order of their runs."""
        wanted = {(job, dataset) for dataset in datasets}
        return list(dict.fromkeys(run.peer for run in self.runs if run.case in wanted))


def _run(fields: dict[str, Any]) -> Run:
    accuracy = fields.pop("accuracy")
    return Run(**fields, accuracy=accuracy and Accuracy(**accuracy))
