"""Flink's jobs by its REST API, and where they can be resumed: savepoints and retained checkpoints. Beam-free.

Beam's own ``cancel`` says that it did and leaves a job with EXTERNAL workers running, so jobs are ended here.
"""

import dataclasses
import functools
import time
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

import fsspec

from pipelines.transforms.errors import UserError

if TYPE_CHECKING:
    import requests

LIVING = ("INITIALIZING", "CREATED", "RUNNING", "RESTARTING", "FAILING", "CANCELLING", "RECONCILING", "SUSPENDED")
"""States of a job that may still write."""

TIMEOUT = 10.0
"""Seconds that an answer may take."""

PATIENCE = 120.0
"""Seconds that a savepoint may take."""

_LOOK = 0.1


class Unreachable(UserError):
    """Nothing of Flink answers there."""


@dataclasses.dataclass(frozen=True)
class Rest:
    """A Flink cluster. url: of its REST API, as http://127.0.0.1:8081. Raises Unreachable where none answers."""

    url: str

    def jobs(self) -> list[dict[str, Any]]:
        """All jobs it knows: jid, name, state, start-time (ms) …, those that have ended too."""
        return cast(list[dict[str, Any]], self._ask("GET", "/jobs/overview")["jobs"])

    def named(self, name: str) -> str | None:
        """The id of the newest job of this name."""
        found = sorted((job for job in self.jobs() if job["name"] == name), key=lambda job: job["start-time"])
        return found[-1]["jid"] if found else None

    def state(self, job: str) -> str | None:
        """As Flink calls it; None for a job that it does not know."""
        return next((one["state"] for one in self.jobs() if one["jid"] == job), None)

    def checkpoints(self, job: str) -> dict[str, Any]:
        """Counts, and the latest ones."""
        return cast(dict[str, Any], self._ask("GET", f"/jobs/{job}/checkpoints"))

    def failure(self, job: str) -> str | None:
        """The text of the last failure."""
        found = self._ask("GET", f"/jobs/{job}/exceptions")
        entries = found.get("exceptionHistory", {}).get("entries") or [{"stacktrace": found.get("root-exception")}]
        return cast("str | None", entries[0]["stacktrace"])

    def savepoint(self, job: str, folder: str) -> str:
        """Takes a savepoint of a job that goes on; answers where it is."""
        return self._taken(job, self._ask("POST", f"/jobs/{job}/savepoints", {"target-directory": folder}), folder)

    def stop(self, job: str, folder: str) -> str:
        """Ends a job with a savepoint; answers where that is. Flink's own drain waits for ever for Beam's sources.

        Raises UserError where there is none after PATIENCE seconds: then the job goes on.
        """
        asked = self._ask("POST", f"/jobs/{job}/stop", {"targetDirectory": folder, "drain": False})
        return self._taken(job, asked, folder)

    def cancel(self, job: str) -> None:
        """Ends a job at once; its retained checkpoint is what is left."""
        self._ask("PATCH", f"/jobs/{job}?mode=cancel")

    def _taken(self, job: str, asked: dict[str, Any], folder: str) -> str:
        before, end = newest(folder), time.monotonic() + PATIENCE
        while time.monotonic() < end:
            time.sleep(_LOOK)
            try:
                told = self._ask("GET", f"/jobs/{job}/savepoints/{asked['request-id']}")
            except UserError:  # a Flink of one job ends with it
                found = newest(folder)
                if found is not None and found != before:
                    return found
                raise
            if told["status"]["id"] == "COMPLETED":
                done = told["operation"]
                if "location" in done:
                    return cast(str, done["location"])
                reason = done["failure-cause"].get("stack-trace", "").splitlines()[:1]
                raise UserError(f"job {job}: no savepoint: {' '.join(reason) or 'Flink does not say why'}")
        raise UserError(f"job {job}: no savepoint within {PATIENCE:.0f} s; it goes on")

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        import requests

        try:
            answer = _session(urlsplit(self.url).hostname).request(method, self.url + path, json=body, timeout=TIMEOUT)
            told = answer.json() if answer.content else {}
        except (requests.RequestException, ValueError) as error:
            raise Unreachable(f"{self.url}: no Flink answers there ({type(error).__name__})") from None
        if not answer.ok:
            reason = str(next(iter(told.get("errors", [])), answer.reason)).splitlines()[0]
            raise UserError(f"{self.url}: {reason}")
        return told


@functools.cache
def _session(host: str | None) -> "requests.Session":
    import requests

    session = requests.Session()
    session.trust_env = host not in ("127.0.0.1", "localhost", "::1")  # a proxy is no way to this machine
    return session


def newest(folder: str) -> str | None:
    """The newest savepoint or checkpoint under a folder that is complete: what a job resumes from. A URI or path."""
    files, path = fsspec.url_to_fs(folder)
    found = [*files.glob(f"{path}/*/_metadata"), *files.glob(f"{path}/*/*/_metadata")]
    if not found:
        return None
    last = max(found, key=lambda name: (files.modified(name), name))
    return cast(str, files.unstrip_protocol(last.removesuffix("/_metadata")))


def location(folder: str) -> str:
    """The folder as Flink names it, absolute: ``file:///…`` or of an object store."""
    files, path = fsspec.url_to_fs(folder)
    return cast(str, files.unstrip_protocol(path))
