"""What the newcomer is told: the README's definition compiles, and `make help` tells of every target."""

import re
import subprocess
from pathlib import Path

import pytest

from pipelines import load

ROOT = Path(__file__).parents[1]


def test_the_definition_of_the_readme_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (definition,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("my_flights.py").write_text(definition)
    assert [view.name for view in load("my_flights.py:flights").views] == ["delays"]


def test_help_lists_every_target_with_one_line() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)
    targets = set(phony.split()) - {"types"}
    told = subprocess.run(["make", "-C", ROOT, "help"], capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"^  make ([\w-]+) +\S.*$", told, flags=re.MULTILINE)) == targets
