"""Where our own CPU-seconds go: ``python -m benchmarks.profiling base 30M``, one run, into the figures.

The parts of the graph are wrapped with a clock of the process's CPU time, all threads: the runner works on one bundle
at a time, so what passes between entering and leaving a part is that part's. One inside another counts for itself only.
"""

import functools
import importlib
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.data import DATASETS, ROOT
from benchmarks.figures import FIGURES, Figures
from benchmarks.peers import OURS

# What is wrapped, by the name of the part it counts for.
PARTS = {
    "read Parquet": ("pipelines.io.rowgroups:read",),
    "decode": ("pipelines.transforms.decoder:Decoder.decode",),
    "steps": ("pipelines.transforms.chain:Chain.run", "pipelines.transforms.clean:Between.split"),
    "partial": ("pipelines.transforms.view:ViewPlan.partials",),
    "split by bucket": ("pipelines.transforms.aggregate:split", "pipelines.transforms.aggregate:_shares"),
    "wait on disk": ("pipelines.transforms.spill:Shelf.put", "pipelines.transforms.spill:Shelf.parts"),
    "merge": ("pipelines.transforms.view:ViewPlan.merged",),
    "result": ("pipelines.transforms.view:ViewPlan.finished", "pipelines.transforms.view:ViewPlan.digested"),
    "shuffle (coder)": (
        "pipelines.transforms.tables:TableCoder.encode",
        "pipelines.transforms.tables:TableCoder.decode",
    ),
    "write Delta": (
        "pipelines.io.parquet:ParquetStage.add",
        "pipelines.io.parquet:ParquetStage.finish",
        "pipelines.commit:Commit.process",
    ),
}


class Clock:
    """Charges CPU time to the part that was entered last and not yet left."""

    def __init__(self) -> None:
        self.spent: Counter[str] = Counter()
        self._open = ["Beam and the rest"]
        self._since = 0.0

    def enter(self, part: str) -> None:
        self._charge()
        self._open.append(part)

    def leave(self) -> None:
        self._charge()
        self._open.pop()

    def _charge(self) -> None:
        now = time.process_time()
        self.spent[self._open[-1]] += now - self._since  # type: ignore[assignment]
        self._since = now

    def wrapped(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time charged to the part; of a generator, each of its steps."""

        @functools.wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            self.enter(part)
            try:
                answer = function(*arguments, **options)
            finally:
                self.leave()
            return self._stepwise(part, answer) if isinstance(answer, Iterator) else answer

        return timed

    def _stepwise(self, part: str, steps: Iterator[Any]) -> Iterator[Any]:
        while True:
            self.enter(part)
            try:
                step = next(steps)
            except StopIteration:
                return
            finally:
                self.leave()
            yield step


def main(job: str, dataset: str) -> None:
    clock = Clock()
    clock.enter("start and imports")
    modules = {place.partition(":")[0] for places in PARTS.values() for place in places}
    for module in ("pipelines.graph", *sorted(modules)):
        importlib.import_module(module)
    from pipelines.cli import main as run

    clock.leave()
    for part, places in PARTS.items():
        for place in places:
            _wrap(clock, part, place)
    with tempfile.TemporaryDirectory(dir=ROOT) as target:
        sys.argv = OURS.command(job, DATASETS[dataset], Path(target))[2:]
        try:
            run(command="run")
        except SystemExit as ended:
            if ended.code:
                raise
    clock.leave()
    figures = Figures.load(FIGURES)
    figures.profiles[f"{job}-{dataset}"] = {part: round(seconds, 2) for part, seconds in clock.spent.most_common()}
    figures.save(FIGURES)


def _wrap(clock: Clock, part: str, place: str) -> None:
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    setattr(owner, name, clock.wrapped(part, getattr(owner, name)))


if __name__ == "__main__":
    main(*sys.argv[1:])
