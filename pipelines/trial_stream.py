"""A trial of a speed layer that is an unbounded graph: a job follows the log while it grows, is stopped or killed, and
is run again with the same options.

A job that its engine can resume goes on where it was stopped, or killed from its last checkpoint; another reads the log
again from its first offset. All end with the same answers: what is late depends on the log alone, and answers are
absolute.
"""

import _thread
import contextlib
import functools
import io
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import pyarrow as pa

from pipelines import drift, streaming
from pipelines import job as jobs
from pipelines.runners import Resumable
from pipelines.transforms import progress
from pipelines.transforms.conservation import Conservation
from pipelines.transforms.errors import UserError
from pipelines.trial import Trial

PACE = 0.15
"""Seconds between two parts: about as long as a bundle reads, so that watermarks move often and timers fire between."""

LOOK = 0.1
"""Seconds between two looks at what a job has counted."""

STILL = 3.0
"""Seconds without a change in the store, after which a job that has counted all has delivered all."""

Point = Literal["stopped at rest", "stopped while it reads", "killed while it reads"]


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
                kills = isinstance(self.engine, Resumable) and self.chance.random() < 0.5
                point: Point = "killed while it reads" if kills else "stopped while it reads"
                self._job(parts, point)
                self.points[point] += 1
                parts = []
        self._job(parts, "stopped at rest")
        self.points["stopped at rest"] += stop < self.turns

    @property
    def counts(self) -> Conservation:
        return drift.counted(f"{self._place}/{jobs.FACTS}")

    @property
    def told(self) -> str:
        how = "each goes on" if isinstance(self.engine, Resumable) else "each begins anew"
        return f"{self.turns} parts, {self.jobs} jobs ({how})"

    @property
    def _place(self) -> str:
        return f"{self.deployment.state}/{self.pipeline.name}"

    def _job(self, parts: list[dict[str, pa.Table]], point: Point) -> None:
        """Runs a job while these parts are sent, and ends it then."""
        first, *others = [part for part in parts if part] or [{}]
        self._send(first)
        Path(f"{self._place}/{jobs.FACTS}").unlink(missing_ok=True)
        self.jobs += 1
        kill = self._kill if point == "killed while it reads" else None
        with _ended(lambda ended: self._feed(others, point, ended), kill):
            streaming.run(self.pipeline, self.deployment, self.engine, self.flags, self._clock)

    def _feed(self, parts: list[dict[str, pa.Table]], point: Point, ended: threading.Event) -> None:
        self._until(ended, lambda: bool(self.counts.rows["read"]))
        if point == "killed while it reads":
            self._until(ended, lambda: self._newest() is not None)
        for part in parts:
            if ended.wait(PACE):
                return
            self._send(part)
        if point == "stopped at rest":
            self._rest(ended)
            if not isinstance(self.engine, Resumable):  # what such a job has counted and not yet delivered ends with it
                self._until(ended, self._still)

    def _until(self, ended: threading.Event, done: Callable[[], bool]) -> None:
        while not done() and not ended.wait(LOOK):
            pass

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

    def _still(self) -> bool:
        """Whether the store is the same for a while."""
        before = [self._live(view.name) for view in self.pipeline.views]
        time.sleep(STILL)
        return [self._live(view.name) for view in self.pipeline.views] == before

    def _newest(self) -> str | None:
        job = jobs.read(self._place)
        return None if job is None else job.newest(self._place)

    def _kill(self) -> None:
        """Ends the job at once: what it has not checkpointed is lost to it."""
        job = jobs.read(self._place)
        found = None if job is None else job.found()
        assert job is not None and found is not None
        found[0].cancel(found[1])
        while job.lives:
            time.sleep(LOOK)


@contextlib.contextmanager
def _ended(until: Callable[[threading.Event], None], kill: Callable[[], None] | None) -> Iterator[None]:
    """Interrupts the block, as Ctrl-C does, when a function that runs beside it returns; or kills what it runs, after
    which it may raise anything. What it says on stderr is not shown. Raises KeyboardInterrupt where somebody else has
    interrupted it."""
    ended, asked, lock = threading.Event(), threading.Event(), threading.Lock()
    failed = list[BaseException]()

    def beside() -> None:
        try:
            until(ended)
        except BaseException as error:
            failed.append(error)
        with lock:
            if ended.is_set():
                return
            asked.set()
            if kill is None or failed:
                _thread.interrupt_main()
                return
        try:
            kill()
        except BaseException as error:
            failed.append(error)
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
    except Exception:
        if kill is None or not asked.is_set():
            raise
    finally:
        thread.join()
    if failed:
        raise failed[0]
    if not asked.is_set():
        raise KeyboardInterrupt
