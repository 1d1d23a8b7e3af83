"""The two layers' rows of a view made one answer: every window is counted once, by exactly one layer.

The batch layer speaks for the windows that end by its boundary, the speed layer for all others. A view of all time has
no window that ends: there the speed layer keeps hours, and their states are added to the batch layer's from the
boundary on. A session may be in both, shorter in one: then the speed layer has a row of it past the boundary, and its
session, which holds the others, is the one that counts.
"""

import pyarrow as pa

from pipelines.transforms import query
from pipelines.transforms.expressions import quote
from pipelines.transforms.view import ViewPlan
from pipelines.transforms.windows import Session, Whole


def merged(batch: pa.Table, boundary: int | None, live: pa.Table, plan: ViewPlan) -> pa.Table:
    """The answers (``plan.schema``) of a view, in no order.

    batch: rows of the generation that readers see, or some of them, as the store has them; boundary: its own (µs; None:
    it speaks for nothing, and batch is not looked at). live: rows of generation LIVE of the same keys and, of the same
    time range, all that end after the boundary. plan: of the batch layer.

    >>> import datetime
    >>> from pipelines import Count, Pipeline, Source, Tumbling, View
    >>> class Sale:
    ...     time: datetime.datetime
    >>> sales = View("sales", window=Tumbling("1h"), n=Count())
    >>> plan = Pipeline("shop", source=Source(Sale, event_time="time"), views=(sales,)).plan().views[0]
    >>> hours = pa.array([0, 3_600_000_000, 3_600_000_001], pa.timestamp("us", "UTC"))
    >>> batch, live = (plan.finished(plan.partials(pa.table({"event_time": hours[:n]}))) for n in (2, 3))
    >>> merged(batch, 3_600_000_000, live, plan).sort_by("window_start")["n"].to_pylist()
    [1, 2]
    """
    if isinstance(plan.window, Whole):
        return _whole(batch, boundary, live, plan)
    names = ", ".join(quote(name) for name in plan.schema.names)
    if boundary is None:
        return query.run(f"SELECT {names} FROM live", {"live": live})
    ended = f"epoch_us(window_end) <= {boundary}"
    spoken = f"SELECT {names} FROM batch WHERE {ended}"
    if isinstance(plan.window, Session):
        same = " AND ".join(f"a.{quote(name)} IS NOT DISTINCT FROM b.{quote(name)}" for name in plan.by) or "true"
        spoken = (
            f"SELECT {names} FROM batch a ANTI JOIN (SELECT * FROM live WHERE NOT ({ended})) b "
            f"ON {same} AND a.window_start < b.window_end AND b.window_start < a.window_end WHERE {ended}"
        )
    sql = f"{spoken} UNION ALL SELECT {names} FROM live WHERE NOT ({ended})"
    return query.run(sql, {"batch": batch, "live": live})


def _whole(batch: pa.Table, boundary: int | None, live: pa.Table, plan: ViewPlan) -> pa.Table:
    """One row a key, of the states of both."""
    names = ", ".join("NULL::BIGINT AS _tile" if n == "_tile" else quote(n) for n in plan.partial_schema.names)
    later = "true" if boundary is None else f"epoch_us(window_start) >= {boundary}"
    parts = [query.run(f"SELECT {names} FROM live WHERE {later}", {"live": live})]
    if boundary is not None:
        parts.append(query.run(f"SELECT {names} FROM batch", {"batch": batch}))
    states = pa.concat_tables(part.cast(plan.partial_schema) for part in parts)
    return plan.finished(plan.merged([states.slice(0, 1), states.slice(1)]))  # one table alone is merged already
