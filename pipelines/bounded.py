"""One bounded pass over a log, in this process and without Beam: what the layers of a pipeline are measured by.

All rows are held at once, and nothing is kept from before, cut, closed, merged into or delivered.
"""

import dataclasses
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.definition import Pipeline
from pipelines.io.log import Log
from pipelines.layer import Layer
from pipelines.transforms.conservation import Conservation, merge, tally
from pipelines.transforms.identity import deduplicate
from pipelines.transforms.lateness import EXPIRES, Position, watermarks
from pipelines.transforms.view import ViewPlan

READ = 64 << 20
"""Bytes of messages that are decoded at once."""


@dataclasses.dataclass(frozen=True)
class Answers:
    """By view, all of a view's answers. counts: of the rows."""

    views: Mapping[str, pa.Table]
    counts: Conservation


@dataclasses.dataclass(frozen=True)
class Bounded:
    """A pipeline over a log. dimensions: their rows by name."""

    pipeline: Pipeline
    layer: Layer
    log: Log
    dimensions: Mapping[str, pa.Table]

    def timely(self) -> Answers:
        """Of the rows that are not late: windows as the speed layer keeps them."""
        rows, tallies = [], []
        for name, bounds in self.log.bounds().items():
            position = Position(bounds.start)
            for messages in self._messages(name, bounds.start, bounds.end):
                taken = self.layer.intake.take(messages, position)
                position = taken.position
                rows.append(taken.rows)
                tallies.append(taken.tallies)
        every = pa.concat_tables([table for table in rows if len(table)] or rows[:1])
        if self.layer.seen is not None and len(every):
            fresh = self.layer.seen.advance([], every, every[EXPIRES.name].to_numpy())
            tallies.append(tally("source", "duplicate", fresh.duplicates))
            tallies.append(tally("source", "rejected", len(fresh.conflicts), "conflict"))
            every = fresh.rows
        cleaned = self.layer.plan.chain.run(every, self.dimensions, self.layer.cipher)
        tallies.append(cleaned.tallies)
        answers = {}
        for view in self.layer.views:
            states, _, counted = view.partial(cleaned.rows, self.dimensions, self.layer.cipher, self.layer.format)
            answers[view.plan.name] = view.plan.finished(view.plan.merged([states]))
            tallies.append(counted)
        return Answers(answers, Conservation.of(merge(tallies)))

    def every(self, ends: Mapping[str, int], before: int | None = None) -> dict[str, pa.Table]:
        """Of all rows up to these offsets, late ones too, and windows as the batch layer keeps them. before: only rows
        of event times (µs) before.

        Also of rows behind these offsets that are displaced by no more than ``disorder``: none of them may be of a
        window that ends by the boundary of a batch run that has read up to there.
        """
        rows = []
        for name, bounds in self.log.bounds().items():
            end, position = ends.get(name, bounds.start), Position(bounds.start)
            for start, stop in ((bounds.start, end), (end, bounds.end)):
                for messages in self._messages(name, start, stop):
                    dated = self.layer.intake.dated(messages)
                    watermark, greatest = watermarks(dated.times, dated.known, position, self.layer.disorder)
                    position = Position(stop, greatest)
                    in_order = dated.known & (dated.times >= watermark)
                    rows.append(dated.rows if stop == end else dated.rows.filter(pa.array(in_order)))
        source, plan = self.pipeline.source, self.pipeline.plan()
        every = pa.concat_tables([table for table in rows if len(table)] or rows[:1])
        if source.identities and len(every):
            dated, _ = plan.dating.split(every, self.layer.format)
            every = deduplicate(dated, source.identities, source.columns).rows
        cleaned = plan.chain.run(every, self.dimensions, self.layer.cipher).rows
        if before is not None:
            cleaned = cleaned.filter(pc.less(cleaned["event_time"].cast(pa.int64()), before))
        return {view.name: self._answers(view, cleaned) for view in plan.views}

    def _answers(self, view: ViewPlan, rows: pa.Table) -> pa.Table:
        if view.chain is not None:
            rows = view.chain.run(rows, self.dimensions, self.layer.cipher).rows
        states, _ = view.tried(rows)
        return view.finished(view.merged([states]))

    def _messages(self, partition: str, start: int, end: int) -> list[pa.Table]:
        found = []
        while start < end and len(messages := self.log.read(partition, start, end, max_bytes=READ)):
            found.append(messages)
            last = messages.slice(len(messages) - 1)
            start = last["_offset"][0].as_py() + last["_rows"][0].as_py()
        return found
