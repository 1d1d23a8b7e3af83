"""Flink's REST API, as far as it is asked: a server of canned answers in a thread."""

import http.server
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.runners import flink_jobs
from pipelines.runners.flink_jobs import Rest, Unreachable, newest
from pipelines.transforms.errors import UserError


class Flink:
    """answers: by method and path; a list is given one by one. asked: what was, with its body."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.asked: list[tuple[str, Any]] = []
        flink = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self) -> None:
                length = int(self.headers.get("content-length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                asked = f"{self.command} {self.path}"
                flink.asked.append((asked, body))
                found = flink.answers.get(asked, (404, {"errors": ["Not found: it\nat java"]}))
                found = found.pop(0) if isinstance(found, list) else found
                status, told = found if isinstance(found, tuple) else (200, found)
                content = json.dumps(told).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PATCH = answer  # noqa: N815

            def log_message(self, *_: object) -> None: ...

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def jobs(self, **states: str) -> None:
        jobs = [
            {"jid": id, "name": "sales-1", "state": state, "start-time": int(id[1:])} for id, state in states.items()
        ]
        self.answers["GET /jobs/overview"] = {"jobs": jobs}

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def flink(monkeypatch: pytest.MonkeyPatch) -> Iterator[Flink]:
    monkeypatch.setattr(flink_jobs, "_LOOK", 0.0)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # no way to this machine
    made = Flink()
    yield made
    made.close()


def kept(folder: Path, *names: str) -> None:
    for at, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        (folder / name / "_metadata").touch()
        os.utime(folder / name / "_metadata", (at, at))


def test_jobs_are_found_by_name_and_told(flink: Flink) -> None:
    flink.jobs(j1="FINISHED", j2="RUNNING")
    rest = Rest(flink.url)
    assert rest.named("sales-1") == "j2"
    assert rest.named("sales") is None
    assert (rest.state("j1"), rest.state("j9")) == ("FINISHED", None)
    flink.answers["GET /jobs/j2/exceptions"] = {"root-exception": None, "exceptionHistory": {"entries": []}}
    assert rest.failure("j2") is None
    flink.answers["GET /jobs/j2/exceptions"] = {"exceptionHistory": {"entries": [{"stacktrace": "it failed"}]}}
    assert rest.failure("j2") == "it failed"


def test_a_savepoint_is_waited_for_and_told(flink: Flink, tmp_path: Path) -> None:
    flink.answers["POST /jobs/j1/stop"] = (202, {"request-id": "r"})
    done = {"status": {"id": "COMPLETED"}, "operation": {"location": "file:/s/savepoint-1"}}
    flink.answers["GET /jobs/j1/savepoints/r"] = [{"status": {"id": "IN_PROGRESS"}}, done]
    assert Rest(flink.url).stop("j1", f"file://{tmp_path}") == "file:/s/savepoint-1"
    assert flink.asked[0] == ("POST /jobs/j1/stop", {"targetDirectory": f"file://{tmp_path}", "drain": False})
    flink.answers["POST /jobs/j1/savepoints"] = (202, {"request-id": "r"})
    failed = {"status": {"id": "COMPLETED"}, "operation": {"failure-cause": {"stack-trace": "no disk\n at java"}}}
    flink.answers["GET /jobs/j1/savepoints/r"] = failed
    with pytest.raises(UserError, match=r"job j1: no savepoint: no disk$"):
        Rest(flink.url).savepoint("j1", f"file://{tmp_path}")


def test_a_flink_that_ends_with_its_job_has_left_the_savepoint(flink: Flink, tmp_path: Path) -> None:
    flink.answers["POST /jobs/j1/stop"] = (202, {"request-id": "r"})

    def gone() -> dict[str, Any]:
        kept(tmp_path, "savepoints/savepoint-1")
        return {}

    class Once(list[Any]):
        def pop(self, _: Any = 0) -> Any:
            return 500, gone()

    flink.answers["GET /jobs/j1/savepoints/r"] = Once()
    assert Rest(flink.url).stop("j1", str(tmp_path)) == f"file://{tmp_path}/savepoints/savepoint-1"


def test_what_flink_refuses_is_a_line_and_who_is_not_there_is_told(flink: Flink) -> None:
    with pytest.raises(UserError, match=r"127\.0\.0\.1:\d+: Not found: it$"):
        Rest(flink.url).cancel("j1")
    assert flink.asked == [("PATCH /jobs/j1?mode=cancel", None)]
    with pytest.raises(Unreachable, match="no Flink answers"):
        Rest("http://127.0.0.1:9").jobs()


def test_the_newest_that_is_complete_is_what_is_resumed(tmp_path: Path) -> None:
    assert newest(str(tmp_path / "none")) is None
    kept(tmp_path, "a/chk-9", "savepoints/savepoint-1", "b/chk-1")
    (tmp_path / "b" / "chk-2").mkdir()  # the process died over it
    assert newest(str(tmp_path)) == f"file://{tmp_path}/b/chk-1"
