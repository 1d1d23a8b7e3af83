"""Dead letters: rows that were refused, with the reason, where they came from and what they said.

One schema for every part of the graph, so that one table holds them all and each can be replayed.
"""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from pipelines.transforms import query
from pipelines.transforms.errors import UserError
from pipelines.transforms.expressions import quote
from pipelines.transforms.payloads import bare
from pipelines.transforms.protect import Cipher

DEAD_LETTERS = pa.schema(
    [
        pa.field("pipeline", pa.string(), nullable=False),
        pa.field("step", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("format", pa.string(), nullable=False),
        pa.field("payload", pa.binary(), nullable=False),
        pa.field("key_id", pa.string()),
    ]
)
"""step: what refused the row ("decode", "dedupe", "step 1 (Check)"). reason: a short code, what reports group by.
detail: for a person, never a personal value. source, offset: where the row stands. format: how to read the payload.
payload: the row's exact bytes where the source has any, else the row as JSON. key_id: null where the payload is in the
clear, else the name of the key of its AES-GCM."""

PURPOSE = "dead letters"
"""What the cipher of dead letters is for: ``Cipher(Key.load(), PURPOSE)``."""

_OF_MESSAGES = {"_published", "_watermark", "_expires"}
_BOOKKEEPING = {"_source", "_offset", "_raw", *_OF_MESSAGES}


def refuse(
    rows: pa.Table,
    *,
    pipeline: str,
    step: str,
    reason: pa.Array | pa.ChunkedArray | str,
    detail: pa.Array | pa.ChunkedArray | str,
    format: str,
    cipher: Cipher | None = None,
) -> pa.Table:
    """The dead letters (DEAD_LETTERS) of refused rows, in their order.

    rows: a row table, or a raw one. The payload is `_raw` where the table has it (a file's line without its end),
    else the user's columns as one JSON object, as DuckDB writes it (NaN and Infinity bare, binary as ``\\xFF`` escapes,
    times in UTC), and then format is "json" whatever was given. cipher: encrypts payloads, bound to source and offset.

    >>> rows = pa.table({"x": [1], "_source": pa.array(["a.parquet"]).dictionary_encode(), "_offset": [7]})
    >>> dead = refuse(rows, pipeline="p", step="step 1 (Check)", reason="low", detail="x > 1", format="parquet")
    >>> dead.select(["reason", "source", "offset", "format", "payload"]).to_pylist()
    [{'reason': 'low', 'source': 'a.parquet', 'offset': 7, 'format': 'json', 'payload': b'{"x":1}'}]
    """
    source, offset = rows["_source"].cast(pa.string()), rows["_offset"]
    if "_raw" in rows.column_names:
        lines = format in ("csv", "json") and _OF_MESSAGES.isdisjoint(rows.column_names)
        payload = bare(rows["_raw"]) if lines else rows["_raw"]
    else:
        payload, format = _json(rows), "json"
    if cipher is not None:
        payload = cipher.encrypt(payload, _contexts(source, offset))
    columns = [pipeline, step, reason, detail, source, offset, format, payload, cipher and cipher.key_id]
    arrays = [_column(value, field.type, len(rows)) for value, field in zip(columns, DEAD_LETTERS, strict=True)]
    return pa.table(arrays, schema=DEAD_LETTERS)


def payloads(letters: pa.Table, cipher: Cipher | None = None) -> pa.ChunkedArray:
    """The payloads of dead letters in the clear (binary). Raises UserError where their key is missing or another."""
    sealed = pc.is_valid(letters["key_id"])
    if not pc.any(sealed).as_py():
        return letters["payload"]
    if cipher is None:
        raise UserError(
            f"dead letters are encrypted with key {pc.max(letters['key_id']).as_py()}: set PIPELINES_KEY_FILE"
        )
    closed = pc.if_else(sealed, letters["payload"], pa.scalar(None, pa.binary()))
    return pc.coalesce(cipher.decrypt(closed, _contexts(letters["source"], letters["offset"])), letters["payload"])


def unheld(letters: pa.Table, held: pads.Dataset) -> pa.Table:
    """The dead letters that a table of them does not hold yet: none of the same place, step, reason and payload.

    What a run over a range refuses is added to what other ranges have refused, and the same range may run again.

    >>> letters = pa.Table.from_pylist(
    ...     [dict.fromkeys(DEAD_LETTERS.names, "x") | {"offset": n, "payload": b"x"} for n in (1, 2)], DEAD_LETTERS
    ... )
    >>> unheld(letters, pads.dataset(letters.slice(1)))["offset"].to_pylist()
    [1]
    """
    offsets, there = pc.min_max(letters["offset"]), pads.field("offset")
    near = pads.field("source").isin(letters["source"].unique()) & (there >= offsets["min"]) & (there <= offsets["max"])
    same = ("source", "offset", "step", "reason", "payload")
    sql = f"SELECT letters.* FROM letters ANTI JOIN held USING ({', '.join(map(quote, same))})"
    found = query.run(sql, {"letters": letters, "held": held.to_table(list(same), filter=near)})
    return found.cast(DEAD_LETTERS)


def _json(rows: pa.Table) -> pa.ChunkedArray:
    user = rows.drop_columns([name for name in _BOOKKEEPING if name in rows.column_names])
    return query.run("select to_json(_row)::varchar as payload from _row", {"_row": user})["payload"].cast(pa.binary())


def _contexts(source: pa.ChunkedArray, offset: pa.ChunkedArray) -> Iterator[bytes]:
    return (f"{name}\n{number}".encode() for name, number in zip(source.to_pylist(), offset.to_pylist(), strict=True))


def _column(value: pa.Array | pa.ChunkedArray | str | None, kind: pa.DataType, length: int) -> pa.Array:
    if isinstance(value, pa.Array | pa.ChunkedArray):
        return value.cast(kind)
    return pa.repeat(pa.scalar(value, kind), length)
