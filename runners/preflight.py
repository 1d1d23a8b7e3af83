"""Preflight: a graph is held against what is known not to work on an engine, before anything is submitted.

What is known is a table, made by running small graphs on each engine. ``refuse``: the run ends with exit 2. ``warn``: a
line on stderr. ``degrade``: a live run takes turns there, each a bounded graph; a graph that has the feature all the
same is refused. On a later Beam than an entry was seen with, what would refuse warns.
"""

import dataclasses
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, TextIO

from pipelines.transforms.errors import UserError

if TYPE_CHECKING:
    import apache_beam as beam

SEEN = "2.77"
"""The Beam that the table was made with."""

Verdict = Literal["refuse", "warn", "degrade"]


@dataclasses.dataclass(frozen=True)
class Known:
    """Something that does not work. feature: of ``features.FINDERS``. reason: ends a sentence about the runner. issue:
    of Beam's tracker, the closest there is."""

    runner: str
    feature: str
    verdict: Verdict
    reason: str
    issue: int

    @property
    def link(self) -> str:
        return f"https://github.com/apache/beam/issues/{self.issue}"

    def said(self, at: str) -> str:
        """In one line; at: the transform."""
        return f"{self.runner}: {self.feature} ({at}): {self.reason}; {self.link}"


_HELD = (
    "the watermark passes by rows that wait for the trigger, so a timer may drop the state that they need before them"
)

_CLEARED = "a timer fires although another one of its bundle has cleared it or set it anew"

KNOWN = (
    Known("DirectRunner", "an unbounded source", "degrade", "FnApiRunner gives nothing before a source ends", 21987),
    Known("DirectRunner", "TestStream", "refuse", "FnApiRunner has no such transform", 21988),
    Known("DirectRunner", "a processing-time trigger", "refuse", "FnApiRunner has no clock for it and crashes", 24680),
    Known(
        "DirectRunner",
        "processing-time timers of a stream",
        "warn",
        "FnApiRunner fires them at once, whatever their time",
        35168,
    ),
    Known(
        "DirectRunner",
        "timers in several transforms",
        "refuse",
        "FnApiRunner forgets those of all but one, and what they would have given",
        35168,
    ),
    Known(
        "DirectRunner",
        "several timers",
        "warn",
        _CLEARED,
        15123,
    ),
    Known(
        "PrismRunner",
        "an unbounded source without a Reshuffle",
        "refuse",
        "with several partitions rows are behind the watermark of the others and vanish in silence",
        33515,
    ),
    Known(
        "PrismRunner", "sessions of an unbounded source", "refuse", "sessions are cut in pieces, or Prism panics", 31438
    ),
    Known("PrismRunner", "a processing-time trigger in windows", "refuse", "Prism panics, or fires panes twice", 31438),
    Known(
        "PrismRunner",
        "windows of an unbounded source",
        "warn",
        "under load rows fall behind the watermark and vanish in silence; allow lateness, and count",
        33515,
    ),
    Known("PrismRunner", "state in a splittable DoFn", "refuse", "its state is not kept by the key", 32139),
    Known(
        "PrismRunner",
        "several timers",
        "warn",
        _CLEARED,
        15123,
    ),
    Known("FlinkRunner", "TestStream", "refuse", "Flink cannot decode elements of Python's coders in it", 19934),
    Known(
        "FlinkRunner",
        "processing-time timers of a stream",
        "warn",
        "a job waits at the end of its input for those that are still set; clear them",
        4639,
    ),
    Known(
        "SparkRunner", "an unbounded source", "degrade", "Spark cannot checkpoint a splittable DoFn of Python's", 19468
    ),
    Known("SparkRunner", "TestStream", "refuse", "Spark has no such transform", 20156),
    Known("DataflowRunner", "TestStream", "refuse", "Dataflow has no such transform", 11118),
    *(
        Known(runner, "event-time timers behind a trigger in the global window", "warn", _HELD, 17856)
        for runner in ("PrismRunner", "FlinkRunner", "DataflowRunner")
    ),
)


def found(runner: str | None, features: Mapping[str, str]) -> Iterator[tuple[Known, str]]:
    """What is known of a runner about a graph of these features, with the transform that it is about."""
    return ((known, features[known.feature]) for known in KNOWN if known.runner == runner and known.feature in features)


def degraded(runner: str) -> str:
    """Why a stream takes turns on a runner; empty where it does not."""
    every = (known for known in KNOWN if (known.runner, known.feature) == (runner, "an unbounded source"))
    return next((f"{known.reason}, {known.link}" for known in every if known.verdict == "degrade"), "")


def guard(runner: str | None, graph: Any, *, version: str | None = None, out: TextIO | None = None) -> None:
    """Holds a graph (a pipeline's proto) against what is known of a runner. version: of Beam, by default what runs.

    Raises UserError for the first thing that does not work; says the others on ``out``, by default stderr.
    """
    from pipelines.runners import features

    later = _later(version or features.VERSION)
    for known, at in found(runner, features.features(graph)):
        if known.verdict == "warn" or later:
            seen = f" (seen with Beam {SEEN}, this one is later)" if later else ""
            print(f"preflight: {known.said(at)}{seen}", file=out or sys.stderr)
        elif known.verdict == "degrade":
            raise UserError(f"preflight: {known.said(at)}; run it with --mode=micro-batch")
        else:
            raise UserError(f"preflight: {known.said(at)}; choose another --runner")


def rehearse(runner: str, build: Callable[["beam.Pipeline"], None]) -> None:
    """Holds what ``build`` puts on an empty pipeline against what is known of a runner, as ``guard``."""
    from pipelines.runners import features, uncollected

    with uncollected():
        guard(runner, features.encoded(build))


def _later(version: str) -> bool:
    """
    >>> _later("2.77.0"), _later("2.78.0.dev"), _later("3.0")
    (False, True, True)
    """
    numbers = [[int(part) for part in re.findall(r"\d+", text)[:2]] for text in (version, SEEN)]
    return numbers[0] > numbers[1]


def table() -> str:
    """What is known, in Markdown: of docs/engines.md."""
    head = ("| runner | graph | preflight | because |", "| --- | --- | --- | --- |")
    rows = (f"| {k.runner} | {k.feature} | {k.verdict} | {k.reason} ([#{k.issue}]({k.link})) |" for k in KNOWN)
    return "\n".join((*head, *rows))


if __name__ == "__main__":
    print(table())
