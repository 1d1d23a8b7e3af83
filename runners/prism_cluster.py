"""A standing Prism, and a pool of our workers: for many runs, each of which would start a Prism of its own."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from pipelines.runners import clusters
from pipelines.runners.clusters import Plan
from pipelines.runners.members import Member, workers
from pipelines.transforms.errors import UserError

STARTED = re.compile(r'msg="Serving JobManagement" endpoint=\S+:(\d+)')
"""What Prism says when it is ready, with the port that it took."""

_HOST = "127.0.0.1"


def plan(folder: Path, port: Callable[[str], int], tell: Callable[[str], None], **options: str) -> Plan:
    """The members. options: prism_location."""
    program = binary(options.get("prism_location"), tell)
    tell(f"with {program}")
    members = [
        Member("prism", command(program, port("prism")), {}, port("prism"), STARTED.pattern),
        workers(port("worker pool")),
    ]
    return Plan(members, f"{_HOST}:{port('prism')}", f"{_HOST}:{port('worker pool')}")


def down(folder: Path) -> None:
    """Nothing is left: Prism keeps all in memory."""


def command(program: Path, port: int) -> list[str]:
    """What starts a Prism; port: 0 for one that it chooses."""
    return [str(program), f"-job_port={port}", "-serve_http=false", "-log_kind=text"]


def binary(given: str | None, tell: Callable[[str], None]) -> Path:
    """The Prism to start. Raises UserError where there is none and none can be made."""
    made = clusters.folder("prism") / "prism"
    if found := given or shutil.which("prism") or (made.exists() and made):
        if not Path(found).exists():
            raise UserError(f"--prism_location={given}: no such file")
        return Path(found).absolute()
    go = shutil.which("go") or shutil.which("/usr/local/go/bin/go")
    if go is None:
        raise UserError("--runner=PrismRunner: no prism and no go on the PATH; install Go, or name a --prism_location")
    tell(f"making Prism by go install into {made.parent}, some minutes")
    package = f"github.com/apache/beam/sdks/v2/go/cmd/prism@v{version('apache-beam')}"
    done = subprocess.run(
        [go, "install", package], env={**os.environ, "GOBIN": str(made.parent)}, capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(f"--runner=PrismRunner: go install fails: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return made
