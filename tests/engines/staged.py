"""Runs what was staged for Dataflow on Beam's FnApiRunner: ``python staged.py OPTIONS.json``, the options of a job.

As on a worker the graph comes from ``pipelineUrl``, whose hash must be ``pipelineProtoHash``, and the parameters that a
template was launched with are among the options. The workers are threads of this process instead of containers.
"""

import hashlib
import json
import sys
from pathlib import Path

import fsspec
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.options.value_provider import RuntimeValueProvider
from apache_beam.portability import python_urns
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.runners.portability.fn_api_runner import FnApiRunner


def main() -> None:
    """Runs it to its end."""
    options = json.loads(Path(sys.argv[1]).read_text())
    with fsspec.open(options["pipelineUrl"], "rb") as file:
        staged = file.read()
    assert hashlib.sha256(staged).hexdigest() == options["pipelineProtoHash"], "not what was submitted"
    graph = beam_runner_api_pb2.Pipeline.FromString(staged)
    for environment in graph.components.environments.values():
        environment.urn, environment.payload = python_urns.EMBEDDED_PYTHON, b""
        del environment.dependencies[:]
    RuntimeValueProvider.set_runtime_options(options)
    FnApiRunner().run_via_runner_api(graph, PipelineOptions([])).wait_until_finish()


if __name__ == "__main__":
    main()
