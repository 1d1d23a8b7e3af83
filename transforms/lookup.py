"""Dimensions as tables that rows are looked up in."""

import pyarrow as pa

from pipelines.transforms import query
from pipelines.transforms.errors import UserError
from pipelines.transforms.expressions import quote


def unique(
    name: str, key: tuple[str, ...], valid_from: str | None, table: pa.Table, personal: tuple[str, ...] = ()
) -> pa.Table:
    """The dimension's table, if each key (and time) is there once; else a UserError that shows one that is not.

    personal: columns whose values are shown as ``***``.

    >>> unique("airports", ("faa",), None, pa.table({"faa": ["EWR", "EWR"]}))
    Traceback (most recent call last):
    pipelines.transforms.errors.UserError: dimension airports: 2 rows for faa='EWR'; a key may be there once
    """
    columns = (*key, *((valid_from,) if valid_from else ()))
    names = ", ".join(map(quote, columns))
    sql = f"SELECT {names}, count(*) AS _copies FROM batch GROUP BY {names} HAVING count(*) > 1 ORDER BY ALL LIMIT 1"
    twice = query.run(sql, {"batch": table})
    if len(twice):
        row = twice.to_pylist()[0]
        shown = {c: "***" if c in personal else str(row[c]) if c == valid_from else repr(row[c]) for c in columns}
        where = ", ".join(f"{column}={value}" for column, value in shown.items())
        raise UserError(f"dimension {name}: {row['_copies']} rows for {where}; a key may be there once")
    return table
