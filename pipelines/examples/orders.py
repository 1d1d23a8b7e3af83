"""Orders with their lines: revenue in euro, what came back, and what sells, by the day in Paris."""

from datetime import datetime
from decimal import Decimal
from typing import Annotated

from pipelines import Check, Column, Count, Derive, Dimension, Explode, Lookup, Pipeline, Source, Sum, Tumbling, View
from pipelines.testing import example, run


class Line:
    """Some units of a product; a return has a negative quantity."""

    sku: str
    quantity: int
    price: Annotated[Decimal, Column("of one, in the order's currency", scale=2)]


class Order:
    """An order, or a return."""

    id: str
    at: datetime
    country: Annotated[str, Column("two capitals, ISO 3166")]
    currency: Annotated[str, Column("ISO 4217")]
    lines: list[Line]


class Rate:
    """What one unit of a currency is worth."""

    currency: str
    euro: Annotated[Decimal, Column(unit="EUR", scale=6)]


rates = Dimension("rates", Rate, key="currency")
to_lines = (Explode("lines"), Derive(amount="quantity * price * euro"))
paris = Tumbling("1d", timezone="Europe/Paris")

orders = Pipeline(
    "orders",
    doc="revenue, returns and products by the day in Paris",
    source=Source(Order, event_time="at", identity="id", disorder="5m", lateness="7d"),
    steps=(
        Check(iso_country="country = upper(country)"),
        Lookup(rates, on="currency", take="euro", missing="reject"),
    ),
    views=(
        View("orders_by_country", by="country", window=paris, orders=Count()),
        View(
            "revenue_by_country",
            by="country",
            window=paris,
            steps=to_lines,
            revenue=Sum("amount"),
            returned=Sum("-amount", where="quantity < 0"),
            return_share="returned / (revenue + returned)",
        ),
        View(
            "products",
            by=("country", "sku"),
            window=paris,
            steps=to_lines,
            revenue=Sum("amount"),
            units=Sum("quantity"),
        ),
    ),
)


def test_a_return_lowers_revenue() -> None:
    bought = example(Line, quantity=4, price=Decimal("10.00"))
    returned = example(Line, quantity=-1, price=Decimal("10.00"))
    rows = [
        example(Order, id=str(n), country="FR", currency="EUR", lines=[line])
        for n, line in enumerate((bought, returned))
    ]
    answer = run(orders, rows, dimensions={"rates": [example(Rate, currency="EUR", euro=Decimal(1))]}).views
    assert answer["revenue_by_country"].select(["revenue", "returned", "return_share"]).to_pylist() == [
        {"revenue": Decimal(30), "returned": Decimal(10), "return_share": 0.25}
    ]
