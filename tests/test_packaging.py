"""Every way to have the project gives the same packages: wheel, sdist, editable install, and a checkout alone."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LISTED = """
import pipelines, pipelines.cli, pipelines.definition, pipelines.examples, pipelines.io.files, pipelines.runners
import pipelines.serving.merge, pipelines.transforms.schema
print(*sorted({module.__file__ for name, module in sys.modules.items() if name.startswith("pipelines")}), sep="\\n")
"""


def ran(*command: str | Path, folder: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported_from(python: str | Path, folder: Path, **environment: str) -> list[Path]:
    listed = ran(python, "-c", "import sys\n" + LISTED, folder=folder, **environment)
    return [Path(line) for line in listed.splitlines()]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that a clone has: building leaves nothing in the project."""
    copy = tmp_path_factory.mktemp("checkout")
    for folder in ("pipelines", "transforms", "io", "runners", "serving"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.mark.slow
def test_a_checkout_needs_no_install(checkout: Path) -> None:
    assert all(path.is_relative_to(checkout) for path in imported_from(sys.executable, checkout))


@pytest.mark.slow
def test_the_editable_install_reaches_every_folder(tmp_path: Path) -> None:
    folders = {path.parent.name for path in imported_from(sys.executable, tmp_path) if path.is_relative_to(ROOT)}
    assert folders == {"pipelines", "examples", "transforms", "io", "runners", "serving"}


@pytest.mark.slow
def test_sdist_and_the_wheel_made_from_it_are_whole(checkout: Path, tmp_path: Path) -> None:
    uv, python = Path(sys.executable).with_name("uv"), tmp_path / "venv/bin/python"
    ran(uv, "build", "--offline", "--no-build-isolation", "--python", sys.executable, "-o", tmp_path, folder=checkout)
    (sdist,), (wheel,) = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    assert sdist.stat().st_size > 10_000
    ran(uv, "venv", "--offline", "--python", sys.executable, "venv", folder=tmp_path)
    ran(uv, "pip", "install", "--offline", "--no-deps", "--python", python, wheel, folder=tmp_path)
    dependencies = sysconfig.get_path("purelib")  # as PYTHONPATH its .pth files, so the editable install, stay out
    found = imported_from(python, tmp_path, PYTHONPATH=dependencies)
    assert all(path.is_relative_to(tmp_path / "venv") for path in found)
    assert "Usage: pipelines" in ran(python.with_name("pipelines"), "--help", folder=tmp_path, PYTHONPATH=dependencies)
