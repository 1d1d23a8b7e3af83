"""How far this process's readers have come, for whoever shows it. Where workers are other processes, nothing arrives.

Readers call `advance` once per table (an addition under a lock), so it costs nothing; the one who shows polls `now`.
"""

import dataclasses
import threading
import time


@dataclasses.dataclass(frozen=True)
class Progress:
    """Rows read, and the seconds from `expect` to the last of them; done of total in the plan's unit.

    The unit is rows where footers tell them, else bytes. total None: not known. reached: the event time, µs, of rows
    that come in its order.
    """

    rows: int = 0
    seconds: float = 0.0
    done: int = 0
    total: int | None = None
    reached: int | None = None


_lock = threading.Lock()
_progress = Progress()
_start = time.perf_counter()


def expect(total: int | None) -> None:
    """A reader's plan: starts counting from nothing. None where the size is not known."""
    global _progress, _start
    with _lock:
        _progress, _start = Progress(total=total), time.perf_counter()


def advance(rows: int, done: int | None = None, *, reached: int | None = None) -> None:
    """Rows just read; done: the same in the plan's unit, where that is not rows. reached: how far in event time, µs.

    >>> expect(10)
    >>> advance(4)
    >>> now().rows, now().done, now().total
    (4, 4, 10)
    """
    global _progress
    with _lock:
        before, seconds = _progress, time.perf_counter() - _start
        done = before.done + (rows if done is None else done)
        _progress = Progress(before.rows + rows, seconds, done, before.total, reached)


def now() -> Progress:
    """What was read so far."""
    return _progress
