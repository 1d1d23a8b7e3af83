"""How far a stream is, as the last step of its graph sees it: what was read, and what of that has surely arrived.

A source tells the offsets that it has read and the watermark that it then reports. Watermarks follow rows through every
channel of an engine and never overtake one. So once this step's watermark has passed the one that was reported with
some offsets, all that was read before them has been through the graph: what is still missing then is lost.
"""

import dataclasses
from typing import Any

import pyarrow as pa

from pipelines.report import iso
from pipelines.transforms.lateness import NEVER


@dataclasses.dataclass(frozen=True)
class Reached:
    """offsets and watermarks: of each partition, as told last (µs). through: the watermark (µs) that has passed here;
    sure: the offsets that were told with it. waits: the next one to pass, and its offsets. ended: the input is over.

    >>> places = pa.table({"partition": ["a"], "offset": [5], "watermark": [60]})
    >>> reached = Reached().told(places)
    >>> reached.waits, reached.settled
    ((60, {'a': 5}), False)
    >>> reached = reached.passed()
    >>> reached.through, reached.settled
    (60, True)
    """

    offsets: dict[str, int] = dataclasses.field(default_factory=dict)
    watermarks: dict[str, int] = dataclasses.field(default_factory=dict)
    through: int | None = None
    sure: dict[str, int] = dataclasses.field(default_factory=dict)
    waits: tuple[int, dict[str, int]] | None = None
    ended: bool = False

    @staticmethod
    def of(told: dict[str, Any]) -> "Reached":
        """From JSON."""
        waits = told.get("waits")
        return Reached(**{**told, "waits": None if waits is None else (waits[0], waits[1])})

    def json(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self)

    @property
    def complete_through(self) -> str | None:
        """``through``, in ISO 8601: every window that ends by then has had its answer."""
        return iso(self.through)

    @property
    def settled(self) -> bool:
        """Whether nothing of what was read can still be on its way."""
        return self.ended or self.sure == self.offsets

    def told(self, places: pa.Table) -> "Reached":
        """After a source has told of partitions (PLACES), in any order."""
        offsets, watermarks = dict(self.offsets), dict(self.watermarks)
        for place in places.to_pylist():
            name = place["partition"]
            offsets[name] = max(offsets.get(name, 0), place["offset"])
            watermarks[name] = max(watermarks.get(name, NEVER), place["watermark"])
        return dataclasses.replace(self, offsets=offsets, watermarks=watermarks)._waiting()

    def passed(self) -> "Reached":
        """After the watermark that it waits for has passed."""
        if self.waits is None:
            return self
        through, sure = self.waits
        return dataclasses.replace(self, through=through, sure=sure, waits=None)._waiting()

    def _waiting(self) -> "Reached":
        least = min(self.watermarks.values(), default=NEVER)
        if self.waits is not None or least == NEVER or (self.through is not None and least <= self.through):
            return self
        return dataclasses.replace(self, waits=(least, dict(self.offsets)))
