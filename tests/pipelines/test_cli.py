import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines import cli
from pipelines import run as runs
from pipelines.options import Deployment, instant
from pipelines.transforms.errors import DataRefused

DEFINITION = """
from datetime import datetime
from pipelines.definition import Dimension, Pipeline, Source, View
from pipelines.transforms.measures import Count, Mean
from pipelines.transforms.steps import Check, Lookup
from pipelines.transforms.windows import Tumbling

class Reading:
    sensor: str
    seen: datetime
    celsius: float | None

class Room:
    sensor: str
    room: str

rooms = Dimension("rooms", Room, key="sensor")

def readings(most: int = 100) -> Pipeline:
    return Pipeline(
        "readings",
        source=Source(Reading, event_time="seen"),
        steps=(Check(not_hot=f"celsius < {most}"),),
        views=(View("by_hour", by="sensor", window=Tumbling("1h"), n=Count(), mean=Mean("celsius")),),
    )

def roomy() -> Pipeline:
    return Pipeline(
        "roomy",
        source=Source(Reading, event_time="seen"),
        steps=(Lookup(rooms, on="sensor", take="room"),),
        views=(View("by_room", by="room", n=Count()),),
    )

broken = 1

def test_a_reading_counts():
    assert readings().name == "readings"

def test_a_miracle():
    assert readings().name == "miracle"
"""
ROWS = """sensor,seen,celsius
a,2024-01-01T00:10:00Z,10
a,2024-01-01T00:20:00Z,20
b,2024-01-01T01:10:00Z,400
b,2024-01-01T01:20:00Z,
"""

Call = Callable[..., SimpleNamespace]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs a command line in a folder of its own that holds a definition and its rows."""
    (tmp_path / "defs.py").write_text(DEFINITION)
    (tmp_path / "rows.csv").write_text(ROWS)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["pipelines", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        told = capsys.readouterr()
        return SimpleNamespace(code=ended.value.code, out=told.out, err=told.err)

    return run


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Deployment]:
    """What `run` was asked for, instead of running it."""
    deployments: list[Deployment] = []

    def stop(_: Any, deployment: Deployment) -> None:
        deployments.append(deployment)

    monkeypatch.setattr(runs, "dry_run", stop)
    return deployments


RUN = ("run", "--pipeline=defs.py:readings", "--history=rows.csv")


@pytest.mark.slow
def test_help_and_mistakes_answer_without_beam() -> None:
    script = """
import sys
sys.argv = ["pipelines", *sys.argv[1:]]
from pipelines.cli import main
try:
    main()
except SystemExit as ended:
    heavy = {"apache_beam", "pyarrow", "duckdb", "numpy"} & set(sys.modules)
    sys.exit(f"imported {heavy}" if heavy else 0)
"""
    for arguments in (["--help"], ["run", "--help"], ["query", "--help"], ["run", "--max_rejected=x"], ["rum"]):
        done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_definition_is_checked_without_beam(tmp_path: Path) -> None:
    (tmp_path / "defs.py").write_text(DEFINITION)
    script = """
import sys
from pipelines.definition import load
load("defs.py:readings")
sys.exit("apache_beam" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=False).returncode == 0


def test_python_m_pipelines_run_is_the_verb_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipelines.run", "--help"]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert told.startswith("Usage: python -m pipelines.run [OPTIONS]")
    for option in ("runner", "pipeline", "mode", "history", "dimension", "warehouse", "store", "dead_letters", "from"):
        assert f"--{option} " in told
    for option in ("to", "report", "json", "set", "max_rejected", "dry_run"):
        assert f"--{option} " in told


def test_every_flag_is_a_field_of_the_deployment(call: Call, asked: list[Deployment]) -> None:
    done = call(
        *RUN, "--dry-run", "--warehouse=w", "--store", "sqlite:///s.db", "--dead-letters=d", "--from=2024-01-01",
        "--to=2024-02-01T00:00+01:00", "--max-rejected=0.5", "--buckets=3", "--report=r.json", "--set", "most=30",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert asked == [
        Deployment(
            "rows.csv",
            {},
            "w",
            "sqlite:///s.db",
            "d",
            instant("2024-01-01"),
            instant("2024-01-31T23:00"),
            0.5,
            3,
            report="r.json",
        )
    ]


def test_flags_beat_the_environment_beats_the_file_beats_the_defaults(
    call: Call, asked: list[Deployment], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("pipelines.toml").write_text('warehouse = "file"\nstore = "file"\nreport = "file"\ndead-letters = "file"\n')
    monkeypatch.setenv("PIPELINES_WAREHOUSE", "environment")
    monkeypatch.setenv("PIPELINES_STORE", "environment")
    monkeypatch.setenv("PIPELINES_FROM", "2024-01-01")
    done = call(*RUN, "--dry_run", "--warehouse=flag")
    assert done.code == 0, done.err
    (got,) = asked
    assert (got.warehouse, got.store, got.report, got.dead_letters) == ("flag", "environment", "file", "file")
    assert got.from_ == instant("2024-01-01")
    assert got.mode == "batch"


def test_an_unknown_key_in_the_file_is_refused(call: Call) -> None:
    Path("pipelines.toml").write_text('warehose = "x"\n')
    done = call(*RUN)
    assert (done.code, done.err) == (2, "pipelines: pipelines.toml: no option 'warehose'. Nearest: warehouse\n")


def test_dimensions_come_by_name_from_flags_and_file(call: Call, asked: list[Deployment]) -> None:
    roomy = ("run", "--pipeline=defs.py:roomy", "--history=rows.csv", "--dry_run")
    missing = call(*roomy)
    assert missing.code == 2
    assert "--dimension rooms=URI" in missing.err
    wrong = call(*roomy, "--dimension", "room=x.csv")
    assert (wrong.code, wrong.err.count("\n")) == (2, 1)
    assert "Nearest: rooms" in wrong.err
    assert call(*roomy, "--dimension", "rooms=x.csv").code == 0
    Path("pipelines.toml").write_text('[dimension]\nrooms = "y.csv"\n')
    assert call(*roomy).code == 0
    assert [one.dimensions for one in asked] == [{"rooms": "x.csv"}, {"rooms": "y.csv"}]


def test_none_switches_the_store_off_and_variables_expand(
    call: Call, asked: list[Deployment], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUCKET", "b")
    assert call(*RUN, "--dry_run", "--store=none", "--warehouse=s3://${BUCKET}/w").code == 0
    assert (asked[0].store, asked[0].warehouse) == (None, "s3://b/w")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run"], "Missing option '--pipeline'"),
        (["rum"], "No such command 'rum'. Did you mean 'run'?"),
        (["query", "select 1", "--warehose=x"], "--warehouse"),
        ([*RUN, "--warehose=x"], "no option --warehose, neither here nor in Apache Beam. Nearest: --warehouse"),
        ([*RUN, "--ware=x"], "no option --ware"),
        ([*RUN, "flights"], "unexpected argument 'flights'"),
        ([*RUN, "--mode=bath"], "'bath' is not one of 'batch', 'stream'"),
        ([*RUN, "--runner=Direct"], "--runner=Direct: no such runner here; one of DataflowRunner, DirectRunner"),
        ([*RUN, "--from=then"], "'then' is not a time"),
        ([*RUN, "--from=2024-01-02", "--to=2024-01-01"], "not before"),
        ([*RUN, "--set", "most"], "'most' is not NAME=VALUE"),
        ([*RUN, "--set", "least=1"], "no parameter 'least'"),
        ([*RUN, "--warehouse=${NOWHERE_AT_ALL}/x"], "NOWHERE_AT_ALL is not set"),
        (["run", "--pipeline=defs.py:readings"], "--history=URI"),
        (["run", "--pipeline=defs.py:broken", "--history=x"], "int, not a Pipeline"),
        (["run", "--pipeline=nowhere.py:x", "--history=x"], "no such file"),
        (["run", "--pipeline=fligths", "--history=x"], "no such built-in pipeline"),
        (["run", "--pipeline=defs.py:readings", "--history=gone.csv"], "gone.csv"),
        ([*RUN, "--report=rows.csv/run.json"], "--report=rows.csv/run.json: cannot be written"),
        (["check", "defs.py:readings", "defs.py:broken"], "not a Pipeline"),
        (["query", "select * from readings.by_hour"], "no table readings.by_hour in data/warehouse"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_2(call: Call, arguments: list[str], told: str) -> None:
    done = call(*arguments)
    assert done.code == 2
    assert told in done.err
    assert done.err.count("\n") == 1
    assert not done.err.startswith("Traceback")


def test_the_tests_beside_a_definition_run(call: Call) -> None:
    done = call("test", "defs.py")
    assert done.code == 2
    passed, failed, *sides = done.out.splitlines()
    assert passed == "defs.py: a reading counts: ok"
    assert failed.startswith("defs.py: a miracle: FAILED defs.py:")
    assert 'assert readings().name == "miracle": AssertionError' in failed
    assert sides == ["    found    'readings'", "    expected 'miracle'"]
    assert done.err == "pipelines: 1 failed\n"


def test_secrets_never_reach_the_terminal(call: Call) -> None:
    done = call("run", "--pipeline=defs.py:readings", "--history=s9://user:hunter2@host/x.csv")
    assert done.code == 2
    assert "hunter2" not in done.err


def test_refused_data_exits_3(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise DataRefused("too much was rejected")

    monkeypatch.setattr(runs, "run", refuse)
    done = call(*RUN)
    assert (done.code, done.err) == (3, "pipelines: too much was rejected\n")


def test_our_own_fault_is_a_traceback(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(runs, "run", fail)
    monkeypatch.setattr(sys, "argv", ["pipelines", *RUN])
    with pytest.raises(ZeroDivisionError):
        cli.main()


@pytest.mark.slow
def test_a_run_reports_and_can_be_asked(call: Call) -> None:
    done = call(*RUN, "--set=most=300")
    assert done.code == 0, done.err
    assert "readings · batch · DirectRunner\n  history    rows.csv, 2024-01-01 00:10 … 2024-01-01 01:20 UTC" in done.out
    assert "read 4 = kept 3 + filtered 0 + rejected 1 + late 0 + duplicate 0   ✓" in done.out
    assert "rejected   1  not_hot          celsius < 300" in done.out
    assert "pipelines query" in done.out
    assert "4 rows ·" in done.err
    written = json.loads(Path("data/run.json").read_text())
    assert written["rows"] == {"read": 4, "kept": 3, "filtered": 0, "rejected": 1, "late": 0, "duplicate": 0}
    assert (written["rejected"], written["unmatched"]) == ({"not_hot": 1}, {})
    assert (written["pipeline"], written["mode"], written["runner"]) == ("readings", "batch", "DirectRunner")
    assert written["views"]["by_hour"]["rows"] == 2
    assert written["boundary"] == "2024-01-01T02:00:00+00:00"
    assert min(written[name] for name in ("seconds", "cpu_seconds", "peak_mib")) > 0
    assert sorted(path.name for path in Path("data").iterdir()) == ["dead_letters", "run.json", "store.db", "warehouse"]

    answer = call("query", "--json", "select sensor, window_start, n, mean from readings.by_hour order by 1")
    assert json.loads(answer.out) == [
        {"sensor": "a", "window_start": "2024-01-01T00:00:00+00:00", "n": 2, "mean": 15.0},
        {"sensor": "b", "window_start": "2024-01-01T01:00:00+00:00", "n": 1, "mean": None},
    ]
    again = call(*RUN, "--json", "--set=most=300", "--direct_num_workers=1")
    assert again.code == 0, again.err
    assert json.loads(again.out)["views"] == written["views"]


@pytest.mark.slow
def test_a_range_is_recomputed_alone(call: Call) -> None:
    assert call(*RUN).code == 0
    Path("rows.csv").write_text(ROWS.replace("00:10:00Z,10", "00:10:00Z,30").replace("01:20:00Z,", "01:20:00Z,50"))
    for _ in range(2):
        done = call(*RUN, "--from=2024-01-01T01:00", "--to=2024-01-01T02:00")
        assert done.code == 0, done.err
        assert "read 4 = kept 1 + filtered 2 + rejected 1" in done.out
    answer = call("query", "--json", "select sensor, n, mean from readings.by_hour order by 1")
    assert json.loads(answer.out) == [{"sensor": "a", "n": 2, "mean": 15.0}, {"sensor": "b", "n": 1, "mean": 50.0}]


@pytest.mark.slow
def test_too_many_rejected_rows_exit_3_and_leave_the_report_of_the_last_good_run(call: Call) -> None:
    assert call(*RUN).code == 0
    before = Path("data/run.json").read_text()
    done = call(*RUN, "--max_rejected=0.2")
    assert done.code == 3
    assert done.err.splitlines()[-1].startswith("pipelines: readings: 1 of 4 rows were rejected")
    assert "Traceback" not in done.err
    assert Path("data/run.json").read_text() == before
