from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipelines.transforms.order import ordered


def tables(rows: int, piece: int, spread: int) -> Iterator[pa.Table]:
    """Rows about in order of t, each up to ``spread`` away from its place."""
    random = np.random.default_rng(5)
    for at in range(0, rows, piece):
        n = np.arange(at, min(at + piece, rows))
        yield pa.table({"t": n // 3 + random.integers(0, spread, len(n)), "n": n, "text": [f"row {i}" for i in n]})


@pytest.mark.parametrize("spread", [1, 50, 100_000])
@pytest.mark.parametrize("run", [1 << 12, 1 << 15, 1 << 30])
def test_all_rows_come_in_order_whole(tmp_path: Path, spread: int, run: int) -> None:
    given = pa.concat_tables(tables(2_000, 300, spread))
    found = pa.concat_tables(ordered(tables(2_000, 300, spread), ["t", "n"], tmp_path, run=run, block=1 << 9))
    expected = sorted(given.to_pylist(), key=lambda row: (row["t"], row["n"]))
    assert found.to_pylist() == expected


def test_what_fits_is_not_written_and_what_does_not_is_unreadable(tmp_path: Path) -> None:
    assert sum(map(len, ordered(tables(1_000, 100, 9), ["t", "n"], tmp_path))) == 1_000
    assert not list(tmp_path.iterdir())
    assert sum(map(len, ordered(tables(1_000, 100, 9), ["t", "n"], tmp_path, run=1 << 13))) == 1_000
    written = [file.read_bytes() for file in tmp_path.iterdir()]
    assert len(written) > 2 and not any(b"row 1" in content for content in written)


def test_it_holds_a_few_blocks_of_each_run_and_no_more(tmp_path: Path) -> None:
    for spread, most in ((1, 800), (100_000, 4_000)):
        given = list(ordered(tables(12_000, 1_500, spread), ["t", "n"], tmp_path, run=1 << 15, block=1 << 12))
        assert max(map(len, given)) < most


def test_no_rows_are_no_tables(tmp_path: Path) -> None:
    assert list(ordered(iter(()), ["t"], tmp_path)) == []
    assert sum(map(len, ordered([pa.table({"t": pa.array([], pa.int64())})], ["t"], tmp_path))) == 0
