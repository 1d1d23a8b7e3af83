"""Environments of their own for the peers that do not fit beside Beam: ``python -m benchmarks.environments``."""

import subprocess
import sys
from pathlib import Path

from benchmarks.peers import ENVIRONMENTS, HERE

PACKAGES = {
    "pyflink": ["apache-flink==2.3.0"],
    "bytewax": ["bytewax==0.21.1", "pyarrow==26.0.1"],
    "pathway": ["pathway==0.33.0"],
}
PYTHON = "3.11"


def main() -> None:
    uv = Path(sys.executable).with_name("uv")
    for name, packages in PACKAGES.items():
        folder = ENVIRONMENTS / name
        subprocess.run([uv, "venv", "-q", "--allow-existing", "--python", PYTHON, folder], check=True)
        python = folder / "bin/python"
        subprocess.run([uv, "pip", "install", "-q", "--python", python, "--compile-bytecode", *packages], check=True)
    # Flink's Parquet format and the Hadoop classes that it needs are no part of the Python package.
    jars = f"-DoutputDirectory={(ENVIRONMENTS / 'pyflink/jars').absolute()}"
    subprocess.run(["mvn", "-q", "-B", "-f", HERE / "pyflink.xml", "dependency:copy-dependencies", jars], check=True)


if __name__ == "__main__":
    main()
