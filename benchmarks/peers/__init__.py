"""Who is measured, and how each is started. Every ``on_*.py`` is a program of its own: ``JOB FOLDER TARGET``."""

import dataclasses
import os
import sys
from pathlib import Path

from benchmarks.data import Dataset

HERE = Path(__file__).parent
ENVIRONMENTS = Path(".benchmarks")


@dataclasses.dataclass(frozen=True)
class Peer:
    """One program. ``environment``: the folder under .benchmarks that holds its interpreter; none: this one."""

    name: str
    program: str
    environment: str | None = None
    options: tuple[str, ...] = ()

    @property
    def python(self) -> str:
        return str(ENVIRONMENTS / self.environment / "bin/python") if self.environment else sys.executable

    def command(self, job: str, dataset: Dataset, target: Path) -> list[str]:
        return [self.python, str(HERE / self.program), job, str(dataset.folder), str(target), *self.options]

    def variables(self) -> dict[str, str]:
        """The environment it runs in. Nothing looks up this machine's name or listens outside it."""
        jars = {"JARS": str(ENVIRONMENTS / self.environment / "jars")} if self.environment else {}
        return os.environ | jars | {"SPARK_LOCAL_IP": "127.0.0.1", "SPARK_LOCAL_HOSTNAME": "127.0.0.1"}


@dataclasses.dataclass(frozen=True)
class Ours(Peer):
    """This project, started as a user starts it. The answer is a Delta table, with the mergeable state beside it."""

    def command(self, job: str, dataset: Dataset, target: Path) -> list[str]:
        options = {
            "pipeline": f"benchmarks/definitions.py:{job}",
            "history": dataset.uri,
            "warehouse": str(target / "warehouse"),
            "store": "none",
            "dead_letters": str(target / "dead_letters"),
            "report": str(target / "run.json"),
        }
        return [self.python, "-m", "pipelines.run", *(f"--{name}={value}" for name, value in options.items())]


OURS = Ours("ours", "")
DUCKDB = Peer("DuckDB", "on_duckdb.py")
POLARS = Peer("Polars", "on_polars.py")
PYSPARK = Peer("PySpark", "on_pyspark.py")
BEAM_WINDOWS = Peer("Beam, per row", "on_beam_rows.py", options=("windows",))
BEAM_KEYS = Peer("Beam, per row, tuned", "on_beam_rows.py", options=("keys",))
PYFLINK = Peer("PyFlink", "on_pyflink.py", "pyflink")
BYTEWAX = Peer("Bytewax", "on_bytewax.py", "bytewax")
PATHWAY = Peer("Pathway", "on_pathway.py", "pathway")
