"""Workers that are threads of this process, started when a job server asks for one: what Beam calls LOOPBACK.

Beam's own start of them listens on every interface, and keeps two threads and a connection of every worker whose
engine hangs up before it has said that it will, which in a live run on Spark was every third turn.
"""

import contextlib
import threading
from collections.abc import Iterator

import grpc
from apache_beam.options.pipeline_options import DebugOptions, PipelineOptions
from apache_beam.portability.api import beam_fn_api_pb2, beam_fn_api_pb2_grpc
from apache_beam.runners.worker import sdk_worker_main
from apache_beam.runners.worker.sdk_worker import SdkHarness
from apache_beam.runners.worker.worker_pool_main import BeamFnExternalWorkerPoolServicer
from apache_beam.utils import thread_pool_executor
from apache_beam.utils.sentinel import Sentinel


@contextlib.contextmanager
def serving(options: PipelineOptions) -> Iterator[str]:
    """Starts workers for all jobs of the block; yields the address to ask at."""
    pool = _Pool(**limits(options))
    server = grpc.server(thread_pool_executor.shared_unbounded_instance())
    beam_fn_api_pb2_grpc.add_BeamFnExternalWorkerPoolServicer_to_server(pool, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(1).wait()


def limits(options: PipelineOptions) -> dict[str, int]:
    """How much of its state a worker keeps, and how long the rows that it gives."""
    return {
        "state_cache_size": sdk_worker_main._get_state_cache_size_bytes(options),
        "data_buffer_time_limit_ms": sdk_worker_main._get_data_buffer_time_limit_ms(
            options.view_as(DebugOptions).experiments or []
        ),
    }


class _Pool(BeamFnExternalWorkerPoolServicer):  # type: ignore[misc]
    def StartWorker(  # noqa: N802
        self, request: beam_fn_api_pb2.StartWorkerRequest, context: grpc.ServicerContext
    ) -> beam_fn_api_pb2.StartWorkerResponse:
        worker = Worker(
            request.control_endpoint.url,
            worker_id=request.worker_id,
            state_cache_size=self._state_cache_size,
            data_buffer_time_limit_ms=self._data_buffer_time_limit_ms,
        )
        self._worker_threads[request.worker_id] = worker  # for StopWorker
        threading.Thread(target=worker.run, name=f"worker {request.worker_id}", daemon=True).start()
        return beam_fn_api_pb2.StartWorkerResponse()


class Worker(SdkHarness):  # type: ignore[misc]
    """A worker that ends in peace when its engine hangs up."""

    def run(self) -> None:
        try:
            super().run()
        except grpc.RpcError:  # the engine has hung up, so no bundle is left
            self._responses.put(Sentinel.sentinel)
            with contextlib.suppress(grpc.RpcError), contextlib.ExitStack() as every:  # whatever the others raise
                every.callback(self._data_channel_factory.close)
                every.callback(self._state_handler_factory.close)
                every.callback(self._bundle_processor_cache.shutdown)
