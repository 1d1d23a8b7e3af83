"""A job on Flink that is followed: Ctrl-C never leaves it running."""

import _thread
import threading
from typing import Any

import pytest

from pipelines.runners import Following
from pipelines.runners.flink import _Followed
from pipelines.runners.flink_jobs import Rest
from pipelines.transforms.errors import UserError


def test_a_job_whose_savepoint_fails_as_it_is_interrupted_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flink takes no savepoint while a task still starts."""
    ended, cancelled, known = threading.Event(), list[str](), threading.Event()

    class Result:
        def wait_until_finish(self) -> None:
            known.wait(10)
            threading.Timer(0.05, _thread.interrupt_main).start()
            ended.wait(10)

    def stop(*_: Any) -> str:
        raise UserError("no savepoint: not all required tasks are currently running")

    def cancel(_: Rest, job: str) -> None:
        cancelled.append(job)
        ended.set()

    monkeypatch.setattr(Rest, "named", lambda *_: "job 1")
    monkeypatch.setattr(Rest, "stop", stop)
    monkeypatch.setattr(Rest, "cancel", cancel)
    monkeypatch.setattr(Rest, "state", lambda *_: "CANCELED")
    following = Following("sales", "memory://kept", None, lambda *_: known.set(), lambda: False)
    result: Any = Result()
    with pytest.raises(KeyboardInterrupt):
        _Followed(result, "sales", lambda: ["http://127.0.0.1:1"], following).wait()
    assert cancelled == ["job 1"]
