"""What ``pipelines.testing.run`` answers is what a run answers: built-in definitions over the same rows, as files."""

import datetime
import json
import random
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines import Pipeline, load, testing
from pipelines import run as runs
from pipelines.io.table import open_table
from pipelines.options import Deployment
from pipelines.transforms import query
from pipelines.transforms.expressions import quote

pytestmark = pytest.mark.slow

Rows = list[dict[str, Any]]
START = datetime.datetime(2026, 3, 28, 21, tzinfo=datetime.UTC)


def calls(dice: random.Random) -> tuple[Rows, dict[str, Rows]]:
    numbers = [f"+336{n:08}" for n in range(6)] + ["0123"]
    rows = [
        {
            "id": f"{dice.randrange(250)}",
            "caller": dice.choice(numbers),
            "callee": dice.choice(numbers),
            "started": START + datetime.timedelta(seconds=number),
            "ended": dice.choice([None, START + datetime.timedelta(seconds=number + 30)]),
            "seconds": dice.choice([1, 3, 600, 90_000]),
        }
        for number in range(300)
    ]
    since = [START - datetime.timedelta(days=1), START + datetime.timedelta(seconds=100)]
    known = [
        {"number": n, "since": at, "plan": f"{at:%d}", "verified": n[-1] == "1"} for n in numbers[:3] for at in since
    ]
    return rows, {"subscribers": known}


def orders(dice: random.Random) -> tuple[Rows, dict[str, Rows]]:
    rows = [
        {
            "id": f"{number}",
            "at": START + datetime.timedelta(hours=dice.randrange(60)),
            "country": dice.choice(["FR", "BE", "de"]),
            "currency": dice.choice(["EUR", "USD", "XXX"]),
            "lines": [
                {
                    "sku": dice.choice("abc"),
                    "quantity": dice.randrange(-2, 5),
                    "price": Decimal(dice.randrange(999)) / 100,
                }
                for _ in range(dice.randrange(4))
            ],
        }
        for number in range(200)
    ]
    rates = {"EUR": Decimal(1), "USD": Decimal("0.923456")}
    return rows + rows[:20], {"rates": [{"currency": name, "euro": euro} for name, euro in rates.items()]}


def sensors(dice: random.Random) -> tuple[Rows, dict[str, Rows]]:
    rows = [
        {
            "sensor": dice.choice("ab"),
            "at": START + datetime.timedelta(seconds=dice.randrange(4_000)),
            "sequence": dice.randrange(2),
            "celsius": dice.choice([None, 21.5, dice.uniform(-50, 130)]),
        }
        for _ in range(300)
    ]
    return rows, {}


def plain(value: object) -> str:
    return str(value) if isinstance(value, Decimal) else value.isoformat()  # type: ignore[attr-defined]


def written(rows: Rows, path: Path) -> str:
    path.write_text("".join(json.dumps(row, default=plain) + "\n" for row in rows))
    return str(path)


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {name: float(f"{value:.9g}") if isinstance(value, float) else value for name, value in row.items()}


def ordered(table: pa.Table, pipeline: Pipeline, view: str) -> list[dict[str, Any]]:
    keys = next((declared.by for declared in pipeline.views if declared.name == view), ())
    order = ", ".join([*map(quote, keys), "window_start"])
    found: Rows = query.run(f"FROM t ORDER BY {order}", {"t": table}).to_pylist()
    return found


@pytest.mark.parametrize("make", [calls, orders, sensors], ids=["calls", "orders", "sensors"])
def test_the_harness_and_a_run_answer_alike(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINES_KEY", "07" * 32)
    pipeline = load(make.__name__)
    rows, dimensions = make(random.Random(7))
    deployment = Deployment(
        history=written(rows, tmp_path / "rows.jsonl"),
        dimensions={name: written(of, tmp_path / f"{name}.jsonl") for name, of in dimensions.items()},
        warehouse=str(tmp_path / "warehouse"),
        dead_letters=str(tmp_path / "dead"),
        store=None,
        report=str(tmp_path / "run.json"),
    )
    report = runs.run(pipeline, deployment)
    expected = testing.run(pipeline, rows, dimensions=dimensions)
    assert expected.counts == report.facts["rows"]
    assert min(expected.counts["kept"], expected.counts["rejected"] + expected.counts["duplicate"]) > 0
    for view in expected.views:
        answers = open_table(f"{deployment.warehouse}/{pipeline.name}/{view}").dataset().to_table()
        found = ordered(answers.select(expected.views[view].column_names), pipeline, view)
        wanted = ordered(expected.views[view], pipeline, view)
        assert [rounded(row) for row in found] == [rounded(row) for row in wanted]
    events = open_table(f"{deployment.warehouse}/{pipeline.name}/events").dataset().to_table()
    everything, names = "FROM t ORDER BY ALL", expected.rows.column_names
    found_rows, wanted_rows = (query.run(everything, {"t": rows}) for rows in (events.select(names), expected.rows))
    assert found_rows.to_pylist() == wanted_rows.to_pylist()
    dead = open_table(f"{deployment.dead_letters}/{pipeline.name}").dataset().to_table()
    assert sorted(zip(*(dead[name].to_pylist() for name in ("step", "reason")), strict=True)) == sorted(
        zip(*(expected.rejected[name].to_pylist() for name in ("step", "reason")), strict=True)
    )
