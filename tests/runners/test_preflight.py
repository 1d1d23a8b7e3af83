"""A graph for each thing that preflight knows, and the verdicts. Nothing is run."""

import functools
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
import pytest
from apache_beam.coders import VarIntCoder
from apache_beam.io.restriction_trackers import OffsetRange, OffsetRestrictionTracker
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.testing.test_stream import TestStream as Stream
from apache_beam.transforms import trigger
from apache_beam.transforms.core import RestrictionProvider
from apache_beam.transforms.timeutil import TimeDomain
from apache_beam.transforms.userstate import BagStateSpec, TimerSpec, on_timer
from apache_beam.transforms.window import FixedWindows, GlobalWindows, Sessions

from pipelines import runners
from pipelines.runners import features as walk
from pipelines.runners.features import FINDERS, HANDLED, features
from pipelines.runners.preflight import KNOWN, SEEN, Known, degraded, found, guard, rehearse, table
from pipelines.transforms.errors import UserError

encoded = functools.cache(walk.encoded)

DUE, LATER = TimerSpec("due", TimeDomain.WATERMARK), TimerSpec("later", TimeDomain.WATERMARK)
CLOCK = TimerSpec("clock", TimeDomain.REAL_TIME)
HELD_, DUE_, LATER_, CLOCK_ = (
    beam.DoFn.StateParam(BagStateSpec("held", VarIntCoder())),
    *map(beam.DoFn.TimerParam, (DUE, LATER, CLOCK)),
)

TWO = tuple[str, int]
DISCARDING = trigger.AccumulationMode.DISCARDING


class Ranges(RestrictionProvider):  # type: ignore[misc]
    def initial_restriction(self, _: Any) -> OffsetRange:
        return OffsetRange(0, 1)

    def create_tracker(self, restriction: OffsetRange) -> OffsetRestrictionTracker:
        return OffsetRestrictionTracker(restriction)


RANGES_ = beam.DoFn.RestrictionParam(Ranges())


class Endless(beam.DoFn):  # type: ignore[misc]
    @beam.DoFn.unbounded_per_element()  # type: ignore[untyped-decorator]
    def process(self, _: Any, tracker: Any = RANGES_) -> Iterator[TWO]:
        yield "a", 1


class Timed(beam.DoFn):  # type: ignore[misc]
    def process(self, element: tuple[str, Any], due: Any = DUE_) -> None: ...
    @on_timer(DUE)  # type: ignore[untyped-decorator]
    def fire(self) -> None: ...


class Clocked(beam.DoFn):  # type: ignore[misc]
    def process(self, element: TWO, clock: Any = CLOCK_) -> None: ...
    @on_timer(CLOCK)  # type: ignore[untyped-decorator]
    def fire(self) -> None: ...


class Twice(Timed):
    def process(self, element: tuple[str, Any], due: Any = DUE_, later: Any = LATER_) -> None: ...
    @on_timer(LATER)  # type: ignore[untyped-decorator]
    def last(self) -> None: ...


class EndlessState(Endless):
    @beam.DoFn.unbounded_per_element()  # type: ignore[untyped-decorator]
    def process(
        self,
        _: Any,
        held: Any = HELD_,
        tracker: Any = RANGES_,
    ) -> Iterator[TWO]:
        yield "a", 1


def some(root: beam.Pipeline) -> beam.PCollection:
    return root | beam.Create([("a", 1)])


def endless(root: beam.Pipeline) -> beam.PCollection:
    return root | beam.Create(["log"]) | beam.ParDo(Endless()).with_output_types(TWO)


def windows(fn: Any, when: Any = None) -> Any:
    return beam.WindowInto(fn, trigger=when, accumulation_mode=DISCARDING if when else None)


EVERY = trigger.Repeatedly(trigger.AfterProcessingTime(1))
EARLY = trigger.AfterWatermark(early=trigger.AfterProcessingTime(1))
HAS: dict[str, list[Callable[[beam.Pipeline], Any]]] = {
    "an unbounded source": [endless],
    "an unbounded source without a Reshuffle": [
        lambda root: endless(root) | beam.Map(lambda row: row).with_output_types(TWO) | beam.ParDo(Timed()),
        lambda root: endless(root) | windows(FixedWindows(1)) | beam.GroupByKey(),
    ],
    "TestStream": [lambda root: root | Stream()],
    "sessions of an unbounded source": [lambda root: endless(root) | windows(Sessions(1)) | beam.GroupByKey()],
    "windows of an unbounded source": [lambda root: endless(root) | windows(FixedWindows(1)) | beam.CombinePerKey(sum)],
    "a processing-time trigger": [lambda root: some(root) | windows(GlobalWindows(), EVERY) | beam.GroupByKey()],
    "a processing-time trigger in windows": [
        lambda root: endless(root) | windows(FixedWindows(1), EARLY) | beam.GroupByKey()
    ],
    "event-time timers behind a trigger in the global window": [
        lambda root: endless(root) | windows(GlobalWindows(), EVERY) | beam.GroupByKey() | beam.ParDo(Timed())
    ],
    "processing-time timers of a stream": [lambda root: endless(root) | beam.ParDo(Clocked())],
    "timers in several transforms": [
        lambda root: [some(root) | beam.ParDo(Timed()), root | "b" >> beam.Create([("b", 1)]) | beam.ParDo(Clocked())]
    ],
    "several timers": [lambda root: some(root) | beam.ParDo(Twice())],
    "state in a splittable DoFn": [lambda root: some(root) | beam.ParDo(EndlessState())],
}
HAS_NOT: dict[str, Callable[[beam.Pipeline], Any]] = {
    "an unbounded source": some,
    "an unbounded source without a Reshuffle": lambda root: endless(root) | beam.Reshuffle() | beam.ParDo(Timed()),
    "sessions of an unbounded source": lambda root: some(root) | windows(Sessions(1)) | beam.GroupByKey(),
    "windows of an unbounded source": lambda root: endless(root) | beam.Reshuffle(),
    "a processing-time trigger": lambda root: endless(root) | windows(FixedWindows(1)) | beam.GroupByKey(),
    "a processing-time trigger in windows": lambda root: (
        endless(root) | windows(GlobalWindows(), EVERY) | beam.GroupByKey()
    ),
    "event-time timers behind a trigger in the global window": lambda root: (
        endless(root) | beam.ParDo(Timed()) | windows(GlobalWindows(), EVERY)
    ),
    "processing-time timers of a stream": lambda root: some(root) | beam.ParDo(Clocked()),
    "timers in several transforms": lambda root: some(root) | beam.ParDo(Twice()),
    "several timers": lambda root: some(root) | beam.ParDo(Timed()),
}


@pytest.mark.parametrize("feature", FINDERS)
def test_a_feature_is_found_where_it_is_and_nowhere_else(feature: str) -> None:
    for build in HAS[feature]:
        assert feature in features(encoded(build))
    if feature in HAS_NOT:
        assert feature not in features(encoded(HAS_NOT[feature]))


def test_what_a_transform_says_that_it_handles_is_not_held_against_its_parts() -> None:
    class Careful(beam.PTransform):  # type: ignore[misc]
        def annotations(self) -> dict[str, Any]:
            return {**super().annotations(), HANDLED: "several timers"}

        def expand(self, rows: beam.PCollection) -> beam.PCollection:
            return rows | beam.ParDo(Twice())

    assert features(encoded(lambda root: some(root) | Careful())) == {}


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: f"{known.runner}: {known.feature}")
def test_each_verdict_does_what_it_says_in_one_line(known: Known) -> None:
    graph, said = encoded(HAS[known.feature][-1]), io.StringIO()
    ((same, at),) = ((one, at) for one, at in found(known.runner, features(graph)) if one is known)
    line = same.said(at)
    assert "\n" not in line and line.endswith(known.link)
    refused = [one for one, _ in found(known.runner, features(graph)) if one.verdict != "warn"]
    if refused:
        with pytest.raises(UserError, match=f"preflight: {refused[0].runner}: {refused[0].feature}") as raised:
            guard(known.runner, graph, out=said)
        assert ("--mode=micro-batch" in str(raised.value)) == (refused[0].verdict == "degrade")
    else:
        guard(known.runner, graph, out=said)
        assert f"preflight: {line}\n" in said.getvalue()


def test_a_later_beam_is_warned_and_tried() -> None:
    graph, said = encoded(HAS["TestStream"][0]), io.StringIO()
    guard("FlinkRunner", graph, version="99.0", out=said)
    assert f"(seen with Beam {SEEN}, this one is later)" in said.getvalue()


def test_a_clean_graph_and_an_unknown_runner_pass_in_silence(capsys: pytest.CaptureFixture[str]) -> None:
    for runner in (*runners.MODULES, "OtherRunner"):
        rehearse(runner, some)
    guard(None, beam_runner_api_pb2.Pipeline())
    assert capsys.readouterr() == ("", "")


def test_the_runners_of_turns_are_those_that_degrade() -> None:
    for name in runners.MODULES:
        if name != "DataflowRunner":  # may not be installed
            assert bool(degraded(name)) == (not runners.named(name).UNBOUNDED)


def test_no_runner_runs_what_it_cannot_run() -> None:
    with pytest.raises(UserError, match="FnApiRunner gives nothing before a source ends"):
        runners.named("DirectRunner").run(endless, [])
    with pytest.raises(UserError, match="FnApiRunner has no such transform"):
        runners.named("DirectRunner").prepared(HAS["TestStream"][0], [])()


def test_the_page_tells_what_is_known() -> None:
    page = Path("docs/engines.md").read_text(encoding="utf-8")
    assert table() in page, "put there what `python -m pipelines.runners.preflight` prints"
