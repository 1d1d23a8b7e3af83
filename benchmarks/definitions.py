"""The benchmarks' jobs as this project's own definitions.

Batch: per (key, hour), over the rows of benchmarks/data.py. Live: per (key, second), over those of benchmarks/feed.py.
"""

import dataclasses
from datetime import datetime

from pipelines import Count, Distinct, Max, Mean, Min, Pipeline, Quantile, Session, Source, Sum, Tumbling, View


@dataclasses.dataclass(frozen=True)
class Reading:
    """What the base job needs. Each job names only the columns it uses, as its peers read only those."""

    key: str
    ts: datetime
    value: float


@dataclasses.dataclass(frozen=True)
class Visit(Reading):
    """A reading and who caused it."""

    user: int


@dataclasses.dataclass(frozen=True)
class Identified(Reading):
    """A reading that must count once."""

    id: int


HOUR = Tumbling("1h")

base = Pipeline(
    "base",
    source=Source(Reading, event_time="ts"),
    views=(
        View(
            "hourly",
            by="key",
            window=HOUR,
            n=Count(),
            total=Sum("value"),
            mean=Mean("value"),
            least=Min("value"),
            most=Max("value"),
        ),
    ),
    events=False,
)
sketch = Pipeline(
    "sketch",
    source=Source(Visit, event_time="ts"),
    views=(
        View(
            "hourly",
            by="key",
            window=HOUR,
            n=Count(),
            total=Sum("value"),
            mean=Mean("value"),
            least=Min("value"),
            most=Max("value"),
            p95=Quantile("value", 0.95),
            users=Distinct("user"),
        ),
    ),
    events=False,
)
identity = Pipeline(
    "identity", source=Source(Identified, event_time="ts", identity="id"), views=base.views, events=False
)

SECOND = View(
    "per_second",
    by="key",
    window=Tumbling("1s"),
    n=Count(),
    total=Sum("value"),
    mean=Mean("value"),
    least=Min("value"),
    most=Max("value"),
)
live = Pipeline("live", source=Source(Reading, event_time="ts"), views=(SECOND,), events=False)
live_identity = Pipeline(
    "live_identity",
    source=Source(Identified, event_time="ts", identity="id", lateness="5s"),
    views=(SECOND,),
    events=False,
)
live_sessions = Pipeline(
    "live_sessions",
    source=Source(Reading, event_time="ts"),
    views=(View("visits", by="key", window=Session("1s"), n=Count(), least=Min("value"), most=Max("value")),),
    events=False,
)
