"""Messages of a log: each kind of poison is refused with its exact bytes, the rest goes on, and schemas may drift."""

from typing import Any

import pyarrow as pa

from pipelines.transforms.decoder import Decoder
from pipelines.transforms.messages import Messages
from pipelines.transforms.schema import RowSchema

PUBLISHED = 1_700_000_000_000_000


class Row:
    """What is sent."""

    n: int
    word: str | None


def batch(*payloads: bytes | None, rows: list[int] | None = None, start: int = 10) -> pa.Table:
    """Messages of one partition."""
    counts = rows or [1] * len(payloads)
    return pa.table(
        {
            "_source": pa.array(["p0"] * len(payloads), pa.string()).dictionary_encode(),
            "_offset": pa.array([start + sum(counts[:at]) for at in range(len(payloads))], pa.int64()),
            "_raw": pa.array(payloads, pa.large_binary()),
            "_published": pa.array([PUBLISHED] * len(payloads), pa.timestamp("us", "UTC")),
            "_rows": pa.array(counts, pa.int32()),
        }
    )


def refused(dead: pa.Table) -> list[tuple[Any, ...]]:
    """Offset, reason and payload of each dead letter."""
    return [tuple(letter[name] for name in ("offset", "reason", "payload")) for letter in dead.to_pylist()]


def test_json_that_cannot_be_read_is_refused_with_its_exact_bytes() -> None:
    good, torn, other = b'{"n": 1}\n', b'{"n": 1\n', b" [1]\r\n"
    decoded = Messages(Decoder(RowSchema.of(Row), "p"), "json").decode(batch(good, torn, None, good, other, b""))
    assert decoded.rows["_offset"].to_pylist() == [10, 13]
    assert decoded.dead is not None
    assert refused(decoded.dead) == [
        (11, "invalid json", torn),
        (12, "empty message", b""),
        (14, "not an object", other),
        (15, "empty message", b""),
    ]
    assert decoded.read == 6
