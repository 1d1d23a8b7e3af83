"""Telephone calls: who calls very many others very briefly, minute by minute, without a readable number anywhere."""

from datetime import UTC, datetime, timedelta
from typing import Annotated

from pipelines import (
    Check,
    Column,
    Count,
    Derive,
    Dimension,
    Distinct,
    Last,
    Lookup,
    Pipeline,
    Protect,
    Pseudonym,
    Sliding,
    Source,
    View,
)
from pipelines.testing import example, run


class Call:
    """A call, told when it ends; one that is still going on has no end."""

    id: str
    caller: Annotated[str, Column("E.164", personal="phone")]
    callee: Annotated[str, Column("E.164", personal="phone")]
    started: datetime
    ended: datetime | None
    seconds: Annotated[int, Column("talked", unit="s")]


class Subscriber:
    """What is known of a number, from a time on."""

    number: Annotated[str, Column("E.164", personal="phone")]
    since: datetime
    plan: str
    verified: bool


subscribers = Dimension("subscribers", Subscriber, key="number", valid_from="since")

calls = Pipeline(
    "calls",
    doc="callers that reach many numbers for seconds only",
    source=Source(Call, event_time="coalesce(ended, started)", identity="id", disorder="1m", lateness="2h"),
    steps=(
        Check(
            e164="starts_with(caller, '+')",
            sane_length="seconds between 0 and 86400",
            ends_after_start="ended >= started",
        ),
        Lookup(subscribers, on={"caller": "number"}, take=("plan", "verified"), at="started"),
        Derive(area="left(caller, 5)"),
        Protect(caller=Pseudonym(), callee=Pseudonym()),
    ),
    views=(
        View(
            "callers",
            by="caller",
            window=Sliding("10m", every="1m"),
            calls=Count(),
            short=Count(where="seconds < 6"),
            callees=Distinct("callee"),
            plan=Last("plan"),
            verified=Last("verified"),
            short_share="short / calls",
            spread="callees / calls",
            suspect="calls >= 20 and short / calls > 0.8 and not coalesce(verified, false)",
        ),
    ),
)


def test_twenty_short_calls_are_suspect_unless_the_caller_is_verified() -> None:
    noon = datetime(2026, 3, 2, 12, tzinfo=UTC)
    rows = [
        example(
            Call,
            id=f"{caller}/{n}",
            caller=caller,
            callee=f"+3310{n:07}",
            started=noon + timedelta(seconds=n),
            seconds=2,
        )
        for caller in ("+33600000001", "+33600000002")
        for n in range(20)
    ]
    known = example(Subscriber, number="+33600000002", since=datetime(2020, 1, 1, tzinfo=UTC), verified=True)
    answer = run(calls, rows, dimensions={"subscribers": [known]}).views["callers"]
    assert {(row["verified"], row["suspect"]) for row in answer.to_pylist()} == {(None, True), (True, False)}
