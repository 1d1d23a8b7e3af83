"""What a graph asks of an engine, found by walking its proto: the features that ``preflight`` knows something about."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import apache_beam as beam
from apache_beam.portability.api import beam_runner_api_pb2 as protos

VERSION: str = beam.__version__

HANDLED = "pipelines:handles:v1"
"""The annotation of a composite transform that names features, separated by commas, whose pitfalls its parts avoid."""

_PARDO = "beam:transform:pardo:v1"
_GROUP = ("beam:transform:group_by_key:v1", "beam:transform:combine_per_key:v1")
_RESHUFFLE, _TEST_STREAM, _READ = (f"beam:transform:{name}:v1" for name in ("reshuffle", "teststream", "read"))
_GLOBAL = "beam:window_fn:global_windows:v1"
_PROCESSING = ("after_processing_time", "after_synchronized_processing_time")


@dataclasses.dataclass(frozen=True)
class Graph:
    """A pipeline's proto, with what a walk needs of it."""

    proto: Any

    @cached_property
    def leaves(self) -> dict[str, Any]:
        """The transforms that have no parts, by id."""
        every = self.proto.components.transforms
        return {name: every[name] for name in sorted(every) if not every[name].subtransforms and every[name].spec.urn}

    @cached_property
    def inside(self) -> dict[str, tuple[Any, ...]]:
        """The composite transforms that a transform is a part of, by its id."""
        every, found = self.proto.components.transforms, {}

        def walk(name: str, outer: tuple[Any, ...]) -> None:
            found[name] = outer
            for part in every[name].subtransforms:
                walk(part, (*outer, every[name]))

        for root in self.proto.root_transform_ids:
            walk(root, ())
        return found

    @cached_property
    def consumers(self) -> dict[str, list[str]]:
        """The leaves that read a PCollection, by its id."""
        found: dict[str, list[str]] = {}
        for name, leaf in self.leaves.items():
            for given in leaf.inputs.values():
                found.setdefault(given, []).append(name)
        return found

    def unbounded(self, collection: str) -> bool:
        bounded = self.proto.components.pcollections[collection].is_bounded
        return bool(bounded == protos.IsBounded.UNBOUNDED)

    def windowing(self, collection: str) -> Any:
        components = self.proto.components
        return components.windowing_strategies[components.pcollections[collection].windowing_strategy_id]

    def pardo(self, leaf: Any) -> Any:
        """The payload of a ParDo; None for any other transform."""
        return protos.ParDoPayload.FromString(leaf.spec.payload) if leaf.spec.urn == _PARDO else None

    def groups(self, *, unbounded: bool = False) -> Iterator[tuple[str, Any, Any]]:
        """Every grouping that is none of a Reshuffle's, with its leaf and how its input is windowed."""
        for name, leaf in self.leaves.items():
            if leaf.spec.urn in _GROUP and not self.reshuffles(name):
                (given,) = leaf.inputs.values()
                if not unbounded or self.unbounded(given):
                    yield name, leaf, self.windowing(given)

    def stateful(self) -> Iterator[tuple[str, Any, Any]]:
        """Every ParDo with state or timers, with its leaf and payload."""
        for name, leaf in self.leaves.items():
            payload = self.pardo(leaf)
            if payload is not None and (payload.state_specs or payload.timer_family_specs):
                yield name, leaf, payload

    def sources(self) -> Iterator[str]:
        """The leaves that turn what is bounded into what is not."""
        for name, leaf in self.leaves.items():
            payload = self.pardo(leaf)
            reads = leaf.spec.urn == _READ or (payload is not None and payload.restriction_coder_id)
            if reads and any(map(self.unbounded, leaf.outputs.values())):
                yield name

    def reshuffles(self, name: str) -> bool:
        return any(outer.spec.urn == _RESHUFFLE for outer in self.inside.get(name, ()))

    def handles(self, name: str, feature: str) -> bool:
        said = (outer.annotations.get(HANDLED, b"") for outer in self.inside.get(name, ()))
        return any(feature in names.decode().split(",") for names in said)

    def behind(self, name: str, stop: Callable[[str], bool]) -> Iterator[str]:
        """The leaves that a leaf's outputs reach, through none of those at which to stop."""
        seen, waiting = set(), [name]
        while waiting:
            for output in self.leaves[waiting.pop()].outputs.values():
                for reader in self.consumers.get(output, ()):
                    if reader not in seen and not stop(reader):
                        seen.add(reader)
                        waiting.append(reader)
                        yield reader


def encoded(build: Callable[[beam.Pipeline], None]) -> Any:
    """The proto of what ``build`` puts on an empty pipeline."""
    root = beam.Pipeline()
    build(root)
    return root.to_runner_api()


def features(proto: Any) -> dict[str, str]:
    """The features of a pipeline, each with the name of the first transform that has it.

    >>> features(encoded(lambda root: root | beam.Create([("a", 1)]) | beam.GroupByKey()))
    {}
    """
    graph, found = Graph(proto), {}
    for feature, finder in FINDERS.items():
        names = (name for name in finder(graph) if not graph.handles(name, feature))
        if (first := next(names, None)) is not None:
            found[feature] = graph.leaves[first].unique_name
    return found


def _test_stream(graph: Graph) -> Iterator[str]:
    return (name for name, leaf in graph.leaves.items() if leaf.spec.urn == _TEST_STREAM)


def _merging(graph: Graph) -> Iterator[str]:
    merges = protos.MergeStatus.NEEDS_MERGE
    return (name for name, _, windows in graph.groups(unbounded=True) if windows.merge_status == merges)


def _windows(graph: Graph) -> Iterator[str]:
    return (name for name, _, windows in graph.groups(unbounded=True) if windows.window_fn.urn != _GLOBAL)


def _processing_trigger(graph: Graph) -> Iterator[str]:
    return (name for name, _, windows in graph.groups() if _waits(windows.trigger))


def _processing_trigger_in_windows(graph: Graph) -> Iterator[str]:
    for name, _, windows in graph.groups(unbounded=True):
        if windows.window_fn.urn != _GLOBAL and _waits(windows.trigger):
            yield name


def _waits(trigger: Any) -> bool:
    """Whether the clock is anywhere in a trigger."""
    return any(
        field.name in _PROCESSING
        or any(_waits(part) for part in (value if field.is_repeated else [value]) if hasattr(part, "ListFields"))
        for field, value in trigger.ListFields()
    )


def _timers(domain: int) -> Callable[[Graph], Iterator[str]]:
    def found(graph: Graph) -> Iterator[str]:
        for name, leaf, payload in graph.stateful():
            timed = any(timer.time_domain == domain for timer in payload.timer_family_specs.values())
            if timed and any(map(graph.unbounded, leaf.inputs.values())):
                yield name

    return found


def _timed_twice(graph: Graph) -> Iterator[str]:
    timed = [name for name, _, payload in graph.stateful() if payload.timer_family_specs]
    return iter(timed[1:])


def _several_timers(graph: Graph) -> Iterator[str]:
    return (name for name, _, payload in graph.stateful() if len(payload.timer_family_specs) > 1)


def _stateful_source(graph: Graph) -> Iterator[str]:
    return (name for name, _, payload in graph.stateful() if payload.restriction_coder_id)


def _triggered_timers(graph: Graph) -> Iterator[str]:
    timed = set(_timers(protos.TimeDomain.EVENT_TIME)(graph))
    for name, _, windows in graph.groups(unbounded=True):
        if windows.window_fn.urn == _GLOBAL and windows.trigger.WhichOneof("trigger") not in ("default", "never"):
            yield from (reader for reader in graph.behind(name, lambda _: False) if reader in timed)


def _undealt(graph: Graph) -> Iterator[str]:
    by_time = {*_timers(protos.TimeDomain.EVENT_TIME)(graph), *_windows(graph)}
    for source in graph.sources():
        yield from (reader for reader in graph.behind(source, graph.reshuffles) if reader in by_time)


FINDERS: dict[str, Callable[[Graph], Iterator[str]]] = {
    "an unbounded source": Graph.sources,
    "an unbounded source without a Reshuffle": _undealt,
    "TestStream": _test_stream,
    "sessions of an unbounded source": _merging,
    "windows of an unbounded source": _windows,
    "a processing-time trigger": _processing_trigger,
    "a processing-time trigger in windows": _processing_trigger_in_windows,
    "event-time timers behind a trigger in the global window": _triggered_timers,
    "processing-time timers of a stream": _timers(protos.TimeDomain.PROCESSING_TIME),
    "timers in several transforms": _timed_twice,
    "several timers": _several_timers,
    "state in a splittable DoFn": _stateful_source,
}
"""How each feature is found: the ids of the transforms that have it."""
