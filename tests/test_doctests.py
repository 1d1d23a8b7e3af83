"""Every module's examples, run under the name by which users import it."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"pipelines": "pipelines", "pipelines.examples": "pipelines/examples"} | {
    f"pipelines.{name}": name for name in ("transforms", "io", "runners", "serving")
}
MODULES = [
    f"{package}.{path.stem}" if path.stem != "__init__" else package
    for package, folder in FOLDERS.items()
    for path in sorted((ROOT / folder).glob("*.py"))
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)
    assert doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS).failed == 0
