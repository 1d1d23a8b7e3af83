"""Chains of steps: every row is kept, filtered or refused, whatever batch it is in and whatever fails beside it."""

import dataclasses
import datetime
import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import Pipeline, Source
from pipelines.transforms import query
from pipelines.transforms.chain import BOOKKEEPING, Chain, Outcome, PythonStage, SqlStage
from pipelines.transforms.conform import OFFSET, RAW, SOURCE
from pipelines.transforms.conservation import Conservation, merge, tally
from pipelines.transforms.deadletters import DEAD_LETTERS, PURPOSE, payloads
from pipelines.transforms.errors import DataRefused, UserError
from pipelines.transforms.protect import Cipher, Key, Pseudonym
from pipelines.transforms.steps import Apply, Check, Derive, Drop, Explode, Filter, Protect, Step

UTC = datetime.UTC
NOON = datetime.datetime(2026, 6, 1, 12, tzinfo=UTC)


class Item:
    n: int


class Row:
    id: int
    text: str | None
    at: datetime.datetime | None
    items: list[Item] | None


def chain(*steps: Step, event_time: str = "at") -> Chain:
    return Pipeline("p", source=Source(Row, event_time=event_time), steps=steps).plan().chain


def table(rows: list[dict[str, Any]], *, raw: bool = False) -> pa.Table:
    schema = Source(Row, event_time="at").schema.arrow
    made = pa.Table.from_pylist([{"id": 1, "at": NOON, **row} for row in rows], schema=schema)
    source = pa.array(["file"] * len(rows), pa.string()).dictionary_encode().cast(SOURCE.type)
    made = made.append_column(SOURCE, source).append_column(OFFSET, pa.array(range(0, 7 * len(rows), 7), OFFSET.type))
    return made.append_column(RAW, pa.array([b"<%d>" % n for n in range(len(rows))], RAW.type)) if raw else made


def counts(*outcomes: Outcome) -> dict[str, int]:
    return dict(Conservation.of(merge(outcome.tallies for outcome in outcomes)).rows)


# Random steps over random rows, against Python


class Refused(Exception):
    """A row is refused: a reason; or filtered: none."""


Change = Callable[[dict[str, Any]], None]


def refuse_if(reason: str | None, condition: Callable[[dict[str, Any]], bool | None]) -> Change:
    def change(row: dict[str, Any]) -> None:
        if condition(row):
            raise Refused(reason)

    return change


def number(row: dict[str, Any]) -> None:
    if row["text"] is not None and not row["text"].isdigit():
        raise Refused("number failed")
    row["number"] = None if row["text"] is None else int(row["text"])


def share(row: dict[str, Any]) -> None:
    if row["id"] == 0:
        raise Refused("share failed")
    row["share"] = 12 // row["id"]


def swap(row: dict[str, Any]) -> None:
    row["id"], row["text"] = row["id"] + 1, f"{row['id']}"


def both(first: Change, second: Change) -> Change:
    def change(row: dict[str, Any]) -> None:
        first(row)
        second(row)

    return change


def seven(rows: pa.Table) -> pa.Table:
    return rows.append_column("made", pa.array([7] * len(rows), pa.int64()))


LOW = both(refuse_if("low", lambda row: row["id"] >= 4), refuse_if("odd", lambda row: row["id"] == 2))
CHEAP = both(refuse_if("cheap failed", lambda row: row["id"] == 0), refuse_if("cheap", lambda row: row["id"] == 1))
OPERATIONS: list[tuple[Step, Change]] = [
    (Check(low="id < 4", odd="id <> 2"), LOW),
    (Filter("text <> '3'"), refuse_if(None, lambda row: row["text"] in (None, "3"))),
    (Derive(number="text::BIGINT"), number),
    (Derive(share="12 // id"), share),
    (Derive(id="id + 1", text="id::VARCHAR"), swap),
    (Check(cheap="12 // id < 12"), CHEAP),
    (Apply(seven, adds={"made": int}), lambda row: row.update(made=7)),
]
GIVEN = st.fixed_dictionaries({"id": st.integers(0, 5), "text": st.sampled_from(["1", "2", "3", "x", None])})


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.sampled_from(range(len(OPERATIONS))), max_size=5, unique=True),
    st.lists(GIVEN, min_size=1, max_size=15),
    st.data(),
)
def test_rows_fare_as_in_python_and_alone(chosen: list[int], rows: list[dict[str, Any]], data: st.DataObject) -> None:
    kept, refused, filtered = [], [], 0
    for place, given_row in enumerate(rows):
        row = dict(given_row)
        for step, (declared, change) in enumerate((OPERATIONS[operation] for operation in chosen), 1):
            try:
                change(row)
            except Refused as error:
                if error.args[0] is None:
                    filtered += 1
                else:
                    refused.append((place * 7, f"step {step} ({declared.label})", error.args[0]))
                break
        else:
            kept.append((place * 7, row))
    made = chain(*(OPERATIONS[operation][0] for operation in chosen))
    cut = data.draw(st.integers(0, len(rows)))
    whole = table(rows)
    for outcomes in ([made.run(whole, {})], [made.run(whole.slice(cut), {}), made.run(whole.slice(0, cut), {})]):
        found = sorted((row["_offset"], row) for outcome in outcomes for row in outcome.rows.to_pylist())
        assert [
            (offset, {name: row[name] for name in expected})
            for (offset, row), (_, expected) in zip(found, kept, strict=True)
        ] == kept
        dead = [(row["offset"], row["step"], row["reason"]) for outcome in outcomes for row in outcome.dead.to_pylist()]
        assert sorted(dead) == refused
        told = counts(*outcomes)
        assert (told["kept"], told["filtered"], told["rejected"]) == (len(kept), filtered, len(refused))


# Event time


@pytest.mark.parametrize("event_time", ["at", "coalesce(at, NULL)"])
def test_a_row_without_an_event_time_is_refused(event_time: str) -> None:
    outcome = chain(event_time=event_time).run(table([{}, {"at": None}]), {})
    assert outcome.rows["event_time"].to_pylist() == [NOON]
    assert outcome.dead.select(["step", "reason", "offset"]).to_pylist() == [
        {"step": "source", "reason": "null event time", "offset": 7}
    ]


def test_an_event_time_that_cannot_be_made_refuses_its_row_only() -> None:
    rows: list[dict[str, Any]] = [{"text": "2026-06-01 12:00:00Z"}, {"text": "noon"}, {"text": None}]
    outcome = chain(event_time="text::TIMESTAMPTZ").run(table(rows), {})
    assert outcome.rows["event_time"].to_pylist() == [NOON]
    assert outcome.dead["offset"].to_pylist() == [7, 14]


def test_an_event_time_that_is_a_column_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    made, batch = chain(), table([{}, {}])

    def fail(*_: Any) -> pa.Table:
        raise AssertionError("no query")

    monkeypatch.setattr(query, "run", fail)
    rows = made.run(batch, {}).rows
    assert rows["event_time"].chunk(0).buffers()[1].address == batch["at"].chunk(0).buffers()[1].address
    assert rows.column_names == ["id", "text", "at", "items", "event_time", *BOOKKEEPING]


def test_what_comes_out_is_the_schema_and_bookkeeping_with_or_without_failures() -> None:
    made = chain(Derive(a="text::BIGINT"), Drop("items"), Filter("id > 0"))
    good, bad = (made.run(table([{"text": text}, {"id": 2}]), {}).rows for text in ("1", "x"))
    assert good.schema.names == bad.schema.names == [*made.schema.names, *BOOKKEEPING]
    assert good.schema == bad.schema
    assert good.schema.field("_source").type == SOURCE.type
    assert pa.schema([good.schema.field(name) for name in made.schema.names]) == made.schema


def test_no_rows_go_through() -> None:
    outcome = chain(Check(a="id > 1"), Derive(b="text::BIGINT"), Explode("items")).run(table([]), {})
    assert (len(outcome.rows), len(outcome.dead), counts(outcome)["kept"]) == (0, 0, 0)


# Dead letters


def test_the_payload_is_the_rows_own_bytes_whichever_step_refuses() -> None:
    made = dataclasses.replace(
        chain(
            Check(a="id <> 2"),
            Apply(lambda rows: rows.append_column("m", rows["id"]), adds={"m": int}),
            Derive(id="id * 10"),
            Check(b="m <> 3"),
            Explode("items"),
            Check(c="n <> 4"),
        ),
        format="csv",
    )
    rows = [{"id": n, "items": [{"n": n}, {"n": 0}]} for n in range(6)]
    dead = made.run(table(rows, raw=True), {}).dead.to_pylist()
    assert [(row["reason"], row["format"], row["payload"]) for row in dead] == [
        ("a", "csv", b"<2>"),
        ("b", "csv", b"<3>"),
        ("c", "csv", b"<4>"),
    ]


def test_without_bytes_the_payload_is_the_row_as_json_before_the_steps() -> None:
    made = chain(Derive(id="id * 10", other="1"), Drop("items"), Check(low="id < 20"))
    dead = made.run(table([{"id": 2, "text": "é"}]), {}).dead
    said = json.loads(dead["payload"][0].as_py())
    assert (said["id"], said["text"], "other" in said, dead["format"][0].as_py()) == (2, "é", False, "json")


def test_payloads_are_encrypted_with_a_cipher_and_details_name_no_value() -> None:
    cipher = Cipher(Key(bytes(32)), PURPOSE)
    dead = (
        chain(Check(a="text <> '+33612345678'"), Derive(b="text::BIGINT"))
        .run(table([{"text": "+33612345678"}, {"text": "secret"}]), {}, cipher)
        .dead
    )
    assert dead.schema == DEAD_LETTERS
    assert b"secret" not in b"".join(dead["payload"].to_pylist())
    assert "secret" not in str(dead.drop_columns("payload").to_pylist())
    assert set(dead["key_id"].to_pylist()) == {cipher.key_id}
    assert [json.loads(text)["text"] for text in payloads(dead, cipher).to_pylist()] == ["+33612345678", "secret"]


# Parts


def test_tallies_of_each_part_add_up_by_their_reasons() -> None:
    made = chain(Check(a="id <> 1", b="id <> 2"), Filter("id <> 3"), Explode("items"), Filter("n > 0"))
    rows = [{"id": n, "items": [{"n": n}, {"n": 0}]} for n in range(6)]
    outcome = made.run(table(rows), {})
    told = Conservation.of(merge([outcome.tallies, tally("source", "read", 6)]))
    assert told.violations() == []
    assert (dict(told.reasons), told.rows["kept"], told.rows["filtered"]) == ({"a": 1, "b": 1}, 3, 1)
    assert told.dropped == {"exploded": {"filtered": 4}}
    assert len(outcome.rows) == 2


def test_a_views_own_steps_count_for_the_view_and_keep_no_source_rows() -> None:
    made = dataclasses.replace(chain(), shared=False)
    assert counts(made.run(table([{}]), {}))["kept"] == 0


def test_one_query_for_all_sql_steps_between_functions() -> None:
    apply = Apply(lambda rows: rows.append_column("m", rows["id"]), adds={"m": int})
    made = chain(Check(a="id > 1"), Derive(b="id"), Filter("b > 1"), Protect(text=Pseudonym()), apply, Derive(c="m"))
    assert [type(stage) for stage in made.stages] == [SqlStage, PythonStage, SqlStage]
    assert made.keyed
    assert not chain(Filter("id > 1")).keyed


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (lambda rows: rows.slice(1), "its function returned 1 rows for 2; give a pyarrow.Table of the same rows"),
        (lambda rows: rows["id"], "its function returned a ChunkedArray; give a pyarrow.Table"),
        (lambda rows: rows, "its function returned no column 'm', only ['id', 'text'"),
        (lambda rows: rows.append_column("m", pa.array(["x", "y"])), "its column m is not int64: "),
        (lambda rows: rows.drop_columns("id").append_column("m", pa.array([1, 2])), "returned no column 'id'"),
    ],
)
def test_a_function_that_returns_something_else_is_told_in_a_line(function: Any, told: str) -> None:
    with pytest.raises(UserError) as error:
        chain(Apply(function, adds={"m": int})).run(table([{}, {}]), {})
    assert str(error.value).startswith("step 1 (Apply): ")
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_a_function_that_raises_is_told_in_a_line_that_shows_no_personal_value() -> None:
    def function(rows: pa.Table) -> pa.Table:
        raise RuntimeError("mine,\n+4915550001")

    failing, place = (
        chain(Apply(function, adds={"m": int})),
        r"^step 1 \(Apply\): its function failed at test_chain.py:\d+: ",
    )
    with pytest.raises(UserError, match=place + r"RuntimeError: mine, \+4915550001$"):
        failing.run(table([{}]), {})
    cipher = Cipher(Key(bytes(32)), PURPOSE)
    with pytest.raises(UserError, match=place + "RuntimeError$"):
        failing.run(table([{}]), {}, cipher)
    other = chain(Apply(lambda rows: rows.append_column("m", pa.array(["+49 155"])), adds={"m": int}))
    with pytest.raises(UserError, match=r"its column m is not int64 but string$"):
        other.run(table([{}]), {}, cipher)


def test_what_no_try_catches_is_told_and_a_check_before_mends_it() -> None:
    made, rows = Derive(local="at at time zone text"), [{"text": "Europe/Paris"}, {"text": "Mars"}]
    with pytest.raises(
        DataRefused, match=r"^source, step 1 \(Derive\): Unknown TimeZone 'Mars'! Refuse such a row by a Check"
    ):
        chain(made).run(table(rows), {})
    outcome = chain(Check(zone="text like 'Europe/%'"), made).run(table(rows), {})
    assert outcome.rows["local"].to_pylist() == [datetime.datetime(2026, 6, 1, 14)]
    assert outcome.dead["reason"].to_pylist() == ["zone"]
