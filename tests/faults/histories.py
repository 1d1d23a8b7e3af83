"""Pipelines of every kind of window, look-up and refusal, and what is sent to them: for kills of live runs."""

import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import Check, Column, Count, Derive, Distinct, Explode, Pipeline, Session, Source, Sum, Tumbling, View
from pipelines.definition import load
from pipelines.examples import flights as flying
from pipelines.options import Deployment
from pipelines.replay import messages
from pipelines.transforms.disorder import Disorder

NAMES = ("flights", "sales", "calls", "sensors")
PARTITIONS = ("0", "1", "2")
PIECE = 15  # rows of a partition that are appended at a time: a turn takes more, so every process reads to the end


class Part:
    """Of a sale."""

    sku: str
    quantity: int


class Sale:
    """Without identity: what is read twice counts twice."""

    at: datetime
    shop: str | None
    cents: Annotated[int, Column(unit="cent")]
    per: int
    parts: list[Part]


SALES = Pipeline(
    "sales",
    source=Source(Sale, event_time="at", disorder="5m", lateness="2d"),
    steps=(Check(positive="cents > 0"), Derive(each="cents // per")),
    views=(
        View("by_day", by="shop", window=Tumbling("1d", timezone="Europe/Paris"), sales=Count(), revenue=Sum("cents")),
        View("by_month", window=Tumbling("1mo", timezone="Europe/Paris"), sales=Count(), shops=Distinct("shop")),
        View("rushes", window=Session("2m"), sales=Count(), revenue=Sum("cents")),
        View("visits", by="shop", window=Session("10m"), sales=Count()),
        View("products", by="sku", window=Tumbling("1h"), steps=(Explode("parts"),), units=Sum("quantity"), n=Count()),
    ),
)


def definition(name: str) -> Pipeline:
    return SALES if name == "sales" else load(name)


def disorder(name: str) -> Disorder:
    """Late rows in two of them; in the others none, so that a batch run has the same answers."""
    return {
        "flights": Disorder("12h", duplicate=0.05, corrupt=0.02, seed=1),
        "sales": Disorder("4h", corrupt=0.03, seed=2),
        "calls": Disorder("1h", late=0.04, duplicate=0.05, corrupt=0.02, seed=3),
        "sensors": Disorder("6h", late=0.03, duplicate=0.1, corrupt=0.02, seed=4),
    }[name]


def history(name: str, n: int) -> pa.Table | str:
    """Rows in event-time order."""
    chance, start = random.Random(name), datetime(2024, 3, 31, 12, tzinfo=UTC)
    gap = {"sales": 100, "calls": 12, "sensors": 150, "flights": 0}[name]
    times = [start + timedelta(seconds=gap * number + chance.random() * gap) for number in range(n)]
    if name == "sales":
        rows: list[dict[str, Any]] = [
            {
                "at": at if chance.random() > 0.004 else datetime(2999, 1, 1, tzinfo=UTC),
                "shop": chance.choice([None, "a", "b", "é"]),
                "cents": chance.randrange(-20, 1_000),
                "per": chance.choice([0, *[1, 2, 3] * 20]),
                "parts": [{"sku": chance.choice("xyz"), "quantity": chance.randrange(5)}] * chance.randrange(3),
            }
            for at in times
        ]
        return pa.Table.from_pylist(rows, definition(name).source.schema.arrow)
    if name == "calls":
        numbers = [f"+336000000{number:02}" for number in range(6)]
        rows = [
            {
                "id": f"call {number}",
                "caller": chance.choice([*numbers, "anonymous"]),
                "callee": chance.choice(numbers),
                "started": at,
                "ended": at + timedelta(seconds=chance.randrange(-1, 60)) if chance.random() < 0.9 else None,
                "seconds": chance.randrange(60),
            }
            for number, at in enumerate(times)
        ]
        return pa.Table.from_pylist(rows, definition(name).source.schema.arrow)
    if name == "sensors":
        rows = [
            {
                "sensor": chance.choice("ab"),
                "at": at,
                "sequence": number,
                "celsius": chance.choice([None, 200.0, round(chance.uniform(-10, 30), 1)]),
            }
            for number, at in enumerate(times)
        ]
        return pa.Table.from_pylist(rows, definition(name).source.schema.arrow)
    return flying.HISTORY()


def dimensions(folder: Path, name: str) -> dict[str, str]:
    if name != "calls":
        return flying.DIMENSIONS() if name == "flights" else {}
    path = folder / "subscribers.parquet"
    if not path.exists():
        of = definition(name).dimensions[0]
        rows = [
            {"number": f"+336000000{n:02}", "since": datetime(2020, 1, 1, tzinfo=UTC), "plan": "p", "verified": n > 3}
            for n in range(5)
        ]
        pq.write_table(pa.Table.from_pylist(rows, of.schema.arrow), path)
    return {"subscribers": str(path)}


def deployment(folder: Path, name: str, **places: Any) -> Deployment:
    """Everything under one folder."""
    return Deployment(
        dimensions=dimensions(folder, name),
        warehouse=str(folder / "warehouse"),
        store=str(folder / "store.db"),
        dead_letters=str(folder / "dead"),
        state=str(folder / "state"),
        report=str(folder / "run.json"),
        trigger=1_000,
        **places,
    )


def sent(name: str, kills: int) -> dict[str, list[pa.Table]]:
    """What a producer appends, in pieces by partition."""
    n = 300 * kills  # more than processes read that die: the last one reads the rest
    start = datetime(2013, 1, 1, 10, tzinfo=UTC)
    stop = start + timedelta(hours=n / 36) if name == "flights" else None
    every: dict[str, list[pa.Table]] = {partition: [] for partition in PARTITIONS}
    told = messages(
        definition(name), history(name, n), disorder(name), partitions=PARTITIONS, start=stop and start, stop=stop
    )
    for piece in told:
        for partition, table in piece.items():
            every[partition].append(table)
    pieces = {}
    for partition, tables in every.items():
        table = pa.concat_tables(tables)
        pieces[partition] = [table.slice(at, PIECE) for at in range(0, len(table), PIECE)]
    return pieces
