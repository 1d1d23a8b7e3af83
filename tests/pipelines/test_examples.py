"""The built-in definitions, on rows and with answers written by hand."""

import hashlib
import hmac
import importlib
import math
import pkgutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines import examples
from pipelines.examples.calls import Call, Subscriber, calls
from pipelines.examples.flights import DIMENSIONS, HISTORY, Airport, Flight, Weather, flights
from pipelines.examples.orders import Line, Order, Rate, orders
from pipelines.examples.sensors import Reading, sensors
from pipelines.testing import example, run


def at(text: str) -> datetime:
    """A time in UTC."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def rows(table: pa.Table, *names: str) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in names) for row in table.to_pylist()]


BESIDE = [
    (name, function)
    for name in (module.name for module in pkgutil.iter_modules(examples.__path__))
    for function in vars(importlib.import_module(f"pipelines.examples.{name}")).values()
    if getattr(function, "__name__", "").startswith("test_")
]


@pytest.mark.parametrize(("name", "test"), BESIDE, ids=[f"{name}-{test.__name__}" for name, test in BESIDE])
def test_the_tests_beside_a_definition_pass(name: str, test: Callable[[], None]) -> None:
    test()


# flights


def flight(time: str, flight: int = 1, **values: Any) -> Flight:
    return example(Flight, time_hour=at(time), flight=flight, **{"origin": "JFK", "carrier": "UA", **values})


def test_flights_by_hour_and_carrier() -> None:
    given = [
        flight("2013-07-01 10:00", 1, dep_delay=0, tailnum="A"),
        flight("2013-07-01 10:00", 2, dep_delay=20, tailnum="A"),
        flight("2013-07-01 10:00", 3, dep_delay=100, tailnum="B"),
        flight("2013-07-01 10:00", 4, dep_delay=None),
        flight("2013-07-01 11:00", 5, dep_delay=15),
        flight("2013-07-01 10:00", 6, dep_delay=-5, carrier="DL"),
    ]
    answer = run(flights(), given).views["delays_by_carrier"]
    names = ("carrier", "window_start", "flights", "cancelled", "late", "late_share", "delay", "worst", "p95", "planes")
    ten, eleven = at("2013-07-01 10:00"), at("2013-07-01 11:00")
    assert rows(answer, *names) == [
        ("DL", ten, 1, 0, 0, 0.0, -5.0, -5, -5.0, 0),
        (
            "UA",
            ten,
            4,
            1,
            2,
            2 / 3,
            40.0,
            100,
            pytest.approx(92),
            2,
        ),  # p95 of 0, 20, 100: 90 % of the way from 20 to 100
        ("UA", eleven, 1, 0, 0, 0.0, 15.0, 15, 15.0, 0),
    ]
    assert set(answer["window_end"].to_pylist()) == {ten + timedelta(hours=1), eleven + timedelta(hours=1)}


def test_an_hour_of_only_cancelled_flights_has_no_share() -> None:
    answer = run(flights(), [flight("2013-07-01 10:00", dep_delay=None)]).views["delays_by_carrier"]
    assert rows(answer, "cancelled", "late", "late_share", "worst", "p95") == [(1, 0, None, None, None)]


def test_the_parameter_says_what_is_late() -> None:
    given = [flight("2013-07-01 10:00", n, dep_delay=delay) for n, delay in enumerate((15, 16, 60, 61))]
    late = [run(flights(*after), given).views["delays_by_carrier"]["late"].to_pylist() for after in ((), (60,))]
    assert late == [[3], [1]]


def test_a_day_in_new_york_has_23_hours_in_march_and_25_in_november() -> None:
    # The clocks go from EST (UTC-5) to EDT (UTC-4) on 10 March 2013, and back on 3 November.
    times = ["03-10 04:59", "03-10 05:00", "03-11 03:59", "03-11 04:00", "11-03 03:59", "11-03 04:00", "11-04 04:59"]
    given = [flight(f"2013-{time}", n) for n, time in enumerate([*times, "11-04 05:00"])]
    answer = run(flights(), given).views["delays_by_day"]
    assert rows(answer, "window_start", "window_end", "flights") == [
        (at("2013-03-09 05:00"), at("2013-03-10 05:00"), 1),
        (at("2013-03-10 05:00"), at("2013-03-11 04:00"), 2),
        (at("2013-03-11 04:00"), at("2013-03-12 04:00"), 1),
        (at("2013-11-02 04:00"), at("2013-11-03 04:00"), 1),
        (at("2013-11-03 04:00"), at("2013-11-04 05:00"), 2),
        (at("2013-11-04 05:00"), at("2013-11-05 05:00"), 1),
    ]


def test_weather_is_looked_up_as_of_the_flight_and_three_hours_back() -> None:
    weather = [
        example(Weather, origin="JFK", time_hour=at("2013-07-01 09:00"), visib=1.0),
        example(Weather, origin="JFK", time_hour=at("2013-07-01 11:00"), visib=None),
        example(Weather, origin="LGA", time_hour=at("2013-07-01 09:00"), visib=9.0),
        example(Weather, origin="JFK", time_hour=at("2013-07-01 20:00"), visib=5.0),
    ]
    times = ["08:59", "09:00", "10:59", "11:00", "14:00", "14:00:00.000001", "23:00", "23:00:00.000001"]
    given = [flight(f"2013-07-01 {time}", n) for n, time in enumerate(times)]
    result = run(flights(), given, dimensions={"weather": weather})
    assert result.rows["visib"].to_pylist() == [None, 1.0, 1.0, None, None, None, 5.0, None]
    assert rows(result.views["delays_by_day"], "flights", "poor_sight") == [(8, 2 / 3)]


def test_a_destination_that_is_not_looked_up_is_a_group_of_its_own() -> None:
    given = [flight("2013-07-01 10:00", 1, dest="LAX"), flight("2013-07-01 10:00", 2, dest="SJU")]
    answer = run(flights(), given, dimensions={"airports": [example(Airport, faa="LAX", name="Los Angeles Intl")]})
    assert sorted(answer.views["delays_by_day"]["dest_name"].to_pylist(), key=str) == ["Los Angeles Intl", None]


def test_impossible_flights_are_refused_and_unknown_air_times_are_not() -> None:
    given = [
        flight("2013-07-01 10:00", 1, origin="BOS"),
        flight("2013-07-01 10:00", 2, distance=600, air_time=60),
        flight("2013-07-01 10:00", 3, distance=599, air_time=60),
        flight("2013-07-01 10:00", 4, distance=99999, air_time=None),
        flight("2013-07-01 10:00", 5, distance=1, air_time=0),
    ]
    result = run(flights(), given)
    assert rows(result.rejected, "offset", "step", "reason") == [
        (0, "step 1 (Check)", "known_origin"),
        (1, "step 1 (Check)", "possible_speed"),
        (4, "step 1 (Check)", "possible_speed failed"),
    ]
    assert result.rows["flight"].to_pylist() == [3, 4]


def test_a_flight_told_twice_counts_once_and_another_story_is_a_conflict() -> None:
    first = flight("2013-07-01 10:00", dep_delay=5)
    result = run(flights(), [first, first, flight("2013-07-01 10:00", dep_delay=6)])
    assert result.counts == {"read": 3, "kept": 1, "filtered": 0, "rejected": 1, "late": 0, "duplicate": 1}
    assert rows(result.rejected, "offset", "step", "reason") == [(2, "dedupe", "conflict")]
    assert result.views["delays_by_carrier"]["delay"].to_pylist() == [5.0]


def test_the_built_in_data_is_there() -> None:
    for uri in (HISTORY(), *DIMENSIONS().values()):
        path, _, options = uri.partition("?")
        assert (Path(path).is_file(), options) == (True, "null=NA")


# calls


def call(id: str, started: str, ended: str | None, **values: Any) -> Call:
    given = {"caller": "+33611111111", "callee": "+33622222222", **values}
    return example(Call, id=id, started=at(started), ended=ended and at(ended), **given)


def pseudonym(value: str) -> str:
    """HMAC-SHA256 with the key of tests, 32 zero bytes, through HKDF (RFC 5869) of one block."""
    secret = hmac.digest(hmac.digest(bytes(32), bytes(32), "sha256"), b"pipelines/pseudonym\x01", "sha256")
    return hmac.new(secret, value.encode(), hashlib.sha256).hexdigest()[:32]


def test_a_call_is_in_ten_windows_of_ten_minutes() -> None:
    result = run(calls, [call("a", "2026-03-02 12:00", "2026-03-02 12:05"), call("b", "2026-03-02 12:06", None)])
    answer = result.views["callers"]
    noon = at("2026-03-02 12:00")
    # The first is told at 12:05: windows that start 11:56 … 12:05. The second at 12:06: 11:57 … 12:06.
    counts = {-4: 1, **dict.fromkeys(range(-3, 6), 2), 6: 1}
    expected = [(noon + timedelta(minutes=n), noon + timedelta(minutes=n + 10), calls) for n, calls in counts.items()]
    assert rows(answer, "window_start", "window_end", "calls") == expected


def test_no_number_is_readable_and_equal_numbers_stay_equal() -> None:
    one, other = "+33611111111", "+33622222222"
    given = [call("a", "2026-03-02 12:00", None), call("b", "2026-03-02 12:00", None, caller=other, callee=one)]
    result = run(calls, given)
    assert rows(result.rows, "caller", "callee", "area") == [
        (pseudonym(one), pseudonym(other), "+3361"),
        (pseudonym(other), pseudonym(one), "+3362"),
    ]
    assert set(result.views["callers"]["caller"].to_pylist()) == {pseudonym(one), pseudonym(other)}


def test_the_plan_is_the_one_at_the_start_of_the_call() -> None:
    known = [
        example(Subscriber, number="+33611111111", since=at("2026-03-01"), plan="small", verified=False),
        example(Subscriber, number="+33611111111", since=at("2026-03-02 12:01"), plan="large", verified=True),
    ]
    given = [
        call("before", "2026-02-28 12:00", None),
        call("during", "2026-03-02 12:00", "2026-03-02 12:02"),
        call("after", "2026-03-02 12:01", "2026-03-02 12:03"),
    ]
    result = run(calls, given, dimensions={"subscribers": known})
    assert rows(result.rows, "id", "plan", "verified") == [
        ("before", None, None),
        ("during", "small", False),
        ("after", "large", True),
    ]
    last = {row["window_start"]: row["plan"] for row in result.views["callers"].to_pylist()}
    assert (last[at("2026-03-02 11:53")], last[at("2026-03-02 11:54")]) == ("small", "large")


@pytest.mark.parametrize(("short", "suspect"), [(16, False), (17, True)])
def test_more_than_four_short_calls_in_five_of_twenty_are_suspect(short: int, suspect: bool) -> None:
    given = [call(str(n), f"2026-03-02 12:00:{n:02}", None, seconds=5 if n < short else 6) for n in range(20)]
    answer = run(calls, given).views["callers"]
    expected = (20, short, 1, short / 20, 1 / 20, suspect)
    assert set(rows(answer, "calls", "short", "callees", "short_share", "spread", "suspect")) == {expected}


def test_calls_that_cannot_be_are_refused() -> None:
    given = [
        call("a", "2026-03-02 12:00", "2026-03-02 11:59"),
        call("b", "2026-03-02 12:00", None, seconds=86401),
        call("c", "2026-03-02 12:00", None, caller="0611111111"),
    ]
    reasons = run(calls, given).rejected["reason"].to_pylist()
    assert reasons == ["ends_after_start", "sane_length", "e164"]


# orders


def order(id: str, time: str, *lines: tuple[str, int, str], **values: Any) -> Order:
    made = [example(Line, sku=sku, quantity=quantity, price=Decimal(price)) for sku, quantity, price in lines]
    return example(Order, id=id, at=at(time), lines=made, **{"country": "FR", "currency": "EUR", **values})


RATES = [example(Rate, currency="EUR", euro=Decimal(1)), example(Rate, currency="USD", euro=Decimal("0.925"))]


def test_revenue_returns_and_products() -> None:
    given = [
        order("a", "2026-06-01 10:00", ("hat", 2, "19.90"), ("tie", 1, "10.00")),
        order("b", "2026-06-01 11:00", ("hat", -1, "19.90")),
        order("c", "2026-06-01 12:00", ("hat", 4, "2.50"), currency="USD"),
        order("d", "2026-06-01 12:00"),
        order("e", "2026-06-01 12:00", ("tie", -2, "10.00"), country="BE"),
    ]
    views = run(orders, given, dimensions={"rates": RATES}).views
    assert rows(views["orders_by_country"], "country", "orders") == [("BE", 1), ("FR", 4)]
    assert rows(views["revenue_by_country"], "country", "revenue", "returned", "return_share") == [
        ("BE", Decimal(-20), Decimal(20), None),
        ("FR", Decimal("39.15"), Decimal("19.90"), pytest.approx(19.90 / 59.05)),
    ]
    assert rows(views["products"], "country", "sku", "revenue", "units") == [
        ("BE", "tie", Decimal(-20), -2),
        ("FR", "hat", Decimal("29.15"), 5),
        ("FR", "tie", Decimal(10), 1),
    ]


def test_a_day_in_paris_has_23_hours_in_march_and_25_in_october() -> None:
    # The clocks go from CET (UTC+1) to CEST (UTC+2) on 29 March 2026, and back on 25 October.
    times = ["03-28 22:59", "03-28 23:00", "03-29 21:59", "03-29 22:00", "10-24 21:59", "10-24 22:00", "10-25 22:59"]
    given = [order(time, f"2026-{time}") for time in [*times, "10-25 23:00"]]
    answer = run(orders, given, dimensions={"rates": RATES}).views["orders_by_country"]
    assert rows(answer, "window_start", "window_end", "orders") == [
        (at("2026-03-27 23:00"), at("2026-03-28 23:00"), 1),
        (at("2026-03-28 23:00"), at("2026-03-29 22:00"), 2),
        (at("2026-03-29 22:00"), at("2026-03-30 22:00"), 1),
        (at("2026-10-23 22:00"), at("2026-10-24 22:00"), 1),
        (at("2026-10-24 22:00"), at("2026-10-25 23:00"), 2),
        (at("2026-10-25 23:00"), at("2026-10-26 23:00"), 1),
    ]


def test_orders_without_a_rate_or_with_a_strange_country_are_refused() -> None:
    given = [order("a", "2026-06-01", currency="XXX"), order("b", "2026-06-01", country="fr"), order("c", "2026-06-01")]
    result = run(orders, given, dimensions={"rates": RATES})
    assert rows(result.rejected, "offset", "step", "reason") == [
        (0, "step 2 (Lookup)", "no rates"),
        (1, "step 1 (Check)", "iso_country"),
    ]
    assert result.rows["id"].to_pylist() == ["c"]


# sensors


def reading(time: str, celsius: float | None, sensor: str = "a", sequence: int = 0) -> Reading:
    return example(Reading, sensor=sensor, at=at(f"2026-06-01 {time}"), sequence=sequence, celsius=celsius)


def test_the_latest_temperature_and_every_hours() -> None:
    given = [
        reading("10:00:10", 20.0),
        reading("10:00:50", 21.0),
        reading("10:59:59.999999", 25.0),
        reading("11:00:00", 10.0),
        reading("11:30:00", None),
    ]
    views = run(sensors, given).views
    assert rows(views["latest"], "sensor", "celsius", "at", "readings") == [("a", 10.0, at("2026-06-01 11:30"), 5)]
    assert rows(views["latest"], "window_start", "window_end") == [(None, None)]
    names = ("window_start", "readings", "mean", "deviation", "median", "minutes", "missing_minutes")
    assert rows(views["by_hour"], *names) == [
        (at("2026-06-01 10:00"), 3, 22.0, pytest.approx(math.sqrt(7)), 21.0, 2, 58),
        (at("2026-06-01 11:00"), 2, 10.0, None, 10.0, 2, 58),
    ]


def test_five_silent_minutes_end_a_session() -> None:
    given = [
        reading("10:00:00", 1.0),
        reading("10:04:59.999", 1.0),
        reading("10:09:59.999", 1.0),
        reading("10:11:00", 1.0),
        reading("10:00:00", 1.0, sensor="b"),
    ]
    answer = run(sensors, given).views["uptime"]
    assert rows(answer, "sensor", "window_start", "window_end", "readings") == [
        ("a", at("2026-06-01 10:00"), at("2026-06-01 10:09:59.999"), 2),
        ("a", at("2026-06-01 10:09:59.999"), at("2026-06-01 10:16"), 2),
        ("b", at("2026-06-01 10:00"), at("2026-06-01 10:05"), 1),
    ]


def test_what_is_no_temperature_is_null_and_what_is_none_of_this_earth_is_flagged() -> None:
    table = pa.table(
        {
            "sensor": ["a", "a", "a"],
            "at": ["2026-06-01T10:00:00Z", "2026-06-01T12:00:00+02:00", "2026-06-01T10:00:00Z"],
            "sequence": ["1", "2", "3"],
            "celsius": ["20.5", "warm", "500"],
        }
    )
    result = run(sensors, table)
    assert rows(result.rows, "celsius", "in_range") == [(20.5, True), (None, True), (500.0, False)]
    assert result.counts["kept"] == 3
