"""Arrow columns to the cells of a row store and back, exactly: integers, floats, text and bytes.

| Arrow | cell |
|---|---|
| integers, bool, dates, times, timestamps, durations | int (uint64: the int64 of the same bits; times in units) |
| floats | float; NaN as its 8 bytes, as SQL stores have no NaN |
| strings | text |
| decimals | text; without a scale, int where the whole column fits 64 bits |
| binary | bytes |
| lists and structs of fixed-width values, none null inside | their bytes one after another, little-endian |
| other lists and structs | text: the JSON list of their cells (bytes as ``{"": base64}``) |
"""

import base64
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types


def storable(kind: pa.DataType) -> bool:
    """Has this type cells? Maps, unions, intervals and dictionaries have not.

    >>> storable(pa.list_(pa.string())), storable(pa.map_(pa.string(), pa.int64()))
    (True, False)
    """
    if _is_list(kind):
        return storable(kind.value_type)
    if types.is_struct(kind):
        return kind.num_fields > 0 and all(storable(field.type) for field in kind)
    other = types.is_nested(kind) or types.is_dictionary(kind) or types.is_interval(kind)
    return not other and not isinstance(kind, pa.BaseExtensionType)


def encode(column: pa.Array) -> list[Any]:
    """The cells of a column of a storable type.

    >>> encode(pa.array([[1, 2], [3, None], None], pa.list_(pa.int16())))
    ['[1, 2]', '[3, null]', None]
    >>> encode(pa.array([[1, 2], [3], None], pa.list_(pa.int16())))
    [b'\\x01\\x00\\x02\\x00', b'\\x03\\x00', None]
    """
    kind = column.type
    if _is_integral(kind):
        return _integers(column)
    if types.is_floating(kind):
        return _floats(column)
    if types.is_decimal(kind):
        return _decimals(column)
    if types.is_nested(kind):
        return _nested(column)
    return column.to_pylist()  # type: ignore[no-any-return]


def decode(cells: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """The column of a type whose cells these are.

    >>> decode([b'\\x01\\x00\\x02\\x00', '[3, null]', None], pa.list_(pa.int16())).to_pylist()
    [[1, 2], [3, None], None]
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
        return _decode_decimals(cells, kind)
    if types.is_nested(kind):
        return _decode_nested(cells, kind)
    return pa.array(cells, kind)


def canonical(column: pa.Array) -> pa.Array:
    """A key column as one whose equal values have equal cells: one NaN, no -0.0, decimals as text."""
    if types.is_decimal(column.type):
        return column.cast(pa.string())
    if not types.is_floating(column.type):
        return column
    plain = pc.add(column, pa.scalar(0.0, column.type))
    return pc.if_else(pc.is_nan(plain), pa.scalar(float("nan"), column.type), plain)


def _is_integral(kind: pa.DataType) -> bool:
    return bool(types.is_integer(kind) or types.is_boolean(kind) or types.is_temporal(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(types.is_list(kind) or types.is_large_list(kind))


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


def _decimals(column: pa.Array) -> list[Any]:
    if column.type.scale == 0:
        try:
            return _integers(column.cast(pa.int64()))
        except pa.ArrowInvalid:
            pass  # too large for 64 bits
    return column.cast(pa.string()).to_pylist()  # type: ignore[no-any-return]


def _decode_decimals(cells: Sequence[Any], kind: pa.DataType) -> pa.Array:
    if any(isinstance(cell, str) for cell in cells):
        return pa.array([None if cell is None else str(cell) for cell in cells], pa.string()).cast(kind)
    return pa.array(cells, pa.int64()).cast(pa.decimal128(38, 0)).cast(kind)


def _nested(column: pa.Array) -> list[Any]:
    layout = _layout(column.type)
    if _is_list(column.type):
        values, lengths = column.flatten(), pc.list_value_length(column).fill_null(0)
    else:
        values, lengths = column.drop_null(), column.is_valid().cast(pa.int64())
    ends = np.cumsum(lengths.to_numpy(zero_copy_only=False), dtype=np.int64)
    packed = None if layout is None else _pack(values, layout)
    if packed is not None:
        cells = _slices(packed.tobytes(), ends * packed.itemsize)
    elif _is_list(column.type):
        cells = [_json(items) for items in _slices(encode(values), ends)]
    else:
        cells = [_json(parts) for parts in zip(*map(encode, column.flatten()), strict=True)]
    if column.null_count:
        cells = [cell if valid else None for cell, valid in zip(cells, column.is_valid().to_pylist(), strict=True)]
    return cells


def _slices(whole: Any, ends: npt.NDArray[np.int64]) -> list[Any]:
    places = ends.tolist()
    return [whole[start:end] for start, end in zip([0, *places], places, strict=False)]


def _json(cells: Sequence[Any]) -> str:
    return json.dumps(cells, ensure_ascii=False, default=lambda data: {"": base64.b64encode(data).decode()})


def _unjson(text: str) -> list[Any]:
    return json.loads(text, object_hook=lambda found: base64.b64decode(found[""]))  # type: ignore[no-any-return]


def _decode_nested(cells: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Packed cells and texts each at once, then in their order again."""
    text = np.array([isinstance(cell, str) for cell in cells], dtype=bool)
    if not text.any():
        return _decode_packed(cells, kind)
    texts = _decode_texts([_unjson(cell) for cell in cells if isinstance(cell, str)], kind)
    packed = _decode_packed([cell for cell in cells if not isinstance(cell, str)], kind)
    places = np.where(text, np.cumsum(text) - 1, len(texts) + np.cumsum(~text) - 1)
    return pa.concat_arrays([texts, packed]).take(pa.array(places))


def _decode_texts(rows: list[list[Any]], kind: pa.DataType) -> pa.Array:
    if types.is_struct(kind):
        parts = zip(*rows, strict=True)
        children = [decode(part, field.type) for part, field in zip(parts, kind, strict=True)]
        return pa.StructArray.from_arrays(children, fields=list(kind))
    return _lists(decode([cell for row in rows for cell in row], kind.value_type), [len(row) for row in rows], kind)


def _decode_packed(cells: Sequence[bytes | None], kind: pa.DataType) -> pa.Array:
    layout = _layout(kind)
    missing = np.array([cell is None for cell in cells], dtype=bool)
    if layout is None or missing.all():
        return pa.nulls(len(cells), kind)
    data = np.frombuffer(b"".join(cell for cell in cells if cell), layout)
    if types.is_struct(kind):
        return _unpack(data, kind).take(pa.array(np.cumsum(~missing) - 1, mask=missing))
    return _lists(
        _unpack(data, kind.value_type), [len(cell or b"") // layout.itemsize for cell in cells], kind, missing
    )


def _lists(
    values: pa.Array, lengths: list[int], kind: pa.DataType, missing: npt.NDArray[np.bool_] | None = None
) -> pa.Array:
    build, width = (pa.LargeListArray, pa.int64()) if types.is_large_list(kind) else (pa.ListArray, pa.int32())
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), width)
    mask = pa.array(missing) if missing is not None and missing.any() else None
    return build.from_arrays(offsets, values, type=kind, mask=mask)


def _layout(kind: pa.DataType) -> "np.dtype[Any] | None":
    """The bytes of a struct or of a list's element; None where they are of varying width."""
    return _width(kind.value_type) if _is_list(kind) else _width(kind)


def _width(kind: pa.DataType) -> "np.dtype[Any] | None":
    if types.is_struct(kind):
        parts = [_width(field.type) for field in kind]
        if None in parts:
            return None
        return np.dtype([(f"f{place}", part) for place, part in enumerate(parts)])
    if types.is_boolean(kind):
        return np.dtype("V1")
    if types.is_primitive(kind) or types.is_decimal(kind):
        return np.dtype(f"V{kind.bit_width // 8}")
    return None


def _pack(values: pa.Array, layout: "np.dtype[Any]") -> npt.NDArray[Any] | None:
    """The elements' bytes; None where one of them is null."""
    if values.null_count:
        return None
    if types.is_struct(values.type):
        packed = np.empty(len(values), layout)
        for name, child in zip(layout.names or (), values.flatten(), strict=True):
            part = _pack(child, layout[name])
            if part is None:
                return None
            packed[name] = part
        return packed
    if types.is_boolean(values.type):
        values = values.cast(pa.uint8())
    data = values.buffers()[1]
    if data is None:
        return np.empty(0, layout)
    return np.frombuffer(data, layout, count=len(values), offset=values.offset * layout.itemsize)


def _unpack(data: npt.NDArray[Any], kind: pa.DataType) -> pa.Array:
    if types.is_struct(kind):
        children = [_unpack(data[f"f{place}"], field.type) for place, field in enumerate(kind)]
        return pa.StructArray.from_arrays(children, fields=list(kind))
    stored = pa.uint8() if types.is_boolean(kind) else kind
    return pa.Array.from_buffers(stored, len(data), [None, pa.py_buffer(np.ascontiguousarray(data))]).cast(kind)
