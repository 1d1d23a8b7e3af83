"""A list per group, in numpy: lengths, and the values of all lists one after the other."""

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Ints = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Lists:
    """A list per group: ``lengths`` of n groups, and all their values one after the other."""

    lengths: Ints
    values: npt.NDArray[Any]

    @staticmethod
    def of(column: pa.ChunkedArray | pa.ListArray) -> "Lists":
        lists = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        return Lists(lengths(lists), lists.flatten().to_numpy())

    def rows(self) -> Ints:
        """The group of every value."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    def cut(self, bounds: Ints) -> list["Lists"]:
        """The groups between each two bounds."""
        ends = np.concatenate([[0], np.cumsum(self.lengths)])[bounds]
        spans = zip(itertools.pairwise(bounds), itertools.pairwise(ends), strict=True)
        return [Lists(self.lengths[a:b], self.values[start:end]) for (a, b), (start, end) in spans]

    @staticmethod
    def joined(parts: Iterable["Lists"]) -> "Lists":
        every = list(parts)
        return Lists(np.concatenate([p.lengths for p in every]), np.concatenate([p.values for p in every]))

    def where(self, groups: npt.NDArray[np.bool_]) -> "Lists":
        return Lists(self.lengths[groups], self.values[np.repeat(groups, self.lengths)])

    def replace(self, groups: npt.NDArray[np.bool_], lists: "Lists") -> "Lists":
        """These lists, with others (in order) in some groups."""
        lengths = self.lengths.copy()
        lengths[groups] = lists.lengths
        values = np.empty(lengths.sum(), self.values.dtype)
        new = np.repeat(groups, lengths)
        values[new] = lists.values
        values[~new] = self.values[~np.repeat(groups, self.lengths)]
        return Lists(lengths, values)

    def arrow(self, kind: pa.DataType) -> pa.Array:
        offsets = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int32)
        values = pa.array(self.values, kind.value_type)
        return pa.ListArray.from_arrays(pa.array(offsets), values, type=kind, mask=pa.array(self.lengths == 0))


def lengths(lists: pa.ListArray) -> Ints:
    """Of the lists of a column; null has none."""
    found: Ints = pc.list_value_length(lists).fill_null(0).to_numpy().astype(np.int64)
    return found


def sums(sizes: npt.NDArray[Any], lengths: Ints) -> Ints:
    """The sum of as many sizes as each length says.

    >>> sums(np.array([1, 2, 3, 4]), np.array([3, 0, 1])).tolist()
    [6, 0, 4]
    """
    ends: Ints = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])[np.concatenate([[0], np.cumsum(lengths)])]
    return np.diff(ends)
