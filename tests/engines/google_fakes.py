"""Google, as far as a Dataflow job needs it: Cloud Storage, and the service, which runs jobs on Beam's FnApiRunner.

``python google_fakes.py FAKE_GCS_SERVER FOLDER`` starts both on 127.0.0.1, prints one line of JSON with the environment
to reach them (and ``service``, the address), and ends when its standard input does. Storage is Go's fake-gcs-server,
behind a translation of the one call that it lacks (an XML PUT, by which a Delta table is committed). The service
writes every job that it is given to FOLDER/jobs/ID.json, and runs the staged graph in a process of its own, by
``staged.py``, unless the project is ``recorded``.
"""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BUCKET = "bucket"
_JOB = re.compile(r"/v1b3/projects/([^/]+)/locations/([^/]+)/jobs(?:/([^/?]+))?(/messages|/metrics)?")
_LAUNCH = re.compile(r"/v1b3/projects/([^/]+)/locations/([^/]+)/templates:launch\?gcsPath=(.+)")
_ENDED = {"JOB_STATE_CANCELLED": "JOB_STATE_CANCELLED", "JOB_STATE_DRAINING": "JOB_STATE_DRAINED"}


class Service:
    """The jobs by id. folder: where they are kept. environment: of the processes that run them."""

    def __init__(self, folder: Path, storage: str) -> None:
        self.folder, self.storage = folder, storage
        self.environment: dict[str, str] = {}
        self.jobs: dict[str, dict[str, Any]] = {}
        self.running: dict[str, subprocess.Popen[str]] = {}
        (folder / "jobs").mkdir(parents=True)

    def create(self, project: str, region: str, given: dict[str, Any]) -> dict[str, Any]:
        number = f"2026-01-01_00_00_00-{len(self.jobs):019d}"
        (self.folder / "jobs" / f"{number}.json").write_text(json.dumps(given, indent=1))
        job = {"id": number, "projectId": project, "location": region, "name": given["name"], "type": given["type"]}
        job |= {"clientRequestId": given.get("clientRequestId", ""), "labels": given.get("labels", {})}
        job |= {"currentState": "JOB_STATE_RUNNING", "createTime": "2026-01-01T00:00:00Z"}
        self.jobs[number] = job
        if project != "recorded":
            self._run(number, given)
        return job

    def _run(self, number: str, given: dict[str, Any]) -> None:
        options = given["environment"]["sdkPipelineOptions"]["options"]
        (self.folder / f"{number}.options").write_text(json.dumps(options))
        command = [sys.executable, str(Path(__file__).with_name("staged.py")), str(self.folder / f"{number}.options")]
        self.running[number] = subprocess.Popen(
            command, env={**os.environ, **self.environment}, stderr=subprocess.PIPE, text=True, cwd=self.folder
        )

    def launch(self, project: str, region: str, place: str, given: dict[str, Any]) -> dict[str, Any]:
        job = json.loads(self.stored(place))
        job["name"] = given["jobName"]
        job["environment"]["sdkPipelineOptions"]["options"] |= given.get("parameters", {})
        return {"job": self.create(project, region, job)}

    def get(self, number: str) -> dict[str, Any]:
        """A job, as it is now."""
        job, process = self.jobs[number], self.running.get(number)
        if process is not None and process.poll() is not None:
            _, job["said"] = process.communicate()
            job["currentState"] = "JOB_STATE_FAILED" if process.returncode else "JOB_STATE_DONE"
            del self.running[number]
        return {name: value for name, value in job.items() if name != "said"}

    def update(self, number: str, wanted: str) -> dict[str, Any]:
        self.jobs[number]["requestedState"] = wanted
        self.jobs[number]["currentState"] = _ENDED[wanted]
        if number in self.running:
            self.running.pop(number).kill()
        return self.get(number)

    def messages(self, number: str) -> dict[str, Any]:
        said = self.jobs[number].get("said") if self.jobs[number]["currentState"] == "JOB_STATE_FAILED" else None
        told = {
            "id": "1",
            "time": "2026-01-01T00:00:01Z",
            "messageText": said,
            "messageImportance": "JOB_MESSAGE_ERROR",
        }
        return {"jobMessages": [told] if said else []}

    def stored(self, place: str) -> bytes:
        bucket, _, name = place.removeprefix("gs://").partition("/")
        found = f"{self.storage}/storage/v1/b/{bucket}/o/{urllib.parse.quote(name, safe='')}?alt=media"
        with urllib.request.urlopen(found) as answer:
            return bytes(answer.read())


class Handler(BaseHTTPRequestHandler):
    """The service's calls, and of storage what a Delta table asks for."""

    protocol_version = "HTTP/1.1"
    service: Service

    def do_GET(self) -> None:
        if found := _JOB.match(self.path):
            _, _, number, part = found.groups()
            if number is None:
                self.answer({"jobs": [self.service.get(known) for known in self.service.jobs]})
            elif number not in self.service.jobs:
                self.answer({"error": {"code": 404, "message": f"{number} is unknown", "status": "NOT_FOUND"}}, 404)
            elif part == "/metrics":
                name = {"origin": "user", "name": "source read ", "context": {"namespace": "pipelines"}}
                self.answer({"metrics": [{"name": name, "scalar": 7}]})
            else:
                self.answer(self.service.messages(number) if part else self.service.get(number))
        else:
            self.forward()

    def do_POST(self) -> None:
        if found := _LAUNCH.match(self.path):
            place = urllib.parse.unquote(found[3])
            self.answer(self.service.launch(found[1], found[2], place, json.loads(self.body())))
        elif found := _JOB.match(self.path):
            self.answer(self.service.create(found[1], found[2], json.loads(self.body())))
        else:
            self.forward()

    def do_PUT(self) -> None:
        if found := _JOB.match(self.path):
            self.answer(self.service.update(found[3], json.loads(self.body())["requestedState"]))
            return
        bucket, _, name = self.path.lstrip("/").partition("/")
        url = f"{self.service.storage}/upload/storage/v1/b/{bucket}/o?uploadType=media&name={name}"
        if (generation := self.headers.get("x-goog-if-generation-match")) is not None:
            url += f"&ifGenerationMatch={generation}"
        try:
            with urllib.request.urlopen(urllib.request.Request(url, self.body(), method="POST")) as answer:
                written = json.loads(answer.read())
            self.answer({}, headers={"ETag": f'"{written["etag"]}"', "x-goog-generation": written["generation"]})
        except urllib.error.HTTPError as error:
            self.answer({}, error.code)

    def do_DELETE(self) -> None:
        self.forward()

    def do_HEAD(self) -> None:
        self.forward()

    def forward(self) -> None:
        """To storage."""
        kept = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "content-length")}
        body = self.body() if self.command not in ("GET", "HEAD") else None
        request = urllib.request.Request(f"{self.service.storage}{self.path}", body, kept, method=self.command)
        try:
            with urllib.request.urlopen(request) as answer:
                self.reply(answer.status, dict(answer.headers), answer.read())
        except urllib.error.HTTPError as error:
            self.reply(error.code, dict(error.headers), error.read())

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, said: Any, code: int = 200, headers: dict[str, str] | None = None) -> None:
        self.reply(code, {"Content-Type": "application/json", **(headers or {})}, json.dumps(said).encode())

    def reply(self, code: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(code)
        for name, value in headers.items():
            if name.lower() not in ("transfer-encoding", "connection", "content-length", "date", "server"):
                self.send_header(name, value)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(body))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def storage(program: str, folder: Path) -> tuple["subprocess.Popen[bytes]", str]:
    """Starts fake-gcs-server; it ends with an error where the port is another's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"127.0.0.1:{port}"
    command = [program, "-scheme=http", "-host=127.0.0.1", f"-port={port}", "-backend=memory", "-log-level=info"]
    command += [f"-public-host={address}", f"-external-url=http://{address}"]
    with open(folder / "storage.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    while b"server started" not in (folder / "storage.log").read_bytes():
        if process.poll() is not None:
            sys.exit((folder / "storage.log").read_text())
        time.sleep(0.02)
    made = json.dumps({"name": BUCKET}).encode()
    headers = {"Content-Type": "application/json"}
    urllib.request.urlopen(urllib.request.Request(f"http://{address}/storage/v1/b?project=p", made, headers)).close()
    return process, f"http://{address}"


def main() -> None:
    """Starts both, and stops them."""
    program, folder = sys.argv[1], Path(sys.argv[2])
    process, address = storage(program, folder)
    try:
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        service = Handler.service = Service(folder, address)
        here = f"http://localhost:{server.server_port}"
        key = {"gcs_base_url": here, "disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
        service.environment = {
            "STORAGE_EMULATOR_HOST": address,
            "GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps(key),
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "GCE_METADATA_HOST": "127.0.0.1:9",
            "GCE_METADATA_IP": "127.0.0.1:9",
            "GCE_METADATA_TIMEOUT": "1",
            "CLOUDSDK_CONFIG": "/nonexistent",
        }
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(json.dumps({"service": here, **service.environment}), flush=True)
        sys.stdin.read()
        for job in service.running.values():
            job.kill()
    finally:
        process.kill()


if __name__ == "__main__":
    main()
