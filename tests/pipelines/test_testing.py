"""The harness that users test their definitions with."""

import dataclasses
import datetime
import os
import subprocess
import sys
from decimal import Decimal
from typing import Annotated, Any, NamedTuple, TypedDict

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from pipelines import (
    Apply,
    Check,
    Column,
    Count,
    Dimension,
    Explode,
    Filter,
    Last,
    Lookup,
    Mean,
    Pipeline,
    Protect,
    Pseudonym,
    Source,
    Sum,
    View,
)
from pipelines.testing import Result, example, run
from pipelines.transforms.errors import DataRefused, UserError

NOON = datetime.datetime(2026, 6, 1, 12, tzinfo=datetime.UTC)


class Part:
    name: str
    weight: Annotated[Decimal | None, Column(scale=2)]


class Event:
    id: int
    at: datetime.datetime
    text: str | None
    share: float | None
    exact: Annotated[Decimal | None, Column(scale=3)]
    raw: bytes | None
    day: datetime.date | None
    good: bool | None
    numbers: list[int] | None
    part: Part | None
    parts: list[Part] | None


def events(*steps: Any, **views: Any) -> Pipeline:
    source = Source(Event, event_time="at")
    return Pipeline("events_of_a_test", source=source, steps=steps, views=tuple(View(n, **v) for n, v in views.items()))


def event(**values: Any) -> Event:
    return example(Event, **{"at": NOON, **values})


# example


def test_an_example_has_plain_values_and_none_where_it_may() -> None:
    assert vars(example(Event, id=7)) == {
        "id": 7,
        "at": datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC),
        **dict.fromkeys(("text", "share", "exact", "raw", "day", "good", "numbers", "part", "parts")),
    }


def test_an_example_of_a_dataclass_a_named_tuple_and_a_typed_dict() -> None:
    @dataclasses.dataclass(frozen=True)
    class A:
        x: int
        y: list[int]

    class B(NamedTuple):
        x: str
        y: float

    class C(TypedDict):
        x: bool

    assert example(A, x=2) == A(2, [])
    assert example(B) == B("x", 1.0)
    assert example(C) == {"x": False}


def test_a_nested_row_is_an_example_too() -> None:
    class Whole:
        part: Part

    made = example(Whole)
    assert (made.part.name, made.part.weight) == ("x", None)


def test_an_example_has_no_other_fields() -> None:
    with pytest.raises(UserError, match=r"^Event has no field 'txt'\. Nearest: text\. It has: id, at"):
        example(Event, txt="x")


# run


def test_every_type_comes_through() -> None:
    values: dict[str, Any] = {
        "id": -(2**63),
        "at": NOON,
        "text": "é",
        "share": 1,
        "exact": Decimal("1.234"),
        "raw": b"\x00",
        "day": datetime.date(1969, 12, 31),
        "good": True,
        "numbers": [1, 2],
        "part": {"name": "a", "weight": Decimal("0.10")},
        "parts": [{"name": "b", "weight": None}],
    }
    found = run(events(), [values]).rows.drop_columns(["event_time"])
    assert found.to_pylist() == [values]
    assert found.schema.field("exact").type == pa.decimal128(38, 3)


def test_rows_are_objects_mappings_or_a_table() -> None:
    table = pa.table({"id": [1], "at": [NOON], "unknown": ["ignored"]})
    one = events(n={"n": Count(), "text": Last("text")})
    answers = [run(one, rows) for rows in ([event(id=1)], [{"id": 1, "at": NOON}], table)]
    assert all(answer.views["n"].equals(answers[0].views["n"]) for answer in answers)
    assert all(answer.rows.equals(answers[0].rows) for answer in answers)


def test_no_rows_give_empty_answers_of_the_same_columns() -> None:
    one = events(Check(low="id < 5"), n={"by": "text", "n": Count()})
    full, empty = run(one, [event(), event(id=9)]), run(one, [])
    for left, right in [(full.rows, empty.rows), (full.rejected, empty.rejected), (full.views["n"], empty.views["n"])]:
        assert len(left) == 1
        assert right.equals(left.slice(0, 0))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"id": "1"}, "row 0, id: '1' is str, not int"),
        ({"id": True}, "row 0, id: True is bool, not int"),
        ({"id": 2**63}, "row 0, id: 9223372036854775808: "),
        ({"share": "x"}, "row 0, share: 'x' is str, not float"),
        ({"share": False}, "row 0, share: False is bool, not float"),
        ({"exact": 1.5}, "row 0, exact: 1.5 is float, not Decimal"),
        ({"exact": Decimal("1.2345")}, "row 0, exact: Decimal('1.2345'): "),
        ({"day": NOON}, "row 0, day: datetime.datetime(2026, 6, 1, 12, 0, tzinfo=datetime.timezone.utc) is datetime"),
        ({"at": NOON.replace(tzinfo=None)}, "row 0, at: datetime.datetime(2026, 6, 1, 12, 0) has no time zone"),
        ({"numbers": [1, "x"]}, "row 0, numbers[1]: 'x' is str, not int"),
        ({"numbers": 1}, "row 0, numbers: 1 is int, not list"),
        ({"part": {"name": 3}}, "row 0, part.name: 3 is int, not str"),
        ({"parts": [{"name": "a"}, object()]}, "row 0, parts[1]: no field 'name' in <object"),
    ],
)
def test_a_value_of_another_type_is_told_in_a_line(values: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as error:
        run(events(), [event(**values)])
    assert str(error.value).startswith(told)
    assert "\n" not in str(error.value)


def test_a_mapping_has_no_other_fields() -> None:
    with pytest.raises(UserError, match=r"^row 1: Event has no field 'idd'\. Nearest: id\.$"):
        run(events(), [event(), {"idd": 1}])


def test_a_naive_time_is_taken_in_the_zone_of_its_column() -> None:
    class Local:
        at: Annotated[datetime.datetime, Column(timezone="Europe/Paris")]

    local = Pipeline("local", source=Source(Local, event_time="at"))
    found = run(local, [{"at": datetime.datetime(2026, 6, 1, 14)}, {"at": NOON}]).rows["at"].to_pylist()
    assert found == [NOON, NOON]


def test_null_where_none_may_be_is_a_dead_letter() -> None:
    result = run(events(), [event(), event(id=None), event(at=None)])
    assert result.rejected.select(["offset", "step", "reason"]).to_pylist() == [
        {"offset": 1, "step": "decode", "reason": "null in id"},
        {"offset": 2, "step": "decode", "reason": "null in at"},
    ]
    assert (result.counts["read"], result.counts["kept"], result.counts["rejected"]) == (3, 1, 2)


def test_every_row_is_counted_once() -> None:
    one = dataclasses.replace(
        events(Check(low="id < 5"), Filter("id > 1")), source=Source(Event, event_time="at", identity="id")
    )
    result = run(one, [event(id=id) for id in (1, 2, 3, 3, 9)])
    assert result.counts == {"read": 5, "kept": 2, "filtered": 1, "rejected": 1, "late": 0, "duplicate": 1}


# What harms: answers that depend on the batch


def apply(function: Any, **views: Any) -> Pipeline:
    return events(Apply(function, adds={"made": int | None}), **views)


def test_a_row_local_apply_passes() -> None:
    doubled = apply(lambda rows: rows.append_column("made", pc.multiply(rows["id"], 2)), v={"total": Sum("made")})
    assert run(doubled, [event(id=id) for id in range(5)]).views["v"]["total"].to_pylist() == [20]


@pytest.mark.parametrize(
    "looks_beyond",
    [
        lambda rows: [len(rows)] * len(rows),
        lambda rows: range(len(rows)),
        lambda rows: [None, *rows["id"].to_pylist()[:-1]],
        lambda rows: [pc.max(rows["id"]).as_py()] * len(rows),
    ],
    ids=["the size of the batch", "the row's number", "the row before", "the greatest of all"],
)
def test_an_apply_that_looks_beyond_its_row_is_found_out(looks_beyond: Any) -> None:
    bad = apply(lambda rows: rows.append_column("made", pa.array(looks_beyond(rows), pa.int64())))
    with pytest.raises(AssertionError, match="events_of_a_test, rows shuffled and cut: the rows has made="):
        run(bad, [event(id=id) for id in range(3)])


def test_a_view_that_hangs_on_the_cut_is_named() -> None:
    bad = apply(
        lambda rows: rows.append_column("made", pa.array([len(rows)] * len(rows), pa.int64())), v={"mean": Mean("made")}
    )
    with pytest.raises(AssertionError, match="view 'v' has mean="):
        run(bad, [event(id=id) for id in range(4)])


def test_an_apply_that_drops_rows_is_refused() -> None:
    with pytest.raises(UserError, match=r"step 1 \(Apply\): its function returned 1 rows for 2; give a pyarrow.Table"):
        run(apply(lambda rows: rows.slice(1).append_column("made", rows["id"].slice(1))), [event(), event()])


def test_floats_may_differ_in_their_last_digits() -> None:
    noise = iter(range(100))
    wobbly = events(
        Apply(
            lambda rows: rows.append_column("made", pa.array([0.1 + next(noise) * 1e-13] * len(rows))),
            adds={"made": float},
        )
    )
    assert len(run(wobbly, [event(id=1), event(id=2)]).rows) == 2


# Dimensions, keys, stops


class Place:
    id: int
    name: str


places = Dimension("places", Place, key="id")


def test_a_dimension_that_is_not_given_is_empty_and_an_unknown_one_refused() -> None:
    one = events(Lookup(places, on="id", take={"place": "name"}))
    assert run(one, [event()]).rows["place"].to_pylist() == [None]
    assert run(one, [event()], dimensions={"places": [{"id": 1, "name": "a"}]}).rows["place"].to_pylist() == ["a"]
    with pytest.raises(UserError, match=r"looks up no dimension 'place'\. Nearest: places\."):
        run(one, [event()], dimensions={"place": []})


def test_a_dimension_has_each_key_once_and_no_null_in_it() -> None:
    one = events(Lookup(places, on="id", take={"place": "name"}))
    with pytest.raises(UserError, match="dimension places: 2 rows for id=1"):
        run(one, [event()], dimensions={"places": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]})
    with pytest.raises(UserError, match="dimension places, row 0: null in id"):
        run(one, [event()], dimensions={"places": [{"id": None, "name": "a"}]})


def test_pseudonyms_have_the_key_of_the_environment_or_one_for_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    one = events(Protect(text=Pseudonym()))
    monkeypatch.delenv("PIPELINES_KEY", raising=False)
    monkeypatch.delenv("PIPELINES_KEY_FILE", raising=False)

    def made() -> Result:
        return run(one, [event(text="+33")])

    assert made().rows["text"].to_pylist() == ["85c816d95eb9a16126ffd686716b51c3"]
    monkeypatch.setenv("PIPELINES_KEY", "11" * 32)
    assert made().rows["text"].to_pylist() != ["85c816d95eb9a16126ffd686716b51c3"]
    monkeypatch.setenv("PIPELINES_KEY", "short")
    with pytest.raises(UserError, match="64 hexadecimal digits"):
        made()


def test_a_rule_that_stops_the_run_stops_this_one() -> None:
    with pytest.raises(DataRefused, match=r"events_of_a_test, step 1 \(Check\): low \(id < 5\) failed for rows at 1"):
        run(events(Check(on_fail="stop", low="id < 5")), [event(), event(id=5)])


def test_a_row_without_items_explodes_to_nothing_and_is_kept() -> None:
    one = events(Explode("parts"), v={"by": "name", "n": Count()})
    parts = [{"name": "a", "weight": None}, {"name": "b", "weight": None}]
    result = run(one, [event(parts=parts), event(parts=[]), event(parts=None), event(parts=parts[:1])])
    assert result.views["v"].select(["name", "n"]).to_pylist() == [{"name": "a", "n": 2}, {"name": "b", "n": 1}]
    assert result.counts["kept"] == 4


@pytest.mark.slow
def test_beam_is_not_imported() -> None:
    code = (
        "import sys; from pipelines.examples import orders; orders.test_a_return_lowers_revenue();"
        "print(sorted(name for name in sys.modules if name.partition('.')[0] == 'apache_beam'))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert told.stdout.strip() == "[]"
