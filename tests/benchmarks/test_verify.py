from pathlib import Path

import duckdb
import pytest

from benchmarks import data, verify

ANSWER = """
    SELECT key, date_trunc('hour', ts) AS hour, count(*) AS n, sum(value) AS total, avg(value) AS mean,
        min(value) AS least, max(value) AS most, quantile_cont(value, 0.95) AS p95, count(DISTINCT user) AS users
    FROM read_parquet('{rows}') GROUP BY ALL
"""


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> data.Dataset:
    monkeypatch.setattr(data, "ROOT", tmp_path)
    monkeypatch.setattr(verify, "ROOT", tmp_path)
    monkeypatch.setattr(data, "ROW_GROUP", 1_000)
    dataset = data.Dataset("small", 3_000, keys=2)
    dataset.make()
    return dataset


def answered(dataset: data.Dataset, tmp_path: Path, change: str = "*") -> Path:
    target = tmp_path / "answer"
    target.mkdir()
    duckdb.execute("SET TimeZone = 'UTC'")
    query = f"COPY (SELECT {change} FROM ({ANSWER.format(rows=dataset.uri)})) TO '{target}/answer.parquet'"
    duckdb.execute(query)
    return target


def test_the_right_answer_is_right(dataset: data.Dataset, tmp_path: Path) -> None:
    accuracy = verify.verify("sketch", dataset, answered(dataset, tmp_path))
    assert accuracy.groups == 335  # of 336 groups one happens to get no row
    assert accuracy.sums < 1e-12
    assert (accuracy.p95, accuracy.users) == (0, 0)


@pytest.mark.parametrize(
    "change",
    [
        "* REPLACE (n + (key = 'sensor-00001')::INT AS n)",
        "* REPLACE (total * (1 + 1e-8) AS total)",
        "* REPLACE (p95 * 1.5 AS p95)",
        "* REPLACE (users * 1.1 AS users)",
        "* REPLACE (hour + INTERVAL 1 HOUR AS hour)",
        "DISTINCT ON (key) *",
    ],
)
def test_a_wrong_answer_is_refused(dataset: data.Dataset, tmp_path: Path, change: str) -> None:
    with pytest.raises(verify.WrongAnswerError):
        verify.verify("sketch", dataset, answered(dataset, tmp_path, change))
