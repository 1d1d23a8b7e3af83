"""The tables of a bundle as one: an engine gives many small ones, and each costs as much as a big one."""

from typing import Any

import pyarrow as pa
from apache_beam.pvalue import TaggedOutput
from apache_beam.transforms.window import GlobalWindows

MOST = 1 << 18
"""Rows that are gathered, at most: what a bundle holds in memory."""


class Gathered:
    """Tables of one schema, in the order they came in.

    >>> gathered = Gathered(most=3)
    >>> gathered.add(pa.table({"x": [1]})) is gathered.add(pa.table({"x": [2]})) is None
    True
    >>> gathered.add(pa.table({"x": [3]}))["x"].to_pylist(), gathered.take()
    ([1, 2, 3], None)
    """

    def __init__(self, most: int = MOST) -> None:
        self.most, self._tables, self._rows = most, list[pa.Table](), 0

    def add(self, table: pa.Table) -> pa.Table | None:
        """One more; all of them, once they are enough."""
        self._tables.append(table)
        self._rows += len(table)
        return self.take() if self._rows >= self.most else None

    def take(self) -> pa.Table | None:
        """All of them, if there are any: it holds none then."""
        tables, self._tables, self._rows = self._tables, [], 0
        if len(tables) < 2:
            return tables[0] if tables else None
        return pa.concat_tables(tables).unify_dictionaries().combine_chunks()


def at_the_end(given: Any) -> Any:
    """What a DoFn gives, as it must be given at the end of a bundle; in the global window."""
    if isinstance(given, TaggedOutput):
        return TaggedOutput(given.tag, GlobalWindows.windowed_value(given.value))
    return GlobalWindows.windowed_value(given)
