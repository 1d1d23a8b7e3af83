"""A live run on stderr: on a terminal a table of the latest windows that updates, elsewhere a line now and then.

Both tell the watermark and the partition that holds it back, the lag, the rate, and what was late or rejected.
"""

import contextlib
import dataclasses
import datetime
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

import pyarrow as pa
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipelines.live import SpeedLayer, Status
from pipelines.report import cell, moment

LINE_SECONDS = 5.0
WINDOWS = 5
"""Rows of each view that are shown."""

LONGEST = 24
"""Characters of a cell."""


@dataclasses.dataclass(frozen=True)
class Rate:
    """Rows read so far at a time, in seconds of a clock."""

    rows: int
    at: float

    def since(self, other: "Rate") -> float:
        """Rows a second.

        >>> Rate(300, 3.0).since(Rate(100, 1.0))
        100.0
        """
        return (self.rows - other.rows) / max(self.at - other.at, 1e-9)


def told(status: Status, rate: float) -> str:
    """How a live run stands, in a line."""
    rows = status.counts.rows
    mark = "none yet" if status.watermark is None else f"{moment(_time(status.watermark))} UTC"
    held = f" (partition {status.held})" if status.held is not None else ""
    parts = [
        f"watermark {mark}{held}",
        f"{rows['read']:,} rows",
        f"{rate:,.0f} rows/s",
        f"lag {status.lag:,}",
        f"late {rows['late']:,}",
        f"rejected {rows['rejected']:,}",
        f"state {status.state:,} rows",
        f"turn {status.turn.number:,}",
    ]
    return " · ".join(parts)


def latest(speed: SpeedLayer, kept: dict[str, pa.Table]) -> dict[str, pa.Table]:
    """The last windows of each view that the last turn changed; of a view that it did not change, those of ``kept``."""
    found = dict(kept)
    for view in speed.layer.views:
        name = view.plan.name
        answers = [rows for kind, of, rows in speed.delivered() if kind == "answers" and of == name]
        if answers:
            rows = pa.concat_tables(answers).select(view.plan.columns)
            order = [("window_start", "descending"), *((key, "ascending") for key in view.plan.by)]
            found[name] = rows.sort_by(order).slice(0, WINDOWS)
    return found


@contextlib.contextmanager
def shown(
    title: str, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[SpeedLayer], None]]:
    """Yields what is to be called after every turn. clock: seconds."""
    stream = stream or sys.stderr
    before, last = Rate(0, clock()), clock() - LINE_SECONDS
    tables: dict[str, pa.Table] = {}
    live = Live(console=Console(file=stream), auto_refresh=False, transient=True) if stream.isatty() else None

    def after(speed: SpeedLayer) -> None:
        nonlocal before, last, tables
        status = speed.status()
        if status is None:
            return
        now = Rate(status.counts.rows["read"], clock())
        if live is not None:
            tables = latest(speed, tables)
            page = _page(title, told(status, now.since(before)), tables, live.console.width)
            live.update(page, refresh=True)
        elif now.at - last >= LINE_SECONDS:
            print(f"{title}: {told(status, now.since(before))}", file=stream, flush=True)
            last = now.at
        else:
            return
        before = now

    with live or contextlib.nullcontext():
        yield after


def _page(title: str, line: str, tables: dict[str, pa.Table], width: int) -> RenderableType:
    parts: list[RenderableType] = [Text(title, style="bold"), Text(line)]
    for name, rows in tables.items():
        columns = [column for column in rows.column_names if column != "window_end"]
        cells = {column: [_short(value) for value in rows[column].to_pylist()] for column in columns}
        fitting = _fitting({column: max(map(len, (column, *cells[column]))) for column in columns}, width)
        more = f" (not shown: {', '.join(columns[fitting:])})" if fitting < len(columns) else ""
        table = Table(box=None, pad_edge=False)
        for column in columns[:fitting]:
            number = not isinstance(rows[column][0].as_py(), str | datetime.datetime)
            table.add_column(column, justify="right" if number else "left", no_wrap=True)
        for row in zip(*(cells[column] for column in columns[:fitting]), strict=True):
            table.add_row(*row)
        parts += [Text(f"\n{name}{more}", style="bold"), table]
    return Group(*parts)


def _fitting(widths: dict[str, int], width: int) -> int:
    """How many columns, from the first on, fit side by side.

    >>> _fitting({"a": 5, "b": 5}, 10), _fitting({"a": 5, "b": 5}, 12)
    (1, 2)
    """
    ends = itertools.accumulate(each + 2 for each in widths.values())
    return sum(end - 2 <= width for end in ends)


def _short(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else cell(value)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _time(micros: int) -> datetime.datetime:
    return datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(microseconds=micros)
