"""What is read of a lake is what the log holds: in every format, in any range, and of what is new."""

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import Count, Pipeline, Source, View
from pipelines.archive import dating, lake
from pipelines.io.lake import Lake
from pipelines.io.lake_rows import Archived, Wanted, arrived, plan
from pipelines.io.log import Format, Options
from pipelines.io.sqlite_log import SqliteLog
from pipelines.transforms.avro_schemas import Schemas
from pipelines.transforms.decoder import Decoded, Decoder
from pipelines.transforms.encode import avro_schema, encode
from pipelines.transforms.errors import UserError
from pipelines.transforms.messages import Messages
from pipelines.transforms.ranges import EVERYTHING, Range, Ranges

START = datetime.datetime(2024, 5, 1, tzinfo=datetime.UTC)
MICROS = int(START.timestamp()) * 1_000_000
MINUTE, HOUR, DAY = 60_000_000, 3_600_000_000, 86_400_000_000


class Reading:
    """A row of the log."""

    sensor: int
    at: datetime.datetime
    celsius: float | None


READINGS = Pipeline("readings", source=Source(Reading, event_time="at"), views=(View("all", n=Count()),))
NAMED = Pipeline("readings", source=Source(Reading, event_time="at", identity="sensor"), views=READINGS.views)
SCHEMA = READINGS.source.schema


def rows(*minutes: int) -> pa.Table:
    at = pa.array([MICROS + minute * MINUTE for minute in minutes], pa.timestamp("us", "UTC"))
    values = [None if minute % 7 == 0 else minute / 3 for minute in minutes]
    return pa.table([pa.array(minutes), at, pa.array(values)], schema=SCHEMA.arrow)


def bad(count: int = 1) -> pa.Table:
    return pa.table(
        {"_raw": pa.array([b"\0poison"] * count, pa.large_binary()), "_rows": pa.array([1] * count, pa.int32())}
    )


def filled(folder: Path, form: Format, *appends: tuple[str, pa.Table], pipeline: Pipeline = READINGS) -> Lake:
    schemas = Schemas(str(folder / "schemas"))
    schemas.add(avro_schema(SCHEMA))
    place = lake(pipeline, str(folder / "lake"))
    options = Options(format=form, schemas=schemas.folder if form == "avro" else None)
    with SqliteLog(folder / "log.db", options, clock=lambda: START + datetime.timedelta(days=400)) as log:
        for partition, table in appends:
            names = ["_raw", "_rows"] if form == "arrow" else ["_raw"]
            given = table if "_raw" in table.column_names else encode(table, SCHEMA, form)
            log.append({partition: given.select(names)})
            place.archive(log, dating(pipeline, log, HOUR))
    return place


def read(place: Lake, wanted: Wanted = Wanted()) -> Decoded:  # noqa: B008 (frozen)
    history = plan(place, place.extent(), wanted)
    decoder = Archived(Decoder(SCHEMA, "readings"), "at", HOUR, place.schemas)
    parts = [decoder.decode(table) for split in history.splits for table in history.read(split)]
    dead = [part.dead for part in parts if part.dead is not None]
    found = [part.rows.select([*SCHEMA.names, "_offset"]) for part in parts if len(part.rows)]
    every = pa.concat_tables(found) if found else rows().append_column("_offset", pa.array([], pa.int64()))
    return Decoded(every, pa.concat_tables(dead) if dead else None)


@pytest.mark.parametrize("form", ["json", "avro", "arrow"])
def test_rows_of_every_format_come_back_as_they_were_sent(form: Format, tmp_path: Path) -> None:
    sent, later = rows(1, 2, 3, 5000, 7), rows(401 * 24 * 60)
    place = filled(tmp_path, form, ("0", sent), ("1", bad()), ("0", later), ("1", rows(9)))
    (tmp_path / "schemas").rename(tmp_path / "gone")
    found = read(place)
    assert found.rows.sort_by("at").select(SCHEMA.names) == pa.concat_tables([sent, rows(9)]).sort_by("at")
    assert found.dead is not None
    poison, future = found.dead.sort_by("offset").to_pylist()
    assert (poison["source"], poison["offset"], poison["payload"], poison["format"]) == ("1", 0, b"\0poison", form)
    assert (future["source"], future["offset"], future["reason"]) == ("0", 5, "event time in the future")


def test_a_refused_row_of_an_arrow_message_is_refused_for_the_same_reason_from_the_lake(tmp_path: Path) -> None:
    given = rows(1, 2, 3).set_column(2, "celsius", pa.array(["1", "warm", None]))
    stream = pa.BufferOutputStream()
    with pa.ipc.new_stream(stream, given.schema) as writer:
        writer.write_table(given)
    raw = pa.array([stream.getvalue().to_pybytes()], pa.large_binary())
    message = pa.table({"_raw": raw, "_rows": pa.array([3], pa.int32())})
    found = read(filled(tmp_path, "arrow", ("0", message)))
    with SqliteLog(tmp_path / "log.db", Options(format="arrow")) as log:
        live = Messages(Decoder(SCHEMA, "readings"), "arrow").decode(log.read("0", 0, 3))
    assert found.rows["sensor"].to_pylist() == live.rows["sensor"].to_pylist() == [1, 3]
    assert found.dead is not None and live.dead is not None
    names = ["reason", "source", "offset"]
    assert found.dead.select(names).to_pylist() == live.dead.select(names).to_pylist()


def inside(ranges: Ranges, minute: int) -> bool:
    return any(
        (part.start is None or MICROS + minute * MINUTE >= part.start)
        and (part.stop is None or MICROS + minute * MINUTE < part.stop)
        for part in ranges
    )


@pytest.fixture(scope="module")
def week(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """Some rows of a week in two partitions, and two without a time in each."""
    folder = tmp_path_factory.mktemp("week")
    return filled(
        folder,
        "json",
        ("0", rows(*range(0, 5000, 90))),
        ("1", bad(2)),
        ("1", rows(*range(5000, 9000, 90))),
        ("0", bad(2)),
    )


BOUND = st.none() | st.integers(0, 9000).map(lambda minute: MICROS + minute * MINUTE)


@given(bounds=st.lists(st.tuples(BOUND, BOUND), max_size=3), offsets=st.none() | st.tuples(*[st.integers(0, 99)] * 2))
@settings(max_examples=8, deadline=None)
def test_a_range_is_read_and_of_rows_without_a_time_what_is_new(
    week: Lake, bounds: list[tuple[int | None, int | None]], offsets: tuple[int, int] | None
) -> None:
    ranges = tuple(Range(*ends) for ends in bounds)
    named = None if offsets is None else (("0", offsets[0]), ("1", offsets[1]))
    found = read(week, Wanted(ranges, named))
    every = [*range(0, 5000, 90), *range(5000, 9000, 90)]
    assert sorted(found.rows["sensor"].to_pylist()) == [minute for minute in every if inside(ranges, minute)]
    first = len(range(0, 5000, 90))
    undated = [("1", 0), ("1", 1), ("0", first), ("0", first + 1)]
    expected = {place for place in undated if offsets is None or place[1] >= offsets[int(place[0])]}
    dead = [] if found.dead is None else found.dead.select(["source", "offset"]).to_pylist()
    assert {(row["source"], row["offset"]) for row in dead} == expected


def test_only_the_files_of_a_range_are_read(week: Lake) -> None:
    extent = week.extent()
    whole, day = plan(week, extent), plan(week, extent, Wanted((Range(MICROS + DAY, MICROS + 2 * DAY),), (("0", 999),)))
    assert len(day.splits[0].names) < len(whole.splits[0].names)
    assert day.rows < whole.rows == 2 + 2 + len(range(0, 5000, 90)) + len(range(5000, 9000, 90))
    assert Wanted((EVERYTHING,)).all


def seconds(minutes: Sequence[int]) -> list[int]:
    return sorted(MICROS + minute * MINUTE for minute in minutes)


def test_what_arrived_since_some_offsets(week: Lake) -> None:
    extent = week.extent()
    ends: dict[str, Any] = dict(extent.offsets)
    assert arrived(week, ends, extent).rows == 0
    since = arrived(week, ends | {"1": 10}, extent)
    assert (since.rows, since.times.tolist()) == (ends["1"] - 10, seconds(range(5000, 9000, 90)[8:]))
    assert arrived(week, {"0": ends["0"]}, extent).rows == ends["1"]


def test_rows_that_share_an_identity_with_a_new_one_are_touched(tmp_path: Path) -> None:
    other = rows(700).set_column(0, SCHEMA.arrow.field("sensor"), pa.array([2]))
    place = filled(tmp_path, "json", ("0", rows(1, 2, 3)), ("1", other), ("0", rows(4)), pipeline=NAMED)
    extent = place.extent()
    assert arrived(place, {"0": 3, "1": 0}, extent).times.tolist() == seconds([2, 4, 700])
    assert arrived(place, {"0": 3, "1": 1}, extent).times.tolist() == seconds([4])


def test_a_lake_without_a_commit_is_told(tmp_path: Path) -> None:
    place = lake(READINGS, str(tmp_path))
    with pytest.raises(UserError, match="there is none yet; archive the log first"):
        plan(place, place.extent())
    assert np.array_equal(Wanted((), None).rows(place.table.schema.empty_table()), np.zeros(0, np.bool_))
