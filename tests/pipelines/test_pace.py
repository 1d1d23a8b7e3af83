from collections.abc import Iterator

import pyarrow as pa
import pytest

from pipelines.pace import TICK, Pace
from pipelines.transforms.errors import UserError

SECOND = 1_000_000


class Clock:
    """Time that passes only by waiting; after ``until`` it is to stop."""

    def __init__(self, until: float = float("inf")) -> None:
        self.now, self.until = 1000.0, 1000.0 + until

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> bool:
        self.now = min(self.now + seconds, self.until)
        return self.now >= self.until


def given(pace: Pace, clock: Clock, times: list[int], step: int = 1000) -> Iterator[tuple[float, list[int]]]:
    tables = [pa.table({"_when": pa.array(times[at : at + step], pa.int64())}) for at in range(0, len(times), step)]
    for piece in pace.of(tables):
        yield clock.now - 1000.0, piece["_when"].to_pylist()


def test_by_rate_each_row_has_its_time() -> None:
    clock = Clock()
    found = list(given(Pace(rate=50, clock=clock, wait=clock.wait), clock, list(range(1000)), step=300))
    assert [row for _, rows in found for row in rows] == list(range(1000))
    assert all(at == pytest.approx(rows[0] / 50) for at, rows in found)
    assert max(len(rows) for _, rows in found) == 5


def test_by_speedup_a_row_comes_when_its_time_does() -> None:
    clock = Clock()
    times = [5 * SECOND + n * n * 10_000 for n in range(300)]
    found = list(given(Pace(speedup=30, clock=clock, wait=clock.wait), clock, times, step=70))
    assert [row for _, rows in found for row in rows] == times
    for at, rows in found:
        assert at == pytest.approx((rows[-1] - times[0]) / SECOND / 30)
        assert rows[-1] - rows[0] <= TICK * 30 * SECOND


def test_what_is_behind_does_not_wait() -> None:
    clock, at = Clock(), list[float]()
    for now, _ in given(Pace(rate=10, clock=clock, wait=clock.wait), clock, list(range(20))):
        at.append(now)
        clock.now += 1.0 if len(at) == 5 else 0.0
    assert at[:5] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4]) and at[5:15] == pytest.approx([1.4] * 10)
    assert at[15:] == pytest.approx([1.5, 1.6, 1.7, 1.8, 1.9])


def test_it_stops_in_the_midst_of_a_wait() -> None:
    clock = Clock(until=3.0)
    found = list(given(Pace(speedup=1, clock=clock, wait=clock.wait), clock, [0, SECOND, 10**15]))
    assert [rows for _, rows in found] == [[0], [SECOND]] and clock.now == 1003.0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rate": 1, "speedup": 1}, "--rate and --speedup: one of them"),
        ({"rate": 0}, "--rate=0: more than 0"),
        ({"speedup": float("inf")}, "--speedup=inf: more than 0"),
    ],
)
def test_errors_are_for_people(settings: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Pace(**settings)  # type: ignore[arg-type]
