"""This package as workers install it: the sdist of the checkout that runs. Beam-free."""

import fcntl
import shutil
import subprocess
import sys
from pathlib import Path

from pipelines.transforms.errors import UserError


def sdist(folder: Path) -> Path:
    """Makes it into a folder. Raises UserError where this is no checkout, or it cannot be made."""
    root, folder = Path(__file__).resolve().parents[1], folder.resolve()
    if not (root / "setup.py").exists():
        raise UserError(
            f"{root}: no checkout to make the package of, which Dataflow's workers need; run it from one, or give "
            "--sdk_container_image=IMAGE that has it"
        )
    # setuptools lays the files out in the checkout before it packs them: one at a time
    made = [sys.executable, "setup.py", "-q", "egg_info", "-e", str(folder), "sdist", "-d", str(folder)]
    with open(root / "setup.py", "rb") as alone:
        fcntl.flock(alone, fcntl.LOCK_EX)
        done = subprocess.run(made, cwd=root, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["?"])[-1]
        raise UserError(f"{root}: cannot make the package that Dataflow's workers need: {why}")
    shutil.rmtree(folder / "pipelines.egg-info")
    (found,) = folder.glob("*.tar.gz")
    return found
