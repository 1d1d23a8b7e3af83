"""Parity on engines of unbounded graphs: a job that follows a growing log, is stopped, and runs again.

Definitions are those of the law suite, with more rows; so is the oracle, which shares no code with the product. How
many are tried: ``PARITY_EXAMPLES=20 python -m pytest -m engine tests/engines/test_parity.py -k any``.
"""

import dataclasses
import os
import shutil
from collections.abc import Iterator

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from pipelines import definition, parity, samples
from pipelines.runners import flink
from tests.laws.test_parity import Stream, agree, streams

EXAMPLES = int(os.environ.get("PARITY_EXAMPLES", "4"))
ROWS = 1000
NEAR = ("median", "p95", "kinds", "numbers")

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def server() -> Iterator[list[str]]:
    """Flags of a job server that stands for all tests: a job costs seconds on it."""
    if lacking := [name for name in ("java", "mvn") if shutil.which(name) is None]:
        pytest.skip(f"no {lacking[0]}")
    with flink.serving() as endpoint:
        yield [f"--job_endpoint={endpoint}"]


@st.composite
def larger(draw: st.DrawFn) -> Stream:
    """A stream of the law suite, of more rows, in parts that come while a job reads."""
    stream, seed = draw(streams()), draw(st.integers(0, 2**32))
    of = stream.case.pipeline
    rows = samples.history(of, seed, ROWS)
    rows = rows.set_column(0, "id", pa.array(np.arange(ROWS)))
    whole = pc.floor_temporal(rows["t"], unit="millisecond")  # as sessions tell event times
    rows = rows.set_column(rows.schema.get_field_index("t"), rows.schema.field("t"), whole)
    case = dataclasses.replace(stream.case, rows=rows)
    other = None if stream.other is None else dataclasses.replace(stream.other, rows=rows)
    return dataclasses.replace(stream, case=case, other=other, turns=8, restarts=draw(st.integers(0, 1)))


@pytest.mark.timeout(0)
@settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)
@given(stream=larger())
def test_any_stream_as_an_unbounded_graph_on_flink(server: list[str], stream: Stream) -> None:
    agree(stream, "FlinkRunner", server, NEAR)


@pytest.mark.parametrize("name", ["flights", "sensors"])
def test_the_examples_with_cut_overs_on_flink(server: list[str], name: str) -> None:
    of = definition.load(name)
    report = parity.parity(
        of, samples.history(of, 11, 3_000), "FlinkRunner", flags=server, seed=11, turns=8, restarts=1
    )
    assert report.different == 0, report.text()
