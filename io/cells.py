"""Arrow columns to the cells of a row store and back, exactly: integers, floats, text and bytes.

| Arrow | cell |
|---|---|
| integers, bool, dates, times, timestamps, durations | int (uint64 as the int64 of the same bits; times in units) |
| floats | float; NaN as its 8 bytes, as SQL stores have no NaN |
| strings, decimals | text |
| binary | bytes |
| lists and structs of fixed-width types without inner nulls | the values' bytes one after another, little-endian |
| any other nested value | text: base64 of its Arrow IPC record batch of one row |
"""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types


def encode(column: pa.Array) -> list[Any]:
    """The cells of a column.

    >>> encode(pa.array([[1, 2], None], pa.list_(pa.int16())))
    [b'\\x01\\x00\\x02\\x00', None]
    """
    kind = column.type
    if _is_integral(kind):
        return _integers(column)
    if types.is_floating(kind):
        return _floats(column)
    if types.is_decimal(kind):
        return column.cast(pa.string()).to_pylist()  # type: ignore[no-any-return]
    if types.is_nested(kind):
        return _nested(column)
    return column.to_pylist()  # type: ignore[no-any-return]


def decode(cells: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """The column of a type whose cells these are.

    >>> decode([b'\\x01\\x00\\x02\\x00', None], pa.list_(pa.int16())).to_pylist()
    [[1, 2], None]
    """
    if types.is_uint64(kind):
        return pa.array(cells, pa.int64()).view(kind)
    if types.is_boolean(kind):
        return pa.array(cells, pa.int8()).cast(kind)
    if types.is_temporal(kind):
        return pa.array(cells, pa.int32() if kind.bit_width == 32 else pa.int64()).view(kind)
    if types.is_floating(kind):
        return _decode_floats(cells, kind)
    if types.is_decimal(kind):
        return pa.array(cells, pa.string()).cast(kind)
    if types.is_nested(kind):
        return _decode_nested(cells, kind)
    return pa.array(cells, kind)


def canonical(column: pa.Array) -> pa.Array:
    """A key column where equal values have equal cells: one NaN, no -0.0."""
    if not types.is_floating(column.type):
        return column
    plain = pc.add(column, pa.scalar(0.0, column.type))
    return pc.if_else(pc.is_nan(plain), pa.scalar(float("nan"), column.type), plain)


def _is_integral(kind: pa.DataType) -> bool:
    return bool(
        types.is_integer(kind) or types.is_boolean(kind) or (types.is_temporal(kind) and not types.is_interval(kind))
    )


def _integers(column: pa.Array) -> list[Any]:
    if types.is_boolean(column.type):
        column = column.cast(pa.int8())
    elif not types.is_integer(column.type) or types.is_uint64(column.type):
        column = column.view(pa.int32() if column.type.bit_width == 32 else pa.int64())
    return column.to_pylist() if column.null_count else column.to_numpy().tolist()  # type: ignore[no-any-return]


def _floats(column: pa.Array) -> list[Any]:
    wide = column.cast(pa.float64())
    plain = wide.fill_null(0.0).to_numpy()
    cells: list[Any] = wide.to_pylist() if wide.null_count else plain.tolist()
    for place in np.flatnonzero(np.isnan(plain)):
        cells[place] = plain[place].tobytes()
    return cells


def _decode_floats(cells: Sequence[Any], kind: pa.DataType) -> pa.Array:
    try:
        wide = pa.array(cells, pa.float64())
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        wide = pa.array([np.frombuffer(cell)[0] if isinstance(cell, bytes) else cell for cell in cells], pa.float64())
    return wide.cast(kind, safe=False)


def _nested(column: pa.Array) -> list[Any]:
    layout = _layout(column.type)
    if layout is None:
        return [_ipc(column, place) for place in range(len(column))]
    is_list = not types.is_struct(column.type)
    values = column.flatten() if is_list else column.drop_null()
    packed = _pack(values, layout)
    if packed is None:
        return [_ipc(column, place) for place in range(len(column))]
    lengths = pc.list_value_length(column).fill_null(0) if is_list else column.is_valid().cast(pa.int64())
    ends = (np.cumsum(lengths.to_numpy(zero_copy_only=False)) * layout.itemsize).tolist()
    data = packed.tobytes()
    cells: list[Any] = [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    if column.null_count:
        return [cell if valid else None for cell, valid in zip(cells, column.is_valid().to_pylist(), strict=True)]
    return cells


def _decode_nested(cells: Sequence[Any], kind: pa.DataType) -> pa.Array:
    layout = _layout(kind)
    if layout is None or any(isinstance(cell, str) for cell in cells):
        return pa.concat_arrays([_decode_one(cell, kind) for cell in cells]) if cells else pa.nulls(0, kind)
    missing = np.array([cell is None for cell in cells], dtype=bool)
    data = np.frombuffer(b"".join(cell or b"" for cell in cells), layout)
    if types.is_struct(kind):
        places = pa.array(np.cumsum(~missing) - 1, mask=missing)
        return _unpack(data, kind).take(places)
    ends = np.cumsum([len(cell or b"") // layout.itemsize for cell in cells], dtype=np.int64)
    offsets = np.concatenate([[0], ends])
    large = types.is_large_list(kind)
    build = pa.LargeListArray if large else pa.ListArray
    ends_type = pa.int64() if large else pa.int32()
    mask = pa.array(missing) if missing.any() else None
    return build.from_arrays(pa.array(offsets, ends_type), _unpack(data, kind.value_type), type=kind, mask=mask)


def _layout(kind: pa.DataType) -> "np.dtype[Any] | None":
    """The bytes of one element; None where elements are of varying width."""
    if types.is_list(kind) or types.is_large_list(kind):
        return (
            None if types.is_list(kind.value_type) or types.is_large_list(kind.value_type) else _layout(kind.value_type)
        )
    if types.is_struct(kind):
        parts = [_layout(field.type) for field in kind if not types.is_list(field.type)]
        if not parts or len(parts) < kind.num_fields or None in parts:
            return None
        return np.dtype([(f"f{place}", part) for place, part in enumerate(parts)])
    if types.is_boolean(kind) or types.is_dictionary(kind):
        return None
    if types.is_primitive(kind) or types.is_decimal(kind):
        return np.dtype(f"V{kind.bit_width // 8}")
    return None


def _pack(values: pa.Array, layout: "np.dtype[Any]") -> npt.NDArray[Any] | None:
    """The elements' bytes; None where one of them is null."""
    if values.null_count:
        return None
    if types.is_struct(values.type):
        packed = np.empty(len(values), layout)
        for place, child in enumerate(values.flatten()):
            part = _pack(child, layout[place])
            if part is None:
                return None
            packed[f"f{place}"] = part
        return packed
    data = values.buffers()[1]
    if data is None:
        return np.empty(0, layout)
    return np.frombuffer(data, layout, count=len(values), offset=values.offset * layout.itemsize)


def _unpack(data: npt.NDArray[Any], kind: pa.DataType) -> pa.Array:
    if types.is_struct(kind):
        children = [_unpack(data[f"f{place}"], field.type) for place, field in enumerate(kind)]
        return pa.StructArray.from_arrays(children, fields=list(kind))
    return pa.Array.from_buffers(kind, len(data), [None, pa.py_buffer(np.ascontiguousarray(data))])


def _ipc(column: pa.Array, place: int) -> str | None:
    if not column[place].is_valid:
        return None
    batch = pa.record_batch([column.slice(place, 1)], names=[""])
    return base64.b64encode(batch.serialize()).decode()


def _decode_one(cell: Any, kind: pa.DataType) -> pa.Array:
    if cell is None:
        return pa.nulls(1, kind)
    if isinstance(cell, bytes):
        return _decode_nested([cell], kind)
    schema = pa.schema([pa.field("", kind)])
    return pa.ipc.read_record_batch(base64.b64decode(cell), schema).column(0)
