from datetime import UTC, datetime
from typing import Literal

import pyarrow as pa
import pytest

from pipelines.transforms.avro_schemas import Schemas
from pipelines.transforms.decoder import Decoder
from pipelines.transforms.encode import avro_schema, encode
from pipelines.transforms.messages import Messages
from pipelines.transforms.poison import poison
from pipelines.transforms.schema import RowSchema


class Reading:
    sensor: str
    at: datetime
    celsius: float | None


class Word:
    text: str
    more: str | None


ROWS: dict[type, dict[str, list[object]]] = {
    Reading: {"sensor": ["a"], "at": [datetime(2024, 1, 1, tzinfo=UTC)], "celsius": [1.5]},
    Word: {"text": ["x"], "more": [None]},
}


@pytest.mark.parametrize("row", [Reading, Word])
@pytest.mark.parametrize("format", ["json", "avro", "arrow"])
def test_nobody_takes_them(row: type, format: Literal["json", "avro", "arrow"], tmp_path: object) -> None:
    schema = RowSchema.of(row)
    Schemas(str(tmp_path)).add(avro_schema(schema))
    (good,) = encode(pa.table(ROWS[row], schema.arrow), schema, format)["_raw"].to_pylist()
    raw = [good, *(poison(good, kind, schema, format) for kind in range(4)), good]
    messages = pa.table(
        {
            "_source": pa.array(["0"] * 6).dictionary_encode(),
            "_offset": range(6),
            "_raw": pa.array(raw, pa.large_binary()),
            "_published": pa.array([0] * 6, pa.timestamp("us", "UTC")),
            "_rows": pa.array([1] * 6, pa.int32()),
        }
    )
    decoded = Messages(Decoder(schema, "poisoned", invalid="null"), format, str(tmp_path)).decode(messages)
    assert decoded.rows["_offset"].to_pylist() == [0, 5]
    assert decoded.dead is not None and sorted(decoded.dead["offset"].to_pylist()) == [1, 2, 3, 4]
