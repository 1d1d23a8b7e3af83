"""The open windows of a view in an unbounded graph: Beam windows and state around ``pipelines.transforms.speed``.

A view of fixed windows is split by (bucket, window) and lives in Beam's FixedWindows. The others are split by bucket
and keep tiles, or the rows of open sessions, in the global window: Beam's sliding windows would shuffle and hold every
state size/every times, its sessions an element for each key, and calendar windows are none that an engine knows.
"""

import dataclasses
from collections.abc import Iterable, Iterator
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
        else:
            pieces = states | "in turn" >> every(self.trigger)
        parts = (
            pieces
            | "group" >> beam.GroupByKey()
            | "open" >> beam.ParDo(_Open(self.view)).with_outputs("gone", "tallies", main="answers")
        )
        parts.tallies = parts.tallies | "counted" >> beam.WindowInto(GlobalWindows())
        return parts

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
_CLOSE = TimerSpec("close", TimeDomain.WATERMARK)
_TIMER = beam.DoFn.TimerParam(_CLOSE)
_LAST = GlobalWindow().max_timestamp().micros


@beam.typehints.with_input_types(tuple[int, Iterable[pa.Table]])
@beam.typehints.with_output_types(pa.Table, gone=pa.Table, tallies=pa.Table)
class _Open(beam.DoFn):  # type: ignore[misc]
    """A bucket's open windows. State is partial states as they came, those that settled merged: a pane reads all of it
    (from the worker's cache) and adds to it, merges what it touches, and settles the rest geometrically.

    In fixed windows Beam drops the state of one that expires. In the global window a timer does, at the median of when
    what is held closes: so dropping costs a state O(1).
    """

    def __init__(self, view: OpenView) -> None:
        self.view, self.plan = view, view.plan

    def process(
        self,
        element: tuple[int, Iterable[pa.Table]],
        window: Any = beam.DoFn.WindowParam,
        settled: Any = _SETTLED,
        recent: Any = _RECENT,
        close: Any = _TIMER,
    ) -> Iterator[Any]:
        new = self.plan.merged(element[1])
        if not len(new):
            return
        old, late = list(settled.read()), list(recent.read())
        known = self.view.touched(pa.concat_tables([new.slice(0, 0), *old, *late]), new)
        pieces = [Piece("", *self.view.span(known), len(known))] if len(known) else []
        moved = self.view.advance(pieces, lambda _: known, [new], NEVER)
        part = f"view:{self.plan.name}"
        counts = tally(part, "rows_out", moved.rows), tally(part, "results", len(moved.answers))
        yield TaggedOutput("tallies", merge(counts))
        if len(moved.gone):
            yield TaggedOutput("gone", moved.gone)
        yield moved.answers
        waiting = sum(map(len, late)) + len(new)
        if waiting > max(FEW, sum(map(len, old))):
            settled.clear()
            recent.clear()
            settled.add(self.plan.merged([*old, *late, new]))
        else:
            recent.add(new)
        if not old and not late and window == GlobalWindow():
            self._set(close, new)

    @on_timer(_CLOSE)  # type: ignore[untyped-decorator]
    def drop(
        self,
        passed: Timestamp = beam.DoFn.TimestampParam,
        settled: Any = _SETTLED,
        recent: Any = _RECENT,
        close: Any = _TIMER,
    ) -> None:
        """Drops what has closed by the time that the watermark has passed."""
        held = self.plan.merged([*settled.read(), *recent.read()])
        settled.clear()
        recent.clear()
        left = held.filter(pa.array(self.view.closes(held) > passed.micros))
        if len(left):
            settled.add(left)
            self._set(close, left)

    def _set(self, close: Any, held: pa.Table) -> None:
        middle = int(np.median(self.view.closes(held)))
        close.set(Timestamp(micros=min(-(-middle // 1000) * 1000, _LAST)))  # engines count in milliseconds
