import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apache_beam as beam
import pyarrow as pa
import pytest
from apache_beam.coders import Coder, FastPrimitivesCoder, PickleCoder
from apache_beam.runners.pipeline_context import PipelineContext
from apache_beam.testing.util import assert_that

from pipelines.transforms.conservation import merge
from pipelines.transforms.dedupe import Dedupe
from pipelines.transforms.spill import Spill, spill_folder

SCHEMA = pa.schema(
    {"id": pa.string(), "x": pa.int64(), "_source": pa.dictionary(pa.int32(), pa.string()), "_offset": pa.int64()}
)


def dedupe(folder: Path | None, n: int = 8) -> Dedupe:
    spill = None if folder is None else Spill(folder, ("id",), n)
    return Dedupe(("id",), ("id", "x"), pipeline="p", format="parquet", spill=spill, buckets=n)


def same(expected: Any, seen: Callable[[list[pa.Table]], Any]) -> Callable[[list[pa.Table]], None]:
    def check(given: list[pa.Table]) -> None:
        found = seen(given)
        assert found == expected, (found, expected)

    return check


def columns(*names: str) -> Callable[[list[pa.Table]], list[tuple[Any, ...]]]:
    return lambda tables: sorted(
        tuple(row[name] for name in names) for table in tables for row in table.select(names).to_pylist()
    )


@pytest.fixture(params=["spill", "shuffle"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "shuffle":
        yield None
    else:
        with spill_folder(tmp_path) as found:
            yield found


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 7])
def test_both_ways_agree_with_one_row_after_the_other(folder: Path | None, n: int) -> None:
    chance = random.Random(n)
    events = [
        {"id": chance.choice(["a", "b", None, *map(str, range(50))]), "x": chance.choice([1, 1, 1, 2])}
        for _ in range(300)
    ]
    rows = [{**event, "_source": f"file {at % 3}", "_offset": at} for at, event in enumerate(events)]
    first: dict[Any, dict[str, Any]] = {}
    kept, dead, duplicates = [], [], 0
    for row in sorted(rows, key=lambda row: (row["_source"], row["_offset"])):
        winner = first.setdefault(row["id"], row)
        if winner is row:
            kept.append((row["_source"], row["_offset"], row["id"], row["x"]))
        elif winner["x"] == row["x"]:
            duplicates += 1
        else:
            detail = f"x differs from {winner['_source']}:{winner['_offset']}"
            dead.append((row["_source"], row["_offset"], "p", "dedupe", "conflict", detail))
    counts = [
        {"part": "source", "counter": "duplicate", "reason": "", "n": duplicates},
        {"part": "source", "counter": "rejected", "reason": "conflict", "n": len(dead)},
    ]
    chance.shuffle(rows)
    tables = [pa.Table.from_pylist(rows[at : at + 40], SCHEMA) for at in range(0, len(rows), 40)]
    with beam.Pipeline("FnApiRunner") as pipeline:
        once = pipeline | beam.Create(tables, reshuffle=False) | dedupe(folder, n)
        assert_that(once.rows, same(sorted(kept), columns("_source", "_offset", "id", "x")), "rows")
        letters = columns("source", "offset", "pipeline", "step", "reason", "detail")
        assert_that(once.dead, same(sorted(dead), letters), "dead")
        assert_that(once.tallies, same(counts, lambda tables: merge(tables).to_pylist()), "tallies")


def coders(coder: Coder) -> list[Coder]:
    return [coder, *(inner for part in coder._get_component_coders() for inner in coders(part))]


def test_every_collection_has_a_declared_coder(folder: Path | None) -> None:
    pipeline = beam.Pipeline()
    table = SCHEMA.empty_table()
    pipeline | beam.Create([table]).with_output_types(pa.Table) | dedupe(folder)
    proto, context = pipeline.to_runner_api(return_context=True)
    assert isinstance(context, PipelineContext)
    ours = [part for part in proto.components.transforms.values() if part.unique_name.startswith("Dedupe")]
    outputs = {identity for part in ours for identity in part.outputs.values()}
    assert len(outputs) >= 5
    for identity in outputs:
        coder = context.coders.get_by_id(proto.components.pcollections[identity].coder_id)
        for one in coders(coder):
            assert not isinstance(one, FastPrimitivesCoder | PickleCoder), (identity, coder)


def test_rows_cannot_be_spilled_by_one_identity_and_compared_by_another(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        Dedupe(("id",), ("id", "x"), pipeline="p", format="json", spill=Spill(tmp_path, ("x",), 1))


def test_beam_has_nothing_to_warn_of(folder: Path | None, caplog: pytest.LogCaptureFixture) -> None:
    given = beam.Pipeline() | beam.Create([SCHEMA.empty_table()])
    caplog.clear()
    given | dedupe(folder)
    assert caplog.messages == []


def test_a_failure_down_the_line_leaves_nothing_on_disk(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([{"id": "a", "x": 1, "_source": "f", "_offset": 0}], SCHEMA)

    def fail(_: pa.Table) -> None:
        assert list(tmp_path.rglob("tmp*"))
        raise ValueError("down the line")

    def run() -> None:
        with spill_folder(tmp_path) as folder, beam.Pipeline("FnApiRunner") as pipeline:
            once = pipeline | beam.Create([table]) | dedupe(folder)
            once.rows | beam.Map(fail)

    with pytest.raises(Exception, match="down the line"):
        run()
    assert list(tmp_path.iterdir()) == []
