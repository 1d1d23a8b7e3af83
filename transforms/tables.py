"""The element of every PCollection here: an Arrow table, with a coder of its own.

Beam's default coder would pickle a slice together with its whole parent buffer; the IPC stream holds only its rows.
"""

from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.coders import Coder, ListCoder

_WRITE = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
_READ = pa.ipc.IpcReadOptions(use_threads=False)


class TableCoder(Coder):  # type: ignore[misc]
    """pa.Table as one Arrow IPC stream, LZ4, deterministic for equal chunks."""

    def encode(self, value: pa.Table) -> bytes:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, value.schema, options=_WRITE) as writer:
            writer.write_table(value)
        return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]

    def decode(self, encoded: bytes) -> pa.Table:
        return pa.ipc.open_stream(encoded, options=_READ).read_all()

    def estimate_size(self, value: pa.Table) -> int:
        # Beam samples sizes for its metrics; by default it would encode the table for that.
        return int(value.nbytes)

    def is_deterministic(self) -> bool:
        return False

    def to_type_hint(self) -> type:
        return pa.Table  # type: ignore[no-any-return]

    @classmethod
    def from_type_hint(cls, _hint: Any, _registry: Any) -> "TableCoder":
        return cls()

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))


beam.coders.registry.register_coder(pa.Table, TableCoder)

TABLES = ListCoder(TableCoder())
"""The coder of an accumulator: tables that are still to be merged."""
