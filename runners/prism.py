"""PrismRunner: Beam's own portable runner in one process, for small graphs that a real engine would be too much for.

Bounded graphs, and unbounded ones under little load: under more than it can take, Prism 2.77 loses rows and says
nothing, so a live run trusts the law of conservation, not its exit. ``--prism_location`` names a binary; else
``prism`` on the PATH, else what ``go install`` made under ``.clusters/prism``, which it makes now if Go is there.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions, PortableOptions, PrismRunnerOptions

from pipelines.runners import jobs
from pipelines.runners.clusters import folder
from pipelines.transforms.errors import UserError

DISTRIBUTED = True
UNBOUNDED = True
DEALT = True

_PACKAGE = f"github.com/apache/beam/sdks/v2/go/cmd/prism@v{beam.__version__}"
_STARTED = re.compile(r'msg="Serving JobManagement" endpoint=\S+:(\d+)')


def run(build: Callable[[beam.Pipeline], None], flags: Sequence[str]) -> None:
    """Runs the graph to its end on Prism. What a worker raises comes as the text of its traceback."""
    options = PipelineOptions(list(flags))
    given = options.view_as(PortableOptions).job_endpoint
    with contextlib.nullcontext(given) if given else serving(options) as endpoint:
        jobs.run(build, endpoint, flags)


def prepared(build: Callable[[beam.Pipeline], None], flags: Sequence[str]) -> Callable[[], None]:
    """The graph, to be run any number of times, as jobs of their own."""
    return lambda: run(build, flags)


@contextlib.contextmanager
def serving(options: PipelineOptions | None = None) -> Iterator[str]:
    """A Prism, for as many runs as the block has; yields its endpoint."""
    program = binary(options or PipelineOptions([]))
    with jobs.serving("prism", [program, "-job_port=0", "-serve_http=false", "-log_kind=text"], _STARTED) as endpoint:
        yield endpoint


def binary(options: PipelineOptions) -> Path:
    """The Prism to start. Raises UserError where there is none and none can be made."""
    given = options.view_as(PrismRunnerOptions).prism_location
    made = folder("prism") / "prism"
    if found := given or shutil.which("prism") or (made.exists() and made):
        if not Path(found).exists():
            raise UserError(f"--prism_location={given}: no such file")
        return Path(found)
    go = shutil.which("go") or shutil.which("/usr/local/go/bin/go")
    if go is None:
        raise UserError("--runner=PrismRunner: no prism and no go on the PATH; install Go, or name a --prism_location")
    print(f"making Prism by go install into {made.parent}, some minutes", file=sys.stderr)
    done = subprocess.run(
        [go, "install", _PACKAGE], env={**os.environ, "GOBIN": str(made.parent)}, capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(f"--runner=PrismRunner: go install fails: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return made
