from pathlib import Path

import pytest

from benchmarks import page
from benchmarks.figures import Figures, Run
from benchmarks.verify import Accuracy


def run(peer: str, cpu: float, number: int = 0, session: str = "a") -> Run:
    return Run(0, cpu, 1.0, 100.0, "base", "30M", 30_000_000, peer, session, number, 0.5, Accuracy(84_000, 0.0))


def test_ratios_are_of_pairs_and_their_median_is_told() -> None:
    figures = Figures({}, [run("ours", 4.0), run("DuckDB", 2.0), run("ours", 9.0, 1), run("DuckDB", 3.0, 1)])
    figures.add(run("ours", 30.0, 2))
    figures.add(run("DuckDB", 1.0, 2))
    assert figures.ratio("base", "30M", "ours", "DuckDB") == 3.0
    assert figures.median("base", "30M", "DuckDB", "cpu") == 2.0


def test_runs_of_different_sessions_are_no_pair() -> None:
    figures = Figures({}, [run("ours", 4.0, session="a"), run("DuckDB", 2.0, session="b")])
    assert figures.ratio("base", "30M", "ours", "DuckDB") is None


def test_a_new_session_replaces_the_old_runs_of_the_same_program_only() -> None:
    figures = Figures({}, [run("ours", 4.0), run("DuckDB", 2.0)])
    figures.add(run("ours", 5.0, session="b"))
    assert [(r.peer, r.cpu) for r in figures.runs] == [("DuckDB", 2.0), ("ours", 5.0)]


def test_figures_come_back_as_they_were_saved(tmp_path: Path) -> None:
    figures = Figures({"cores": "2"}, [run("ours", 4.0)])
    figures.save(tmp_path / "figures.json")
    assert Figures.load(tmp_path / "figures.json") == figures


@pytest.mark.parametrize(("cpu", "verdict"), [(5.9, "met"), (6.1, "**missed**")])
def test_a_bar_is_met_or_missed(cpu: float, verdict: str) -> None:
    bars = page.tables(Figures({}, [run("ours", cpu), run("DuckDB", 2.0)]))["bars"]
    (line,) = [line for line in bars.splitlines() if line.startswith("| base, 30M rows |")]
    assert line.endswith(f"| {verdict} |")
