"""DataflowRunner: the graph submitted to Google's Dataflow, bounded ones and streams.

The graph is staged under ``--temp_location`` (``pipeline.pb``) with this package's sdist, which the workers install, or
nothing but the graph where ``--sdk_container_image`` names an image that has it. A bounded job is waited for, as its
report is wanted; a stream goes on by itself. Either can be found again by the id that is told, and by its label.

Exactly once: batch shuffles in the service, a stream runs on Streaming Engine in exactly-once mode. At least once is
refused: what is counted twice stays so. Machines are chosen for elements of up to 64 MB and a DuckDB of one thread in
each worker process (one a core): few threads a process, and 4 GB each.
"""

import importlib.metadata
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import (
    DebugOptions,
    GoogleCloudOptions,
    PipelineOptions,
    SetupOptions,
    StandardOptions,
    WorkerOptions,
)

from pipelines.runners import Detached, preflight
from pipelines.runners.dataflow_jobs import LABEL, console
from pipelines.runners.package import sdist
from pipelines.transforms.errors import UserError

DISTRIBUTED = True
UNBOUNDED = True
DEALT = False

_BATCH = ("--machine_type=n2-standard-2", "--number_of_worker_harness_threads=2", "--experiments=shuffle_mode=service")
_STREAM = (
    "--machine_type=n2-standard-2",
    "--number_of_worker_harness_threads=4",
    "--enable_streaming_engine",
    "--dataflow_service_options=streaming_mode_exactly_once",
)
_ONCE = "streaming_mode_at_least_once"
_FILES = ("gcsfs", "s3fs")
"""What reads a place by its scheme: extras of the package, so the workers must be told to install them."""


def run(build: Callable[[beam.Pipeline], None], flags: Sequence[str]) -> None:
    """Submits the graph. A bounded one runs to its end; what a worker raises comes as the text of its traceback.

    Raises Detached for a stream, a template (``--template_location``), and where Ctrl-C ends the waiting and not the
    job; UserError for what is missing, before anything is built.
    """
    with tempfile.TemporaryDirectory() as folder:
        result, options = submit(build, flags, Path(folder))
    google = options.view_as(GoogleCloudOptions)
    if google.template_location:
        what = "the graph" if options.view_as(StandardOptions).streaming else "the graph of one run"
        raise Detached(f"{what} is at {google.template_location}; `pipelines template build` makes one to launch often")
    job = result.job_id()
    where = f"Dataflow job {job} of {google.project} in {google.region}"
    print(f"{where}: {console(google.project, google.region, job)}", file=sys.stderr)
    facts = {"project": google.project, "region": google.region, "endpoint": google.dataflow_endpoint, "job": job}
    if options.view_as(StandardOptions).streaming:
        raise Detached(f"{where} runs on by itself; pipelines jobs lists, shows, drains and stops it", facts)
    try:
        result.wait_until_finish()
    except KeyboardInterrupt:
        raise Detached(f"{where} runs on, nobody waits for it now", facts, code=130) from None


def prepared(build: Callable[[beam.Pipeline], None], flags: Sequence[str]) -> Callable[[], None]:
    """Refused: a turn would be a job, and a job takes minutes to start."""
    raise UserError("--runner=DataflowRunner: a turn would be a job of minutes there; run it with --mode=stream")


def submit(build: Callable[[beam.Pipeline], None], flags: Sequence[str], folder: Path) -> tuple[Any, PipelineOptions]:
    """Checks the flags, builds the graph, and gives it to the service, or to a template. folder: for what is staged."""
    _libraries()
    from apache_beam.runners.dataflow.dataflow_runner import DataflowRunner

    ours = _STREAM if "--streaming" in flags else _BATCH
    options = PipelineOptions([*ours, f"--labels={LABEL[0]}={LABEL[1]}", *flags])
    check(options)
    _package(options, folder)
    pipeline = beam.Pipeline(runner=DataflowRunner(), options=options)
    build(pipeline)
    preflight.guard("DataflowRunner", pipeline.to_runner_api())
    return pipeline.run(), options


def _libraries() -> None:
    try:
        import apache_beam.runners.dataflow.internal.apiclient  # noqa: F401
    except ImportError:
        raise UserError("--runner=DataflowRunner needs Google's libraries: pip install 'pipelines[gcp]'") from None


def check(options: PipelineOptions) -> None:
    """Raises UserError for the first option that is missing or cannot be."""
    google = options.view_as(GoogleCloudOptions)
    template = google.template_location
    for name, example in (("project", "my-project"), ("region", "europe-west1"), ("temp_location", "gs://bucket/tmp")):
        if not getattr(google, name):
            raise UserError(f"--runner=DataflowRunner needs --{name}, for example --{name}={example}")
    for name in ("temp_location", "staging_location", "template_location"):
        value = getattr(google, name)
        if value and not re.fullmatch(r"gs://[a-z0-9][-_.a-z0-9]{1,220}[a-z0-9](/.*)?", value):
            raise UserError(f"--{name}={value}: Dataflow stages in Cloud Storage; give gs://bucket/folder")
    if template and google.update:
        raise UserError(f"--update: a template replaces no job; leave it out, or --template_location={template}")
    if google.job_name and not re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", google.job_name):
        raise UserError(f"--job_name={google.job_name}: lower-case letters, digits and -, beginning with a letter")
    if _ONCE in (google.dataflow_service_options or []):
        raise UserError(f"--dataflow_service_options={_ONCE}: counts would be wrong; leave it out")
    if options.view_as(DebugOptions).lookup_experiment("disable_streaming_engine"):
        raise UserError("--experiments=disable_streaming_engine: Python streams run on Streaming Engine; leave it out")


def _package(options: PipelineOptions, folder: Path) -> None:
    """How the workers get this package: in their image, as the user says, or as an sdist made of this checkout."""
    setup, worker = options.view_as(SetupOptions), options.view_as(WorkerOptions)
    if worker.sdk_container_image:
        if setup.sdk_location == "default":
            setup.sdk_location = "container"
        return
    if not (setup.setup_file or setup.extra_packages):
        setup.extra_packages = [str(sdist(folder))]
    if not setup.requirements_file:
        wanted = folder / "requirements.txt"
        wanted.write_text("".join(f"{name}=={version}\n" for name, version in _installed(_FILES)))
        setup.requirements_file, setup.requirements_cache = str(wanted), "skip"


def _installed(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    for name in names:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
