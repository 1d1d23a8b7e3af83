"""A run's progress on stderr: a bar on a terminal, plain lines elsewhere. Rows, rows a second, time left."""

import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from typing import TextIO

from pipelines.transforms import progress
from pipelines.transforms.progress import Progress

BAR = 28
LINE_SECONDS = 5.0
FRAME_SECONDS = 0.1


def told(state: Progress, seconds: float) -> str:
    """The state in words. Time left is for the reading, from the share done; without a total it is not told.

    >>> told(Progress(rows=500_000, done=50, total=100), 2.0)
    '500,000 rows · 250k rows/s · 0:02 left'
    """
    rate = state.rows / max(seconds, 1e-9)
    words = f"{state.rows:,} rows · {f'{rate / 1000:,.0f}k' if rate >= 1000 else f'{rate:,.0f}'} rows/s"
    if not state.total or not state.done:
        return words
    if state.done >= state.total:
        return f"{words} · all read, writing"
    left = round(seconds * (state.total - state.done) / state.done)
    return f"{words} · {left // 60}:{left % 60:02d} left"


def bar(state: Progress) -> str:
    """The share done, as a line of BAR characters.

    >>> bar(Progress(done=3, total=4))
    '━━━━━━━━━━━━━━━━━━━━━╺╺╺╺╺╺╺'
    """
    full = round(BAR * min(1.0, state.done / state.total)) if state.total else 0
    return "━" * full + "╺" * (BAR - full)


@contextlib.contextmanager
def shown(title: str, stream: TextIO | None = None) -> Iterator[None]:
    """Shows what `pipelines.transforms.progress` counts while the block runs, and at its end one last line."""
    stream = stream or sys.stderr
    progress.expect(None)
    start, ended = time.perf_counter(), threading.Event()
    show, every = (_frame, FRAME_SECONDS) if stream.isatty() else (_line, LINE_SECONDS)

    def follow() -> None:
        while not ended.wait(every):
            show(stream, title, progress.now(), time.perf_counter() - start)

    thread = threading.Thread(target=follow, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if stream.isatty():
            stream.write("\r\x1b[2K")


def last(seconds: float, stream: TextIO | None = None) -> None:
    """The last line: all that was read."""
    state = progress.now()
    rows = Progress(state.rows, 1, 1)
    words = told(rows, seconds).replace("all read, writing", "0:00 left")
    print(f"  {bar(rows)}  {words}", file=stream or sys.stderr, flush=True)


def _frame(stream: TextIO, title: str, state: Progress, seconds: float) -> None:
    text = f"{title}  {bar(state)}  {told(state, seconds)}"
    stream.write("\r\x1b[2K" + text[: shutil.get_terminal_size().columns - 1])
    stream.flush()


def _line(stream: TextIO, title: str, state: Progress, seconds: float) -> None:
    print(f"{title}: {told(state, seconds)}", file=stream, flush=True)
