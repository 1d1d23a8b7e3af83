"""A batch run that kills itself at a given point: ``python dying.py POINT PLACE HISTORY``; POINT 0 runs to the end.

A point is a call of a function of the project, counted over all threads from the moment the graph is built: the same
run passes the same points, through reading, spilling, merging, staging, committing and flipping.
"""

import itertools
import os
import signal
import sys
import threading
from datetime import datetime
from pathlib import Path
from typing import Any

import pipelines.commit
import pipelines.graph
import pipelines.report
from pipelines import Check, Count, Distinct, Pipeline, Quantile, Source, Sum, Tumbling, View
from pipelines.options import Deployment
from pipelines.run import run

ROOT = str(Path(pipelines.graph.__file__).parent.parent)


class Sale:
    """A row of the test's history."""

    id: int
    at: datetime
    shop: str
    cents: int


SALES = Pipeline(
    "sales",
    source=Source(Sale, event_time="at", identity="id"),
    steps=(Check(positive="cents > 0"),),
    views=(
        View(
            "by_shop",
            by="shop",
            window=Tumbling("1h"),
            sales=Count(),
            revenue=Sum("cents"),
            median=Quantile("cents", 0.5),
        ),
        View("by_day", window=Tumbling("1d"), shops=Distinct("shop"), revenue=Sum("cents")),
    ),
)


def deployment(place: Path, history: str) -> Deployment:
    """Everything under one folder."""
    return Deployment(
        history=history,
        warehouse=str(place / "warehouse"),
        store=str(place / "store.db"),
        dead_letters=str(place / "dead"),
        report=str(place / "run.json"),
    )


def main() -> None:
    """Runs, and dies at the point."""
    point, place, history = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    counter = itertools.count(1)

    def called(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(ROOT) and next(counter) == point:
            os.kill(os.getpid(), signal.SIGKILL)

    threading.setprofile(called)
    sys.setprofile(called)
    run(SALES, deployment(place, history))
    sys.setprofile(None)
    print(next(counter))


if __name__ == "__main__":
    main()
