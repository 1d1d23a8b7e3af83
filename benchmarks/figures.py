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


@dataclasses.dataclass(frozen=True)
class LiveRun(Measured):
    """One run of one program that followed a log, of ``rate`` rows a second for ``seconds``, then twice that for ten.

    p50, p99: seconds, over the keys and windows of the first phase; None where one was not complete in the end.
    backlog: rows sent and not visible at the end of the first phase; surge: of the second. drained: seconds from the
    last append until all rows were visible; None if they never were. counted: the rows in the answers.
    feeder_cpu: of the process that sent them; behind: seconds that it was late at most.
    """

    job: str
    format: str
    peer: str
    rate: int
    seconds: int
    sent: int
    counted: int
    p50: float | None
    p99: float | None
    backlog: int
    surge: int
    drained: float | None
    feeder_cpu: float
    behind: float
    load: float

    @property
    def steady(self) -> bool:
        """Whether it kept up, at most two seconds of rows behind, and nothing was lost."""
        return self.counted == self.sent and self.drained is not None and self.backlog <= 2 * self.rate

    @property
    def held(self) -> bool:
        """Whether it kept up, with a window's answer within two seconds, and nothing was lost."""
        return self.counted == self.sent and self.drained is not None and self.p99 is not None and self.p99 <= 2


@dataclasses.dataclass
class Figures:
    """All runs, and what they ran on."""

    machine: dict[str, str]
    runs: list[Run]
    profiles: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    """By job and rows (base-30M): the CPU-seconds of each part of our own run."""
    live: list[LiveRun] = dataclasses.field(default_factory=list)

    @classmethod
    def load(cls, path: Path) -> "Figures":
        """Those of a file; none when it is not there."""
        if not path.exists():
            return cls({}, [])
        stored = json.loads(path.read_text(encoding="utf-8"))
        live = [LiveRun(**fields) for fields in stored.get("live", [])]
        return cls(stored["machine"], [_run(fields) for fields in stored["runs"]], stored["profiles"], live)

    def save(self, path: Path) -> None:
        runs, live = (",\n".join(json.dumps(dataclasses.asdict(run)) for run in of) for of in (self.runs, self.live))
        machine, profiles = json.dumps(self.machine, indent=1), json.dumps(self.profiles, indent=1)
        text = f'{{"machine": {machine},\n"profiles": {profiles},\n"runs": [\n{runs}\n],\n"live": [\n{live}\n]}}\n'
        path.write_text(text, encoding="utf-8")

    def add(self, run: Run) -> None:
        """Adds a run; those of an earlier session of the same program in the same case give way."""
        same = (run.case, run.peer)
        self.runs = [old for old in self.runs if (old.case, old.peer) != same or old.session == run.session]
        self.runs.append(run)

    def add_live(self, run: LiveRun) -> None:
        """Adds a run, in place of that of the same program in the same job at the same rate."""
        case = (run.job, run.peer, run.rate)
        self.live = [old for old in self.live if (old.job, old.peer, old.rate) != case] + [run]

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
