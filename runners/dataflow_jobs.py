"""Dataflow's jobs by its REST API: found again, told, cancelled, drained. Beam-free; Google's libraries sign in.

A drain loses no row that was read: the source stops, and open windows are closed early, so their last answers are of
the rows so far and incomplete. A cancelled job stops at once; what it held is gone.
"""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, cast

from pipelines.transforms.errors import UserError

if TYPE_CHECKING:
    import requests

ENDPOINT = "https://dataflow.googleapis.com"
LABEL = ("made-by", "pipelines")
"""Of every job that is submitted here."""

TIMEOUT = 30.0
"""Seconds that an answer may take."""

_SCOPE = "https://www.googleapis.com/auth/cloud-platform"
_ENDS = {"stop": "JOB_STATE_CANCELLED", "drain": "JOB_STATE_DRAINING"}
_OVER = ("DONE", "FAILED", "CANCELLED", "UPDATED", "DRAINED")


@dataclasses.dataclass(frozen=True)
class Job:
    """state: as Dataflow has it, without JOB_STATE_. created: ISO 8601."""

    id: str
    name: str
    state: str
    mode: Literal["batch", "stream"]
    created: str
    project: str
    region: str

    @property
    def console(self) -> str:
        """Where a person looks at it."""
        return console(self.project, self.region, self.id)

    @property
    def lives(self) -> bool:
        """Whether it may still write."""
        return self.state not in _OVER


def console(project: str, region: str, job: str) -> str:
    """Where a person looks at a job."""
    return f"https://console.cloud.google.com/dataflow/jobs/{region}/{job}?project={project}"


@dataclasses.dataclass(frozen=True)
class Region:
    """The jobs of a project in a region. endpoint: of the service; one of this machine is asked without signing in.

    Raises UserError where it cannot be asked, or does not know a job.
    """

    project: str
    region: str
    endpoint: str = ENDPOINT

    def jobs(self) -> list[Job]:
        """Those that were submitted here, the newest first; those that have ended too."""
        found = [job for job in self._pages() if job.get("labels", {}).get(LABEL[0]) == LABEL[1]]
        return sorted(map(self._job, found), key=lambda job: (job.created, job.id), reverse=True)

    def job(self, job: str) -> Job:
        """A job, as it is now."""
        return self._job(self._ask("GET", f"/{job}"))

    def counters(self, job: str) -> dict[str, int]:
        """What its graph has counted, as far as Dataflow knows."""
        counted = {}
        for metric in self._ask("GET", f"/{job}/metrics").get("metrics", []):
            name = metric.get("name", {})
            if name.get("context", {}).get("namespace") == "pipelines" and "tentative" not in name.get("context", {}):
                counted[name["name"].strip()] = int(metric.get("scalar") or 0)
        return counted

    def failure(self, job: str) -> str | None:
        """The last error that it told; None where there was none."""
        told = self._ask("GET", f"/{job}/messages?minimumImportance=JOB_MESSAGE_ERROR").get("jobMessages", [])
        return told[-1]["messageText"] if told else None

    def stop(self, job: str) -> None:
        """Cancels it, now."""
        self._end(job, "stop")

    def drain(self, job: str) -> None:
        """Ends a stream behind the rows that it has read. Raises UserError for a batch job, which ends by itself."""
        if self.job(job).mode == "batch":
            raise UserError(f"job {job}: a batch job cannot be drained; stop it, or wait for its end")
        self._end(job, "drain")

    def _end(self, job: str, how: str) -> None:
        now = self.job(job)
        if not now.lives:
            raise UserError(f"job {job}: is over already ({now.state.lower()})")
        self._ask("PUT", f"/{job}", {"requestedState": _ENDS[how]})

    def _job(self, told: dict[str, Any]) -> Job:
        state = told.get("currentState", "JOB_STATE_UNKNOWN").removeprefix("JOB_STATE_")
        mode: Literal["batch", "stream"] = "stream" if told.get("type") in ("JOB_TYPE_STREAMING", 2) else "batch"
        return Job(told["id"], told["name"], state, mode, told.get("createTime", ""), self.project, self.region)

    def _pages(self) -> Iterator[dict[str, Any]]:
        token = ""
        while True:
            page = self._ask("GET", f"?pageSize=100&pageToken={token}")
            yield from page.get("jobs", [])
            if not (token := page.get("nextPageToken", "")):
                return

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        import requests

        where = f"{self.endpoint}/v1b3/projects/{self.project}/locations/{self.region}/jobs"
        try:
            answer = self._session().request(method, where + path, json=body, timeout=TIMEOUT)
        except requests.RequestException as error:
            raise UserError(f"Dataflow at {self.endpoint} cannot be asked: {error}") from None
        if answer.status_code != 200:
            try:
                said = answer.json()["error"]["message"]
            except (ValueError, KeyError, TypeError):
                said = answer.reason
            raise UserError(f"Dataflow, project {self.project}, region {self.region}: {said} ({answer.status_code})")
        return cast(dict[str, Any], answer.json())

    def _session(self) -> "requests.Session":
        if self.endpoint.startswith(("http://localhost:", "http://127.0.0.1:")):
            import requests

            return requests.Session()
        try:
            import google.auth
            from google.auth.exceptions import DefaultCredentialsError
            from google.auth.transport.requests import AuthorizedSession
        except ImportError:
            raise UserError("Dataflow's jobs need Google's libraries: pip install 'pipelines[gcp]'") from None
        try:
            credentials, _ = google.auth.default(scopes=[_SCOPE])
        except DefaultCredentialsError:
            said = "gcloud auth application-default login"
            raise UserError(f"Dataflow: there are no credentials; sign in with `{said}`") from None
        return cast("requests.Session", AuthorizedSession(credentials))
