"""Each step against plain Python, on rows of a scope built by hand."""

import datetime
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipelines.definition import Dimension
from pipelines.transforms.chain import Chain, Outcome
from pipelines.transforms.conform import OFFSET, SOURCE
from pipelines.transforms.conservation import Conservation
from pipelines.transforms.errors import DataRefused
from pipelines.transforms.expressions import DefinitionError, arrow_types
from pipelines.transforms.protect import Key, Mask, Pseudonym
from pipelines.transforms.schema import UTC_MICROS
from pipelines.transforms.stage import Builder, Scope
from pipelines.transforms.steps import (
    Apply,
    Check,
    Derive,
    Drop,
    Explode,
    Filter,
    Lookup,
    Protect,
    Step,
    StepError,
    names,
    struct_fields,
)

EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("text", pa.string()),
        ("items", pa.list_(pa.struct([("sku", pa.string()), ("n", pa.int64())]))),
        ("event_time", UTC_MICROS),
    ]
)
FAST = settings(max_examples=25, deadline=None)


def compiled(*steps: Step, schema: pa.Schema = SCHEMA) -> Chain:
    types = arrow_types(schema)
    builder = Builder("p", Scope(types, {name: frozenset({name}) for name in types}), "source")
    for number, step in enumerate(steps, 1):
        builder.label = builder.where = f"step {number} ({step.label})"
        step.build(builder)
    return builder.chain(shared=True)


def at(second: float) -> datetime.datetime:
    return EPOCH + datetime.timedelta(seconds=second)


def table(rows: list[dict[str, Any]], schema: pa.Schema = SCHEMA) -> pa.Table:
    given = [{"event_time": EPOCH, **row} for row in rows]
    made = pa.Table.from_pylist(given, schema=schema)
    source = pa.array(["file"] * len(rows), pa.string()).dictionary_encode().cast(SOURCE.type)
    return made.append_column(SOURCE, source).append_column(OFFSET, pa.array(range(len(rows)), OFFSET.type))


def ran(steps: list[Step], rows: list[dict[str, Any]], dimensions: Mapping[str, pa.Table] = {}) -> Outcome:
    return compiled(*steps).run(table(rows), dimensions, None, lambda: Key(bytes(32)))


def kept(outcome: Outcome, *columns: str) -> list[Any]:
    rows = [tuple(row[name] for name in columns) for row in outcome.rows.to_pylist()]
    return [row[0] for row in rows] if len(columns) == 1 else rows


def refused(outcome: Outcome) -> list[tuple[int, str, str]]:
    return [(row["offset"], row["step"], row["reason"]) for row in outcome.dead.to_pylist()]


def ids(*values: int | None) -> list[dict[str, Any]]:
    return [{"id": value} for value in values]


# Check and Filter


def test_a_check_refuses_what_is_false_and_lets_null_pass() -> None:
    outcome = ran([Check(positive="id > 0", small="id < 10")], ids(1, 0, None, 10))
    assert kept(outcome, "id") == [1, None]
    assert refused(outcome) == [(1, "step 1 (Check)", "positive"), (3, "step 1 (Check)", "small")]
    assert outcome.dead["detail"].to_pylist() == ["id > 0", "id < 10"]


def test_the_first_rule_that_is_false_is_the_reason() -> None:
    assert refused(ran([Check(a="id > 5", b="id > 7")], ids(1)))[0][2] == "a"
    assert refused(ran([Check(b="id > 7", a="id > 5")], ids(1)))[0][2] == "b"


def test_a_rule_that_fails_in_a_row_refuses_it_and_no_other() -> None:
    outcome = ran([Check(even="text::BIGINT % 2 = 0")], [{"text": text} for text in ("2", "two", "3", None)])
    assert kept(outcome, "text") == ["2", None]
    assert refused(outcome) == [(1, "step 1 (Check)", "even failed"), (2, "step 1 (Check)", "even")]


def test_a_flag_keeps_the_row_and_says_so() -> None:
    outcome = ran([Check(on_fail="flag", positive="id > 0", small="id < 10")], ids(1, 0, None, 10))
    assert kept(outcome, "id", "positive", "small") == [
        (1, True, True),
        (0, False, True),
        (None, True, True),
        (10, True, False),
    ]
    assert outcome.rows.schema.field("positive").type == pa.bool_()


def test_a_flag_that_fails_refuses() -> None:
    outcome = ran([Check(on_fail="flag", ok="text::BIGINT > 0")], [{"text": "1"}, {"text": "x"}])
    assert (kept(outcome, "ok"), refused(outcome)) == ([True], [(1, "step 1 (Check)", "ok failed")])


def test_a_stop_ends_the_run_and_says_where() -> None:
    with pytest.raises(DataRefused, match=r"^p, step 1 \(Check\): positive \(id > 0\) failed for file at 2"):
        ran([Check(on_fail="stop", positive="id > 0")], ids(1, 2, 0))
    assert kept(ran([Check(on_fail="stop", positive="id > 0")], ids(1, None)), "id") == [1, None]


def test_a_filter_keeps_only_what_is_true() -> None:
    outcome = ran([Filter("id > 0")], ids(1, 0, None, 2))
    assert kept(outcome, "id") == [1, 2]
    assert refused(outcome) == []
    assert Conservation.of(outcome.tallies).rows["filtered"] == 2


def test_what_a_step_refused_no_later_step_looks_at() -> None:
    outcome = ran([Check(ok="id <> 0"), Derive(share="10 // id"), Filter("share > 2")], ids(0, 2, 5))
    assert (kept(outcome, "id"), refused(outcome)) == ([2], [(0, "step 1 (Check)", "ok")])


# Derive and Drop


def test_derived_columns_see_those_before_the_step_not_their_siblings() -> None:
    outcome = ran([Derive(id="id + 1", before="id"), Derive(twice="id * 2")], ids(1))
    assert kept(outcome, "id", "before", "twice") == [(2, 1, 4)]


@pytest.mark.parametrize(
    ("sql", "bad"),
    [
        ("text::BIGINT", "x"),
        ("id * 4611686018427387904", 4),
        ("10 // id", 0),
        ("sqrt(id)", -1),
        ("text::DATE", "2026-02-30"),
    ],
)
def test_a_value_that_cannot_be_derived_refuses_its_row(sql: str, bad: object) -> None:
    column = "text" if isinstance(bad, str) else "id"
    good: object = {"text::BIGINT": "1", "text::DATE": "2026-02-28"}.get(sql, 1)
    outcome = ran([Derive(made=sql)], [{column: good}, {column: bad}, {column: None}])
    assert kept(outcome, column) == [good, None]
    assert refused(outcome) == [(1, "step 1 (Derive)", "made failed")]


def test_what_a_failing_row_shares_with_the_others_stays_right() -> None:
    rows = [{"id": n, "text": "x" if n == 2 else str(n)} for n in range(5)]
    steps: list[Step] = [Derive(number="text::BIGINT", twice="text::BIGINT * 2", same="text"), Check(low="number < 4")]
    outcome = ran(steps, rows)
    assert kept(outcome, "number", "twice", "same") == [(0, 0, "0"), (1, 2, "1"), (3, 6, "3")]
    assert refused(outcome) == [(2, "step 1 (Derive)", "number failed"), (4, "step 2 (Check)", "low")]


def test_dropped_columns_are_gone() -> None:
    chain = compiled(Drop("text", "items"))
    assert chain.schema.names == ["id", "event_time"]
    assert chain.run(table(ids(1)), {}).rows.column_names == ["id", "event_time", "_source", "_offset"]


@pytest.mark.parametrize("last", [Drop("made"), Derive(made="1"), Drop("made", "text")])
def test_a_row_that_fails_is_refused_even_if_the_column_goes(last: Step) -> None:
    rows: list[dict[str, Any]] = [{"text": "1"}, {"text": "x"}, {"text": "2", "id": 0}]
    steps = [Derive(made="text::BIGINT", share="1 // id"), last]
    whole = ran(steps, rows)
    assert refused(whole) == [(1, "step 1 (Derive)", "made failed"), (2, "step 1 (Derive)", "share failed")]
    alone = ran(steps, rows[1:2])
    assert refused(alone) == [(0, "step 1 (Derive)", "made failed")]


# Lookup


class Place:
    key: int
    since: datetime.datetime
    name: str | None


PLACES = Dimension("places", Place, key="key")
HISTORY = Dimension("history", Place, key="key", valid_from="since")


def dimension(*rows: tuple[int | None, float, str | None]) -> pa.Table:
    given = [{"key": key, "since": at(second), "name": name} for key, second, name in rows]
    return pa.Table.from_pylist(given, schema=PLACES.schema.arrow)


def test_a_lookup_takes_columns_of_the_row_with_the_key() -> None:
    outcome = ran(
        [Lookup(PLACES, on={"id": "key"}, take={"place": "name"})],
        ids(1, 2, 3, None),
        {"places": dimension((1, 0, "a"), (2, 0, None))},
    )
    assert kept(outcome, "id", "place") == [(1, "a"), (2, None), (3, None), (None, None)]
    assert Conservation.of(outcome.tallies).unmatched == {"places": {"": 2}}


def test_a_missing_row_may_refuse() -> None:
    lookup = Lookup(PLACES, on={"id": "key"}, take={"place": "name"}, missing="reject")
    outcome = ran([lookup], ids(1, 2, 3, None), {"places": dimension((1, 0, "a"), (2, 0, None))})
    assert kept(outcome, "id", "place") == [(1, "a"), (2, None)]
    assert refused(outcome) == [(2, "step 1 (Lookup)", "no places"), (3, "step 1 (Lookup)", "no places")]
    assert Conservation.of(outcome.tallies).unmatched == {}


def test_two_lookups_of_one_dimension_and_a_key_of_the_same_name() -> None:
    steps: list[Step] = [
        Lookup(PLACES, on={"id": "key"}, take={"name1": "name", "key": "key"}),
        Lookup(PLACES, on="key", take={"name2": "name"}),
    ]
    outcome = ran(steps, ids(1, 5), {"places": dimension((1, 0, "a"))})
    assert kept(outcome, "name1", "key", "name2") == [("a", 1, "a"), (None, None, None)]


seconds = st.integers(0, 20)
HISTORIES = st.lists(st.tuples(st.integers(1, 3), seconds), max_size=12, unique=True)


@FAST
@given(
    HISTORIES,
    st.lists(st.tuples(st.integers(1, 4) | st.none(), seconds), min_size=1, max_size=12),
    st.sampled_from([None, "3s", "1s"]),
)
@example([(1, 5)], [(1, 5), (1, 8), (1, 9), (1, 4)], "3s")
def test_a_lookup_as_of_is_the_last_row_not_after_and_not_older(
    history: list[tuple[int, int]], rows: list[tuple[int | None, int]], within: str | None
) -> None:
    def expected(key: int | None, second: int) -> str | None:
        before = [since for known, since in history if known == key and since <= second]
        age = int(within[0]) if within else 99
        return str(max(before)) if before and second - max(before) <= age else None

    known = dimension(*((key, since, str(since)) for key, since in history))
    outcome = ran(
        [Lookup(HISTORY, on={"id": "key"}, take={"place": "name"}, within=within)],
        [{"id": key, "event_time": at(second)} for key, second in rows],
        {"history": known},
    )
    assert sorted(kept(outcome, "_offset", "place")) == [(n, expected(*row)) for n, row in enumerate(rows)]


def test_within_holds_to_the_microsecond() -> None:
    times = [2.999999, 3.0, 6.0, 6.000001]
    outcome = ran(
        [Lookup(HISTORY, on={"id": "key"}, take={"place": "name"}, within="3s")],
        [{"id": 1, "event_time": at(second)} for second in times],
        {"history": dimension((1, 3, "a"))},
    )
    assert sorted(kept(outcome, "_offset", "place")) == [(0, None), (1, "a"), (2, "a"), (3, None)]
    assert Conservation.of(outcome.tallies).unmatched == {"history": {"older than 3s": 2}}


def test_a_lookup_may_go_by_another_time() -> None:
    lookup = Lookup(HISTORY, on={"id": "key"}, take={"place": "name"}, at="event_time - INTERVAL 5 SECOND")
    rows = [{"id": 1, "event_time": at(second)} for second in (7, 8)]
    outcome = ran([lookup], rows, {"history": dimension((1, 3, "a"))})
    assert sorted(kept(outcome, "_offset", "place")) == [(0, None), (1, "a")]


# Explode


def item(sku: str | None, n: int | None) -> dict[str, Any]:
    return {"sku": sku, "n": n}


def test_a_list_of_structs_becomes_rows() -> None:
    rows: list[dict[str, Any]] = [
        {"id": 1, "items": [item("a", 1), item("b", None)]},
        {"id": 2, "items": []},
        {"id": 3, "items": None},
        {"id": 4, "items": [item("c", 3)]},
    ]
    outcome = ran([Explode("items")], rows)
    assert sorted(kept(outcome, "id", "sku", "n")) == [(1, "a", 1), (1, "b", None), (4, "c", 3)]
    assert "items" not in outcome.rows.column_names
    assert Conservation.of(outcome.tallies).rows["kept"] == 4


def test_after_an_explode_rows_are_no_source_rows() -> None:
    steps: list[Step] = [Filter("id > 0"), Explode("items"), Filter("n > 1"), Check(sku="sku <> 'x'")]
    rows = [{"id": 1, "items": [item("a", 1), item("x", 2), item("b", 2)]}, {"id": 0, "items": [item("a", 1)]}]
    counts = Conservation.of(ran(steps, rows).tallies)
    assert (counts.rows["kept"], counts.rows["filtered"], counts.rows["rejected"]) == (1, 1, 0)
    assert counts.dropped == {"exploded": {"filtered": 1, "sku": 1}}


def test_the_dead_letter_of_an_exploded_row_is_its_source_row() -> None:
    steps: list[Step] = [
        Explode("items"),
        Apply(lambda rows: rows.append_column("m", rows["n"]), adds={"m": int}),
        Check(n="m > 1"),
    ]
    outcome = ran(steps, [{"id": 1, "items": [item("a", 1), item("b", 2)]}])
    assert b'"items":[{"sku":"a","n":1},{"sku":"b","n":2}]' in outcome.dead["payload"][0].as_py()


# Protect and Apply


def test_protected_columns_are_text_and_null_stays() -> None:
    outcome = ran(
        [Protect(text=Pseudonym(), id=Mask(keep=2))], [{"text": "+33", "id": 12345}, {"text": None, "id": None}]
    )
    assert kept(outcome, "text", "id") == [("85c816d95eb9a16126ffd686716b51c3", "***45"), (None, None)]


def test_protecting_is_possible_beside_rows_that_fail() -> None:
    steps: list[Step] = [Derive(n="text::BIGINT"), Protect(text=Pseudonym())]
    outcome = ran(steps, [{"text": "1"}, {"text": "x"}, {"text": None}])
    assert kept(outcome, "n") == [1, None]
    assert refused(outcome) == [(1, "step 1 (Derive)", "n failed")]
    assert all(text is None or len(text) == 32 for text in kept(outcome, "text"))


def test_an_apply_adds_and_replaces_columns_between_sql_steps() -> None:
    def function(rows: pa.Table) -> pa.Table:
        assert rows.column_names == ["id", "text", "items", "event_time", "two"]
        return rows.append_column("made", pa.array([str(n) for n in rows["two"].to_pylist()])).set_column(
            0, "id", pa.array([n.as_py() * 10 for n in rows["id"]])
        )

    steps: list[Step] = [
        Derive(two="id * 2"),
        Apply(function, adds={"made": str, "id": int}),
        Derive(both="made || id"),
    ]
    assert kept(ran(steps, ids(1, 2)), "both") == ["210", "420"]


# What steps are made of


def test_the_fields_of_a_struct() -> None:
    kind = 'STRUCT(sku VARCHAR, "a b" STRUCT(x INTEGER, y VARCHAR[]))'
    assert struct_fields(kind) == {"sku": "VARCHAR", "a b": "STRUCT(x INTEGER, y VARCHAR[])"}


def test_one_name_or_several() -> None:
    assert (names("a"), names(("a", "b")), names(())) == (("a",), ("a", "b"), ())


def test_steps_are_equal_by_what_they_declare_not_where() -> None:
    one = Filter("id > 1")
    other = Filter("id > 1")
    assert one == other
    assert hash(one) == hash(other)
    assert one != Filter("id > 2")
    assert one.at != other.at
    assert repr(one) == "Filter(keep='id > 1')"


@pytest.mark.parametrize(
    "make",
    [
        lambda: Check(),
        lambda: Derive(),
        lambda: Drop(),
        lambda: Protect(),
        lambda: Derive(_x="1"),
        lambda: Check(on_fail="no", a="true"),  # type: ignore[arg-type]
        lambda: Lookup("places", on="id", take="name"),
        lambda: Lookup(PLACES, on=("id", "text"), take="name"),
    ],
)
def test_a_step_that_declares_nothing_sensible_is_refused_at_once(make: Callable[[], Step]) -> None:
    with pytest.raises(StepError) as error:
        make()
    assert "\n" not in str(error.value)


def test_a_step_without_its_column_is_refused_when_built() -> None:
    for step in (Drop("no"), Explode("no"), Protect(no=Mask()), Lookup(PLACES, on={"no": "key"}, take="name")):
        with pytest.raises(DefinitionError, match="no column 'no'"):
            compiled(step)
