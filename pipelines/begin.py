"""The beginning of a bounded run: what it is to read, and the table versions and store generations that it takes.

A run takes them where its graph is built, as the graph then runs once and at once. A classic template is built once and
run often, so its graph takes them itself, in its first step, which hands them to the others as a side input. Other
graphs do not: Flink and Spark cut a graph before every side input, so all rows would leave the worker and come back;
and Spark computes again what it has lost, and would begin a second time in the middle of a run.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.options.value_provider import ValueProvider
from apache_beam.transforms.window import GlobalWindow

from pipelines.commit import Commit, Limits, Output
from pipelines.io.store import open_store
from pipelines.io.table import Table
from pipelines.io.upsert import WriteStore
from pipelines.io.write import StageTable
from pipelines.options import Deployment
from pipelines.transforms.ranges import Ranges
from pipelines.transforms.view import ViewPlan


@dataclasses.dataclass(frozen=True)
class Begun:
    """A run that has begun: its name for itself (token), its tables with their versions, and its generations by view.

    Guarantee: from here on the store holds a new generation of each view, which nobody reads yet. What begins twice has
    taken the first one's generations away, and the first is refused as it writes.
    """

    pipeline: str
    token: str
    outputs: Mapping[str, Output]
    generations: Mapping[str, int]
    deployment: Deployment
    limits: Limits

    def stage(self, name: str) -> StageTable:
        """What writes the rows of a table."""
        output = self.outputs[name]
        return StageTable(output.table, token=self.token, version=output.version)

    def store(self, view: str) -> WriteStore:
        """What writes the rows of a view into its generation."""
        assert self.deployment.store
        return WriteStore(self.deployment.store, f"{self.pipeline}.{view}", self.generations[view])

    def commit(self) -> Commit:
        """What makes all of it what readers see."""
        outputs, generations = tuple(self.outputs.values()), dict(self.generations)
        return Commit(self.pipeline, self.token, outputs, generations, self.deployment, self.limits)

    @property
    def held(self) -> Table | None:
        """The dead letters that are kept, if this run adds to them."""
        letters = self.outputs["dead letters"]
        return letters.table if letters.replace == "nothing" and letters.version > 1 else None


def begin(
    pipeline: str,
    deployment: Deployment,
    *,
    token: str,
    outputs: Mapping[str, Output],
    views: Sequence[tuple[ViewPlan, Ranges]],
    limits: Limits,
) -> Begun:
    """views: those that are computed, with where their windows start. Raises UserError as the store does."""
    generations = {}
    if deployment.store:
        with open_store(deployment.store) as store:
            for view, ranges in views:
                keys = (*view.by, "window_start")
                generations[view.name] = store.begin(f"{pipeline}.{view.name}", view.schema, keys, ranges)
    return Begun(pipeline, token, outputs, generations, deployment, limits)


class First(beam.DoFn):  # type: ignore[misc]
    """The first step of a template's graph. Outputs: the run that it begins, and tagged what is to be read.

    places: parts of a deployment that are known as the template is launched. begin: of a deployment, the run and, by
    tag, what is to be read.
    """

    def __init__(
        self,
        deployment: Deployment,
        places: Mapping[str, ValueProvider],
        dimensions: Mapping[str, ValueProvider],
        begin: Callable[[Deployment], tuple[Begun, Mapping[str, Any]]],
    ) -> None:
        self.deployment, self.places, self.dimensions, self.begin = deployment, places, dimensions, begin

    def process(self, _: int) -> Iterator[Any]:
        given: dict[str, Any] = {name: place.get() for name, place in self.places.items()}
        given["dimensions"] = {name: uri for name, place in self.dimensions.items() if (uri := place.get())}
        begun, reading = self.begin(dataclasses.replace(self.deployment, **given))
        for tag, splits in reading.items():
            for split in splits:
                yield beam.pvalue.TaggedOutput(tag, split)
        yield begun


class Later(beam.DoFn):  # type: ignore[misc]
    """A part of a template's graph, which knows only as it runs what it is to do: ``made`` of the run that has begun,
    its first side input. Bounded input in the global window only."""

    def __init__(self, made: Callable[[Begun], beam.DoFn]) -> None:
        self.made = made
        self._part: Any = None

    def start_bundle(self) -> None:
        self._part = None

    def process(self, element: Any, begun: Begun, *sides: Any) -> Iterator[Any]:
        if self._part is None:
            self._part = self.made(begun)
            self._part.setup()
            self._part.start_bundle()
        windowed = {"window": GlobalWindow()} if isinstance(self._part, WriteStore) else {}
        yield from self._part.process(element, *sides, **windowed) or ()

    def finish_bundle(self) -> Iterator[Any]:
        if self._part is not None:
            part, self._part = self._part, None
            yield from part.finish_bundle() or ()
            part.teardown()
