"""How far this process's readers have come, for whoever shows it. Where workers are other processes, nothing arrives.

Readers call `advance` once per table (an addition under a lock), so it costs nothing; the one who shows polls `now`.
"""

import dataclasses
import threading


@dataclasses.dataclass(frozen=True)
class Progress:
    """Rows read; done of total in the plan's unit (rows where footers tell them, else bytes; total None = unknown)."""

    rows: int = 0
    done: int = 0
    total: int | None = None


_lock = threading.Lock()
_progress = Progress()


def expect(total: int | None) -> None:
    """A reader's plan: starts counting from nothing. None where the size is not known."""
    global _progress
    with _lock:
        _progress = Progress(total=total)


def advance(rows: int, done: int | None = None) -> None:
    """Rows just read; done: the same in the plan's unit, where that is not rows.

    >>> expect(10)
    >>> advance(4)
    >>> now()
    Progress(rows=4, done=4, total=10)
    """
    global _progress
    with _lock:
        before = _progress
        _progress = Progress(before.rows + rows, before.done + (rows if done is None else done), before.total)


def now() -> Progress:
    """What was read so far."""
    return _progress
