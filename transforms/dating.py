"""Rows that have no event time are refused before rows are compared: no later row repeats or contradicts them. So a row
that is sent again with its time counts, and batch and live, which cannot know how long to remember them, agree.
"""

import dataclasses

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.transforms import query
from pipelines.transforms.chain import Chain, Outcome, SqlStage, timely
from pipelines.transforms.protect import Cipher


@dataclasses.dataclass(frozen=True)
class Dating:
    """dated: SQL of a source's rows, whether one has an event time that windows take. guard: the chain that refuses the
    others, as the pipeline's own would."""

    dated: str
    guard: Chain

    def split(self, rows: pa.Table, format: str, cipher: Cipher | None = None) -> tuple[pa.Table, Outcome | None]:
        """The rows with an event time; and what was refused, if others were there. format: of their payloads.

        >>> import datetime
        >>> from pipelines import Count, Pipeline, Source, View
        >>> class Sale:
        ...     at: datetime.datetime | None
        >>> plan = Pipeline("sales", source=Source(Sale, event_time="at"), views=(View("all", n=Count()),)).plan()
        >>> at = pa.array([0, None], pa.timestamp("us", "UTC"))
        >>> rows = pa.table({"at": at, "_source": ["a", "a"], "_offset": [0, 1]})
        >>> kept, refused = plan.dating.split(rows, "csv")
        >>> kept["_offset"].to_pylist(), refused.dead["reason"].to_pylist()
        ([0], ['null event time'])
        """
        (stage,) = self.guard.stages
        assert isinstance(stage, SqlStage)
        if stage.alias and timely(rows[stage.alias]):
            return rows, None
        dated = query.run(f"SELECT {self.dated} AS dated FROM batch", {"batch": rows})["dated"]
        if pc.all(dated, min_count=0).as_py():
            return rows, None
        guard = dataclasses.replace(self.guard, format=format)
        return rows.filter(dated), guard.run(rows.filter(pc.invert(dated)), {}, cipher)
