"""Bad rows, end to end by the command line: each is a dead letter, and the run goes on."""

import math
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import duckdb
import pyarrow as pa
import pytest

if TYPE_CHECKING:
    from tests.faults.conftest import Place

pytestmark = pytest.mark.slow

HEADER = "sensor,at,celsius,count,price,code\n"
GOOD = "a,2024-01-01T00:10:00Z,10,1,1.5,1\n"
AT = datetime(2024, 1, 1, 0, 10, tzinfo=UTC)


# A row's fault: a dead letter with its reason, place and exact bytes, and the run goes on

LONG = "z" * 1_000_000
CSV: list[tuple[bytes, str, str]] = [
    (b"a,2024-01-01T00:20:00Z,1,2", "too few fields", "4 fields, the header has 6"),
    (b"a,2024-01-01T00:20:00Z,1,2,3,4,5", "too many fields", "7 fields, the header has 6"),
    (b"caf\xe9,2024-01-01T00:20:00Z,1,2,3,4", "invalid utf-8", "bytes that are not UTF-8 text"),
    (b'a,2024-01-01T00:20:00Z,1,1,1,"open', "unterminated quote", "a quoted field that does not end, or"),
    (b"a,yesterday,1,2,3,4", "invalid datetime in at", "invalid datetime in at: 'yesterday'"),
    (b"a,2024-02-30T00:00:00Z,1,2,3,4", "invalid datetime in at", "invalid datetime in at: '2024-02-30T00:00:00Z'"),
    (b"a,2024-01-01T00:20:00,1,2,3,4", "naive time in at", "naive time in at: '2024-01-01T00:20:00'"),
    (b"a,10000-01-01T00:00:00Z,1,2,3,4", "invalid datetime in at", "invalid datetime in at: '10000-01-01"),
    (b"a,9999-12-31T23:59:59Z,1,2,3,4", "event time out of range", "at: the years 100 to 9899"),
    (b"a,0001-01-01T00:00:00Z,1,2,3,4", "event time out of range", "at: the years 100 to 9899"),
    (b"a,,1,2,3,4", "null event time", "at"),
    (b"a,2024-01-01T00:20:00Z,1,9223372036854775808,3,4", "invalid int in count", "'9223372036854775808'"),
    (b"a,2024-01-01T00:20:00Z,1,1.5,3,4", "invalid int in count", "invalid int in count: '1.5'"),
    (b"a,2024-01-01T00:20:00Z,warm,1,3,4", "invalid float in celsius", "invalid float in celsius: 'warm'"),
    (b"a,2024-01-01T00:20:00Z,1e400,1,3,4", "invalid float in celsius", "invalid float in celsius: '1e400'"),
    (b"a,2024-01-01T00:20:00Z,1,1," + b"9" * 30 + b",4", "invalid Decimal in price", "invalid Decimal in price: '999"),
    (LONG.encode() + b",2024-01-01T00:20:00Z,1,x,3,4", "invalid int in count", "invalid int in count: 'x'"),
    (b"a,2024-01-01T00:20:00Z,1," + LONG.encode() + b",3,4", "invalid int in count", "zzz…'"),
]
JSON: list[tuple[bytes, str, str]] = [
    (b'{"sensor": "a", "at"', "invalid json", "bytes that are not JSON"),
    (b'["a", "2024-01-01T00:20:00Z"]', "not an object", "JSON, but not an object"),
    (b'{"sensor": "caf\xe9", "at": "2024-01-01T00:20:00Z"}', "invalid utf-8", "bytes that are not UTF-8 text"),
    (b'{"sensor": "a", "at": 1704067200}', "invalid datetime in at", "invalid datetime in at: '1704067200'"),
    (b'{"sensor": "a", "at": "2024-01-01T00:20:00"}', "naive time in at", "naive time in at: '2024-01-01T00:20:00'"),
    (b'{"sensor": "a", "at": null}', "null event time", "at"),
    (b'{"sensor": "a"}', "null event time", "at"),
    (b'{"at": "2024-01-01T00:20:00Z", "count": 18446744073709551616}', "invalid int in count", "'1844674407370955161"),
    (b'{"at": "2024-01-01T00:20:00Z", "celsius": {"x": 1}}', "invalid float in celsius", "invalid float in celsius"),
]


@pytest.mark.parametrize(("name", "faults"), [("rows.csv", CSV), ("rows.jsonl", JSON)])
def test_a_line_that_is_no_row_is_a_dead_letter_with_its_exact_bytes(
    place: "Place", name: str, faults: list[tuple[bytes, str, str]]
) -> None:
    first, last = b'{"sensor": "a", "at": "2024-01-01T00:10:00Z"}', b'{"sensor": "b", "at": "2024-01-01T00:10:00Z"}'
    lines = [first, *(line for line, _, _ in faults), last]
    if name == "rows.csv":
        lines = [HEADER.strip().encode(), b"a,2024-01-01T00:10:00Z,,,,", *lines[1:-1], b"b,2024-01-01T00:10:00Z,,,,"]
    content = b"\r\n".join(lines) + b"\n"
    place.write(name, content)
    report = place.done("readings", name)
    letters = place.letters("readings")
    assert len(letters) == len(faults)
    for letter, (line, reason, detail) in zip(letters, faults, strict=True):
        assert (letter["pipeline"], letter["source"], letter["key_id"]) == ("readings", name, None)
        assert letter["step"] == ("source" if "event time" in reason else "decode")
        assert letter["reason"] == reason
        assert detail in letter["detail"]
        assert len(letter["detail"]) < 200
        assert letter["format"] == ("csv" if name == "rows.csv" else "json")
        assert letter["payload"] == line
        assert content[letter["offset"] :].startswith(line + b"\r\n")
    reasons = [reason for _, reason, _ in faults]
    assert report["rejected"] == {reason: reasons.count(reason) for reason in reasons}
    counts = {"read": len(faults) + 2, "kept": 2, "filtered": 0, "rejected": len(faults), "late": 0, "duplicate": 0}
    assert report["rows"] == counts
    assert [(row["sensor"], row["event_time"]) for row in place.rows("readings", "events")] == [("a", AT), ("b", AT)]


def test_a_typed_value_that_does_not_fit_is_a_dead_letter_with_its_row(place: "Place") -> None:
    far = pa.array([0, 2**38], pa.timestamp("s", "UTC"))
    wide = pa.array([2**63 - 1, 2**63], pa.uint64())
    for name, column, reason in (("at", far, "time out of range in at"), ("count", wide, "invalid int in count")):
        place.parquet(sensor=["good", "bad"], **{name: column})
        report = place.done("readings", "rows.parquet", "--store=none")
        (letter,) = place.letters("readings")
        assert (letter["reason"], letter["offset"], letter["format"]) == (reason, 1, "json")
        assert b'"sensor":"bad"' in letter["payload"]
        assert report["rows"]["kept"] == 1


def test_null_keys_are_a_group_and_long_text_is_a_key(place: "Place") -> None:
    place.write("rows.csv", HEADER + GOOD + GOOD.replace("a,", ",") * 2 + GOOD.replace("a,", LONG + ","))
    place.done("readings", "rows.csv")
    found = {row["sensor"]: row["n"] for row in place.rows("readings", "by_sensor")}
    assert found == {"a": 1, None: 2, LONG: 1}
    assert {row["sensor"]: row["n"] for row in place.answers("readings", "by_sensor")[3]} == found
    assert {row["sensor"] for row in place.rows("readings", "events")} == {"a", None, LONG}


def test_floats_that_are_no_numbers_count_as_duckdb_counts_them(place: "Place") -> None:
    values = ["NaN", "inf", "-inf", "1", "-0.0", "", "1e308", "1e308"]
    lines = [f"{sensor},2024-01-01T00:10:00Z,{value},1,1,c\n" for sensor in "ab" for value in values]
    lines += [f"{value},2024-01-01T00:10:00Z,{value},1,1,c\n" for value in values]
    place.write("rows.csv", HEADER + "".join(lines))
    place.done("numbers", "rows.csv")
    functions = {"n": "count", "total": "sum", "mean": "avg", "least": "min", "most": "max", "values": "approx"}
    measures = ", ".join(f"{function}(celsius) AS {name}" for name, function in functions.items())
    measures = measures.replace("approx(", "count(DISTINCT ")
    sql = f"SELECT sensor, {measures} FROM read_csv('rows.csv') GROUP BY 1"
    for expected in duckdb.connect().sql(sql).to_arrow_table().to_pylist():
        (found,) = [row for row in place.rows("numbers", "by_sensor") if row["sensor"] == expected["sensor"]]
        for name, value in expected.items():
            same = found[name] == value or (value is not None and math.isnan(value) and math.isnan(found[name]))
            assert same, f"{expected['sensor']}: {name} is {found[name]}, and by DuckDB {value}"


# What the source says about columns and values that it does not know


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.parquet"])
@pytest.mark.parametrize("extra", ["ignore", "keep", "reject", "stop"])
def test_a_column_that_is_not_declared(place: "Place", name: str, extra: str) -> None:
    place.write("rows.csv", HEADER.replace("code", "code,unit") + "a,2024-01-01T00:10:00Z,10,1,1.5,1,°C\n")
    place.write("rows.jsonl", '{"sensor":"a","at":"2024-01-01T00:10:00Z","unit":"°C"}\n')
    place.parquet(sensor=["a"], unit=["°C"])
    done = place.run("readings", name, f"--set=extra={extra}", "--set=events=true")
    if extra == "stop":
        assert done.code == 3
        assert "unit" in done.refusal
        assert "Source(extra='stop')" in done.refusal
        assert name in done.refusal
        return
    assert (done.code, done.told) == (0, [])
    letters, events = place.letters("readings"), place.rows("readings", "events")
    assert [row.get("_extra") for row in events] == {"ignore": [None], "keep": ['{"unit":"°C"}'], "reject": []}[extra]
    assert [(letter["reason"], letter["detail"]) for letter in letters] == (
        [("extra column", "Reading does not declare unit")] if extra == "reject" else []
    )


def test_only_columns_that_are_not_declared_are_unknown(place: "Place") -> None:
    """Also those that no view uses are known."""
    place.write("rows.csv", HEADER + GOOD)
    report = place.done("readings", "rows.csv", "--set=extra=reject", "--set=events=false")
    assert report["rows"]["kept"] == 1


def test_what_is_kept_goes_through_every_step_to_the_events(place: "Place") -> None:
    place.write("rooms.csv", "sensor,room,floor\na,attic,2\n")
    lines = [("a", "10", ', "unit": "°C"'), ("a", "11", ""), ("x", "12", ', "unit": "K"')]
    rows = [
        f'{{"sensor": "{sensor}", "at": "2024-01-01T00:{minute}:00Z", "celsius": 1{more}}}\n'
        for sensor, minute, more in lines
    ]
    rows.append(rows[0].replace("°C", "°F"))  # the same identity, and only what is not declared differs
    place.write("rows.jsonl", "".join(rows))
    report = place.done("extras", "rows.jsonl", "--dimension=rooms=rooms.csv")
    events = [(row["room"], row["unit"], row["_extra"]) for row in place.rows("extras", "events")]
    assert sorted(events, key=repr) == [("attic", "°C", '{"unit":"°C"}'), ("attic", None, None)]
    assert report["rejected"] == {"known": 1, "conflict": 1}
    details = [letter["detail"] for letter in place.letters("extras")]
    assert details == ["sensor <> 'x'", "_extra differs from rows.jsonl:0"]
    asked = place.call("query", "select _extra from extras.events where unit = '°C'", "--json")
    assert asked.out.strip() == '[{"_extra": "{\\"unit\\":\\"°C\\"}"}]'


@pytest.mark.parametrize("invalid", ["reject", "null", "stop"])
def test_a_value_of_another_type(place: "Place", invalid: str) -> None:
    place.write("rows.csv", HEADER + GOOD + GOOD.replace("10,1", "10,x") + GOOD.replace("2024-01-01T00:10:00Z", "noon"))
    done = place.run("readings", "rows.csv", f"--set=invalid={invalid}")
    if invalid == "stop":
        assert done.code == 3
        told = "readings: rows.csv at 103: invalid datetime in at: 'noon'; Source(invalid='stop') ends the run"
        assert done.refusal == told
        assert not list(place.folder.glob("data/warehouse/*/*/*.parquet"))
        return
    assert (done.code, done.told) == (0, [])
    reasons = [letter["reason"] for letter in place.letters("readings")]
    counts = [row["count"] for row in place.rows("readings", "events")]
    if invalid == "null":
        assert (reasons, counts) == (["null event time"], [1, None])
    else:
        assert (reasons, counts) == (["invalid int in count", "invalid datetime in at"], [1])


@pytest.mark.parametrize("invalid", ["reject", "null"])
def test_a_column_of_another_type(place: "Place", invalid: str) -> None:
    place.parquet(count=pa.array([True]))
    done = place.run("readings", "rows.parquet", f"--set=invalid={invalid}")
    if invalid == "reject":
        assert done.code == 2
        assert done.refusal == "rows.parquet: column count is bool, Reading declares int"
    else:
        assert (done.code, done.told) == (0, [])
        assert [row["count"] for row in place.rows("readings", "events")] == [None]


# An expression that fails for a row


def test_an_expression_that_fails_refuses_its_row_and_names_itself(place: "Place") -> None:
    faults = [
        ("a,2024-01-01T00:10:00Z,10,0,1.5,1", "step 1 (Check)", "share failed", "100 // count >= 0"),
        ("a,2024-01-01T00:10:00Z,10,-1,1.5,1", "step 1 (Check)", "share", "100 // count >= 0"),
        ("a,2024-01-01T00:10:00Z,10,1,1.5,x", "step 2 (Derive)", "number failed", "code::INTEGER"),
        ("a,2024-01-01T00:10:00Z,10,9000,1.5,1", "step 2 (Derive)", "until failed", '"at" + to_years(count)'),
        ("a,2024-01-01T00:10:00Z,10,9000000000,1.5,1", "step 2 (Derive)", "until failed", '"at" + to_years(count)'),
        ("a,2024-01-01T00:10:00Z,10,1000,1.5,1", "step 3 (Derive)", "big failed", "count * 10_000_000_000_000_000"),
        ("a,2024-01-01T00:10:00Z,-2000,1,1.5,1", "step 4 (Filter)", "filter failed", "coalesce(sqrt("),
    ]
    content = HEADER + GOOD + "".join(f"{line}\n" for line, *_ in faults) + GOOD + "a,2024-01-01T00:10:00Z,,,,\n"
    place.write("rows.csv", content)
    report = place.done("steps", "rows.csv")
    letters = place.letters("steps")
    for letter, (line, step, reason, detail) in zip(letters, faults, strict=True):
        assert (letter["step"], letter["reason"]) == (step, reason)
        assert letter["detail"].startswith(detail)
        assert (letter["payload"].decode(), letter["format"]) == (line, "csv")
        assert content[letter["offset"] :].startswith(line + "\n")
    assert report["rows"] == {"read": 10, "kept": 3, "filtered": 0, "rejected": 7, "late": 0, "duplicate": 0}
    reasons = [reason for _, _, reason, _ in faults]
    assert report["rejected"] == {reason: reasons.count(reason) for reason in reasons}
    assert [row["n"] for row in place.rows("steps", "every")] == [3]


def test_an_expression_of_a_view_that_fails_costs_the_view_its_row_alone(place: "Place") -> None:
    cold, seven, hot = (GOOD.replace(",10,", f",{celsius},") for celsius in ("-300", "7", "900"))
    place.write("rows.csv", HEADER + GOOD + cold + seven + hot)
    report = place.done("steps", "rows.csv")
    assert report["rows"]["kept"] == 4
    assert report["dropped"] == {"view:inverse": {"sum failed": 1}, "view:logs": {"log failed": 1, "filtered": 1}}
    found = {(letter["step"], letter["reason"], letter["detail"]) for letter in place.letters("steps")}
    assert found == {
        ("step 1 (Derive) of view 'logs'", "log failed", "ln(celsius + 300)"),
        ("view 'inverse'", "sum failed", "1 / (celsius - 7)"),
    }
    for letter, celsius in zip(place.letters("steps"), ("-300.0", "7.0"), strict=True):
        assert f'"celsius":{celsius}'.encode() in letter["payload"]
    assert [row["n"] for name in ("every", "logs", "inverse") for row in place.rows("steps", name)] == [4, 2, 3]


@pytest.mark.parametrize(("count", "told"), [("-1", "share (100 // count >= 0) failed"), ("0", "share (100 // count")])
def test_a_check_may_stop_the_run(place: "Place", count: str, told: str) -> None:
    place.write("rows.csv", HEADER + GOOD + GOOD.replace("10,1,", f"10,{count},"))
    done = place.run("steps", "rows.csv", "--set=on_fail=stop")
    assert done.code == 3
    assert done.refusal.startswith(f"steps, step 1 (Check): {told}")
    assert done.refusal.endswith(" failed for rows.csv at 69; Check(on_fail='stop') ends the run")


def test_a_part_that_fails_behind_an_explode_is_a_dead_letter_of_its_row(place: "Place") -> None:
    rows = [
        b'{"id":1,"at":"2024-01-01T00:10:00Z","lines":[{"sku":"a","quantity":0},{"sku":"b","quantity":5}]}',
        b'{"id":2,"at":"2024-01-01T00:10:00Z","lines":[]}',
        b'{"id":3,"at":"2024-01-01T00:10:00Z","lines":5}',
        b'{"id":4,"at":"2024-01-01T00:10:00Z","lines":[{"sku":null,"quantity":1}]}',
    ]
    place.write("rows.jsonl", b"\n".join(rows))
    report = place.done("orders", "rows.jsonl")
    assert [(letter["reason"], letter["payload"]) for letter in place.letters("orders")] == [
        ("each failed", rows[0]),
        ("invalid list in lines", rows[2]),
        ("null in lines.sku", rows[3]),
    ]
    assert report["rows"] == {"read": 4, "kept": 2, "filtered": 0, "rejected": 2, "late": 0, "duplicate": 0}
    assert report["dropped"] == {"exploded": {"each failed": 1}}
    assert [(row["sku"], row["n"], row["each"]) for row in place.rows("orders", "skus")] == [("b", 1, 20)]


@pytest.mark.parametrize(("of", "value"), [("count", 2**63 - 1), ("price", 10**28)])
def test_a_sum_past_its_type_refuses_the_run(place: "Place", of: str, value: int) -> None:
    column = pa.array([value] * 12, pa.int64() if of == "count" else pa.decimal128(38, 0))
    place.parquet(**{of: column})
    done = place.run("total", "rows.parquet", f"--set=of={of}")
    assert done.code == 3
    assert done.refusal.startswith("view whole: ")
    assert " is past its type and nothing was committed; measure a wider one, as in Sum('x::DEC" in done.refusal
    assert not list(place.folder.glob("data/warehouse/*/*/_delta_log"))


# The same identity twice


def test_the_same_event_twice_counts_once_and_another_of_its_identity_is_a_conflict(place: "Place") -> None:
    other, none = GOOD.replace("10,1,", "10,2,"), GOOD.replace("a,", ",")
    place.write("rows.csv", HEADER + GOOD + GOOD + other + none + none)
    place.write("rows-2.csv", HEADER + GOOD + other.replace("10,", "11,"))
    report = place.done("readings", "*.csv", "--set=identity=true")
    assert report["rows"] == {"read": 7, "kept": 2, "filtered": 0, "rejected": 2, "late": 0, "duplicate": 3}
    assert report["rejected"] == {"conflict": 2}
    found = {letter["source"]: letter for letter in place.letters("readings")}
    assert found["rows.csv"]["detail"] == "count differs from rows-2.csv:35"
    assert found["rows-2.csv"]["detail"] == "celsius, count differ from rows-2.csv:35"
    for source, letter in found.items():
        assert letter["payload"] == (place.folder / source).read_bytes()[letter["offset"] :].split(b"\n")[0]
    assert [row["count"] for row in place.rows("readings", "events")] == [1, 1]


# Dimensions

ROOMS = "sensor,room,floor\n"


@pytest.mark.parametrize(
    ("rooms", "told"),
    [
        ("a,attic,1\na,attic,1\n", "dimension rooms: 2 rows for sensor='a'; a key may be there once"),
        ("a,attic,up\n", "dimension rooms: rooms.csv at 18: invalid int in floor: 'up'; look-ups need every row, so "),
        ("a,attic\n", "dimension rooms: rooms.csv at 18: too few fields, 2 fields, the header has 3; look-ups "),
        (",attic,1\n", "dimension rooms: rooms.csv at 18: null in sensor, which may not be null; look-ups "),
        ("caf\udce9,attic,1\n", "dimension rooms: rooms.csv at 18: invalid utf-8, bytes that are not UTF-8 text; "),
        (None, "rooms.csv: no such file"),
    ],
)
def test_a_dimension_that_cannot_be_trusted_is_told_in_one_line(place: "Place", rooms: str | None, told: str) -> None:
    place.write("rows.csv", HEADER + GOOD)
    if rooms is not None:
        place.write("rooms.csv", (ROOMS + rooms).encode(errors="surrogateescape"))
    done = place.run("rooms", "rows.csv", "--dimension=rooms=rooms.csv")
    assert done.code == 2
    assert done.refusal.startswith(told)
    assert not list(place.folder.glob("data/warehouse/*/*/_delta_log"))


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ((), "rooms looks up rooms: say where it is with --dimension rooms=URI"),
        (("--dimension=room=rooms.csv",), "--dimension room=…: not looked up by rooms. Nearest: rooms"),
        (("--dimension=rooms=less.csv",), "less.csv: no column 'room', which Room declares. "),
    ],
)
def test_a_dimension_that_is_not_there(place: "Place", flags: tuple[str, ...], told: str) -> None:
    place.write("rows.csv", HEADER + GOOD)
    place.write("less.csv", "sensor,floor\n")
    done = place.run("rooms", "rows.csv", *flags)
    assert done.code == 2
    assert done.refusal.startswith(told)


@pytest.mark.parametrize("missing", ["null", "reject"])
def test_a_row_without_a_match(place: "Place", missing: str) -> None:
    place.write("rooms.csv", ROOMS + "a,attic,1\n")
    place.write("rows.csv", HEADER + GOOD + GOOD.replace("a,", "b,") + GOOD.replace("a,", ","))
    report = place.done("rooms", "rows.csv", "--dimension=rooms=rooms.csv", f"--set=missing={missing}")
    letters = [(letter["reason"], letter["detail"], letter["offset"]) for letter in place.letters("rooms")]
    if missing == "null":
        assert (report["unmatched"], letters) == ({"rooms": {"": 2}}, [])
    else:
        assert letters == [("no rooms", "no row of rooms for sensor", at) for at in (69, 103)]
        assert report["unmatched"] == {}
