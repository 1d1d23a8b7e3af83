"""What executes a graph: one file per engine, each with ``run(build, flags)``. Importing this imports no engine."""

import contextlib
import gc
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, cast

from pipelines.transforms.errors import UserError

if TYPE_CHECKING:
    import apache_beam as beam

MODULES = {
    "DataflowRunner": "dataflow",
    "DirectRunner": "direct",
    "FlinkRunner": "flink",
    "PrismRunner": "prism",
    "SparkRunner": "spark",
}
"""The runners of --runner, each with the module that knows it."""

REMOTE = ("DataflowRunner",)
"""Those whose workers are never on this machine, so they do not see its files."""


class Detached(Exception):
    """The job runs on without this process, or has yet to run: there is nothing to report. Its text says where it is.

    job: how an engine finds it again. code: what the process exits with.
    """

    def __init__(self, said: str, job: Mapping[str, str] | None = None, *, code: int = 0) -> None:
        super().__init__(said)
        self.job, self.code = job, code


class Engine(Protocol):
    """What a runner's module offers.

    DISTRIBUTED: work must be dealt out to workers, and nothing is shared by a disk of one process. UNBOUNDED: it takes
    graphs that do not end, given with ``--streaming``; a live run on another runner is of turns. DEALT: the rows of an
    unbounded source must go through a Reshuffle.
    """

    DISTRIBUTED: bool
    UNBOUNDED: bool
    DEALT: bool

    def run(self, build: Callable[["beam.Pipeline"], None], flags: Sequence[str]) -> None:
        """Runs what ``build`` puts on an empty pipeline to its end. flags: Beam's own options. Raises what failed."""

    def prepared(self, build: Callable[["beam.Pipeline"], None], flags: Sequence[str]) -> Callable[[], None]:
        """What runs it any number of times, each to its end."""


def named(runner: str) -> Engine:
    """The module of a runner. Raises UserError for a name that is none of MODULES."""
    if runner not in MODULES:
        raise UserError(f"--runner={runner}: no such runner here; one of {', '.join(MODULES)}")
    with uncollected():
        return cast(Engine, importlib.import_module(f"pipelines.runners.{MODULES[runner]}"))


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Without garbage collection: what imports and graphs are made of stays, and looking for more costs 0.2 CPU-s."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
