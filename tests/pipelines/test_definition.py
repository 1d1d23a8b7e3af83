"""What a definition may be, and how it is told what it may not: the place, the text underlined, the fix."""

import datetime
import inspect
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pytest

from pipelines import (
    Apply,
    Check,
    Column,
    Count,
    DefinitionError,
    Derive,
    Dimension,
    Drop,
    Explode,
    Filter,
    Lookup,
    Mask,
    Max,
    Mean,
    Pipeline,
    Protect,
    Pseudonym,
    Quantile,
    Session,
    Sliding,
    Source,
    Sum,
    Tumbling,
    View,
    load,
)
from pipelines.transforms.errors import UserError
from pipelines.transforms.schema import RowSchema


class Item:
    sku: str
    n: int


class Event:
    id: int
    at: datetime.datetime
    text: str | None
    x: float | None
    dep_delay: int | None
    items: list[Item]


class Place:
    key: int
    since: datetime.datetime
    name: str
    size: int


SOURCE = Source(Event, event_time="at")
PLACES = Dimension("places", Place, key="key")
HISTORY = Dimension("history", Place, key="key", valid_from="since")


def steps(*declared: Any) -> Pipeline:
    return Pipeline("p", source=SOURCE, steps=declared)


def view(**declared: Any) -> Pipeline:
    return Pipeline("p", source=SOURCE, views=(View("v", **declared),))


def told(make: Callable[[], Any]) -> str:
    """The message, with a line of this file as LINE."""
    with pytest.raises(UserError) as error:
        make()
    return re.sub(r"test_definition\.py:\d+", "LINE", str(error.value))


def test_an_unknown_column_is_underlined_with_the_nearest_name_and_those_there_are() -> None:
    assert told(lambda: steps(Filter("id > 0"), Derive(late="2 * dep_dealy > 15"))) == (
        "pipeline 'p', step 2 (Derive late=), LINE:\n"
        "  2 * dep_dealy > 15\n"
        "      ^^^^^^^^^ no column 'dep_dealy'. Nearest: dep_delay (bigint). "
        "Columns here: id, at, text, x, dep_delay, items, event_time"
    )


def test_the_place_is_where_the_step_is_written_not_the_pipeline() -> None:
    step = Derive(a="b")
    line = inspect.currentframe().f_lineno - 1  # type: ignore[union-attr]
    with pytest.raises(DefinitionError, match=rf"test_definition\.py:{line}:"):
        steps(step)
    late = View("v", n=Sum("b"))
    with pytest.raises(DefinitionError, match=rf"view 'v', measure n=, test_definition\.py:{line + 4}:"):
        Pipeline("p", source=SOURCE, views=(late,))


@pytest.mark.parametrize(
    ("sql", "underlined", "why"),
    [
        ("sum(id) + 1", "^^^^^^^    ", "sum is an aggregate; aggregates are a View's measures"),
        ("1 + count(*)", "    ^^^^^^^^", "count_star is an aggregate"),
        ("weighted_avg(id, x)", "^^^^^^^^^^^^^^^^^^^", "sum is an aggregate"),
        (
            "id + lag(id) over (order by x)",
            "     ^^^^^^^^^^^^^^^^^^^^^^^^^",
            "a window function is not row-local; use a View",
        ),
        ("id in (select 1)", "      ^^^^^^^^^^", "a subquery is not row-local; use Lookup for other tables"),
        ("exists (select 1)", "^^^^^^^^^^^^^^^^^", "a subquery is not row-local"),
        ("x < now()", "    ^^^^^", "clocks, randomness and settings give another answer on every run"),
        ("x < current_date", "    ^^^^^^^^^^^^", "clocks"),
        ("age(event_time)", "^^^^^^^^^^^^^^^", "age of one time goes by the clock; use age(later, earlier)"),
        ("ago(INTERVAL 1 DAY) < event_time", "^^^^^^^^^^^^^^^^^^^", "ago is (current_timestamp"),
        ("random() < 0.5", "^^^^^^^^", "randomness"),
        ("uuid()", "^^^^^^", "randomness"),
        ("current_setting('threads')", "^^^^^^^^^^^^^^^^^^^^^^^^^^", "settings"),
        ("nextval('s')", "^^^^^^^^^^^^", "give another answer"),
        ("unnest([1, 2])", "^^^^^^^^^^^^^^", "unnest makes several rows of one; use Explode"),
        ("regexp_split_to_table(text, ',')", "^" * 32, "unnest makes several rows"),
        ("COLUMNS('id')", "^^^^^^^^^^^^^", "name the columns; * is not an expression"),
        ("id = ?", "     ^", "no parameters here; use an f-string and --set NAME=VALUE"),
        ("#1", "^^", "name the columns; they have no numbers"),
        ("id as other", "^^^^^^^^^^^", "an expression takes no alias ('other')"),
        ("id > (id", "      ^", "syntax error"),
        ("text + 1", "^^^^^^^^", "No function matches the given name and argument types '+(VARCHAR"),
        ("nosuch(id)", "^^^^^^^^^^", "nosuch does not exist"),
        ("räksmörgås + 1", "^^^^^^^^^^", "no column 'räksmörgås'"),
        ("'é' || txt", "       ^^^", "no column 'txt'. Nearest: text (varchar)"),
        ("list_transform(items, lambda i: i.n + idd)", " " * 38 + "^^^", "no column 'idd'. Nearest: id"),
    ],
)
def test_what_is_not_a_function_of_the_row_is_refused(sql: str, underlined: str, why: str) -> None:
    where, text, marked = told(lambda: steps(Derive(made=sql))).split("\n")
    assert where == "pipeline 'p', step 1 (Derive made=), LINE:"
    assert text == f"  {sql}"
    assert marked.startswith(f"  {underlined.rstrip()} ")
    assert why in marked


@pytest.mark.parametrize("sql", ["", "  ", None, 3])
def test_an_expression_is_text(sql: Any) -> None:
    assert (
        told(lambda: steps(Filter(sql)))
        == f"pipeline 'p', step 1 (Filter), LINE: expected an SQL expression, got {sql!r}"
    )


def test_the_line_of_a_long_expression_that_is_wrong_is_shown() -> None:
    message = told(lambda: steps(Derive(made="case when id > 1\n     then nosuch\n     else 2 end")))
    assert message.split("\n")[1:] == [
        "       then nosuch",
        "            ^^^^^^ no column 'nosuch'. Columns here: id, at, text, x, dep_delay, items, event_time",
    ]


STEP_ERRORS: list[tuple[Callable[[], Any], str]] = [
    (lambda: steps(Check(positive="id")), "step 1 (Check positive=), LINE:\n  id\n  ^^ is BIGINT; expected BOOLEAN"),
    (lambda: steps(Check()), "Check() declares nothing; write Check(positive='amount > 0')"),
    (lambda: steps(Check(on_fail="flg", a="id > 1")), "Check(on_fail='flg'): reject, flag or stop"),  # type: ignore[arg-type]
    (
        lambda: steps(Check(on_fail="flag", text="id > 1")),
        "there is a column 'text' already; give the rule another name",
    ),
    (lambda: steps(Filter("text")), "step 1 (Filter), LINE:\n  text\n  ^^^^ is VARCHAR; expected BOOLEAN"),
    (lambda: steps(Derive(_a="id")), "Derive(_a=…): names that begin with _ are reserved"),
    (lambda: steps(Derive(event_time="at")), "the name 'event_time' is reserved"),
    (lambda: steps(Derive(window_end="at")), "the name 'window_end' is reserved"),
    (lambda: steps(Derive(ID="id")), "'ID' and 'id' are one name to SQL; choose another"),
    (lambda: steps(Derive(a="id", b="a")), "  a\n  ^ no column 'a'"),
    (lambda: steps(Drop("txt")), "step 1 (Drop), LINE: no column 'txt'. Nearest: text. Columns here: id, at, text"),
    (lambda: steps(Drop()), "Drop() declares nothing"),
    (lambda: steps(Drop("event_time")), "event_time is what windows go by; it stays"),
    (
        lambda: steps(Drop("text"), Filter("text = 'a'")),
        "step 2 (Filter), LINE:\n  text = 'a'\n  ^^^^ no column 'text'",
    ),
    (lambda: steps(Lookup(PLACES, on={"id": "key"}, take="nam")), "no column 'nam' in places. It has key, since, name"),
    (lambda: steps(Lookup(PLACES, on={"idd": "key"}, take="name")), "no column 'idd'. Nearest: id."),
    (lambda: steps(Lookup(PLACES, on={"id": "name"}, take="name")), "'name' is not in the key of places (key)"),
    (lambda: steps(Lookup(PLACES, on=("id", "at"), take="name")), "Lookup('places', on=('id', 'at')): its key is key"),
    (lambda: steps(Lookup(PLACES, on={"text": "key"}, take="name")), "text is VARCHAR, places.key is BIGINT"),
    (
        lambda: steps(Lookup(PLACES, on={"id": "key"}, take={"x": "size"})),
        "there is a column 'x' already; take={'another_",
    ),
    (lambda: steps(Lookup(PLACES, on={"id": "key"}, take="name", within="3h")), "places keeps no history (valid_from)"),
    (lambda: steps(Lookup(PLACES, on={"id": "key"}, take="name", at="at")), "places keeps no history (valid_from)"),
    (
        lambda: steps(Lookup(HISTORY, on={"id": "key"}, take="name", at="id")),
        "(Lookup at=), LINE:\n  id\n  ^^ is BIGINT; exp",
    ),
    (
        lambda: steps(Lookup(HISTORY, on={"id": "key"}, take="name", within="3 h")),
        "duration '3 h': a whole number and a",
    ),
    (lambda: steps(Lookup(HISTORY, on={"id": "key"}, take="name", within="1mo")), "months have no fixed length"),
    (lambda: steps(Lookup(HISTORY, on={"id": "key"}, take="name", missing="drop")), "Lookup(missing='drop'): null or"),  # type: ignore[arg-type]
    (lambda: steps(Lookup("places", on={"id": "key"}, take="name")), "Lookup('places'): a Dimension, as in Dimension("),
    (lambda: steps(Explode("id")), "id is BIGINT; Explode takes a list of structs (list[Row])"),
    (lambda: steps(Explode("item")), "no column 'item'. Nearest: items."),
    (lambda: steps(Derive(sku="id"), Explode("items")), "there is a column 'sku' already; Drop it"),
    (lambda: steps(Protect(x=Pseudonym())), "x: Pseudonym needs a text, bytes, a whole or decimal number"),
    (lambda: steps(Protect(items=Mask())), "items: Mask needs a column of single values"),
    (lambda: steps(Protect(text="mask")), "text='mask': a column but event_time, Pseudonym() or Mask()"),  # type: ignore[arg-type]
    (lambda: steps(Protect(event_time=Mask())), "a column but event_time"),
    (lambda: steps(Apply(lambda rows: rows, adds={})), "Apply() declares nothing"),
    (lambda: steps(Apply(lambda rows: rows, adds={"a": set})), "field a: no Arrow type for <class 'set'>"),
    (lambda: steps(Apply("f", adds={"a": int})), "Apply('f'): a function of a table"),  # type: ignore[arg-type]
    (lambda: steps(Derive(a="at - at")), "events=True: column a is month_day_nano_interval, which no table holds"),
    (lambda: steps(Derive(a="{'b': at::TIME}")), "column a is struct<b: time64[us]>, which no table holds"),
    (lambda: steps("Check"), "pipeline 'p': steps: 'Check' is no Step"),
]

VIEW_ERRORS: list[tuple[Callable[[], Any], str]] = [
    (lambda: view(by="idd", n=Count()), "pipeline 'p', view 'v', LINE: no column 'idd'. Nearest: id."),
    (lambda: view(by=("id", "id"), n=Count()), "view 'v': the name 'id' is taken or reserved; choose another"),
    (lambda: view(by="id", ID=Count()), "the name 'ID' is taken or reserved"),
    (lambda: view(n=Count(), N=Count()), "the name 'N' is taken or reserved"),
    (lambda: view(by="items", n=Count()), "key items is STRUCT(sku VARCHAR, n BIGINT)[]; Derive a column of one value"),
    (
        lambda: view(n=Max("at - event_time")),
        "view 'v', LINE: column n is month_day_nano_interval, which no table holds",
    ),
    (lambda: view(window_start=Count()), "the name 'window_start' is taken or reserved"),
    (lambda: view(event_time=Count()), "the name 'event_time' is taken or reserved"),
    (lambda: view(_n=Count()), "the name '_n' is taken or reserved"),
    (lambda: view(), "view 'v' measures nothing; add for example rows=Count()"),
    (lambda: view(n=3), "view 'v', measure n=3: a measure such as Count(), or SQL text"),
    (lambda: view(n=Count), "a measure such as Count(), or SQL text"),
    (lambda: view(n=Sum("idd")), "view 'v', measure n=, LINE:\n  idd\n  ^^^ no column 'idd'"),
    (lambda: view(n=Sum("text")), "measure n=, LINE:\n  text\n  ^^^^ Sum needs a number, not VARCHAR"),
    (lambda: view(n=Mean("at")), "Mean needs a number, not TIMESTAMP WITH TIME ZONE"),
    (lambda: view(n=Max("items")), "Max needs one value that has an order"),
    (lambda: view(n=Count(where="id")), "  id\n  ^^ is BIGINT; expected BOOLEAN"),
    (lambda: view(n=Quantile("x", 95)), "the quantile is 0 to 1"),
    (lambda: view(n=Sum("sum(id)")), "sum is an aggregate"),
    (
        lambda: view(n=Count(), share="nn / 2"),
        "measure share=, LINE:\n  nn / 2\n  ^^ no column 'nn'. Nearest: n (bigint)",
    ),
    (lambda: view(share="n / 2", n=Count()), "no column 'n'. Columns here: window_start, window_end"),
    (lambda: view(n=Count(), share="id / n"), "no column 'id'. Columns here: window_start, window_end, n"),
    (lambda: view(n=Count(), share="sum(n)"), "sum is an aggregate"),
    (lambda: view(window="1h", n=Count()), "window='1h': Tumbling, Sliding, Session or Whole"),
    (
        lambda: view(window=Tumbling("1 hour"), n=Count()),
        "duration '1 hour': a whole number and a unit, as in 10s 5m 2h 1d",
    ),
    (lambda: view(window=Tumbling("1d", timezone="Paris"), n=Count()), "not an IANA time zone, such as Europe/Paris"),
    (lambda: view(window=Sliding("1h", every="2h"), n=Count()), "every must be at most size"),
    (lambda: view(window=Session("1mo"), n=Count()), "months have no fixed length"),
    (
        lambda: view(n=Count(), steps=(Filter("idd > 1"),)),
        "pipeline 'p', step 1 (Filter) of view 'v', LINE:\n  idd > 1\n  ^^^",
    ),
    (lambda: View("events", n=Count()), "view name 'events' is taken"),
    (lambda: View("My view", n=Count()), "view name 'My view': lower-case letters, digits and _"),
]

OTHER_ERRORS: list[tuple[Callable[[], Any], str]] = [
    (lambda: Source(Event, event_time="at", identity="idd"), "Source identity: no column 'idd' in Event. Nearest: id."),
    (lambda: Source(Event, event_time="at", disorder="1x"), "duration '1x': a whole number and a unit"),
    (lambda: Source(Event, event_time="at", lateness="1mo"), "Source lateness='1mo': months have no fixed length"),
    (
        lambda: Source(Event, event_time="at", extra="kep"),  # type: ignore[arg-type]
        "Source extra='kep': one of ignore, keep, reject, stop. Nearest: keep",
    ),
    (
        lambda: Source(Event, event_time="at", invalid="nul"),  # type: ignore[arg-type]
        "Source invalid='nul': one of reject, null, stop. Nearest: null",
    ),
    (
        lambda: Pipeline("p", source=Source(Event, event_time="ats")),
        "pipeline 'p', Source event_time:\n  ats\n  ^^^ no column",
    ),
    (lambda: Pipeline("p", source=Source(Event, event_time="id")), "is BIGINT; expected TIMESTAMP WITH TIME ZONE"),
    (lambda: Pipeline("p", source=Event), "a Source(Row, event_time=…)"),  # type: ignore[arg-type]
    (lambda: Pipeline("P", source=SOURCE), "pipeline name 'P': lower-case letters, digits and _"),
    (lambda: Pipeline("p", source=SOURCE, events=False), "pipeline 'p' keeps nothing: give it views, or events=True"),
    (
        lambda: Pipeline("p", source=SOURCE, views=(View("v", n=Count()),) * 2),
        "pipeline 'p': view 'v' is declared twice",
    ),
    (lambda: Pipeline("p", source=SOURCE, views=("v",)), "pipeline 'p': views: 'v' is no View"),  # type: ignore[arg-type]
    (lambda: Dimension("d", Place, key="k"), "Dimension 'd': no column 'k' in Place. Nearest: key."),
    (lambda: Dimension("d", Place, key="key", valid_from="sinc"), "no column 'sinc' in Place. Nearest: since."),
    (lambda: Dimension("d", Place, key="key", valid_from="name"), "valid_from='name' is string; a datetime, please"),
    (lambda: Column(personal="phon"), "Column(personal='phon'): one of name, email, phone"),  # type: ignore[arg-type]
    (lambda: Column(timezone="Paris"), "Column(timezone='Paris'): not an IANA time zone"),
    (lambda: Column(scale=38), "Column(scale=38): 0 to 37 decimal places"),
    (lambda: RowSchema.of(object), "row object has no annotated fields"),
]


@pytest.mark.parametrize(
    ("make", "expected"), [*STEP_ERRORS, *VIEW_ERRORS, *OTHER_ERRORS], ids=lambda value: str(value)[:40]
)
def test_what_cannot_run_is_refused_at_construction(make: Callable[[], Any], expected: str) -> None:
    message = told(make)
    assert expected in message
    assert message.count("\n") in (0, 2)


def test_one_name_is_one_dimension() -> None:
    again = Dimension("places", Place, key="size")
    take = Lookup(PLACES, on={"id": "key"}, take="name"), Lookup(again, on={"id": "size"}, take={"other": "name"})
    assert told(lambda: steps(*take)) == "pipeline 'p': dimension 'places' is declared twice"
    same = Dimension("places", Place, key="key")
    assert len(steps(take[0], Lookup(same, on={"id": "key"}, take={"other": "name"})).dimensions) == 1


# Row classes


def test_python_types_are_arrow_types() -> None:
    class Row:
        a: Annotated[str, Column("doc", unit="m")]
        b: Annotated[int, Column(personal="id")] | None
        c: Annotated[float | None, Column(path="x.y")]
        d: list[Item] | None

    item = pa.struct([pa.field("sku", pa.string(), False), pa.field("n", pa.int64(), False)])
    schema = RowSchema.of(Row)
    assert schema.arrow == pa.schema(
        [
            pa.field("a", pa.string(), False),
            pa.field("b", pa.int64()),
            pa.field("c", pa.float64()),
            pa.field("d", pa.list_(pa.field("item", item, False))),
        ]
    )
    assert [(field.column.unit, field.column.path) for field in schema.fields[:3]] == [
        ("m", None),
        (None, None),
        (None, "x.y"),
    ]
    assert schema.personal == ("b",)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"a": set}, "row R, field a: no Arrow type for <class 'set'>. Types: str int float bool bytes"),
        ({"a": int | str}, "no Arrow type for int | str"),
        ({"a": dict[str, int]}, "no Arrow type for dict[str, int]"),
        ({"event_time": datetime.datetime}, "the name 'event_time' is reserved; rename the field (Column(path=…)"),
        ({"_a": int}, "the name '_a' is reserved"),
        ({"a": int, "A": int}, "to SQL another field is 'a' too; rename it"),
    ],
)
def test_a_row_class_that_cannot_be_a_schema_is_refused(fields: dict[str, Any], expected: str) -> None:
    assert expected in told(lambda: RowSchema.of(type("R", (), {"__annotations__": fields})))


# Plans


def test_a_column_that_is_named_as_a_keyword_needs_no_quotes() -> None:
    class Row:
        at: datetime.datetime
        order: int
        end: int

    source = Source(Row, event_time="at", identity="order")
    Pipeline(
        "p",
        source=source,
        steps=(Check(a="order > 1 and at is not null"), Derive(b="case when order > end then at::DATE end")),
        views=(View("v", by="order", n=Max("at"), m=Sum("order + 1", where="end > 0")),),
    )


def test_only_needed_columns_are_read_where_no_rows_are_kept() -> None:
    made = Pipeline(
        "p",
        source=Source(Event, event_time="at"),
        steps=(Check(a="x > 1"), Derive(b="text || 'a'", c="dep_delay + 1")),
        views=(View("v", by="b", n=Count()),),
        events=False,
    )
    assert made.plan().columns == ("at", "text", "x", "dep_delay")
    assert Pipeline("p", source=SOURCE).plan().columns == tuple(Event.__annotations__)


def test_lineage_reaches_the_source_through_every_step() -> None:
    made = Pipeline(
        "p",
        source=SOURCE,
        steps=(Derive(a="x + id"), Lookup(PLACES, on={"id": "key"}, take="name"), Explode("items")),
        views=(View("v", by=("sku", "name"), total=Sum("a * n", where="text = 'a'"), share="total / 2"),),
    )
    lineage = {column: set(sources) for column, sources in made.plan().lineage["v"].items()}
    assert lineage == {
        "sku": {"items"},
        "name": {"places.name"},
        "window_start": {"at"},
        "window_end": {"at"},
        "total": {"x", "id", "items", "text"},
        "share": {"x", "id", "items", "text"},
    }


# load


DEFINITION = """
import datetime
from pipelines import *

class Row:
    at: datetime.datetime
    n: int

def made(least: int = 1, exact: bool = False, ratio: float = 0.5, name: str = "x") -> Pipeline:
    assert (type(least), type(exact), type(ratio), type(name)) == (int, bool, float, str)
    return Pipeline("made", source=Source(Row, event_time="at"), steps=(Filter(f"n >= {least}"),))

one = made()
number = 1
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "defined.py"
    path.write_text(DEFINITION)
    return path


def test_a_pipeline_is_loaded_from_a_file_and_by_name(file: Path) -> None:
    assert load(f"{file}:one").name == "made"
    assert load(f"{file}:made", least="5", exact="True", ratio="1", name="2").steps[0] == Filter("n >= 5")
    assert load("flights").name == load("flights:flights", late_after="30").name == "flights"


@pytest.mark.parametrize(
    ("what", "parameters", "expected"),
    [
        ("nowhere.py:x", {}, "nowhere.py: no such file"),
        ("flight", {}, "no such built-in pipeline. Nearest: flights. Built in: calls, flights, orders, sensors"),
        ("{file}:ones", {}, "no 'ones' there. Nearest: one. Pipelines there: one"),
        ("{file}:number", {}, "is int, not a Pipeline"),
        ("{file}:one", {"least": "1"}, "is not a function, so it takes no --set least=…"),
        ("{file}:made", {"last": "1"}, "has no parameter 'last'. Nearest: least. It has: least, exact, ratio, name"),
        ("{file}:made", {"least": "many"}, "--set least='many' is not int"),
        ("{file}:made", {"exact": "1"}, "--set exact='1' is not bool"),
    ],
)
def test_what_cannot_be_loaded_is_told_in_a_line(
    file: Path, what: str, parameters: dict[str, str], expected: str
) -> None:
    message = told(lambda: load(what.format(file=file), **parameters))
    assert expected in message
    assert "\n" not in message


def test_an_error_in_a_file_is_told_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "wrong.py"
    path.write_text(
        textwrap.dedent("""
        from pipelines import *
        import nosuch
    """)
    )
    assert told(lambda: load(f"{path}:x")) == f"{path}:3: ModuleNotFoundError: No module named 'nosuch'"
    path.write_text("def f(:\n")
    assert "SyntaxError" in told(lambda: load(f"{path}:x"))
    path.write_text(
        DEFINITION + "\nbad = Pipeline('p', source=Source(Row, event_time='at'), steps=(Filter('m > 1'),))\n"
    )
    assert "step 1 (Filter), wrong.py:16:\n  m > 1\n  ^ no column 'm'" in told(lambda: load(f"{path}:x"))
