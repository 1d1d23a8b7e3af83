"""Tallies: what every part of a run counted, and the law that they must keep. Nothing is lost in silence.

Tallies are small tables that are summed, so they may be cut, ordered and merged in any way.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Literal

import pyarrow as pa

TALLY = pa.schema(
    [
        pa.field("part", pa.string(), nullable=False),
        pa.field("counter", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("n", pa.int64(), nullable=False),
    ]
)
"""part: "source", "exploded" (what an Explode made of source rows), "view:<name>", "dimension:<name>", "state:<what>".
reason: "" or what a counter is told apart by. n: rows; of state, those that it has more, or fewer, than before."""

SPAN = pa.schema([("first", pa.int64()), ("last", pa.int64())])
"""The least and greatest event time of some rows, µs UTC."""

SOURCE = ("read", "kept", "filtered", "rejected", "late", "duplicate")
"""The counters of part "source", all in source rows."""

Counter = Literal[
    "read", "kept", "filtered", "rejected", "late", "duplicate", "partly_late", "rows_in", "rows_out", "results",
    "unmatched", "held",
]  # fmt: skip


def tally(part: str, counter: Counter, n: int, reason: str = "") -> pa.Table:
    """One count as a table (TALLY) of one row.

    >>> tally("source", "rejected", 4, "possible_speed").to_pylist()
    [{'part': 'source', 'counter': 'rejected', 'reason': 'possible_speed', 'n': 4}]
    """
    return pa.table([[part], [counter], [reason], [n]], schema=TALLY)


def merge(tallies: Iterable[pa.Table]) -> pa.Table:
    """The sums (TALLY), ordered by part, counter and reason.

    >>> merge([tally("source", "read", 2), tally("source", "read", 3)])["n"].to_pylist()
    [5]
    """
    every = pa.concat_tables([TALLY.empty_table(), *tallies])
    keys = ["part", "counter", "reason"]
    sums = every.group_by(keys, use_threads=False).aggregate([("n", "sum")]).rename_columns([*keys, "n"])
    return sums.select(TALLY.names).cast(TALLY).sort_by([(key, "ascending") for key in keys])


@dataclasses.dataclass(frozen=True)
class Conservation:
    """What a run counted. rows: source rows by counter. reasons: rejected source rows by reason. views: (rows in, rows
    out, results) by name. unmatched: rows of look-ups without a match, by dimension and reason. dropped: rows that were
    rejected, filtered or late after the source's law, by part and then reason ("filtered", "late", "partly_late").
    held: rows of state, by what they are.

    >>> counts = Conservation.of(merge([tally("source", "read", 3), tally("source", "kept", 2)]))
    >>> counts.violations()
    ['read 3 = kept 2 + filtered 0 + rejected 0 + late 0 + duplicate 0 is off by 1: rows were lost']
    """

    rows: Mapping[str, int]
    reasons: Mapping[str, int]
    views: Mapping[str, tuple[int, int, int]]
    unmatched: Mapping[str, Mapping[str, int]]
    dropped: Mapping[str, Mapping[str, int]]
    held: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @staticmethod
    def of(tallies: pa.Table) -> "Conservation":
        """Reads a table of tallies (TALLY), merged or not."""
        rows, reasons = dict.fromkeys(SOURCE, 0), {}
        views: dict[str, dict[str, int]] = {}
        unmatched: dict[str, dict[str, int]] = {}
        dropped: dict[str, dict[str, int]] = {}
        held: dict[str, int] = {}
        for row in merge([tallies]).to_pylist():
            kind, _, name = row["part"].partition(":")
            if kind == "source":
                rows[row["counter"]] += row["n"]
                if row["counter"] == "rejected":
                    reasons[row["reason"]] = row["n"]
            elif row["counter"] in ("filtered", "rejected", "late", "partly_late"):
                dropped.setdefault(row["part"], {})[row["reason"] or row["counter"]] = row["n"]
            elif kind == "state":
                held[name] = row["n"]
            elif kind == "view":
                counts = views.setdefault(name, dict.fromkeys(("rows_in", "rows_out", "results"), 0))
                counts[row["counter"]] += row["n"]
            else:
                unmatched.setdefault(name, {})[row["reason"]] = row["n"]
        told = {name: (counts["rows_in"], counts["rows_out"], counts["results"]) for name, counts in views.items()}
        return Conservation(rows, reasons, told, unmatched, dropped, held)

    def equation(self) -> str:
        """read 5 = kept 4 + filtered 0 + rejected 1 + late 0 + duplicate 0"""
        read, *rest = (f"{name} {self.rows[name]:,}" for name in SOURCE)
        return f"{read} = {' + '.join(rest)}"

    def violations(self) -> list[str]:
        """Each broken law in one line, with the difference; empty when nothing was lost and nothing made up."""
        found = []
        difference = self.rows["read"] - sum(self.rows[name] for name in SOURCE[1:])
        if difference:
            found.append(f"{self.equation()} {_off(difference)}")
        for name, (taken, given, _) in self.views.items():
            if taken != given:
                found.append(f"view {name}: rows in {taken:,} = rows out {given:,} {_off(taken - given)}")
        return found


def _off(difference: int) -> str:
    return f"is off by {abs(difference):,}: rows were {'lost' if difference > 0 else 'counted twice'}"
