"""Thermometers that report about once a minute: the latest value, every hour's, and when each was up."""

from datetime import datetime
from typing import Annotated

from pipelines import (
    Check,
    Column,
    Count,
    Derive,
    Distinct,
    Last,
    Max,
    Mean,
    Pipeline,
    Quantile,
    Session,
    Source,
    StdDev,
    Tumbling,
    View,
)
from pipelines.testing import example, run


class Reading:
    """One reading; a sensor that is out of order sends no temperature."""

    sensor: str
    at: datetime
    sequence: int
    celsius: Annotated[float | None, Column(unit="°C")]


sensors = Pipeline(
    "sensors",
    doc="temperatures: the latest, by the hour, and times of silence",
    source=Source(
        Reading,
        event_time="at",
        identity=("sensor", "at", "sequence"),
        disorder="10s",
        lateness="12h",
        invalid="null",
    ),
    steps=(
        Check(in_range="celsius between -40 and 125", on_fail="flag"),
        Derive(minute="date_trunc('minute', at)"),
    ),
    views=(
        View("latest", by="sensor", celsius=Last("celsius"), at=Max("at"), readings=Count()),
        View(
            "by_hour",
            by="sensor",
            window=Tumbling("1h"),
            readings=Count(),
            mean=Mean("celsius"),
            deviation=StdDev("celsius"),
            median=Quantile("celsius", 0.5),
            minutes=Distinct("minute"),
            missing_minutes="60 - minutes",
        ),
        View("uptime", by="sensor", window=Session("5m"), readings=Count()),  # 5 silent minutes end it
    ),
)


def test_a_reading_out_of_range_is_flagged_and_kept() -> None:
    result = run(
        sensors, [example(Reading, celsius=celsius, sequence=n) for n, celsius in enumerate((20.0, 500.0, None))]
    )
    assert result.rows["in_range"].to_pylist() == [True, False, True]
    assert result.views["latest"]["readings"].to_pylist() == [3]
