"""The built-in flights on any runner: what each view came to, as rows and digest."""

from pathlib import Path
from typing import Any

from pipelines import definition, run
from pipelines.examples import flights
from pipelines.options import Deployment

Views = dict[str, tuple[int, str]]


def views(path: Path, runner: str, **places: Any) -> Views:
    """A run to its end: in batch over the history, unless ``places`` say otherwise."""
    end: dict[str, Any] = {"until": "end"} if "live" in places else {"history": flights.HISTORY()}
    deployment = Deployment(
        dimensions=flights.DIMENSIONS(),
        warehouse=f"{path}/warehouse",
        store=f"{path}/store.db",
        state=f"{path}/state",
        dead_letters=f"{path}/dead",
        report=f"{path}/run.json",
        runner=runner,
        **end,
        **places,
    )
    facts = run.run(definition.load("flights"), deployment).facts
    return {name: (view["rows"], view["digest"]) for name, view in facts["views"].items()}
