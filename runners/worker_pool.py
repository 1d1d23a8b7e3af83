"""The workers of a local cluster: ``python -m pipelines.runners.worker_pool --port=N``.

An engine asks here for a worker (Beam's EXTERNAL environment), which is a process of its own. Beam's pool listens on
every interface and starts a bare ``python``, which then takes 3 CPU-s to import what it needs. Here one process imports
everything, once, and each worker is a fork of it. It has no threads of Python's, since a fork takes none along; who
listens for the engines is a fork too.

Whatever way the pool ends, its workers do: each reads from a pipe that only the pool can write to.
"""

import argparse
import contextlib
import dataclasses
import gc
import importlib
import json
import logging
import os
import select
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from typing import NoReturn

import grpc
from apache_beam.internal import pickler
from apache_beam.options.pipeline_options import PipelineOptions, SetupOptions
from apache_beam.portability.api import (
    beam_fn_api_pb2,
    beam_fn_api_pb2_grpc,
    beam_provision_api_pb2,
    beam_provision_api_pb2_grpc,
)
from apache_beam.runners.job import utils as job_utils
from apache_beam.runners.worker import sdk_worker_main
from apache_beam.runners.worker.worker_id_interceptor import WorkerIdInterceptor
from apache_beam.utils import thread_pool_executor
from apache_beam.utils.sentinel import Sentinel

from pipelines.runners.workers import Worker, limits

GRACE = 10.0
"""Seconds that a worker has to end what it does, once the engine needs it no more."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """A worker that an engine asks for, and where that expects it."""

    worker: str
    control: str
    provision: str


class Pool:
    """The process that forks. workers: by the engine's name of each, its process, and the pipe that holds it."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.workers: dict[str, tuple[int, int]] = {}
        self.closed: list[int] = []
        """What no fork may keep open."""
        self.loaded = _sources()

    def run(self) -> None:
        """Serves until whoever listens is gone."""
        gc.collect()
        gc.freeze()  # what is not touched stays shared with the forks
        ours, theirs = socket.socketpair()
        self.closed.append(ours.fileno())
        _, tether = self._fork(lambda end: _listen(self.port, theirs, end))
        self.closed.append(tether)
        theirs.close()
        with ours.makefile("rw") as asked:
            for line in asked:
                self._reap()
                request = json.loads(line)
                if "stop" in request:
                    self._stop(request["stop"])
                else:
                    self._start(Asked(**request))
                asked.write("\n")
                asked.flush()

    def _start(self, asked: Asked) -> None:
        if _sources() == self.loaded:
            self.workers[asked.worker] = self._fork(lambda end: _work(asked, end))
        else:
            print("the code is newer than this pool: a worker imports it again, some seconds", flush=True)
            self.workers[asked.worker] = self._fresh(asked)

    def _stop(self, worker: str) -> None:
        if worker in self.workers:
            with contextlib.suppress(BrokenPipeError):  # it has ended by itself
                os.write(self.workers[worker][1], b"!")

    def _fork(self, run: Callable[[int], None]) -> tuple[int, int]:
        end, tether = os.pipe()
        pid = os.fork()
        if not pid:
            for descriptor in (tether, *self.closed, *(pipe for _, pipe in self.workers.values())):
                os.close(descriptor)
            _run(lambda: run(end))
        os.close(end)
        return pid, tether

    def _fresh(self, asked: Asked) -> tuple[int, int]:
        end, tether = os.pipe()
        told = json.dumps(dataclasses.asdict(asked))
        command = [sys.executable, "-m", "pipelines.runners.worker_pool", f"--worker={told}", f"--tether={end}"]
        pid = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[end]).pid
        os.close(end)
        return pid, tether

    def _reap(self) -> None:
        for name, (pid, tether) in list(self.workers.items()):
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(pid, os.WNOHANG) == (0, 0):
                    continue
            os.close(tether)
            del self.workers[name]


def _sources() -> dict[str, int]:
    """Our modules that are imported here, and when each was written."""
    files = {getattr(module, "__file__", None) for name, module in list(sys.modules.items()) if name[:9] == "pipelines"}
    return {file: os.stat(file).st_mtime_ns if os.path.exists(file) else 0 for file in files if file}


def _run(run: Callable[[], None]) -> NoReturn:
    """All that a fork does: nothing of what its parent was about to do."""
    code = 1
    try:
        run()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _held(end: int, stop: Callable[[], object]) -> None:
    """Ends this process with the pool, whatever else it is doing; told to end, it has some time."""

    def hold() -> None:
        if os.read(end, 1):
            stop()
            select.select([end], [], [], GRACE)
        os._exit(1)

    threading.Thread(target=hold, name="tether", daemon=True).start()


class _Servicer(beam_fn_api_pb2_grpc.BeamFnExternalWorkerPoolServicer):  # type: ignore[misc]
    """Hands on what engines ask for, one after another."""

    def __init__(self, pool: socket.socket) -> None:
        self.pool = pool.makefile("rw")
        self.lock = threading.Lock()

    def StartWorker(  # noqa: N802
        self, request: beam_fn_api_pb2.StartWorkerRequest, context: grpc.ServicerContext
    ) -> beam_fn_api_pb2.StartWorkerResponse:
        asked = Asked(request.worker_id, request.control_endpoint.url, request.provision_endpoint.url)
        self._tell(dataclasses.asdict(asked))
        return beam_fn_api_pb2.StartWorkerResponse()

    def StopWorker(  # noqa: N802
        self, request: beam_fn_api_pb2.StopWorkerRequest, context: grpc.ServicerContext
    ) -> beam_fn_api_pb2.StopWorkerResponse:
        self._tell({"stop": request.worker_id})
        return beam_fn_api_pb2.StopWorkerResponse()

    def _tell(self, request: dict[str, str]) -> None:
        with self.lock:
            self.pool.write(json.dumps(request) + "\n")
            self.pool.flush()
            self.pool.readline()


def _listen(port: int, pool: socket.socket, end: int) -> None:
    _held(end, lambda: None)
    alone = ("grpc.so_reuseport", 0)  # else two pools could have one port
    pinged = [("grpc.http2.max_pings_without_data", 0), ("grpc.http2.max_ping_strikes", 0)]
    server = grpc.server(thread_pool_executor.shared_unbounded_instance(), options=[alone, *pinged])
    beam_fn_api_pb2_grpc.add_BeamFnExternalWorkerPoolServicer_to_server(_Servicer(pool), server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    print(f"ready at 127.0.0.1:{port}", flush=True)
    server.wait_for_termination()


def _work(asked: Asked, end: int) -> None:
    """A worker, until its engine hangs up or says that it is needed no more."""
    options, capabilities = _provided(asked)
    pickler.set_library(options.view_as(SetupOptions).pickle_library)
    worker = Worker(asked.control, worker_id=asked.worker, runner_capabilities=capabilities, **limits(options))
    _held(end, lambda: worker._responses.put(Sentinel.sentinel))
    worker.run()


def _provided(asked: Asked) -> tuple[PipelineOptions, frozenset[str]]:
    """The options of the job, and what its engine can do."""
    if not asked.provision:
        return PipelineOptions([]), frozenset()
    with grpc.insecure_channel(asked.provision) as channel:
        channel = grpc.intercept_channel(channel, WorkerIdInterceptor(asked.worker))
        service = beam_provision_api_pb2_grpc.ProvisionServiceStub(channel)
        info = service.GetProvisionInfo(beam_provision_api_pb2.GetProvisionInfoRequest(), timeout=60).info
    told = sdk_worker_main._load_pipeline_options(json.dumps(job_utils.struct_to_dict(info.pipeline_options)))
    return PipelineOptions.from_dictionary(told), frozenset(info.runner_capabilities)


def _told(record: logging.LogRecord) -> bool:
    """Beam warns of what it lacks and nobody asked for."""
    return record.levelno >= logging.ERROR or "/apache_beam/" not in record.pathname


def main(given: Iterable[str]) -> None:
    """Serves until it is killed."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.runners.worker_pool", description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--preload", default="", metavar="MODULE,…", help="What workers will import.")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--tether", type=int, help=argparse.SUPPRESS)
    flags = parser.parse_args([*given])
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger().handlers[0].addFilter(_told)
    if flags.worker:
        _run(lambda: _work(Asked(**json.loads(flags.worker)), flags.tether))
    for name in filter(None, flags.preload.split(",")):
        importlib.import_module(name)
    Pool(flags.port).run()


if __name__ == "__main__":
    main(sys.argv[1:])
