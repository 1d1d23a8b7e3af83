"""What a log's rows become, however they are read: against a loop over messages in plain Python."""

import dataclasses
import datetime
import itertools
import json
from typing import Any

import hypothesis.strategies as st
import pyarrow as pa
import pytest
from hypothesis import example, given, settings

from pipelines.io.log import MESSAGES
from pipelines.transforms.conservation import Conservation, merge
from pipelines.transforms.decoder import Decoder
from pipelines.transforms.encode import encode
from pipelines.transforms.intake import Intake
from pipelines.transforms.lateness import NEVER, Lateness, Position
from pipelines.transforms.messages import Messages
from pipelines.transforms.schema import RowSchema
from pipelines.transforms.windows import Session, Sliding, Tumbling

START = 1_711_800_000_000_000
PUBLISHED = START + 3_600_000_000
MINUTE = 60_000_000
DISORDER, AHEAD, LATENESS = 30_000_500, 10 * MINUTE, 2 * MINUTE
"""Disorder is no whole ms: watermarks are."""

RULES = (
    Lateness(Tumbling("5m"), LATENESS),
    Lateness(Sliding("3m", every="1m"), LATENESS),
    Lateness(Session("90s"), LATENESS),
)


class Event:
    at: datetime.datetime | None
    n: int


def intake(form: Any = "json") -> Intake:
    return Intake(Messages(Decoder(RowSchema.of(Event), "p"), form), "at", DISORDER, AHEAD, RULES)


Sent = int | str | None
"""The event time of a row, µs; None where it has none; "bad" for a message that is none."""


def payload(sent: Sent, number: int) -> bytes:
    if sent == "bad":
        return b'{"n": '
    at = (
        None
        if sent is None
        else (datetime.datetime(1970, 1, 1) + datetime.timedelta(microseconds=int(sent))).isoformat()
    )
    return json.dumps({"at": at and f"{at}Z", "n": number}).encode()


def messages(sent: list[Sent], first: int = 0) -> pa.Table:
    rows = [payload(one, first + number) for number, one in enumerate(sent)]
    return table(rows, range(first, first + len(sent)), [1] * len(sent))


def table(payloads: list[bytes], offsets: Any, rows: list[int]) -> pa.Table:
    source = pa.array(["0"] * len(payloads), pa.string()).dictionary_encode().cast(MESSAGES.field("_source").type)
    columns = [source, list(offsets), payloads, [PUBLISHED] * len(payloads), rows]
    arrays = [c if isinstance(c, pa.Array) else pa.array(c, f.type) for c, f in zip(columns, MESSAGES, strict=True)]
    return pa.table(arrays, schema=MESSAGES)


def judged(sent: list[Sent]) -> tuple[list[tuple[int, int, int]], dict[str, int], int | None]:
    """(offset, watermark, expires) of the rows that go on; counts; the greatest event time."""
    kept, counts, greatest = [], dict.fromkeys(("read", "late", "bad", "future"), 0), None
    for offset, time in enumerate(sent):
        counts["read"] += 1
        watermark = NEVER if greatest is None else (greatest - DISORDER) // 1000 * 1000
        if time == "bad":
            counts["bad"] += 1
        elif time is None:
            kept.append((offset, watermark, NEVER))
        elif int(time) > PUBLISHED + AHEAD:
            counts["future"] += 1
        else:
            at = int(time)
            ends = [at // (5 * MINUTE) * 5 * MINUTE + 5 * MINUTE, at // MINUTE * MINUTE + 3 * MINUTE]
            expires = max(*ends, at // 1000 * 1000 + 90_000_000) + LATENESS
            if expires <= watermark:
                counts["late"] += 1
            else:
                kept.append((offset, watermark, expires))
            greatest = at if greatest is None else max(greatest, at)
    return kept, counts, greatest


def took(taken: list[Any]) -> tuple[list[tuple[int, int, int]], dict[str, int]]:
    rows = [pa.concat_tables([one.rows for one in taken if len(one.rows)])] if any(len(o.rows) for o in taken) else []
    kept = [
        (row["_offset"], row["_watermark"], row["_expires"])
        for table in rows
        for row in table.select(["_offset", "_watermark", "_expires"]).to_pylist()
    ]
    counts = Conservation.of(merge(one.tallies for one in taken))
    reasons = counts.reasons
    future = reasons.get("event time in the future", 0)
    assert sum(len(one.dead) for one in taken) == counts.rows["rejected"]
    told = {"read": counts.rows["read"], "late": counts.rows["late"], "future": future}
    return kept, {**told, "bad": counts.rows["rejected"] - future}


SENT = st.lists(
    st.one_of(
        st.integers(START - 20 * MINUTE, START + 20 * MINUTE),
        st.sampled_from([None, "bad", PUBLISHED + AHEAD, PUBLISHED + AHEAD + 1, START + 999, START + 500]),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=15)
@given(SENT, st.sets(st.integers(1, 11)))
@example([None, "bad", START + 10**8, START - 10**9, PUBLISHED + AHEAD + 1, START], {2, 4})
@example([START], set())
def test_any_poll_sizes_give_the_same_rows_and_watermarks(sent: list[Sent], cuts: set[int]) -> None:
    expected, counts, greatest = judged(sent)
    bounds = sorted({0, len(sent), *(cut for cut in cuts if cut < len(sent))})
    taken, position = [], Position(0)
    for low, high in itertools.pairwise(bounds):
        taken.append(intake().take(messages(sent[low:high], low), position))
        position = taken[-1].position
    found, told = took(taken)
    assert [row for row in found if row[2] != NEVER] == [row for row in expected if row[2] != NEVER]
    assert {row[0] for row in found} == {row[0] for row in expected}
    assert told == counts
    assert position == Position(len(sent), greatest)


def test_messages_of_many_rows_have_a_watermark_before_each_row() -> None:
    times = [START, START + 5 * MINUTE, START - 30 * MINUTE, START + MINUTE, START + 20 * MINUTE, START]
    schema = RowSchema.of(Event)
    at = pa.array(times, pa.timestamp("us", "UTC"))
    rows = pa.table({"at": at, "n": list(range(6))}, schema=schema.arrow)
    encoded = [encode(rows.slice(low, high - low), schema, "arrow") for low, high in ((0, 2), (2, 3), (3, 6))]
    payloads = [raw for part in encoded for raw in part["_raw"].to_pylist()]
    sizes = [n for part in encoded for n in part["_rows"].to_pylist()]
    starts = [0, *itertools.accumulate(sizes)][:-1]
    given = table(payloads, starts, sizes)
    expected, counts, greatest = judged(list(times))
    for cut in range(len(payloads) + 1):
        first = intake("arrow").take(given.slice(0, cut), Position(0))
        second = intake("arrow").take(given.slice(cut), first.position)
        assert took([first, second]) == (expected, counts)
        assert second.position == Position(6, greatest)


def test_gaps_between_offsets_and_an_idle_watermark_are_kept() -> None:
    position = Position(7, START, idle=START + 20 * MINUTE)
    given = messages([START + 15 * MINUTE, START, START + 12 * MINUTE], 20)
    taken = intake().take(given, position)
    assert [row["_offset"] for row in taken.rows.to_pylist()] == [20]  # in time: its window ends at 20 m, plus 2 m
    assert set(taken.rows["_watermark"].to_pylist()) == {START + 20 * MINUTE}
    assert taken.position == dataclasses.replace(position, offset=23, greatest=START + 15 * MINUTE)
    assert intake().take(given.slice(0, 0), position).position == position


@pytest.mark.parametrize("text", ["0001-01-01T00:00:00Z", "9999-12-31T00:00:00Z", "0050-06-01T00:00:00Z"])
def test_times_at_the_ends_of_the_calendar_end_nothing(text: str) -> None:
    rows = [json.dumps({"at": at, "n": 1}).encode() for at in ("2024-03-30T12:00:00Z", text, "2024-03-30T12:00:01Z")]
    taken = intake().take(table(rows, range(3), [1] * 3), Position(0))
    assert {0, 2} <= set(taken.rows["_offset"].to_pylist())
    assert taken.position.greatest == START + 1_000_000
