"""What executes a graph: one file per engine, each with ``run(build, flags)``. Importing this imports no engine."""

import contextlib
import dataclasses
import gc
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, cast, runtime_checkable

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


@dataclasses.dataclass(frozen=True)
class Following:
    """How an unbounded graph is run that its engine can resume. name: of the job. folder: a URI, where it keeps what it
    can be resumed from. since: what it resumes, one of those; None: it begins. submitted: called with the name that it
    runs under, its id, and where the engine is asked about it. ended: whether its input has come to its end."""

    name: str
    folder: str
    since: str | None
    submitted: Callable[[str, str, str], None]
    ended: Callable[[], bool]


@runtime_checkable
class Resumable(Protocol):
    """What an Engine's module offers besides, where a stopped or killed job can be resumed."""

    def follow(self, build: Callable[["beam.Pipeline"], None], flags: Sequence[str], following: Following) -> None:
        """Runs an unbounded graph until it has ended, or somebody else has stopped it. Interrupted, it stops the job in
        a way that it can be resumed from, and raises KeyboardInterrupt. Raises what failed."""


def named(runner: str) -> Engine:
    """The module of a runner. Raises UserError for a name that is none of MODULES."""
    if runner not in MODULES:
        raise UserError(f"--runner={runner}: no such runner here; one of {', '.join(MODULES)}")
    with uncollected():
        engine = cast(Engine, importlib.import_module(f"pipelines.runners.{MODULES[runner]}"))
        if engine.DISTRIBUTED:
            _carry()
        return engine


def _carry() -> None:
    """Has definitions that are files pickled with all that is in them: workers elsewhere have no such module."""
    pickling = importlib.import_module("apache_beam.internal.cloudpickle")
    for name, module in list(sys.modules.items()):
        if name.startswith("_definition_"):
            pickling.register_pickle_by_value(module)


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
