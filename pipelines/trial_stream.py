"""A trial of a speed layer that is an unbounded graph: a job follows the log while it grows, is stopped as by Ctrl-C,
and is run again with the same options.

A job that its engine can resume goes on where it was stopped; another reads the log again from its first offset. Both
must end with the same answers: what is late depends on the log alone, and answers are absolute.
"""

import _thread
import contextlib
import functools
import io
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pyarrow as pa

from pipelines import drift, stream
from pipelines.transforms import progress
from pipelines.transforms.conservation import Conservation
from pipelines.transforms.errors import UserError
from pipelines.trial import Trial

PACE = 0.15
"""Seconds between two parts: about as long as a bundle reads, so that watermarks move often and timers fire between."""

LOOK = 0.1
"""Seconds between two looks at what a job has counted."""


class Streamed(Trial):
    """One job after the other. Runs in the main thread, which is whom an interrupt stops."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if threading.current_thread() is not threading.main_thread():
            raise UserError(f"{self.pipeline.name}: parity of an unbounded graph runs in the main thread")
        self.jobs = 0
        for name, at in self._sizes.items():  # a partition without rows at first would begin where others are then
            self._sizes[name] = [at[0], *(max(offset, min(at[0] + 1, at[-1])) for offset in at[1:])]
        self._clock = functools.partial(float, time.time())  # stands still: nothing is idle

    def take(self, start: int, stop: int) -> None:
        parts = []
        for number in range(start, stop):
            parts.append(self._next(number))
            if self._deaths[number] and any(parts):
                self._job(parts, rest=False)
                self.points["while it reads"] += 1
                parts = []
        self._job(parts, rest=True)
        self.points["at rest"] += stop < self.turns

    @property
    def counts(self) -> Conservation:
        return drift.counted(self._facts)

    @property
    def told(self) -> str:
        return f"{self.turns} parts, {self.jobs} jobs"

    @property
    def _facts(self) -> str:
        return f"{self.deployment.state}/{self.pipeline.name}/stream.json"

    def _job(self, parts: list[dict[str, pa.Table]], rest: bool) -> None:
        """Runs a job while these parts are sent, and stops it then. rest: when it has taken all."""
        first, *others = [part for part in parts if part] or [{}]
        self._send(first)
        Path(self._facts).unlink(missing_ok=True)
        self.jobs += 1
        with _interrupted(lambda ended: self._feed(others, rest, ended)):
            stream.run(self.pipeline, self.deployment, self.engine, self.flags, self._clock)

    def _feed(self, parts: list[dict[str, pa.Table]], rest: bool, ended: threading.Event) -> None:
        while not self.counts.rows["read"]:  # until the job runs
            if ended.wait(LOOK):
                return
        for part in parts:
            if ended.wait(PACE):
                return
            self._send(part)
        if rest:
            self._rest(ended)

    def _send(self, part: Mapping[str, pa.Table]) -> None:
        self.log.append(part)
        progress.advance(sum(map(len, part.values())))

    def _rest(self, ended: threading.Event) -> None:
        """Until all rows are accounted for, or what is missing has not moved for long."""
        total = sum(bounds.end - bounds.start for bounds in self.log.bounds().values())
        before, since = None, time.monotonic()
        while not ended.wait(LOOK):
            counts = self.counts
            if counts.rows["read"] == total and not counts.violations():
                return
            if counts != before:
                before, since = counts, time.monotonic()
            if time.monotonic() - since > drift.PATIENCE:
                return


@contextlib.contextmanager
def _interrupted(until: Callable[[threading.Event], None]) -> Iterator[None]:
    """Interrupts the block, as Ctrl-C does, when a function that runs beside it returns. What the block says on stderr
    is not shown. Raises KeyboardInterrupt where somebody else has interrupted it."""
    ended, asked, lock = threading.Event(), threading.Event(), threading.Lock()
    failed = list[BaseException]()

    def beside() -> None:
        try:
            until(ended)
        except BaseException as error:
            failed.append(error)
        with lock:
            if not ended.is_set():
                asked.set()
                _thread.interrupt_main()

    thread = threading.Thread(target=beside, daemon=True)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            thread.start()
            try:
                yield
            finally:
                with lock:
                    ended.set()
    except KeyboardInterrupt:
        if not asked.is_set():
            raise
    finally:
        thread.join()
    if failed:
        raise failed[0]
    if not asked.is_set():
        raise KeyboardInterrupt
