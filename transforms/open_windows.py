"""The open windows of a view in an unbounded graph: Beam windows and state around ``pipelines.transforms.speed``.

A view of fixed windows is split by (bucket, window) and lives in Beam's FixedWindows. The others are split by bucket
and keep tiles, or the rows of open sessions, in the global window: Beam's sliding windows would shuffle and hold every
state size/every times, its sessions an element for each key, and calendar windows are none that an engine knows.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
from apache_beam.pvalue import TaggedOutput
from apache_beam.transforms import trigger
from apache_beam.transforms.timeutil import TimeDomain
from apache_beam.transforms.userstate import BagStateSpec, TimerSpec, on_timer
from apache_beam.transforms.window import FixedWindows, GlobalWindow, GlobalWindows, TimestampedValue
from apache_beam.utils.timestamp import Duration, Timestamp

from pipelines.transforms import tables
from pipelines.transforms.buckets import cut
from pipelines.transforms.conservation import merge, tally
from pipelines.transforms.lateness import NEVER
from pipelines.transforms.speed import OpenView, Piece
from pipelines.transforms.windows import Tumbling

SLACK = 1_000_000
"""µs that Beam allows beyond our own rule, so that it never drops what that takes."""

FEW = 4096
"""States that wait, before they are merged with the others."""


@dataclasses.dataclass
class Open(beam.PTransform):  # type: ignore[misc]
    """(bucket, partial states) of a view to its answers. Outputs, all of pa.Table: ``answers`` (the plan's schema:
    every window that changed), ``gone`` (keys and window_start of sessions that others absorbed), ``tallies`` (TALLY).

    trigger: µs between early answers, and between late ones; None: when a window closes, and at every late row.
    """

    view: OpenView
    trigger: int | None = None

    def __post_init__(self) -> None:
        super().__init__(self.view.plan.name)

    def expand(self, states: beam.PCollection) -> Any:
        window = self.view.plan.window
        if isinstance(window, Tumbling) and not window.overlapping:
            pieces = states | "by window" >> beam.ParDo(_ByWindow()) | "fixed" >> self._fixed(window)
            panes = pieces | "group" >> beam.GroupByKey()
            parts = panes | "fold" >> beam.ParDo(Fold(self.view)).with_outputs("tallies", main="answers")
            parts.tallies = parts.tallies | "counted" >> beam.WindowInto(GlobalWindows())
            return parts
        keep = beam.ParDo(Keep(self.view, self.trigger))
        return states | "keep" >> keep.with_outputs("gone", "tallies", main="answers")

    def _fixed(self, window: Tumbling) -> beam.WindowInto:
        often = _often(self.trigger)
        early = None if self.trigger is None else often
        offset = int(window.ends(np.zeros(1, np.int64))[0]) % window.tile
        return beam.WindowInto(
            FixedWindows(Duration(micros=window.tile), Timestamp(micros=offset)),
            trigger=trigger.AfterWatermark(early=early, late=often),
            accumulation_mode=trigger.AccumulationMode.DISCARDING,
            allowed_lateness=Duration(micros=self.view.rule.allowed + SLACK),
        )


def every(micros: int | None) -> beam.WindowInto:
    """The global window, in which what came is given on every so many µs; None: whenever something comes."""
    repeated = trigger.Repeatedly(_often(micros))
    return beam.WindowInto(GlobalWindows(), trigger=repeated, accumulation_mode=trigger.AccumulationMode.DISCARDING)


def _often(micros: int | None) -> trigger.TriggerFn:
    return trigger.AfterCount(1) if micros is None else trigger.AfterProcessingTime(max(1, micros // 1_000_000))


@beam.typehints.with_input_types(tuple[int, pa.Table])
@beam.typehints.with_output_types(tuple[int, pa.Table])
class _ByWindow(beam.DoFn):  # type: ignore[misc]
    """(bucket, states) to a piece for each tile, at the time at which that starts."""

    def process(self, element: tuple[int, pa.Table]) -> Iterator[TimestampedValue]:
        bucket, states = element
        starts, numbers = np.unique(states["_tile"].to_numpy(), return_inverse=True)
        for number, piece in cut(states, numbers, len(starts)):
            yield TimestampedValue((bucket, piece), Timestamp(micros=int(starts[number])))


_SETTLED = beam.DoFn.StateParam(BagStateSpec("settled", tables.TableCoder()))
_RECENT = beam.DoFn.StateParam(BagStateSpec("recent", tables.TableCoder()))
_WAITING = beam.DoFn.StateParam(BagStateSpec("waiting", tables.TableCoder()))
_CLOSE = TimerSpec("close", TimeDomain.WATERMARK)
_TURN = TimerSpec("turn", TimeDomain.REAL_TIME)
_LAST = GlobalWindow().max_timestamp()


class _Opened:
    """A bucket's open windows. State is partial states as they came, those that settled merged: what comes is compared
    with all of it (from the worker's cache), merged with what it touches, and added; the rest settles geometrically."""

    def __init__(self, view: OpenView, settled: Any, recent: Any) -> None:
        self.view, self.plan, self._settled, self._recent = view, view.plan, settled, recent
        self.old, self.late = list(settled.read()), list(recent.read())

    def add(self, parts: Iterable[pa.Table]) -> Iterator[Any]:
        """Partial states in; what changes by them out."""
        new = self.plan.merged(parts)
        if not len(new):
            return
        known = self.view.touched(pa.concat_tables([new.slice(0, 0), *self.old, *self.late]), new)
        pieces = [Piece("", *self.view.span(known), len(known))] if len(known) else []
        moved = self.view.advance(pieces, lambda _: known, [new], NEVER)
        part = f"view:{self.plan.name}"
        counts = tally(part, "rows_out", moved.rows), tally(part, "results", len(moved.answers))
        yield TaggedOutput("tallies", merge(counts))
        if len(moved.gone):
            yield TaggedOutput("gone", moved.gone)
        yield moved.answers
        if sum(map(len, self.late)) + len(new) > max(FEW, sum(map(len, self.old))):
            self.replace(self.plan.merged([*self.old, *self.late, new]))
        else:
            self._recent.add(new)
            self.late.append(new)

    def replace(self, states: pa.Table) -> None:
        """Makes it hold these."""
        self._settled.clear()
        self._recent.clear()
        self.old, self.late = [states] if len(states) else [], []
        for table in self.old:
            self._settled.add(table)


@beam.typehints.with_input_types(tuple[int, Iterable[pa.Table]])
@beam.typehints.with_output_types(pa.Table, tallies=pa.Table)
class Fold(beam.DoFn):  # type: ignore[misc]
    """Panes of a bucket in a fixed window, with whose expiry Beam drops the state."""

    def __init__(self, view: OpenView) -> None:
        self.view = view

    def process(
        self, element: tuple[int, Iterable[pa.Table]], settled: Any = _SETTLED, recent: Any = _RECENT
    ) -> Iterator[Any]:
        yield from _Opened(self.view, settled, recent).add(element[1])


@beam.typehints.with_input_types(tuple[int, pa.Table])
@beam.typehints.with_output_types(pa.Table, gone=pa.Table, tallies=pa.Table)
class Keep(beam.DoFn):  # type: ignore[misc]
    """Partial states of a bucket, in the global window, added in turn: every ``trigger`` µs, or at once.

    A trigger of Beam's would hold them where the watermark passes by, and what they belong to would be dropped. Here a
    timer at the median of when what is held closes drops it, after all that came before: so that costs a state O(1).
    """

    def __init__(self, view: OpenView, trigger: int | None, clock: Callable[[], float] = time.time) -> None:
        self.view, self.trigger, self.clock = view, trigger, clock

    def process(
        self,
        element: tuple[int, pa.Table],
        settled: Any = _SETTLED,
        recent: Any = _RECENT,
        waiting: Any = _WAITING,
        turn: Any = beam.DoFn.TimerParam(_TURN),  # noqa: B008  (Beam's way to ask for it)
        close: Any = beam.DoFn.TimerParam(_CLOSE),  # noqa: B008
    ) -> Iterator[Any]:
        if self.trigger is None:
            yield from self._add([element[1]], settled, recent, close)
            return
        if not any(True for _ in waiting.read()):
            turn.set(Timestamp(self.clock() + self.trigger / 1_000_000))
            if not any(True for bag in (settled, recent) for _ in bag.read()):
                self._set(close, element[1])  # it is also the last turn, at the end of the input
        waiting.add(element[1])

    @on_timer(_TURN)  # type: ignore[untyped-decorator]
    def take(
        self,
        settled: Any = _SETTLED,
        recent: Any = _RECENT,
        waiting: Any = _WAITING,
        close: Any = beam.DoFn.TimerParam(_CLOSE),  # noqa: B008
    ) -> Iterator[Any]:
        parts = list(waiting.read())
        waiting.clear()
        yield from self._add(parts, settled, recent, close)

    @on_timer(_CLOSE)  # type: ignore[untyped-decorator]
    def drop(
        self,
        passed: Timestamp = beam.DoFn.TimestampParam,
        settled: Any = _SETTLED,
        recent: Any = _RECENT,
        waiting: Any = _WAITING,
        turn: Any = beam.DoFn.TimerParam(_TURN),  # noqa: B008  (Beam's way to ask for it)
        close: Any = beam.DoFn.TimerParam(_CLOSE),  # noqa: B008
    ) -> Iterator[Any]:
        """Drops what has closed by the time that the watermark has passed."""
        yield from self.take(settled, recent, waiting, close)
        turn.clear()  # a turn that is still to come would keep Flink from ending
        held = _Opened(self.view, settled, recent)
        states = self.view.plan.merged([*held.old, *held.late])
        left = states.filter(pa.array(self.view.closes(states) > passed.micros))
        held.replace(left)
        self._set(close, left)

    def _add(self, parts: list[pa.Table], settled: Any, recent: Any, close: Any) -> Iterator[Any]:
        held = _Opened(self.view, settled, recent)
        first = not held.old and not held.late
        yield from held.add(parts)
        if first:
            self._set(close, pa.concat_tables([self.view.plan.partial_schema.empty_table(), *held.old, *held.late]))

    def _set(self, close: Any, held: pa.Table) -> None:
        if len(held):
            middle = int(np.median(self.view.closes(held)))
            close.set(min(Timestamp(micros=-(-middle // 1000) * 1000), _LAST))  # engines count in milliseconds
