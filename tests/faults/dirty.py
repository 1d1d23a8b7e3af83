"""Definitions that the tests of bad input run by the command line; ``--set`` says what varies."""

from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any

import pyarrow as pa

from pipelines import (
    Apply,
    Check,
    Column,
    Count,
    Derive,
    Dimension,
    Distinct,
    Explode,
    Filter,
    Lookup,
    Mask,
    Max,
    Mean,
    Min,
    Pipeline,
    Protect,
    Pseudonym,
    Quantile,
    Source,
    Sum,
    Tumbling,
    View,
)


class Reading:
    """Nearly everything may lack."""

    sensor: str | None
    at: datetime | None
    celsius: float | None
    count: int | None
    price: Decimal | None
    code: str | None


class Room:
    """A row of a dimension."""

    sensor: str
    room: str
    floor: int | None


class Call:
    """Who called, and for how long."""

    id: int
    at: datetime
    caller: Annotated[str, Column("E.164", personal="phone")]
    name: Annotated[str | None, Column(personal="name")]
    seconds: int


class Subscriber:
    """A dimension by a personal key."""

    number: Annotated[str, Column(personal="phone")]
    plan: str


class Line:
    """A part of an order."""

    sku: str
    quantity: int


class Order:
    """A row with parts."""

    id: int
    at: datetime
    lines: list[Line]


BY_SENSOR = View("by_sensor", by="sensor", window=Tumbling("1h"), n=Count(), total=Sum("count"), mean=Mean("celsius"))


def readings(extra: str = "ignore", invalid: str = "reject", identity: bool = False, events: bool = True) -> Pipeline:
    """Rows as they come."""
    source: Any = {"extra": extra, "invalid": invalid, "identity": ("sensor", "at") if identity else None}
    return Pipeline("readings", source=Source(Reading, event_time="at", **source), views=(BY_SENSOR,), events=events)


def extras() -> Pipeline:
    """What the row class lacks goes through every kind of step."""
    rooms = Dimension("rooms", Room, key="sensor")
    return Pipeline(
        "extras",
        source=Source(Reading, event_time="at", identity=("sensor", "at"), extra="keep"),
        steps=(
            Check(known="sensor <> 'x'"),
            Lookup(rooms, on="sensor", take="room"),
            Derive(unit="_extra->>'$.unit'"),
            Filter("celsius < 100"),
        ),
        views=(View("by_unit", by="unit", n=Count(), extras=Distinct("_extra")),),
    )


def steps(on_fail: str = "reject") -> Pipeline:
    """Every kind of step with an expression that can fail."""
    fail: Any = on_fail
    return Pipeline(
        "steps",
        source=Source(Reading, event_time="at"),
        steps=(
            Check(share="100 // count >= 0", on_fail=fail),
            Derive(number="code::INTEGER", until="at + to_years(count)"),
            Derive(big="count * 10_000_000_000_000_000"),
            Filter("coalesce(sqrt(celsius + 1000), 0) >= 0"),
        ),
        views=(
            View("every", n=Count()),
            View("logs", steps=(Derive(log="ln(celsius + 300)"), Filter("log < 6")), n=Count(), most=Max("log")),
            View("inverse", n=Count(), sum=Sum("1 / (celsius - 7)")),
        ),
    )


def numbers() -> Pipeline:
    """Floats that are no numbers, and text of any length, in every measure that takes them."""
    return Pipeline(
        "numbers",
        source=Source(Reading, event_time="at"),
        views=(
            View(
                "by_sensor",
                by="sensor",
                n=Count("celsius"),
                total=Sum("celsius"),
                mean=Mean("celsius"),
                least=Min("celsius"),
                most=Max("celsius"),
                median=Quantile("celsius", 0.5),
                values=Distinct("celsius"),
            ),
            View("by_code", by="code", n=Count()),
        ),
    )


def total(of: str = "count") -> Pipeline:
    """A sum that may not fit its type."""
    return Pipeline("total", source=Source(Reading, event_time="at"), views=(View("whole", total=Sum(of)),))


def rooms(missing: str = "null") -> Pipeline:
    """A look-up."""
    how: Any = missing
    dimension = Dimension("rooms", Room, key="sensor")
    return Pipeline(
        "rooms",
        source=Source(Reading, event_time="at"),
        steps=(Lookup(dimension, on="sensor", take="room", missing=how),),
        views=(View("by_room", by="room", n=Count()),),
    )


def calls(invalid: str = "reject") -> Pipeline:
    """Personal columns, published only as pseudonyms and masks."""
    how: Any = invalid
    return Pipeline(
        "calls",
        source=Source(Call, event_time="at", identity="id", invalid=how),
        steps=(
            Check(e164="starts_with(caller, '+')"),
            Derive(rate="3600 // seconds"),
            Protect(caller=Pseudonym(), name=Mask(keep=1)),
            Check(short="seconds < 5000"),
        ),
        views=(
            View("callers", by="caller", steps=(Derive(even="100 // (seconds - 7)"),), n=Count(), most=Max("even")),
        ),
    )


def subscribed() -> Pipeline:
    """A look-up by a personal key."""
    subscribers = Dimension("subscribers", Subscriber, key="number")
    return Pipeline(
        "subscribed",
        source=Source(Call, event_time="at"),
        steps=(Lookup(subscribers, on={"caller": "number"}, take="plan"), Protect(caller=Pseudonym(), name=Mask())),
        views=(View("plans", by="plan", n=Count()),),
    )


def pseudonyms() -> Pipeline:
    """Nothing personal is declared, and yet a key is needed."""
    return Pipeline("pseudonyms", source=Source(Reading, event_time="at"), steps=(Protect(sensor=Pseudonym()),))


def _broken(rows: pa.Table) -> pa.Table:
    raise KeyError(rows["sensor"][0].as_py())


def broken() -> Pipeline:
    """A function that raises."""
    return Pipeline("broken", source=Source(Reading, event_time="at"), steps=(Apply(_broken, adds={"score": float}),))


def orders() -> Pipeline:
    """An Explode, and an expression behind it that can fail."""
    return Pipeline(
        "orders",
        source=Source(Order, event_time="at"),
        steps=(Explode("lines"), Derive(each="100 // quantity")),
        views=(View("skus", by="sku", n=Count(), each=Sum("each")),),
    )
