"""Archives a log and computes what is new, and kills itself at a point: ``python dying_lake.py POINT PLACE``; POINT 0
runs to the end. A point is a call of a function of the project, as in dying.py."""

import dataclasses
import itertools
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from dying import ROOT, SALES, deployment  # type: ignore[import-not-found]  # beside this program

from pipelines.archive import archive
from pipelines.run import run


def main() -> None:
    """Runs, and dies at the point."""
    point, place = int(sys.argv[1]), Path(sys.argv[2])
    counter = itertools.count(1)

    def called(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(ROOT) and next(counter) == point:
            os.kill(os.getpid(), signal.SIGKILL)

    where = dataclasses.replace(
        deployment(place, ""), history=None, live=f"{place}/log.db", lake=f"{place}/lake", since="last"
    )
    threading.setprofile(called)
    sys.setprofile(called)
    archive(SALES, where)
    run(SALES, where)
    sys.setprofile(None)
    print(next(counter))


if __name__ == "__main__":
    main()
