"""Is a peer's answer right? Its time counts only then.

The oracle is exact: DuckDB over the same files, a slice of the keys at a time, so that 300M rows fit in memory.
"""

import dataclasses
from pathlib import Path

import duckdb
from deltalake import DeltaTable

from benchmarks.data import ROOT, Dataset

SLICE = 10_000_000  # rows sorted at once
ORACLE = """
    COPY (
        SELECT key, hour, n, total, mean, least, most, users,
            sorted[1 + floor(0.95 * (n - 1))::BIGINT] AS low, sorted[1 + ceil(0.95 * (n - 1))::BIGINT] AS high
        FROM (
            SELECT key, epoch_us(ts) // 3600000000 AS hour, count(*) AS n, sum(value) AS total, avg(value) AS mean,
                min(value) AS least, max(value) AS most, list_sort(list(value)) AS sorted, count(DISTINCT user) AS users
            FROM read_parquet('{rows}') WHERE hash(key) % {slices} = {slice} GROUP BY ALL
        )
    ) TO '{path}' (FORMAT parquet)
"""
# One row per group that either side has: is it the same, and how far apart.
PAIRS = """
    SELECT (a.n, a.least, a.most) IS NOT DISTINCT FROM (e.n, e.least, e.most) AS same,
        greatest(abs(a.total / e.total - 1), abs(a.mean / e.mean - 1)) AS sums {sketches}
    FROM (SELECT * REPLACE (epoch_us(hour::TIMESTAMPTZ) // 3600000000 AS hour) FROM answer) a
    FULL JOIN read_parquet('{oracle}/*.parquet') e USING (key, hour)
"""
SKETCHED = ", greatest(e.low / a.p95 - 1, 1 - e.high / a.p95, 0) AS p95, abs(a.users / e.users - 1) AS users"
SUMMARY = "count(*), count(*) FILTER (NOT same), max(sums)"
SKETCH_SUMMARY = f"{SUMMARY}, avg(p95), quantile_cont(p95, 0.99), avg(users), quantile_cont(users, 0.99)"


class WrongAnswerError(Exception):
    """A peer's answer is not the oracle's."""


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """How far an answer is from the oracle: relative errors, over all groups.

    ``sums``: the worst of sum and mean. ``p95``: the distance from the interval between the two neighbouring values
    that PERCENTILE_CONT interpolates. ``users``: of distinct users. Both as mean, and as 99th percentile of the groups.
    """

    groups: int
    sums: float
    p95: float | None = None
    p95_99: float | None = None
    users: float | None = None
    users_99: float | None = None


def verify(job: str, dataset: Dataset, target: Path) -> Accuracy:
    """Compares the answer under ``target``. Raises WrongAnswerError with what is wrong.

    Counts, least and most must be equal, sums within 1e-9, the percentile within 2 % and distinct users within 5 % in
    the mean.
    """
    sketched = job == "sketch"
    pairs = PAIRS.format(oracle=_oracle(dataset), sketches=SKETCHED if sketched else "")
    with duckdb.connect() as connection:
        _register(connection, target)
        query = f"SELECT {SKETCH_SUMMARY if sketched else SUMMARY} FROM ({pairs})"
        ((groups, wrong, *errors),) = connection.sql(query).fetchall()
    accuracy = Accuracy(groups, *errors)
    if wrong or accuracy.sums > 1e-9 or (accuracy.p95 or 0) > 0.02 or (accuracy.users or 0) > 0.05:
        raise WrongAnswerError(f"{target}: {wrong} groups with another count, least or most; {accuracy}")
    return accuracy


def _register(connection: duckdb.DuckDBPyConnection, target: Path) -> None:
    """The answer as a view: ours is a Delta table by its view's name."""
    connection.execute("SET TimeZone = 'UTC'")
    logs = list(target.rglob("hourly/_delta_log"))
    if logs:
        connection.register("written", DeltaTable(logs[0].parent).to_pyarrow_dataset())
        connection.execute("CREATE VIEW answer AS SELECT * RENAME (window_start AS hour) FROM written")
    else:
        files = [str(path) for path in target.rglob("*") if path.is_file() and not path.name.startswith(("_", "."))]
        connection.read_parquet(files).create_view("answer")


def _oracle(dataset: Dataset) -> Path:
    """The folder of the exact answer, computed once."""
    folder = ROOT / "expected" / dataset.name
    folder.mkdir(parents=True, exist_ok=True)
    slices = -(-dataset.rows // SLICE)
    with duckdb.connect() as connection:
        for number in range(slices):
            path = folder / f"{number}.parquet"
            if not path.exists():
                unfinished = path.with_suffix(".unfinished")
                query = ORACLE.format(rows=dataset.uri, slices=slices, slice=number, path=unfinished)
                connection.execute(query)
                unfinished.rename(path)
    return folder
