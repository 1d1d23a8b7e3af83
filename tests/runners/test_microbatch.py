import os
import signal
import threading
from collections.abc import Iterator

import pytest

from pipelines.runners.microbatch import SIGNALS, stopped_by_signals, turns


class Time(threading.Event):
    """A clock that moves when somebody waits, or when a step takes time; set when its end has come."""

    def __init__(self, end: float) -> None:
        super().__init__()
        self.now, self.end = 100.0, 100.0 + end
        self.waits: list[float] = []

    def clock(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds
        if self.now >= self.end:
            self.set()

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None and timeout > 0
        self.waits.append(timeout)
        self.pass_(timeout)
        return self.is_set()


def starts(steps: list[tuple[float, bool]], end: float) -> list[float]:
    """When turns start, with a trigger of 1 s; steps: how long each takes and whether it leaves a backlog."""
    time, left, found = Time(end), iter(steps), []

    def step() -> bool:
        found.append(time.now - 100.0)
        seconds, backlog = next(left, (0.0, False))
        time.pass_(seconds)
        return backlog

    turns(step, trigger=1.0, stop=time, clock=time.clock)
    return found


def test_a_turn_starts_every_trigger_however_long_it_takes() -> None:
    assert starts([(0.25, False), (0.75, False), (0.0, False)], 4.0) == [0.0, 1.0, 2.0, 3.0]


def test_with_a_backlog_the_next_starts_straight_away() -> None:
    assert starts([(0.25, True), (0.25, True), (0.25, False)], 3.0) == [0.0, 0.25, 0.5, 1.5, 2.5]


def test_after_a_long_turn_one_starts_at_once_and_none_is_made_up_for() -> None:
    assert starts([(3.5, False), (0.25, False)], 6.0) == [0.0, 3.5, 4.5, 5.5]


def test_a_stop_ends_the_wait_and_never_a_step() -> None:
    time, done = Time(10.0), []

    def step() -> bool:
        time.set()
        done.append(True)
        return True

    turns(step, trigger=1.0, stop=time, clock=time.clock)
    assert (done, time.waits) == ([True], [])
    turns(step, trigger=1.0, stop=time, clock=time.clock)
    assert done == [True]


def test_what_a_step_raises_ends_the_turns() -> None:
    def step() -> bool:
        raise LookupError("gone")

    with pytest.raises(LookupError, match="gone"):
        turns(step, trigger=1.0, stop=threading.Event())


@pytest.fixture
def handlers() -> Iterator[None]:
    """As a fresh process has them, and after the test as they were."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def now() -> list[object]:
    return [signal.getsignal(number) for number in SIGNALS]


AS_BEFORE: list[object] = [signal.default_int_handler, signal.SIG_DFL]


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_lets_the_turn_end_and_no_other_begin(number: int) -> None:
    stop, ended = threading.Event(), []

    def step() -> bool:
        os.kill(os.getpid(), number)
        assert stop.wait(60)
        ended.append(True)
        return True

    with stopped_by_signals(stop):
        turns(step, trigger=60.0, stop=stop)
    assert ended == [True]
    assert now() == AS_BEFORE


@pytest.mark.usefixtures("handlers")
def test_a_signal_ends_the_wait_for_the_next_turn() -> None:
    stop = threading.Event()
    interrupt = threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT))

    def step() -> bool:
        interrupt.start()
        return False

    with stopped_by_signals(stop):
        turns(step, trigger=3600.0, stop=stop)
    assert stop.is_set()


@pytest.mark.usefixtures("handlers")
def test_a_second_interrupt_aborts_at_once() -> None:
    stop, reached = threading.Event(), []

    def step() -> bool:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            reached.append(stop.wait(60))
        return True

    with pytest.raises(KeyboardInterrupt), stopped_by_signals(stop):
        turns(step, trigger=60.0, stop=stop)
    assert reached == [True]
    assert now() == AS_BEFORE


@pytest.mark.usefixtures("handlers")
def test_a_signal_while_the_event_is_in_use_blocks_nobody() -> None:
    stop = threading.Event()
    with stopped_by_signals(stop):
        with stop._cond:  # type: ignore[attr-defined]
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.wait(60)


@pytest.mark.usefixtures("handlers")
def test_handlers_are_restored_after_an_error_too() -> None:
    threads = threading.active_count()

    def step() -> bool:
        assert now() != AS_BEFORE
        raise LookupError

    stop = threading.Event()
    with pytest.raises(LookupError), stopped_by_signals(stop):
        turns(step, trigger=1.0, stop=stop)
    assert now() == AS_BEFORE
    assert threading.active_count() == threads


@pytest.mark.usefixtures("handlers")
def test_in_another_thread_signals_are_left_alone() -> None:
    seen: list[object] = []

    def run() -> None:
        with stopped_by_signals(threading.Event()):
            seen.extend(now())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == AS_BEFORE
