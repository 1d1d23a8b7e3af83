"""Staging from a PCollection: every row once, whatever the bundles."""

from pathlib import Path
from typing import Any

import apache_beam as beam
import pyarrow as pa
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.util import assert_that

from pipelines.io.table import STAGED, Table, open_table
from pipelines.io.write import StageTable, unit
from pipelines.transforms.tables import TableCoder

SCHEMA = pa.schema([pa.field("v", pa.int64(), nullable=False)])


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return open_table(str(tmp_path / "table"), SCHEMA)


def commit(table: Table, staged: list[pa.Table]) -> None:
    both = pa.concat_tables([STAGED.empty_table(), *staged])
    table.commit(both, token="run", version=1, replace="everything")


def bundle(table: Table, *elements: pa.Table) -> list[pa.Table]:
    worker = StageTable(table, token="run", version=1)
    worker.start_bundle()
    for element in elements:
        worker.process(element)
    return [staged.value for staged in worker.finish_bundle()]


def rows(source: str, first: int, *values: int) -> pa.Table:
    positions = range(first, first + len(values))
    return pa.table({"v": list(values), "_source": [source] * len(values), "_offset": list(positions)})


@pytest.mark.slow
def test_a_pipeline_stages_every_row_in_one_file_a_bundle(table: Table) -> None:
    def check(staged: list[pa.Table]) -> None:
        assert all(one.schema == STAGED for one in staged)
        commit(table, staged)

    with beam.Pipeline("DirectRunner", PipelineOptions([])) as pipeline:
        staged = (
            pipeline
            | beam.Create(range(5), reshuffle=False)
            | beam.Map(lambda n: pa.table({"v": range(n * 10, n * 10 + n)})).with_output_types(pa.Table)
            | beam.ParDo(StageTable(table, token="run", version=1))
        )
        assert isinstance(beam.coders.registry.get_coder(staged.element_type), TableCoder)
        assert_that(staged, check)

    assert sorted(table.dataset().to_table()["v"].to_pylist()) == [n * 10 + i for n in range(5) for i in range(n)]
    assert len(table.files()) <= 2


def test_equal_rows_from_other_places_are_all_kept(table: Table) -> None:
    bundles = [rows("a.csv", 0, 7, 7), rows("a.csv", 2, 7, 7), rows("b.csv", 0, 7, 7)]
    staged = [file for one in bundles for file in bundle(table, one)]
    commit(table, staged)
    assert table.dataset().to_table()["v"].to_pylist() == [7] * 6


def test_a_bundle_tried_again_is_staged_twice_and_committed_once(table: Table) -> None:
    bundle(table, rows("a.csv", 0, 1), rows("a.csv", 1, 2))
    staged = bundle(table, rows("a.csv", 1, 2), rows("a.csv", 0, 1))
    commit(table, staged)
    assert sorted(table.dataset().to_table()["v"].to_pylist()) == [1, 2]
    assert len(list(Path(table.uri).glob("*part*"))) == 1


def test_a_bundle_without_rows_stages_nothing(table: Table) -> None:
    assert bundle(table) == bundle(table, rows("a.csv", 0)) == []


def test_a_worker_begins_every_bundle_anew(table: Table) -> None:
    worker: Any = StageTable(table, token="run", version=1)
    worker.start_bundle()
    worker.process(rows("a.csv", 0, 1))  # this bundle fails
    worker.start_bundle()
    worker.process(rows("a.csv", 0, 2))
    commit(table, [staged.value for staged in worker.finish_bundle()])
    assert table.dataset().to_table()["v"].to_pylist() == [2]


def test_a_unit_is_named_by_where_its_first_row_came_from() -> None:
    assert unit(rows("a.csv", 5, 1, 2)) == unit(rows("a.csv", 5, 3))
    assert len({unit(rows("a.csv", 5, 1)), unit(rows("a.csv", 6, 1)), unit(rows("b.csv", 5, 1))}) == 3
    assert unit(pa.table({"v": [1, 2]})) == unit(pa.table({"v": [1, 3]})) != unit(pa.table({"v": [2]}))
