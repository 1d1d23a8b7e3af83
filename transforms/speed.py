"""The open windows of a view: what the speed layer keeps until no row in time can change them. No Beam in here.

State is kept in pieces, immutable tables of partial states (``ViewPlan.partial_schema``) that each span a range of
tiles, or of sessions. A batch of partials replaces the pieces that it touches and no other, and gives the answers of
exactly those windows that it changed.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.transforms import query
from pipelines.transforms.conservation import merge, tally
from pipelines.transforms.deadletters import DEAD_LETTERS
from pipelines.transforms.expressions import quote
from pipelines.transforms.lateness import SINCE, WATERMARK, Lateness
from pipelines.transforms.protect import Cipher
from pipelines.transforms.view import ViewPlan
from pipelines.transforms.windows import Micros, Session, Sliding

PIECE = 1 << 16
"""Rows of a piece, at most."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """A kept table, by name. low, high: µs, its least and greatest tile; of sessions, first and last row."""

    name: str
    low: int
    high: int
    rows: int


@dataclasses.dataclass(frozen=True)
class Advanced:
    """What a batch of partials made of a view. kept: the pieces that stay. tables: new pieces, not named yet.
    answers: the plan's schema, every window that changed. gone: keys and window_start of sessions that others absorbed.
    rows: how many rows the state is of now, less those it was of before.
    """

    kept: tuple[Piece, ...]
    tables: list[pa.Table]
    answers: pa.Table
    gone: pa.Table
    rows: int


@dataclasses.dataclass(frozen=True)
class Timely:
    """rows: those in time, of a sliding view with SINCE. late: rows late for all their windows; partly: for some."""

    rows: pa.Table
    late: int
    partly: int


@dataclasses.dataclass(frozen=True)
class OpenView:
    """A view as the speed layer keeps it. plan: compiled live. rule: when its rows are late."""

    plan: ViewPlan
    rule: Lateness

    def timely(self, rows: pa.Table) -> Timely:
        """Cleaned rows (with event_time and WATERMARK) without those that are late for this view."""
        times = rows["event_time"].cast(pa.int64()).to_numpy()
        watermark = rows[WATERMARK.name].to_numpy()
        late = self.rule.late(times, watermark)
        since = self.rule.since(times, watermark)
        if SINCE.name in self.plan.partial_schema.names:
            rows = rows.append_column(SINCE, since)
        partly = len(since) - since.null_count - int(late.sum())
        return Timely(rows.filter(pa.array(~late)) if late.any() else rows, int(late.sum()), max(partly, 0))

    def partial(
        self, rows: pa.Table, dimensions: Mapping[str, pa.Table], cipher: Cipher | None, format: str
    ) -> tuple[pa.Table, pa.Table, pa.Table]:
        """Cleaned rows of a log through the view's own steps to partial states of those in time; dead letters and
        tallies. format: of the log's payloads."""
        part, dead, tallies = f"view:{self.plan.name}", [DEAD_LETTERS.empty_table()], []
        if self.plan.chain is not None:
            outcome = dataclasses.replace(self.plan.chain, format=format).run(rows, dimensions, cipher)
            rows = outcome.rows
            dead.append(outcome.dead)
            tallies.append(outcome.tallies)
        timely = self.timely(rows)
        states, refused = self.plan.tried(timely.rows, cipher)
        taken = timely.rows
        if refused is not None:
            taken = refused.rows
            dead.append(refused.dead)
            tallies.append(refused.tallies)
        tallies += [tally(part, "late", timely.late), tally(part, "partly_late", timely.partly)]
        tallies.append(tally(part, "rows_in", len(taken)))
        return states, pa.concat_tables(dead), merge(tallies)

    def span(self, states: pa.Table) -> tuple[int, int]:
        """The range (low, high) of a piece."""
        low, high = ("_start", "_last") if self._session else ("_tile", "_tile")
        return pc.min(states[low]).as_py(), pc.max(states[high]).as_py()

    def closed(self, piece: Piece, watermark: int) -> bool:
        """Whether nothing in a piece can change any more."""
        return bool(self.rule.closed(pa.array([piece.high]).to_numpy(), watermark)[0])

    def due(self, states: pa.Table) -> Micros:
        """For each state the end (µs) of the first window that it is in: when its answer is due."""
        window, times = self.plan.window, states["_last" if self._session else "_tile"].to_numpy()
        return window.opens(times) + window.longest if isinstance(window, Sliding) else window.ends(times)

    def closes(self, states: pa.Table) -> Micros:
        """For each state the watermark (µs) from which on it can no longer change."""
        return self.rule.closes(states["_last" if self._session else "_tile"].to_numpy())

    def touched(self, states: pa.Table, by: pa.Table) -> pa.Table:
        """The states of the keys that another table has, merged."""
        found = self._touched(states, by, [])
        return self.plan.merged([found.slice(0, 1), found.slice(1)])  # one table alone is merged already

    def advance(
        self, pieces: Sequence[Piece], read: Callable[[Piece], pa.Table], parts: Iterable[pa.Table], watermark: int
    ) -> Advanced:
        """Merges partial states into the pieces.

        read: a piece's table. watermark: µs; what was closed by then leaves the state, so it must be one that is
        committed, with the answers it closed delivered.
        """
        new = self.plan.merged(parts)
        if not len(new):
            empty = self.plan.schema.empty_table()
            return Advanced(tuple(pieces), [], empty, empty.select(self._named), 0)
        return (self._sessions if self._session else self._tiles)(pieces, read, new, watermark)

    def answered(self, held: Sequence[pa.Table], new: pa.Table) -> Advanced:
        """As ``advance``, of merged states that are added to those that are held, which stay as they are. Not of
        sessions, nor of windows that overlap."""
        known = self._touched(pa.concat_tables(held), new, ["_tile"]) if held else new.slice(0, 0)
        answers = self.plan.finished(self.plan.merged([known, new]))
        return Advanced((), [], answers, answers.select(self._named).slice(0, 0), _total([new]))

    def _tiles(
        self, pieces: Sequence[Piece], read: Callable[[Piece], pa.Table], new: pa.Table, watermark: int
    ) -> Advanced:
        low, high = self.span(new)
        hot = [piece for piece in pieces if piece.low <= high and piece.high >= low]
        before = [read(piece) for piece in hot]
        merged = self.plan.merged([*before, new])
        if self.plan.window.overlapping:
            cold = [piece for piece in pieces if piece not in hot]
            answers = self._overlapping(cold, read, merged, new)
        else:
            answers = self.plan.finished(self._touched(merged, new, ["_tile"]))
        rows = _total([merged]) - _total(before)
        kept = tuple(piece for piece in pieces if piece not in hot)
        return Advanced(
            kept, self._cut(merged, "_tile", watermark), answers, answers.select(self._named).slice(0, 0), rows
        )

    def _overlapping(
        self, cold: list[Piece], read: Callable[[Piece], pa.Table], merged: pa.Table, new: pa.Table
    ) -> pa.Table:
        """The answers of every window that has one of the new tiles: with all the tiles of these windows."""
        since = f"coalesce(window_start >= {SINCE.name}, true)" if SINCE.name in new.column_names else "true"
        windows = query.run(
            f"SELECT DISTINCT {', '.join([*self._keys, 'window_start', 'window_end'])} "
            f"FROM ({self.plan.window.windows_sql('batch')}) WHERE {since}",
            {"batch": new},
        )
        start, end = pc.min(windows["window_start"]).as_py(), pc.max(windows["window_end"]).as_py()
        around = [read(piece) for piece in cold if piece.low < end and piece.high >= start]
        states = self._touched(pa.concat_tables([merged, *around]), new, [], f"a._tile >= {start} AND a._tile < {end}")
        moment = pa.timestamp("us", "UTC")
        windows = windows.set_column(len(self._keys), "window_start", windows["window_start"].cast(moment))
        return self._touched(self.plan.finished(states), windows, ["window_start"])

    def _sessions(
        self, pieces: Sequence[Piece], read: Callable[[Piece], pa.Table], new: pa.Table, watermark: int
    ) -> Advanced:
        assert isinstance(self.plan.window, Session)
        low, high = self.span(new)
        gap = self.plan.window.micros
        hot = [piece for piece in pieces if piece.low - gap <= high and piece.high + gap >= low]
        before = [read(piece) for piece in hot]
        merged = self.plan.merged([*before, new])
        old = pa.concat_tables([new.slice(0, 0), *before])
        same = self._join([])
        absorbed = query.run(
            f"SELECT {', '.join([*self._keys, 'make_timestamptz(_start) AS window_start'])} "
            f"FROM old a ANTI JOIN merged b ON {same} AND a._start = b._start",
            {"old": old, "merged": merged},
        )
        changed = query.run(
            f"SELECT a.* FROM merged a SEMI JOIN new b ON {same} AND b._start BETWEEN a._start AND a._last",
            {"merged": merged, "new": new},
        )
        kept = tuple(piece for piece in pieces if piece not in hot)
        tables = self._cut(merged, "_last", watermark)
        return Advanced(kept, tables, self.plan.finished(changed), absorbed, _total([merged]) - _total(before))

    def _cut(self, merged: pa.Table, time: str, watermark: int) -> list[pa.Table]:
        """The states that may still change, as new pieces."""
        closed = self.rule.closed(merged[time].to_numpy(), watermark)
        if closed.any():
            merged = merged.filter(pa.array(~closed))
        if len(merged) > PIECE:
            merged = merged.sort_by(time)
        return [merged.slice(at, PIECE) for at in range(0, len(merged), PIECE)]

    def _touched(self, rows: pa.Table, by: pa.Table, also: list[str], where: str = "true") -> pa.Table:
        """The rows whose keys, and these columns, are in another table."""
        sql = f"SELECT a.* FROM rows a SEMI JOIN by_ b ON {self._join(also)} WHERE {where}"
        return query.run(sql, {"rows": rows, "by_": by})

    def _join(self, also: list[str]) -> str:
        columns = [*self._keys, *also]
        return " AND ".join(f"a.{name} IS NOT DISTINCT FROM b.{name}" for name in columns) or "true"

    @property
    def _keys(self) -> list[str]:
        return [quote(name) for name in self.plan.by]

    @property
    def _named(self) -> list[str]:
        return [*self.plan.by, "window_start"]

    @property
    def plain(self) -> bool:
        """Whether its windows are side by side, so that states are merged by key and tile alone."""
        return not self._session and not self.plan.window.overlapping

    @property
    def _session(self) -> bool:
        return isinstance(self.plan.window, Session)


def _total(states: Iterable[pa.Table]) -> int:
    return sum(pc.sum(table["_rows"]).as_py() or 0 for table in states)
