import os
from collections.abc import Iterable
from pathlib import Path

import apache_beam as beam
import pytest
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

from pipelines import run, runners
from pipelines.transforms.errors import DataRefused, UserError


def test_it_runs_the_graph_in_this_process_on_the_runner_it_names(tmp_path: Path) -> None:
    chosen = []
    place = tmp_path / "pid"

    def build(pipeline: beam.Pipeline) -> None:
        chosen.append(isinstance(pipeline.runner, FnApiRunner))
        _ = pipeline | beam.Create([place]) | beam.Map(lambda path: path.write_text(str(os.getpid())))

    runners.named("DirectRunner").run(build, [])
    assert place.read_text() == str(os.getpid())
    assert chosen == [True]


@pytest.mark.parametrize("kind", [UserError, DataRefused])
def test_what_a_worker_raises_is_found_again_in_one_line(kind: type[Exception]) -> None:
    def fail(_: int) -> None:
        raise kind("no such file: x")

    def build(pipeline: beam.Pipeline) -> None:
        _ = pipeline | beam.Create([1]) | beam.Map(fail)

    with pytest.raises(Exception, match="no such file") as raised:
        runners.named("DirectRunner").run(build, [])
    found = run.mistake(raised.value)
    assert type(found) is kind
    assert str(found) == "no such file: x"


def test_our_own_fault_stays_ours() -> None:
    assert run.mistake(KeyError("pipelines.transforms.errors")) is None
    assert run.mistake(RuntimeError("Traceback:\nValueError: x [while running 'Read']")) is None


def test_a_mistake_is_found_in_the_text_of_a_far_worker() -> None:
    raised = "pipelines.transforms.schema.SchemaError: row X: bad [while running 'A/B']"
    text = f"Error from worker: Traceback\n  File x\n{raised}\n\n"
    found = run.mistake(RuntimeError(text))
    assert isinstance(found, UserError)
    assert str(found) == "row X: bad"


def test_a_full_disk_is_told() -> None:
    found = run.mistake(OSError(28, "No space left on device", "data/x"))
    assert isinstance(found, UserError)
    assert "the disk is full" in str(found)


def test_a_kept_graph_runs_again_with_the_worker_of_the_first_run(tmp_path: Path) -> None:
    made: list[int] = []

    class Note(beam.DoFn):  # type: ignore[misc]
        def setup(self) -> None:
            (tmp_path / "made").open("a").write("1")

        def process(self, n: int) -> list[tuple[int, int]]:
            return [(n % 2, 1)] * int((tmp_path / "times").read_text())

    def tell(group: tuple[int, Iterable[int]]) -> None:
        if group[0] == 0 and (tmp_path / "fail").exists():
            raise UserError("not now")
        (tmp_path / f"told{group[0]}").write_text(str(sum(group[1])))

    def build(pipeline: beam.Pipeline) -> None:
        _ = (
            pipeline
            | beam.Create([1, 2, 3])
            | beam.ParDo(Note()).with_output_types(tuple[int, int])
            | beam.GroupByKey()
            | beam.Map(tell)
        )

    again = runners.named("DirectRunner").prepared(build, [])
    for times in (1, 2, 0, 3):
        (tmp_path / "times").write_text(str(times))
        again()
        made.append(int((tmp_path / "told1").read_text()))
    assert made == [2, 4, 4, 6]
    assert (tmp_path / "made").read_text() == "1"
    (tmp_path / "fail").touch()
    with pytest.raises(Exception, match="not now"):
        again()
    (tmp_path / "fail").unlink()
    (tmp_path / "times").write_text("5")
    again()
    assert (tmp_path / "told0").read_text() == "5"
    assert (tmp_path / "told1").read_text() == "10"
    assert (tmp_path / "made").read_text() == "11"
