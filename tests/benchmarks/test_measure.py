import json
import subprocess
import sys
from pathlib import Path

from benchmarks import measure

BURN = "import time\nend = time.process_time() + {seconds}\nwhile time.process_time() < end: pass"


def measured(tmp_path: Path, program: str) -> measure.Measured:
    figures = tmp_path / "figures.json"
    subprocess.run([sys.executable, measure.__file__, figures, sys.executable, "-S", "-c", program], check=True)
    return measure.Measured(**json.loads(figures.read_text()))


def test_the_cpu_seconds_of_a_child_whose_parent_is_gone_are_counted(tmp_path: Path) -> None:
    burn = BURN.format(seconds=0.2)
    figures = measured(tmp_path, f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-S', '-c', {burn!r}])")
    assert figures.status == 0
    assert figures.cpu >= 0.2


def test_the_peak_is_at_least_what_was_touched(tmp_path: Path) -> None:
    assert measured(tmp_path, "bytes = bytearray(b'x') * (100 << 20)").peak_mib >= 100


def test_the_status_is_the_commands(tmp_path: Path) -> None:
    assert measured(tmp_path, "raise SystemExit(3)").status == 3
