"""A run's progress on stderr: a bar on a terminal, plain lines elsewhere. Rows, rows a second, time left."""

import contextlib
import dataclasses
import datetime
import shutil
import sys
import threading
from collections.abc import Iterator
from typing import TextIO

from pipelines.transforms import progress
from pipelines.transforms.progress import Progress

BAR = 28
LINE_SECONDS = 5.0
FRAME_SECONDS = 0.1
_EPOCH = datetime.datetime(1970, 1, 1)


def told(state: Progress) -> str:
    """The state in words: rows, their rate and the event time reached, and from the share done the time left.

    >>> told(Progress(rows=500_000, seconds=2.0, done=50, total=100))
    '500,000 rows · 250k rows/s · 0:02 left'
    """
    rate = state.rows / max(state.seconds, 1e-9)
    words = f"{state.rows:,} rows · {f'{rate / 1000:,.0f}k' if rate >= 1000 else f'{rate:,.0f}'} rows/s"
    if state.reached is not None:
        words += f" · {_EPOCH + datetime.timedelta(microseconds=state.reached):%Y-%m-%d %H:%M}"
    if not state.total or not state.done:
        return words
    if state.done >= state.total:
        return f"{words} · all read, writing"
    left = round(state.seconds * (state.total - state.done) / state.done)
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
    ended = threading.Event()
    show, every = (_frame, FRAME_SECONDS) if stream.isatty() else (_line, LINE_SECONDS)

    def follow() -> None:
        while not ended.wait(every):
            show(stream, title, progress.now())

    thread = threading.Thread(target=follow, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if stream.isatty():
            stream.write("\r\x1b[2K")


def last(stream: TextIO | None = None) -> None:
    """The last line: all that was read."""
    state = dataclasses.replace(progress.now(), done=1, total=1)
    words = told(state).replace("all read, writing", "0:00 left")
    print(f"  {bar(state)}  {words}", file=stream or sys.stderr, flush=True)


def _frame(stream: TextIO, title: str, state: Progress) -> None:
    text = f"{title}  {bar(state)}  {told(state)}"
    stream.write("\r\x1b[2K" + text[: shutil.get_terminal_size().columns - 1])
    stream.flush()


def _line(stream: TextIO, title: str, state: Progress) -> None:
    print(f"{title}: {told(state)}", file=stream, flush=True)
