"""Windows over event time, as SQL: the tile a row falls in, and the windows that tiles make up.

A row is counted in exactly one *tile*, a fixed range of µs in UTC. Tiles are what is merged and stored; the windows
that a user declared are merged from tiles when results are made. So a sliding window counts each row once, a calendar
window (a day in Paris, a month) needs no arithmetic on every row. Session windows have no tiles: rows of a key less
than the gap apart belong together (Akidau et al., The Dataflow Model, VLDB 2015), in whole ms as Beam.
"""

import dataclasses
import datetime
import functools
import math
import re
import zoneinfo
from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.transforms import query
from pipelines.transforms.errors import UserError

Micros = npt.NDArray[np.int64]
"""Times, µs UTC."""

_MICROS = {"s": 10**6, "m": 60 * 10**6, "h": 3600 * 10**6, "d": 86400 * 10**6, "w": 7 * 86400 * 10**6}
_MONTHS = {"mo": 1, "q": 3, "y": 12}
_HOUR, _QUARTER, _DAY = _MICROS["h"], _MICROS["h"] // 4, _MICROS["d"]
_YEAR_ONE = 719_162 * _DAY
"""From the year 1 to 1970."""
_MONDAY = 4 * _DAY
"""1970-01-05, a Monday: where windows of whole days and weeks start counting."""


class WindowError(UserError):
    """A window that cannot be: says which value, and what it may be."""


@dataclasses.dataclass(frozen=True)
class Duration:
    """A length of time: µs for s m h d w, or calendar months for mo q y.

    >>> Duration.parse("5m").micros, Duration.parse("1q").months
    (300000000, 3)
    """

    text: str
    micros: int
    months: int

    @staticmethod
    @functools.cache
    def parse(text: str) -> "Duration":
        match = re.fullmatch(r"([1-9]\d{0,8})(s|m|h|d|w|mo|q|y)", text)
        if not match:
            raise WindowError(f"duration {text!r}: a whole number and a unit, as in 10s 5m 2h 1d 1w 1mo 1q 1y")
        number, unit = int(match[1]), match[2]
        return Duration(text, number * _MICROS.get(unit, 0), number * _MONTHS.get(unit, 0))

    @staticmethod
    def fixed(text: str, what: str) -> int:
        """µs of a duration that the calendar does not bend; ``0s`` is allowed."""
        if text in ("0s", "0"):
            return 0
        duration = Duration.parse(text)
        if duration.months:
            raise WindowError(f"{what}={text!r}: months have no fixed length; use s m h d w")
        return duration.micros


def floor_sql(time: str, width: int, offset: int = 0) -> str:
    """SQL for the start of the fixed range that ``time`` (BIGINT µs) lies in, also before 1970."""
    shifted = f"({time} - {offset})" if offset else f"({time})"
    return f"({time} - ({shifted} % {width} + {width}) % {width})"


class Window(ABC):
    """How a view divides event time."""

    @property
    def tile(self) -> int | None:
        """Width of a tile in µs, or None where there is only one (Whole) or none (Session)."""
        return None

    @property
    def overlapping(self) -> bool:
        """Whether a window has several tiles, or a tile several windows."""
        return False

    @property
    def longest(self) -> int | None:
        """No window is longer than this many µs; None: no bound."""
        return None

    def tile_sql(self, time: str) -> str:
        """SQL for the number of a row's tile from its event time in BIGINT µs: one division a row, never negative."""
        return "NULL::BIGINT" if self.tile is None else f"({time} + {self._shift}) // {self.tile}"

    def tile_start_sql(self, number: str) -> str:
        """SQL for the start of a tile, BIGINT µs, from its number: once a group."""
        return f"{number}::BIGINT" if self.tile is None else f"({number} * {self.tile} - {self._shift})"

    @property
    def _shift(self) -> int:
        """What makes every event time (from the year 1) positive, and a tile's first µs a multiple of its width."""
        assert self.tile
        offset = _MONDAY % self.tile if self.tile % _DAY == 0 else 0
        return (_YEAR_ONE // self.tile + 2) * self.tile - offset

    @abstractmethod
    def windows_sql(self, tiles: str) -> str:
        """A SELECT that adds ``window_start`` and ``window_end`` (BIGINT µs) to the rows of ``tiles`` by ``_tile``."""

    @abstractmethod
    def ends(self, times: Micros) -> Micros:
        """The end of the last window that a row of each event time is in."""

    def _tiles(self, times: Micros) -> Micros:
        assert self.tile
        return (times + self._shift) // self.tile * self.tile - self._shift


@dataclasses.dataclass(frozen=True)
class Whole(Window):
    """One window over all time: window_start and window_end are null."""

    def windows_sql(self, tiles: str) -> str:
        return f"SELECT *, NULL::BIGINT AS window_start, NULL::BIGINT AS window_end FROM {tiles}"

    def ends(self, times: Micros) -> Micros:
        raise ValueError("Whole never ends: the speed layer keeps it by the hour")


@dataclasses.dataclass(frozen=True)
class Tumbling(Window):
    """Windows of equal length, one after the other; days and longer follow the calendar of ``timezone``.

    ``1d`` in a zone with daylight saving has days of 23 and 25 hours. Weeks start on Monday, quarters in January.
    Windows under a day are aligned in UTC. A zone's offsets from before standard time (not multiples of 15 minutes) are
    rounded to the tile that holds the change.
    """

    every: str
    _: dataclasses.KW_ONLY
    timezone: str = "UTC"

    def __post_init__(self) -> None:
        duration = Duration.parse(self.every)
        if self.timezone not in zoneinfo.available_timezones():
            raise WindowError(f"Tumbling(timezone={self.timezone!r}): not an IANA time zone, such as Europe/Paris")
        if self.timezone != "UTC" and duration.micros and duration.micros % _DAY:
            raise WindowError(
                f"Tumbling({self.every!r}, timezone={self.timezone!r}): windows under a day are aligned in UTC; "
                "drop timezone, or use whole days"
            )

    @property
    def _calendar(self) -> bool:
        return self.timezone != "UTC" or Duration.parse(self.every).months > 0

    @property
    def overlapping(self) -> bool:
        return self._calendar

    @property
    def tile(self) -> int:
        if not self._calendar:
            return Duration.parse(self.every).micros
        if self.timezone == "UTC":
            return _DAY
        return _HOUR if _whole_hours(self.timezone) else _QUARTER

    @property
    def longest(self) -> int:
        duration = Duration.parse(self.every)
        return duration.months * 31 * _DAY + duration.micros + (_DAY if self._calendar else 0)

    def windows_sql(self, tiles: str) -> str:
        duration = Duration.parse(self.every)
        if not self._calendar:
            return f"SELECT *, _tile AS window_start, _tile + {duration.micros} AS window_end FROM {tiles}"
        interval = f"INTERVAL {duration.months} MONTH" if duration.months else f"INTERVAL {duration.micros // _DAY} DAY"
        origin = "TIMESTAMP '1970-01-01'" if duration.months else "TIMESTAMP '1970-01-05'"
        local = f"time_bucket({interval}, make_timestamptz(_tile) AT TIME ZONE '{self.timezone}', {origin})"
        return (
            f"SELECT t.*, c.window_start, c.window_end FROM {tiles} t JOIN ("
            f"SELECT _tile, {self._instant('_local')} AS window_start, "
            f"{self._instant(f'(_local + {interval})')} AS window_end "
            f"FROM (SELECT DISTINCT _tile, {local} AS _local FROM {tiles})) c ON t._tile = c._tile"
        )

    def ends(self, times: Micros) -> Micros:
        """
        >>> Tumbling("1d", timezone="Europe/Paris").ends(np.array([0])).tolist()  # ends at 23:00 UTC
        [82800000000]
        """
        tiles = self._tiles(times)
        if not self._calendar:
            return tiles + self.tile
        distinct, places = np.unique(tiles, return_inverse=True)
        known = _ends(self)
        if unknown := [tile for tile in distinct.tolist() if tile not in known]:
            found = query.run(
                f"SELECT _tile, window_end FROM ({self.windows_sql('tiles')})",
                {"tiles": pa.table([unknown], ["_tile"])},
            )
            known.update(zip(found["_tile"].to_pylist(), found["window_end"].to_pylist(), strict=True))
        return np.array([known[tile] for tile in distinct.tolist()], np.int64)[places]

    def _instant(self, local: str) -> str:
        """When a local midnight is, in µs: the first of two, where clocks go back over it (Havana)."""
        at = f"epoch_us({local} AT TIME ZONE '{self.timezone}')"
        before = f"{at} - {_HOUR}"
        return (
            f"CASE WHEN make_timestamptz({before}) AT TIME ZONE '{self.timezone}' = {local} THEN {before} ELSE {at} END"
        )


@dataclasses.dataclass(frozen=True)
class Sliding(Window):
    """Windows of length ``size`` that start every ``every``: a row is in size/every of them, and counted in one tile.

    Where ``every`` is whole days, they start counting from a Monday.
    """

    size: str
    _: dataclasses.KW_ONLY
    every: str

    def __post_init__(self) -> None:
        size, every = Duration.fixed(self.size, "Sliding size"), Duration.fixed(self.every, "Sliding every")
        if not 0 < every <= size:
            raise WindowError(f"Sliding({self.size!r}, every={self.every!r}): every must be at most size")
        if size // every > 10_000:
            raise WindowError(
                f"Sliding({self.size!r}, every={self.every!r}): every row would be in {size // every} windows"
            )

    @property
    def overlapping(self) -> bool:
        return True

    @property
    def tile(self) -> int:
        both = math.gcd(Duration.fixed(self.size, "size"), Duration.fixed(self.every, "every"))
        return both if both % _DAY == 0 else math.gcd(both, _MONDAY)

    @property
    def longest(self) -> int:
        return Duration.fixed(self.size, "size")

    def windows_sql(self, tiles: str) -> str:
        size, every, offset = self._measures
        last = floor_sql("_tile", every, offset)
        first = f"({last} - {(size - 1) // every * every})"
        return (
            f"SELECT *, window_start + {size} AS window_end FROM ("
            f"SELECT *, unnest(range({first}, {last} + 1, {every})) AS window_start FROM {tiles}) "
            f"WHERE window_start + {size} > _tile"
        )

    def ends(self, times: Micros) -> Micros:
        size, _, _ = self._measures
        return self._last(self._tiles(times)) + size

    def opens(self, ends: Micros) -> Micros:
        """The start of the first window that ends after each of these times.

        >>> Sliding("10m", every="5m").opens(np.array([600_000_000])).tolist()
        [300000000]
        """
        size, every, _ = self._measures
        return self._last(ends - size) + every

    def _last(self, times: Micros) -> Micros:
        """The start of the last window that starts at or before each time."""
        _, every, offset = self._measures
        return times - (times - offset) % every

    @property
    def _measures(self) -> tuple[int, int, int]:
        size, every = Duration.fixed(self.size, "size"), Duration.fixed(self.every, "every")
        return size, every, _MONDAY if every % _DAY == 0 else 0


@dataclasses.dataclass(frozen=True)
class Session(Window):
    """Rows of one key less than ``gap`` apart; the window ends ``gap`` after its last row. Event times in whole ms."""

    gap: str

    def __post_init__(self) -> None:
        if Duration.fixed(self.gap, "Session gap") < 1000:
            raise WindowError(f"Session({self.gap!r}): the gap is at least 1s")

    @property
    def micros(self) -> int:
        return Duration.fixed(self.gap, "gap")

    def islands_sql(self, parts: str, keys: tuple[str, ...]) -> str:
        """A SELECT that numbers (``_island``) the sessions of each key in ``parts``, by ``_start`` and ``_last``.

        Rows that are equal in both come in another order in each of the two sorts, so their sums include each other.
        """
        partition = f"PARTITION BY {', '.join(keys)} " if keys else ""
        order = f"({partition}ORDER BY _start, _last"
        return (
            f"SELECT *, sum(_opens) OVER {order} RANGE UNBOUNDED PRECEDING) AS _island FROM ("
            f"SELECT *, coalesce(_start - max(_last) OVER {order} ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) "
            f">= {self.micros}, true)::INT AS _opens FROM {parts})"
        )

    def windows_sql(self, tiles: str) -> str:
        return f"SELECT *, _start AS window_start, _last + {self.micros} AS window_end FROM {tiles}"

    def ends(self, times: Micros) -> Micros:
        """The end of a session of that row alone."""
        return times - times % 1000 + self.micros


@functools.lru_cache
def _ends(window: Tumbling) -> dict[int, int]:
    """The end of the calendar window that a tile is in, of the tiles that were asked for: a live run asks again and
    again, and a query costs some ms."""
    return {}


@functools.lru_cache
def _whole_hours(timezone: str) -> bool:
    zone, hour = zoneinfo.ZoneInfo(timezone), datetime.timedelta(hours=1)
    days = (datetime.datetime(year, month, 1, tzinfo=zone) for year in range(1970, 2038) for month in (1, 4, 7, 10))
    return all((day.utcoffset() or hour) % hour == datetime.timedelta(0) for day in days)
