"""The loop of a micro-batch: one bounded turn after another, and a clean stop between two of them.

What a turn does is the caller's; every engine that runs a bounded graph can run it::

    stop = threading.Event()
    with stopped_by_signals(stop):
        turns(step, trigger=1.0, stop=stop)
"""

import contextlib
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def turns(
    step: Callable[[], bool], *, trigger: float, stop: threading.Event, clock: Callable[[], float] = time.monotonic
) -> None:
    """Takes one step after another until ``stop`` is set, which ends the wait for the next, never a step.

    step: does a whole turn, and answers whether a backlog is left; then the next one starts straight away. Otherwise
    one starts every ``trigger`` seconds, however long each takes; after one that took longer than that, at once, and
    what was missed is not made up for. What a step raises is raised.

    >>> stop, read = threading.Event(), iter([True, True, False])
    >>> def step() -> bool:
    ...     if not (backlog := next(read)):
    ...         stop.set()
    ...     return backlog
    >>> turns(step, trigger=60.0, stop=stop)
    """
    due = clock()
    while not stop.is_set():
        backlog = step()
        now = clock()
        due = now if backlog else max(due + trigger, now)
        if due > now:
            stop.wait(due - now)


@contextlib.contextmanager
def stopped_by_signals(stop: threading.Event) -> Iterator[None]:
    """While it lasts, the first Ctrl-C or SIGTERM sets ``stop``, and the second does what it did before: it aborts.

    Outside the main thread, where Python takes no signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # An Event has a lock that its setter takes, and a handler may interrupt this very thread while it holds that. So
    # the handler only puts something into a queue that is made for it, and a thread sets the event.
    signalled: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def follow() -> None:
        if signalled.get():
            stop.set()

    def first(_: int, __: FrameType | None) -> None:
        restore()
        signalled.put(True)

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    follower = threading.Thread(target=follow, name="signals", daemon=True)
    follower.start()
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in SIGNALS}
    try:
        for number in SIGNALS:
            signal.signal(number, first)
        yield
    finally:
        restore()
        signalled.put(False)
        follower.join()
