"""The open windows of a view in an unbounded graph: state and timers around ``pipelines.transforms.speed``.

State is split by (bucket, span): a span is many windows side by side, or all of a view whose windows overlap or are
sessions. Beam's own windows would give an element, and a state, for each bucket and window: following a year of hourly
windows took a minute of CPU per 6,000 rows, while one query answers for all the windows of a span at once. Sliding ones
would also be shuffled and held size/every times, sessions by an element for each key; and calendar windows are none
that an engine knows.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
from apache_beam.pvalue import TaggedOutput
from apache_beam.transforms.timeutil import TimeDomain
from apache_beam.transforms.userstate import BagStateSpec, TimerSpec, on_timer
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.timestamp import Timestamp

from pipelines.transforms import tables
from pipelines.transforms.buckets import cut
from pipelines.transforms.conservation import merge, tally
from pipelines.transforms.lateness import NEVER
from pipelines.transforms.speed import Advanced, OpenView, Piece
from pipelines.transforms.windows import Session

TILES = 128
"""Windows of a span."""

FEW = 4096
"""States that wait, before they are merged with the others."""


@dataclasses.dataclass
class Open(beam.PTransform):  # type: ignore[misc]
    """(bucket, partial states) of a view to its answers. Outputs, all of pa.Table: ``answers`` (the plan's schema:
    every window that changed), ``gone`` (keys and window_start of sessions that others absorbed), ``tallies`` (TALLY).

    Answers come when the watermark passes the end of a window, for late rows soon after they came, and every trigger
    (µs) in between, if there is one. The rule of the view says what is late, so nothing here drops a row.
    """

    view: OpenView
    trigger: int | None = None

    def __post_init__(self) -> None:
        super().__init__(self.view.plan.name)

    def annotations(self) -> dict[str, Any]:
        """What is known of timers on some engines does not matter here: each of the three may fire at any time."""
        handled = "several timers,processing-time timers of a stream"
        return {**super().annotations(), "pipelines:handles:v1": handled}

    def expand(self, states: beam.PCollection) -> Any:
        keep = beam.ParDo(Keep(self.view, self.trigger)).with_outputs("gone", "tallies", main="answers")
        return states | "by span" >> beam.ParDo(_BySpan(self.view)) | "keep" >> keep


Key = tuple[int, int]
"""Bucket and span."""


@beam.typehints.with_input_types(tuple[int, pa.Table])
@beam.typehints.with_output_types(tuple[Key, pa.Table])
class _BySpan(beam.DoFn):  # type: ignore[misc]
    def __init__(self, view: OpenView) -> None:
        window = view.plan.window
        one = isinstance(window, Session) or window.overlapping or window.tile is None
        self.width = None if one else TILES * (window.tile or 1)

    def process(self, element: tuple[int, pa.Table]) -> Iterator[tuple[Key, pa.Table]]:
        bucket, states = element
        if self.width is None:
            yield (bucket, 0), states
            return
        spans, numbers = np.unique(states["_tile"].to_numpy() // self.width, return_inverse=True)
        for number, piece in cut(states, numbers, len(spans)):
            yield (bucket, int(spans[number])), piece


_SETTLED = beam.DoFn.StateParam(BagStateSpec("settled", tables.TableCoder()))
_RECENT = beam.DoFn.StateParam(BagStateSpec("recent", tables.TableCoder()))
_WAITING = beam.DoFn.StateParam(BagStateSpec("waiting", tables.TableCoder()))
_TURN = TimerSpec("turn", TimeDomain.REAL_TIME)
_DUE, _CLOSE = TimerSpec("due", TimeDomain.WATERMARK), TimerSpec("close", TimeDomain.WATERMARK)
_TURNS, _DUES, _CLOSES = (beam.DoFn.TimerParam(timer) for timer in (_TURN, _DUE, _CLOSE))
_LAST = GlobalWindow().max_timestamp()


class _Opened:
    """The open windows of a span. State is partial states as they came, and those that settled merged: what comes is
    compared with all of it, merged with what it touches, and added. The rest settles geometrically."""

    def __init__(self, view: OpenView, settled: Any, recent: Any) -> None:
        self.view, self.plan, self._settled, self._recent = view, view.plan, settled, recent
        self.old, self.late = list(settled.read()), list(recent.read())

    def add(self, parts: Iterable[pa.Table]) -> Iterator[Any]:
        """Partial states in; what changes by them out."""
        new, before = self.plan.merged(parts), self.rows
        if not len(new):
            return
        moved = self._moved([*self.old, *self.late], new)
        if sum(map(len, self.late)) + len(new) > max(FEW, sum(map(len, self.old))):
            self.replace(self.plan.merged([*self.old, *self.late, new]))
        else:
            self._recent.add(new)
            self.late.append(new)
        part = f"view:{self.plan.name}"
        counts = tally(part, "rows_out", moved.rows), tally(part, "results", len(moved.answers))
        yield TaggedOutput("tallies", merge([*counts, self.held(before)]))
        if len(moved.gone):
            yield TaggedOutput("gone", moved.gone)
        yield moved.answers

    def _moved(self, held: list[pa.Table], new: pa.Table) -> Advanced:
        if self.view.plain:
            return self.view.answered(held, new)
        known = self.view.touched(pa.concat_tables(held), new) if held else new.slice(0, 0)
        pieces = [Piece("", *self.view.span(known), len(known))] if len(known) else []
        return self.view.advance(pieces, lambda _: known, [new], NEVER)

    def left(self, watermark: int) -> pa.Table:
        """What is not closed by then, merged. Sessions are merged first: a part of one may close before it."""
        every = [*self.old, *self.late]
        if isinstance(self.plan.window, Session):
            every = [self.plan.merged(every)]
        return self.plan.merged(table.filter(pa.array(self.view.closes(table) > watermark)) for table in every)

    @property
    def rows(self) -> int:
        """Of state."""
        return sum(map(len, self.old)) + sum(map(len, self.late))

    def held(self, before: int) -> pa.Table:
        """TALLY: how many rows of state there are more than before."""
        return tally(f"state:view {self.plan.name}", "held", self.rows - before)

    def replace(self, states: pa.Table) -> None:
        """Makes it hold these."""
        self._settled.clear()
        self._recent.clear()
        self.old, self.late = [states] if len(states) else [], []
        for table in self.old:
            self._settled.add(table)


@beam.typehints.with_input_types(tuple[Key, pa.Table])
@beam.typehints.with_output_types(pa.Table, gone=pa.Table, tallies=pa.Table)
class Keep(beam.DoFn):  # type: ignore[misc]
    """Partial states of a span, which wait for their turn, for the end of a window or for the end of the input.

    They wait in this state and not for a trigger of Beam's: that would hold them where the watermark passes by, and
    what they belong to would be dropped before them. It is dropped by a timer at the median of when what is held
    closes, so that costs a state O(1).
    """

    def __init__(self, view: OpenView, trigger: int | None, clock: Callable[[], float] = time.time) -> None:
        self.view, self.trigger, self.clock = view, trigger, clock

    def process(
        self, element: tuple[Key, pa.Table], waiting: Any = _WAITING, turn: Any = _TURNS, due: Any = _DUES
    ) -> None:
        states = element[1]
        if not any(True for _ in waiting.read()):
            if self.trigger is not None:
                turn.set(Timestamp(self.clock() + self.trigger / 1_000_000))
            due.set(_timestamp(int(self.view.due(states).min())))
        waiting.add(states)

    @on_timer(_TURN)  # type: ignore[untyped-decorator]
    def in_turn(
        self,
        settled: Any = _SETTLED,
        recent: Any = _RECENT,
        waiting: Any = _WAITING,
        due: Any = _DUES,
        close: Any = _CLOSES,
    ) -> Iterator[Any]:
        yield from self._take(settled, recent, waiting, close, due)

    @on_timer(_DUE)  # type: ignore[untyped-decorator]
    def on_time(
        self,
        settled: Any = _SETTLED,
        recent: Any = _RECENT,
        waiting: Any = _WAITING,
        turn: Any = _TURNS,
        close: Any = _CLOSES,
    ) -> Iterator[Any]:
        yield from self._take(settled, recent, waiting, close, turn)

    @on_timer(_CLOSE)  # type: ignore[untyped-decorator]
    def drop(
        self,
        passed: Timestamp = beam.DoFn.TimestampParam,
        settled: Any = _SETTLED,
        recent: Any = _RECENT,
        waiting: Any = _WAITING,
        turn: Any = _TURNS,
        due: Any = _DUES,
        close: Any = _CLOSES,
    ) -> Iterator[Any]:
        """Drops what has closed by the time that the watermark has passed, after all that came before."""
        yield from self._take(settled, recent, waiting, close, turn, due)
        held = _Opened(self.view, settled, recent)
        left, before = held.left(passed.micros), held.rows
        held.replace(left)
        yield TaggedOutput("tallies", held.held(before))
        self._close(close, left)

    def _take(self, settled: Any, recent: Any, waiting: Any, close: Any, *others: Any) -> Iterator[Any]:
        """others: the timers that would take it later. At the end of the input they would keep Flink from ending."""
        if not (parts := list(waiting.read())):
            return
        waiting.clear()
        for timer in others if self.trigger is not None else others[1:]:
            timer.clear()
        held = _Opened(self.view, settled, recent)
        first = not held.old and not held.late
        yield from held.add(parts)
        if first:
            self._close(close, pa.concat_tables([self.view.plan.partial_schema.empty_table(), *held.old, *held.late]))

    def _close(self, close: Any, held: pa.Table) -> None:
        if len(held):
            close.set(_timestamp(int(np.median(self.view.closes(held)))))


def _timestamp(micros: int) -> Timestamp:
    return min(Timestamp(micros=-(-micros // 1000) * 1000), _LAST)  # engines count in milliseconds
