"""What an unbounded graph counts: the tallies of all its parts together, as counters of the engine and as JSON."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
import fsspec
import pyarrow as pa
from apache_beam.coders import StrUtf8Coder
from apache_beam.metrics import Metrics
from apache_beam.transforms import trigger
from apache_beam.transforms.timeutil import TimeDomain
from apache_beam.transforms.userstate import BagStateSpec, TimerSpec, on_timer
from apache_beam.transforms.window import GlobalWindow, GlobalWindows
from apache_beam.utils.timestamp import Timestamp
from fsspec.implementations.local import LocalFileSystem

from pipelines.io.follow import PLACES
from pipelines.reached import Reached
from pipelines.transforms import tables
from pipelines.transforms.conservation import Conservation, merge


@dataclasses.dataclass
class Every(beam.PTransform):  # type: ignore[misc]
    """Tables to some of them together, in one place, every so many µs (None: each by itself)."""

    micros: int | None

    def __post_init__(self) -> None:
        super().__init__()

    def expand(self, given: beam.PCollection) -> beam.PCollection:
        keyed = given | "key" >> beam.Map(lambda table: (0, table)).with_output_types(tuple[int, pa.Table])
        seconds = trigger.AfterProcessingTime(max(1, (self.micros or 0) // 1_000_000))
        fired = trigger.Repeatedly(trigger.AfterCount(1) if self.micros is None else seconds)
        discarding = trigger.AccumulationMode.DISCARDING
        return keyed | beam.WindowInto(GlobalWindows(), trigger=fired, accumulation_mode=discarding) | beam.GroupByKey()


@dataclasses.dataclass
class Counted(beam.PTransform):  # type: ignore[misc]
    """Tables to what Count makes of them, some together."""

    micros: int | None
    facts: str
    clock: Callable[[], float]

    def __post_init__(self) -> None:
        super().__init__("count")

    def annotations(self) -> dict[str, Any]:
        """What is known of timers on some engines does not matter: they drop nothing."""
        handled = (
            "an unbounded source without a Reshuffle",
            "event-time timers behind a trigger in the global window",
            "several timers",
        )
        return {**super().annotations(), "pipelines:handles:v1": ",".join(handled)}

    def expand(self, given: beam.PCollection) -> Any:
        return given | "some" >> Every(self.micros) | "all" >> beam.ParDo(Count(self.facts, self.clock))


@beam.typehints.with_input_types(pa.Table)
@beam.typehints.with_output_types(pa.Table)
class Sum(beam.DoFn):  # type: ignore[misc]
    """The tallies of a bundle as one, and as counters of the engine."""

    def start_bundle(self) -> None:
        self._tallies: list[pa.Table] = []

    def process(self, counted: pa.Table) -> None:
        self._tallies.append(counted)

    def finish_bundle(self) -> Iterator[Any]:
        counted = merge(self._tallies)
        for row in counted.to_pylist():
            Metrics.counter("pipelines", f"{row['part']} {row['counter']} {row['reason']}".strip()).inc(row["n"])
        if len(counted):
            yield GlobalWindows.windowed_value(counted)


_COUNTS = beam.DoFn.StateParam(BagStateSpec("counts", tables.TableCoder()))
_REACHED = beam.DoFn.StateParam(BagStateSpec("reached", StrUtf8Coder()))
_PASS, _END = TimerSpec("pass", TimeDomain.WATERMARK), TimerSpec("end", TimeDomain.WATERMARK)
_PASSES, _ENDS = beam.DoFn.TimerParam(_PASS), beam.DoFn.TimerParam(_END)


@beam.typehints.with_input_types(tuple[int, Iterable[pa.Table]])
class Count(beam.DoFn):  # type: ignore[misc]
    """All that was counted so far, and how far it is, as JSON; and as gauges of the engine: rows of state, and how far
    what is complete is behind the clock."""

    def __init__(self, facts: str, clock: Callable[[], float]) -> None:
        self.facts, self.clock = facts, clock

    def process(
        self,
        element: tuple[int, Iterable[pa.Table]],
        counts: Any = _COUNTS,
        reached: Any = _REACHED,
        passes: Any = _PASSES,
        ends: Any = _ENDS,
    ) -> None:
        given = list(element[1])
        all_ = merge([*counts.read(), *(table for table in given if table.schema != PLACES)])
        counts.clear()
        counts.add(all_)
        far = _far(reached)
        if places := [table for table in given if table.schema == PLACES]:
            if far is None:
                ends.set(GlobalWindow().max_timestamp())
            far = self._next((far or Reached()).told(pa.concat_tables(places)), reached, passes)
        self._tell(all_, far)

    @on_timer(_PASS)  # type: ignore[untyped-decorator]
    def passed(self, counts: Any = _COUNTS, reached: Any = _REACHED, passes: Any = _PASSES) -> None:
        """The watermark that was waited for has passed."""
        if (far := _far(reached)) is not None:
            self._tell(merge(counts.read()), self._next(far.passed(), reached, passes))

    @on_timer(_END)  # type: ignore[untyped-decorator]
    def ended(self, counts: Any = _COUNTS, reached: Any = _REACHED) -> None:
        """There is nothing more to come."""
        if (far := _far(reached)) is not None:
            far = dataclasses.replace(far.passed(), ended=True)
            reached.clear()
            reached.add(json.dumps(far.json()))
            self._tell(merge(counts.read()), far)

    def _next(self, far: Reached, reached: Any, passes: Any) -> Reached:
        reached.clear()
        reached.add(json.dumps(far.json()))
        if far.waits is not None and not far.ended:
            passes.set(Timestamp(micros=far.waits[0]))
        return far

    def _tell(self, counts: pa.Table, far: Reached | None) -> None:
        held = Conservation.of(counts).held
        for what, rows in held.items():
            Metrics.gauge("pipelines", f"state rows {what}").set(rows)
        told: dict[str, Any] = {"tallies": counts.to_pylist()}
        if far is not None:
            told["reached"] = far.json()
            if far.through is not None:
                Metrics.gauge("pipelines", "watermark age ms").set(int(self.clock() * 1000) - far.through // 1000)
        _write(self.facts, json.dumps(told))


def _write(uri: str, text: str) -> None:
    """Whole or not at all; on disk some time: the state has it all."""
    files, path = fsspec.url_to_fs(uri)
    if not isinstance(files, LocalFileSystem):
        files.pipe_file(path, text.encode())
        return
    aside = Path(f"{path}.new")
    aside.parent.mkdir(parents=True, exist_ok=True)
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def _far(reached: Any) -> Reached | None:
    return next((Reached.of(json.loads(text)) for text in reached.read()), None)
