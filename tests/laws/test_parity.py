"""Any pipeline over any stream: what the speed layer gives is what its definition says of the rows in time.

Definitions and rows are those of test_graph_against_duckdb; here they come through a log, late, twice, out of order and
with bad messages between, in turns of any size, by layers that die. The oracle shares no code with the product: which
row is late, and which is a repetition, is decided row by row in Python, and the answers are DuckDB's over whole rows.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import duckdb
import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import event, given, settings

from pipelines import Session, View, Whole, definition, parity, samples
from pipelines.io.log import Log
from pipelines.io.store import LIVE
from pipelines.transforms.disorder import Disorder
from pipelines.transforms.encode import encode
from pipelines.transforms.windows import Duration
from tests.laws.test_graph_against_duckdb import Case, _tumbling, cases, same

EXAMPLES = int(os.environ.get("PARITY_EXAMPLES", "25"))
HOUR = _tumbling("1h", "1 HOUR", "UTC")
"""What the speed layer keeps of all time."""

BEFORE = -(2**62)
"""The watermark before any row."""


@dataclasses.dataclass(frozen=True)
class Stream:
    """A case whose rows come as a stream. other: a second view over the same rows."""

    case: Case
    other: Case | None
    disorder: Disorder
    turns: int
    restarts: int
    batch: bool


class Judged(NamedTuple):
    """The rows in time, each once, by number, with the watermark before each; and how many were not."""

    rows: list[tuple[int, int]]
    read: int
    late: int
    repeated: int


@st.composite
def streams(draw: st.DrawFn) -> Stream:
    case, other = draw(cases(least=10)), draw(st.none() | cases())
    kinds = {"id": int, **case.pipeline.source.row.__annotations__}
    source = dataclasses.replace(
        case.pipeline.source,
        row=type("Row", (), {"__annotations__": kinds}),
        identity=draw(st.sampled_from(["id", "id", None])),
        disorder=draw(st.sampled_from(["0s", "10m", "1h"])),
        lateness=draw(st.sampled_from(["0s", "0s", "20m", "3h"])),
    )
    rows = case.rows.add_column(0, "id", pa.array(range(len(case.rows)), pa.int64()))
    disorder = Disorder(
        shuffle=draw(st.sampled_from(["5h", "10h", "30m", "0s"])),
        late=draw(st.sampled_from([0.4, 0.2, 0.0])),
        duplicate=draw(st.sampled_from([0.5, 0.2, 0.0])),
        corrupt=draw(st.sampled_from([0.0, 0.1])),
        seed=draw(st.integers(0, 2**32)),
    )
    views = case.pipeline.views
    if other is not None:
        (view,) = other.pipeline.views
        measures: dict[str, Any] = dict(view.measures)
        views = (*views, View("others", by=view.by, window=view.window, **measures))
    pipeline = dataclasses.replace(case.pipeline, source=source, views=views)
    case = dataclasses.replace(case, pipeline=pipeline, rows=rows)
    if other is not None:
        other = dataclasses.replace(other, pipeline=pipeline, rows=rows, steps=case.steps)
    turns, batch = draw(st.integers(1, 5)), draw(st.sampled_from([False, False, False, True]))
    return Stream(case, other, disorder, turns, draw(st.integers(0, 2)), batch)


def window(case: Case) -> str:
    """The oracle's SQL of the windows that the speed layer keeps."""
    pick = HOUR if isinstance(case.window.ours, Whole) else case.window
    return pick.sql.replace("{keys}", ", ".join(case.by) or "NULL::INT")


def arrivals(case: Case, log: Log) -> Iterator[list[int | None]]:
    """The rows of each partition, by number, as they lie in the log; None for a bad message."""
    schema = case.pipeline.source.schema
    numbers = {raw: number for number, raw in enumerate(encode(case.rows, schema, "json")["_raw"].to_pylist())}
    for partition, at in log.bounds().items():
        yield [numbers.get(raw) for raw in log.read(partition, at.start, at.end)["_raw"].to_pylist()]


def ends(case: Case) -> list[int]:
    """When the last window of each row ends, µs."""
    times = case.rows["t"].cast(pa.int64()).to_pylist()
    if isinstance(case.window.ours, Session):
        return [time + case.window.ours.micros for time in times]
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        connection.register("given", case.rows)
        last = f"SELECT id, max(epoch_us(window_end)) FROM ({window(case).format('given')}) GROUP BY id ORDER BY id"
        return [end for _, end in connection.sql(last).fetchall()]


def judged(views: list[Case], log: Log) -> Judged:
    """The rule of the source: late is what ends, lateness after, at or before the watermark of its partition: for every
    view."""
    case = views[0]
    source, times = case.pipeline.source, case.rows["t"].cast(pa.int64()).to_pylist()
    disorder, lateness = (Duration.fixed(text, "") for text in (source.disorder, source.lateness))
    last = [max(of) for of in zip(*map(ends, views), strict=True)]
    kept, late, repeated, read = [], 0, 0, 0
    for rows in arrivals(case, log):
        watermark, known = BEFORE, dict[int, int]()
        for row in rows:
            read += 1
            if row is None:
                continue
            expires = last[row] + lateness
            if expires <= watermark:
                late += 1
            elif source.identity and known.get(row, BEFORE) > watermark:
                repeated += 1
            else:
                kept.append((row, watermark))
                known[row] = expires
            watermark = max(watermark, times[row] - disorder)
    return Judged(kept, read, late, repeated)


def expected(case: Case, rows: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """The answers over these rows: each counts in those of its windows that are not over by its watermark."""
    lateness = Duration.fixed(case.pipeline.source.lateness, "")
    watermarks = pa.array([watermark for _, watermark in rows], pa.int64())
    given = case.rows.take(pa.array([row for row, _ in rows], pa.int64())).append_column("wm", watermarks)
    if isinstance(case.window.ours, Session):  # a session has its end from the rows that are in time
        filtered, gap = window(case), case.window.ours.micros
        given = given.filter(pc.field("t").cast(pa.int64()) + gap + lateness > pc.field("wm"))
    else:
        filtered = f"SELECT * FROM ({window(case)}) WHERE epoch_us(window_end) + {lateness} > wm"
    windowed = case.window._replace(sql=filtered)
    return dataclasses.replace(case, rows=given, window=windowed).expected()


def agree(stream: Stream, runner: str = "DirectRunner", flags: Sequence[str] = (), near: Sequence[str] = ()) -> None:
    """Runs the stream's speed layer over its rows, and holds what it gives against the oracle, and against a bounded
    pass. near: measures that are estimates of so many rows: these only against that, which has the same."""
    case, turns, restarts = stream.case, stream.turns, stream.restarts
    views = {"answers": case} if stream.other is None else {"answers": case, "others": stream.other}
    with parity.prepared(
        case.pipeline, case.rows, stream.disorder, runner, turns=turns, restarts=restarts, flags=flags
    ) as trial:
        trial.take(0, turns)
        judgement, counts = judged(list(views.values()), trial.log), trial.counts.rows
        event(f"late {judgement.late > 0}, repeated {judgement.repeated > 0}, kept {min(len(judgement.rows), 3)}")
        assert (counts["read"], counts["late"], counts["duplicate"]) == judgement[1:]
        for name, view in views.items():
            found = trial.store.scan(f"anything.{name}", generation=LIVE).to_pylist()
            answers = expected(view, judgement.rows)
            same(found, [{key: row[key] for key in row if key not in near} for row in answers], view.by)
        timely = trial.bounded.timely()
        compared = [trial.speed_layer(timely)]
        if stream.batch:
            trial.cut_over()
            compared.append(trial.both_layers(timely))
        for layers in compared:
            assert [differences.first for differences in layers.values() if differences.different] == []


@pytest.mark.slow
@pytest.mark.timeout(0 if EXAMPLES > 25 else 600)
@settings(max_examples=EXAMPLES, deadline=None)
@given(streams())
def test_any_stream_in_turns_is_the_definition_over_the_rows_in_time(stream: Stream) -> None:
    agree(stream)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["calls", "flights", "orders", "sensors"])
@pytest.mark.parametrize("seed", [11, 12])
def test_the_examples(name: str, seed: int) -> None:
    of = definition.load(name)
    report = parity.parity(of, samples.history(of, seed, 3_000), seed=seed, turns=6, restarts=4)
    assert report.different == 0, report.text()
