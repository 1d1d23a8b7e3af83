"""The graph as Beam sees it: every PCollection of tables has the tables' coder, on both ways of de-duplication."""

import dataclasses
import datetime
from collections.abc import Iterator
from pathlib import Path

import apache_beam as beam
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

from pipelines import (
    Check,
    Count,
    Dimension,
    Explode,
    Lookup,
    Min,
    Pipeline,
    Session,
    Source,
    Sum,
    Tumbling,
    View,
    graph,
)
from pipelines.io import files
from pipelines.io.splits import Split
from pipelines.io.table import open_table
from pipelines.options import Deployment
from pipelines.transforms.errors import DataRefused

pytestmark = pytest.mark.slow

NOON = datetime.datetime(2024, 5, 1, 12, tzinfo=datetime.UTC)
SMALL = ("read", "once", "commit")
"""Parts whose values may be pickled, as they are few and no rows: the splits to read, the one commit (and the
one None of Beam's own DoOnce)."""


class Line:
    """A part of an order."""

    sku: str
    cents: int


class Order:
    """A row of the history."""

    id: int
    at: datetime.datetime
    country: str
    lines: list[Line]


class Country:
    """A row of the dimension."""

    code: str
    name: str


COUNTRIES = Dimension("countries", Country, key="code")
ORDERS = Pipeline(
    "orders",
    source=Source(Order, event_time='"at"', identity="id"),
    steps=(Check(known="country <> 'XX'"), Lookup(COUNTRIES, on={"country": "code"}, take={"land": "name"})),
    views=(
        View("by_hour", by="country", window=Tumbling("1h"), orders=Count()),
        View("products", by="sku", steps=(Explode("lines"), Check(paid="cents > 0")), revenue=Sum("cents")),
        View("visits", by="land", window=Session("30m"), orders=Count()),
    ),
)


def order(number: int, country: str = "FR", *cents: int) -> dict[str, object]:
    lines = [{"sku": f"s{n}", "cents": value} for n, value in enumerate(cents)]
    return {"id": number, "at": NOON + datetime.timedelta(minutes=number), "country": country, "lines": lines}


@pytest.fixture
def deployment(tmp_path: Path) -> Deployment:
    orders = [order(1, "FR", 5, 0), order(2, "DE", 7), order(2, "DE", 7), order(3, "XX"), order(90), order(1, "DE")]
    pq.write_table(
        pa.Table.from_pylist(orders, ORDERS.source.schema.arrow), tmp_path / "orders.parquet", row_group_size=2
    )
    pq.write_table(pa.Table.from_pylist([{"code": "FR", "name": "France"}]), tmp_path / "countries.parquet")
    return Deployment(
        history=str(tmp_path / "orders.parquet"),
        dimensions={"countries": str(tmp_path / "countries.parquet")},
        warehouse=str(tmp_path / "warehouse"),
        store=str(tmp_path / "store.db"),
        dead_letters=str(tmp_path / "dead"),
        report=str(tmp_path / "run.json"),
    )


def built(deployment: Deployment, spill: Path | None) -> beam.Pipeline:
    root = beam.Pipeline(runner=FnApiRunner(), options=PipelineOptions([]))
    graph.build(root, graph.prepare(ORDERS, deployment), spill=spill)
    return root


def coders(proto: beam_runner_api_pb2.Pipeline, coder: str) -> Iterator[str]:
    """The coder and all that it is made of, as text."""
    found = proto.components.coders[coder]
    yield f"{found.spec.urn} {found.spec.payload.decode('latin1')}"
    for part in found.component_coder_ids:
        yield from coders(proto, part)


@pytest.mark.parametrize("spill", [True, False])
def test_no_table_is_pickled_between_two_parts(deployment: Deployment, tmp_path: Path, spill: bool) -> None:
    proto = built(deployment, tmp_path if spill else None).to_runner_api()
    makers = {made: part.unique_name for part in proto.components.transforms.values() for made in part.outputs.values()}
    pickled = set()
    for name, collection in proto.components.pcollections.items():
        said = " ".join(coders(proto, collection.coder_id))
        if "TableCoder" not in said and "pickle" in said.lower():
            pickled.add(makers[name])
    assert {name for name in pickled if not name.startswith(SMALL) and "/DoOnce" not in name} == set()


@pytest.mark.parametrize("spill", [True, False])
def test_the_same_answer_whether_identities_are_found_on_disk_or_by_a_shuffle(
    deployment: Deployment, tmp_path: Path, spill: bool
) -> None:
    built(deployment, tmp_path if spill else None).run().wait_until_finish()
    views = {view: answers(tmp_path, view) for view in ("by_hour", "products", "visits")}
    assert views["by_hour"] == [("DE", NOON, 1), ("FR", NOON, 1), ("FR", NOON + datetime.timedelta(hours=1), 1)]
    assert views["products"] == [("s0", None, 12)]
    assert views["visits"] == [
        ("France", NOON + datetime.timedelta(minutes=1), 1),
        ("France", NOON + datetime.timedelta(minutes=90), 1),
        (None, NOON + datetime.timedelta(minutes=2), 1),
    ]
    dead = open_table(str(tmp_path / "dead/orders")).dataset().to_table()
    assert sorted(zip(dead["step"].to_pylist(), dead["reason"].to_pylist(), strict=True)) == [
        ("dedupe", "conflict"),
        ("step 1 (Check)", "known"),
        ("step 2 (Check) of view 'products'", "paid"),
    ]


def test_the_same_answer_from_a_file_of_codes_and_one_of_text(deployment: Deployment, tmp_path: Path) -> None:
    source = Source(Order, event_time='"at"')
    repeated = dataclasses.replace(
        ORDERS, source=source, views=(*ORDERS.views, View("lands", by="land", least=Min("country")))
    )
    rows = [order(number, ("FR", "DE", "XX", "ÖS")[number % 4], number % 3) for number in range(2_000)]
    found = []
    for way in (True, False):
        place = tmp_path / str(way)
        place.mkdir()
        pq.write_table(pa.Table.from_pylist(rows, source.schema.arrow), place / "orders.parquet", use_dictionary=way)
        there = dataclasses.replace(
            deployment,
            history=str(place / "orders.parquet"),
            warehouse=str(place / "warehouse"),
            store=None,
            dead_letters=str(place / "dead"),
        )
        prepared = graph.prepare(repeated, there)
        splits = [split for split in prepared.history.splits if isinstance(split, Split)]
        kinds = {table["country"].type for split in splits for table in files.read(split)}
        assert {pa.types.is_dictionary(kind) for kind in kinds} == {way}
        root = beam.Pipeline(runner=FnApiRunner(), options=PipelineOptions([]))
        graph.build(root, prepared, spill=tmp_path)
        root.run().wait_until_finish()
        dead = open_table(str(place / "dead/orders")).dataset().to_table().drop_columns("source")
        views = [answers(place, view.name) for view in repeated.views]
        found.append((views, sorted(map(str, dead.to_pylist()))))
    assert found[0] == found[1]
    assert all(found[0][0]) and len(found[0][1]) > 500


def answers(place: Path, view: str) -> list[tuple[object, ...]]:
    table = open_table(str(place / "warehouse/orders" / view)).dataset().to_table()
    found = zip(
        *(table[name].to_pylist() for name in (table.column_names[0], "window_start", table.column_names[3])),
        strict=True,
    )
    return sorted(found, key=lambda row: (str(row[0]), str(row[1])))


def test_rows_that_a_part_loses_refuse_the_run_and_leave_readers_on_the_old_answer(
    deployment: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(deployment, tmp_path).run().wait_until_finish()
    before = answers(tmp_path, "by_hour")
    from pipelines.transforms.view import ViewPlan

    whole = ViewPlan.merged
    monkeypatch.setattr(ViewPlan, "merged", lambda plan, parts: whole(plan, [part.slice(0, 1) for part in parts]))
    with pytest.raises(DataRefused, match=r"view by_hour: rows in 3 = rows out \d is off by \d: rows were lost"):
        built(deployment, tmp_path).run().wait_until_finish()
    assert answers(tmp_path, "by_hour") == before
