import random
from collections.abc import Iterator
from typing import Any

import apache_beam as beam
import pyarrow as pa
import pytest
from apache_beam.coders import Coder, FastPrimitivesCoder, PickleCoder
from apache_beam.pvalue import TaggedOutput
from apache_beam.testing.util import assert_that, equal_to
from apache_beam.utils.timestamp import Timestamp

from pipelines.transforms.conservation import merge
from pipelines.transforms.dedupe import Repeated
from pipelines.transforms.dedupe_stream import DedupeStream, Once
from pipelines.transforms.seen import Seen

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "x": pa.int64(),
        "_source": pa.dictionary(pa.int32(), pa.string()),
        "_offset": pa.int64(),
        "_watermark": pa.int64(),
        "_expires": pa.int64(),
    }
)
TILE = 1_000_000  # µs
LIFE = 3 * TILE
Row = dict[str, Any]


def stream(tiles: int, seed: int) -> list[Row]:
    """20 rows a tile, of one partition: new identities, and ones of the last five tiles, some with other content."""
    chance = random.Random(seed)
    rows: list[Row] = []
    for at in range(20 * tiles):
        tile = at // 20
        new = chance.random() < 0.7
        identity = str(at if new else chance.randrange(max(0, at - 100), at + 1))
        place = {"_source": "p0", "_offset": at, "_watermark": tile * TILE, "_expires": tile * TILE + LIFE + at % 20}
        rows.append({"id": identity, "x": chance.choice([1, 1, 1, 2]), **place})
    return rows


def oracle(rows: list[Row]) -> tuple[list[int], int, dict[int, int]]:
    """Offsets kept, number of duplicates, and for each conflict the offset of the row that it differs from."""
    known: dict[str, list[Row]] = {}
    kept, duplicates, conflicts = [], 0, {}
    for row in rows:
        records = known.setdefault(row["id"], [])
        first = next((one for one in records if one["_expires"] > row["_watermark"]), None)
        if first is None:
            records.append(row)
            kept.append(row["_offset"])
        elif first["x"] == row["x"]:
            duplicates += 1
        else:
            conflicts[row["_offset"]] = first["_offset"]
    return kept, duplicates, conflicts


class Bag:
    def __init__(self) -> None:
        self.held: list[pa.Table] = []
        self.written = 0

    def read(self) -> list[pa.Table]:
        return self.held

    def add(self, piece: pa.Table) -> None:
        self.held = [*self.held, piece]
        self.written += len(piece)

    def clear(self) -> None:
        self.held = []


class Timer:
    def __init__(self) -> None:
        self.at: Timestamp | None = None

    def set(self, at: Timestamp) -> None:
        self.at = at


def outputs(given: Iterator[Any]) -> Iterator[tuple[str, pa.Table]]:
    for one in given:
        yield (one.tag, one.value) if isinstance(one, TaggedOutput) else ("rows", one)


def test_state_expires_over_many_tiles_and_stays_bounded() -> None:
    rows = stream(tiles=40, seed=7)
    once = Once(Seen(("id",), ("id", "x")), Repeated("p", "json"))
    bags, timer = (Bag(), Bag(), Bag()), Timer()
    found: dict[str, list[pa.Table]] = {"rows": [], "dead": [], "tallies": []}
    fired, most = 0, 0

    def watermark(passed: int | None) -> None:
        nonlocal fired
        while timer.at is not None and (passed is None or timer.at.micros <= passed):
            at, timer.at = timer.at, None
            assert at.micros % 1000 == 0
            found["tallies"] += [table for _, table in outputs(once.drop(at, *bags, timer))]
            fired += 1

    for start in range(0, len(rows), 2):
        batch = rows[start : start + 2]
        watermark(batch[0]["_watermark"])
        for tag, table in outputs(once.process((3, pa.Table.from_pylist(batch, SCHEMA)), *bags, timer)):
            found[tag].append(table)
        most = max(most, sum(len(piece) for bag in bags for piece in bag.held))
        assert sum(len(bag.held) for bag in bags) <= 12
    kept, duplicates, conflicts = oracle(rows)
    assert [offset for table in found["rows"] for offset in table["_offset"].to_pylist()] == kept
    letters = [letter for table in found["dead"] for letter in table.to_pylist()]
    assert {letter["offset"]: int(letter["detail"].split("p0:")[1].split()[0]) for letter in letters} == conflicts
    counts = {one["counter"]: one["n"] for one in merge(found["tallies"]).to_pylist()}
    held = sum(len(piece) for bag in bags for piece in bag.held)
    assert counts == {"duplicate": duplicates, "rejected": len(conflicts), "held": held}
    assert duplicates > 50 and len(conflicts) > 30
    assert most <= 2 * 4 * 20 and fired >= 15
    assert sum(bag.written for bag in bags) <= 6 * len(kept)
    watermark(None)
    assert [bag.held for bag in bags] == [[], [], []]


@pytest.mark.slow
def test_a_pipeline_agrees_with_one_row_after_the_other() -> None:
    rows = stream(tiles=30, seed=3)
    kept, duplicates, conflicts = oracle(rows)
    tables = [pa.Table.from_pylist(rows[start : start + 25], SCHEMA) for start in range(0, len(rows), 25)]
    with beam.Pipeline("FnApiRunner") as pipeline:
        given = pipeline | beam.Create(tables, reshuffle=False)
        once = given | DedupeStream(("id",), ("id", "x"), pipeline="p", format="json", buckets=3)
        offsets = once.rows | "offsets" >> beam.FlatMap(lambda table: table["_offset"].to_pylist())
        assert_that(offsets, equal_to(kept), "rows")
        refused = once.dead | "refused" >> beam.FlatMap(lambda table: table["offset"].to_pylist())
        assert_that(refused, equal_to(list(conflicts)), "dead")
        counts = once.tallies | beam.FlatMap(lambda table: [(one["counter"], one["n"]) for one in table.to_pylist()])
        summed = counts | beam.CombinePerKey(sum)
        assert_that(summed, equal_to([("duplicate", duplicates), ("rejected", len(conflicts)), ("held", 0)]), "tallies")


def coders(coder: Coder) -> list[Coder]:
    return [coder, *(inner for part in coder._get_component_coders() for inner in coders(part))]


def test_every_collection_has_a_declared_coder() -> None:
    pipeline = beam.Pipeline()
    given = pipeline | beam.Create([SCHEMA.empty_table()]).with_output_types(pa.Table)
    given | DedupeStream(("id",), ("id", "x"), pipeline="p", format="json")
    proto, context = pipeline.to_runner_api(return_context=True)
    ours = [part for part in proto.components.transforms.values() if part.unique_name.startswith("DedupeStream")]
    found = {identity for part in ours for identity in part.outputs.values()}
    assert len(found) >= 4
    for identity in found:
        coder = context.coders.get_by_id(proto.components.pcollections[identity].coder_id)
        for one in coders(coder):
            assert not isinstance(one, FastPrimitivesCoder | PickleCoder), (identity, coder)
