"""A folder in which a test runs pipelines by the command line, and what is there afterwards."""

import dataclasses
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import cli
from pipelines.io.store import open_store
from pipelines.io.table import open_table

AT = datetime(2024, 1, 1, 0, 10, tzinfo=UTC)


@dataclasses.dataclass(frozen=True)
class Done:
    """How a run ended. told: what it said on stderr, but for its progress."""

    code: int
    out: str
    told: list[str]

    @property
    def refusal(self) -> str:
        """The one line that a run which did not succeed says."""
        (line,) = self.told
        assert line.startswith("pipelines: ")
        assert self.out == ""
        return line.removeprefix("pipelines: ")


@dataclasses.dataclass(frozen=True)
class Place:
    """A folder with a history in it; runs write to its folder ``data``, as they do by default."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    DIRTY = Path(__file__).parent / "dirty.py"

    def write(self, name: str, content: str | bytes) -> str:
        """A file of these bytes; its name."""
        (self.folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return name

    def parquet(self, **columns: Any) -> str:
        """rows.parquet with these columns of a Reading: a time in every row, and nulls where none are given."""
        length = max((len(values) for values in columns.values()), default=1)
        plain = {name: pa.nulls(length) for name in ("sensor", "at", "celsius", "count", "price", "code")}
        plain["at"] = pa.array([AT] * length, pa.timestamp("us", "UTC"))
        pq.write_table(pa.table({**plain, **columns}), self.folder / "rows.parquet")
        return "rows.parquet"

    def call(self, *arguments: str) -> Done:
        """A command line, run here."""
        self.monkeypatch.setattr(sys, "argv", ["pipelines", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        told = self.capsys.readouterr()
        lines = [line for line in told.err.splitlines() if " rows/s" not in line]
        assert isinstance(ended.value.code, int)
        return Done(ended.value.code, told.out, lines)

    def run(self, pipeline: str, history: str, *flags: str) -> Done:
        """One of the definitions of dirty.py over a history."""
        return self.call("run", f"--pipeline={self.DIRTY}:{pipeline}", f"--history={history}", *flags)

    def done(self, pipeline: str, history: str, *flags: str) -> dict[str, Any]:
        """The report of a run that has to succeed."""
        done = self.run(pipeline, history, *flags)
        assert (done.code, done.told) == (0, [])
        return self.report()

    def report(self) -> dict[str, Any]:
        """The run.json of the last run."""
        return json.loads((self.folder / "data/run.json").read_text())  # type: ignore[no-any-return]

    def letters(self, pipeline: str) -> list[dict[str, Any]]:
        """The dead letters, by place and step."""
        rows = table(self.folder / f"data/dead_letters/{pipeline}").to_pylist()
        return sorted(rows, key=lambda row: (row["source"], row["offset"], row["step"]))

    def rows(self, pipeline: str, name: str) -> list[dict[str, Any]]:
        """A table of the warehouse, in some order that is always the same; without states."""
        found = table(self.folder / f"data/warehouse/{pipeline}/{name}")
        shown = [column for column in found.column_names if column == "_extra" or not column.startswith("_")]
        return sorted(found.select(shown).to_pylist(), key=repr)

    def answers(self, pipeline: str, *views: str) -> list[list[dict[str, Any]]]:
        """All that readers see of a pipeline: letters, events, and each view in the warehouse and in the store."""
        seen = [self.letters(pipeline), self.rows(pipeline, "events")]
        for view in views:
            seen.append(self.rows(pipeline, view))
            with open_store(str(self.folder / "data/store.db")) as store:
                seen.append(sorted(store.scan(f"{pipeline}.{view}").to_pylist(), key=repr))
        return seen


def table(folder: Path) -> pa.Table:
    return open_table(str(folder)).dataset().to_table()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Place:
    """An empty folder, where the test is run, without a key."""
    monkeypatch.chdir(tmp_path)
    for name in ("PIPELINES_KEY", "PIPELINES_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    return Place(tmp_path, monkeypatch, capsys)
