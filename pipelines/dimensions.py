"""A live run's dimensions: whole tables, read again from time to time, kept as state files for workers. Beam-free."""

import hashlib
from collections.abc import Callable

import pyarrow as pa

from pipelines.definition import Dimension, Pipeline
from pipelines.io import files
from pipelines.layer import Layer
from pipelines.options import Deployment
from pipelines.transforms.decoder import Decoder
from pipelines.transforms.errors import UserError
from pipelines.transforms.lookup import unique

Clock = Callable[[], float]
"""Seconds, for how long partitions are idle and dimensions old."""


class Dimensions:
    """The pipeline's dimensions as state files, read again when they are older than ``--refresh``."""

    def __init__(self, pipeline: Pipeline, deployment: Deployment, layer: Layer, clock: Clock) -> None:
        self.pipeline, self.deployment, self.layer, self.clock = pipeline, deployment, layer, clock
        self._names: dict[str, str] = {}
        self._read: float | None = None

    def now(self) -> dict[str, str]:
        """Name to state file: the same name for the same rows."""
        at = self.clock()
        if self._read is None or at - self._read >= self.deployment.refresh / 1_000_000:
            self._names = {d.name: self._written(d) for d in self.pipeline.dimensions}
            self._read = at
        return self._names

    def _written(self, of: Dimension) -> str:
        rows = whole(of, self.deployment.dimensions[of.name])
        said = hashlib.blake2b(digest_size=8)
        for batch in rows.combine_chunks().to_batches():
            said.update(batch.serialize())
        name = f"dimension-{of.name}-{said.hexdigest()}"
        if name != self._names.get(of.name):
            self.layer.keep(name, rows)
        return name


def whole(of: Dimension, uri: str) -> pa.Table:
    """The whole of a dimension, its keys checked. Raises UserError for a row that cannot be read."""
    decoder = Decoder(of.schema, of.name)
    parts = [of.schema.arrow.empty_table()]
    for part in files.plan(uri, of.schema, invalid="stop").splits:
        for table in files.read(part):
            decoded = decoder.decode(table)
            if decoded.dead is not None:
                first = decoded.dead.slice(0, 1).to_pylist()[0]
                raise UserError(
                    f"dimension {of.name}: {first['source']} at {first['offset']}: {first['detail']}; "
                    "look-ups need every row, so mend or remove it"
                )
            parts.append(decoded.rows.select(of.schema.arrow.names))
    return unique(of.name, of.key, of.valid_from, pa.concat_tables(parts), of.schema.personal)
