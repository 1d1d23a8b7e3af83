import dataclasses
import functools
import itertools
import json
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import replay
from pipelines.definition import Pipeline, Source, View
from pipelines.io.log import Format
from pipelines.pace import Pace
from pipelines.replay import Counts, messages
from pipelines.transforms.avro_schemas import Schemas
from pipelines.transforms.decoder import Decoder
from pipelines.transforms.disorder import Disorder
from pipelines.transforms.encode import avro_schema
from pipelines.transforms.errors import UserError
from pipelines.transforms.intake import Intake
from pipelines.transforms.lateness import Lateness, Position
from pipelines.transforms.measures import Count
from pipelines.transforms.messages import Messages
from pipelines.transforms.order import ordered
from pipelines.transforms.schema import Column
from pipelines.transforms.windows import Session, Tumbling

START = datetime(2024, 1, 1, tzinfo=UTC)


class Reading:
    sensor: str
    seen: datetime | None
    celsius: Annotated[float | None, Column(path="body.celsius")]
    tags: list[str]


def pipeline(**settings: Any) -> Pipeline:
    source = {"event_time": "seen", "identity": ("sensor", "seen"), "disorder": "1m", "lateness": "2m", **settings}
    views = (
        View("by_minute", by="sensor", window=Tumbling("1m"), n=Count()),
        View("stays", by="sensor", window=Session("30s"), n=Count()),
    )
    return Pipeline("readings", source=Source(Reading, **source), views=views)


def rows(n: int = 3_000) -> pa.Table:
    """Rows a second apart, mixed up, of 7 sensors."""
    order = [(number * 1_009) % n for number in range(n)]
    return pa.table(
        {
            "sensor": [f"s{number % 7}" for number in order],
            "seen": pa.array([START + timedelta(seconds=number) for number in order], pa.timestamp("us", "UTC")),
            "body.celsius": [number / 8 for number in order],
            "tags": pa.array([["a"] * (number % 3) for number in order], pa.list_(pa.string())),
        }
    )


def sent(of: Pipeline, history: str | pa.Table, *args: Any, **settings: Any) -> dict[str, pa.Table]:
    """The messages of each partition."""
    found: dict[str, list[pa.Table]] = {}
    for piece in messages(of, history, *args, **settings):
        for partition, table in piece.items():
            found.setdefault(partition, []).append(table)
    return {partition: pa.concat_tables(tables) for partition, tables in sorted(found.items())}


def objects(given: pa.Table) -> list[dict[str, Any]]:
    return [json.loads(raw) for raw in given["_raw"].to_pylist()]


def test_the_history_comes_in_event_time_order() -> None:
    found = objects(sent(pipeline(), rows())["0"])
    assert [row["seen"] for row in found] == sorted(row["seen"] for row in found)
    assert found[0] == {"sensor": "s0", "seen": "2024-01-01T00:00:00.000000Z", "body": {"celsius": 0.0}, "tags": []}
    assert len({json.dumps(row) for row in found}) == 3_000


def test_an_identity_has_one_partition_and_partitions_are_even() -> None:
    found = sent(pipeline(identity="sensor"), rows(700), partitions=["a", "b", "c"])
    sensors = [{row["sensor"] for row in objects(table)} for table in found.values()]
    assert sum(map(len, sensors)) == 7 and len(set().union(*sensors)) == 7
    by_key = sent(pipeline(identity=None), rows(700), partitions=["a", "b", "c"])
    assert [len(table) for table in by_key.values()] == [len(table) for table in found.values()]
    in_turn = sent(dataclasses.replace(pipeline(identity=None), views=()), rows(700), partitions=["a", "b", "c"])
    assert [len(table) for table in in_turn.values()] == [234, 233, 233]


@pytest.mark.parametrize("format", ["json", "avro", "arrow"])
def test_what_is_told_is_what_a_live_run_finds(format: Format, tmp_path: Path) -> None:
    of, counts = pipeline(), Counts()
    Schemas(str(tmp_path)).add(avro_schema(of.source.schema))
    disorder = Disorder("40s", late=0.05, duplicate=0.1, corrupt=0.04, seed=4)
    found = sent(of, rows(), disorder, partitions=["0", "1", "2"], format=format, counts=counts)
    rules = tuple(Lateness(view.window, 120_000_000) for view in of.views)
    reader = Messages(Decoder(of.source.schema, of.name), format, str(tmp_path))
    intake, seen = Intake(reader, "seen", 60_000_000, 10**15, rules), set[datetime]()
    for partition, table in found.items():
        taken = intake.take(published(partition, table), Position(0))
        tallied = {(row["counter"], row["reason"]): row["n"] for row in taken.tallies.to_pylist()}
        told = counts.partitions[partition]
        assert (told.rows, told.late, told.corrupt) == (tallied["read", ""], tallied["late", ""], len(taken.dead))
        assert told.late > 20 and told.corrupt > 20 and told.duplicates > 60
        seen.update(taken.rows["seen"].to_pylist())
    assert counts.sent.rows == counts.total == 3_000 + counts.sent.duplicates + counts.sent.corrupt
    assert 3_000 - counts.sent.late <= len(seen) < 3_000
    assert (counts.first, counts.last, counts.reached) == (micros(0), micros(2999), micros(2999))


def test_a_seed_gives_the_same_messages_however_the_history_is_cut(tmp_path: Path) -> None:
    disorder = Disorder("40s", late=0.05, duplicate=0.1, corrupt=0.04, seed=4)
    for name, size in (("one", 3_000), ("many", 170)):
        nested = rows().rename_columns(["sensor", "seen", "celsius", "tags"])
        body = pa.StructArray.from_arrays([nested["celsius"].combine_chunks()], ["celsius"])
        pq.write_table(nested.set_column(2, "body", body), tmp_path / f"{name}.parquet", row_group_size=size)
    one, many = (sent(pipeline(), str(tmp_path / f"{name}.parquet"), disorder) for name in ("one", "many"))
    assert one == many == sent(pipeline(), rows(), disorder)
    assert one != sent(pipeline(), rows(), dataclasses.replace(disorder, seed=5))
    for pace in (
        Pace(rate=9_000, wait=lambda _: False, clock=ever),
        Pace(speedup=2_000, wait=lambda _: False, clock=ever),
    ):
        paced = sent(pipeline(), rows(), disorder, pace=pace)
        assert paced["0"]["_raw"].to_pylist() == one["0"]["_raw"].to_pylist()


def test_a_history_larger_than_memory_gives_the_same_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    disorder = Disorder("40s", late=0.05, duplicate=0.1, corrupt=0.04, seed=4)
    expected = sent(pipeline(), rows(), disorder, partitions=["0", "1"])
    monkeypatch.setattr(replay, "ordered", functools.partial(ordered, run=1 << 15, block=1 << 12))
    found = sent(pipeline(), rows(), disorder, partitions=["0", "1"])
    assert {name: table["_raw"].to_pylist() for name, table in found.items()} == {
        name: table["_raw"].to_pylist() for name, table in expected.items()
    }


LINES = b"""{"tags": [], "sensor": "first"
{"sensor": "b", "seen": "2024-01-01T00:00:09Z", "tags": [], "body": {}}
{"sensor": "c", "seen": "2024-01-01T00:00:05Z", "tags": [], "more": {"x": [1]}}
not JSON, after c
{"sensor": "d", "seen": null, "tags": []}
{"sensor": "e", "seen": "2024-01-01T00:00:07Z", "tags": ["x"]}
"""


def test_what_cannot_be_decoded_comes_after_the_row_before_it_with_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(LINES)
    counts = Counts()
    found = sent(pipeline(extra="keep"), str(tmp_path / "rows.jsonl"), counts=counts)["0"]["_raw"].to_pylist()
    assert [found[0], found[2]] == [b'{"tags": [], "sensor": "first"', b"not JSON, after c"]
    assert [json.loads(found[at])["sensor"] for at in (1, 3, 4, 5)] == ["c", "d", "e", "b"]
    assert json.loads(found[1])["more"] == {"x": [1]} and "more" not in json.loads(found[4])
    assert (counts.sent.rows, counts.sent.undecodable, counts.total) == (6, 2, 6)
    arrow = sent(pipeline(), str(tmp_path / "rows.jsonl"), format="arrow")["0"]
    assert sorted(arrow["_rows"].to_pylist()) == [1, 1, 4] and b"not JSON, after c" in arrow["_raw"].to_pylist()


def test_columns_that_no_run_reads_are_not_asked_for() -> None:
    of = dataclasses.replace(pipeline(identity=None), events=False)
    found = objects(sent(of, rows(2).drop_columns(["tags"]))["0"])
    assert found[0] == {"sensor": "s0", "seen": "2024-01-01T00:00:00.000000Z"}


def test_a_range_of_event_times_is_sent() -> None:
    start, stop = START + timedelta(seconds=10), START + timedelta(seconds=13)
    found = objects(sent(pipeline(), rows(), start=start, stop=stop)["0"])
    assert [row["seen"][17:19] for row in found] == ["10", "11", "12"]
    assert sent(pipeline(), rows(), start=START + timedelta(days=1)) == {}


def test_it_stops_when_it_is_told_to() -> None:
    stopping, counts = threading.Event(), Counts()
    pace = Pace(rate=1_000, clock=itertools.count().__next__, wait=lambda _: stopping.is_set())
    found = messages(pipeline(), rows(), Disorder(late=0.5), pace=pace, counts=counts)
    given = len(next(found)["0"])
    stopping.set()
    assert list(found) == [] and 0 < given == counts.sent.rows < 101
    assert list(messages(pipeline(), rows(), pace=pace, counts=counts)) == [] and not counts.sent.rows


def test_a_history_without_times_or_rows() -> None:
    lacking = rows(5).set_column(1, "seen", pa.nulls(5, pa.timestamp("us", "UTC")))
    assert len(sent(pipeline(), lacking, Disorder("10s", 0.5, 1, seed=1), pace=Pace(speedup=1))["0"]) == 10
    assert sent(pipeline(), rows(5).slice(0, 0)) == {}


def test_errors_are_for_people() -> None:
    with pytest.raises(UserError, match=r"nowhere\.csv: no such file"):
        sent(pipeline(), "nowhere.csv")


ever = itertools.count().__next__
"""A clock by which everything is due."""


def micros(second: int) -> int:
    return int((START.timestamp() + second) * 1_000_000)


def published(partition: str, table: pa.Table) -> pa.Table:
    """As the log gives them."""
    ends = list(itertools.accumulate(table["_rows"].to_pylist()))
    columns = {
        "_source": pa.array([partition] * len(table)).dictionary_encode(),
        "_offset": pa.array([0, *ends[:-1]], pa.int64()),
        "_published": pa.array([datetime.now(UTC)] * len(table), pa.timestamp("us", "UTC")),
    }
    for name, values in columns.items():
        table = table.append_column(name, values)
    return table
