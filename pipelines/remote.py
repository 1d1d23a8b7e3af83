"""Places and workers that are not of one machine: what the workers do not see is refused before anything is built."""

from collections.abc import Iterator

from pipelines.options import Deployment, masked
from pipelines.transforms.errors import UserError


def check(deployment: Deployment) -> None:
    """Raises UserError for the first place of a deployment that only this machine has.

    >>> check(Deployment(history="gs://bucket/flights.csv"))
    Traceback (most recent call last):
    pipelines.transforms.errors.UserError: --warehouse=data/warehouse: only this machine has it, and the workers of \
DirectRunner are others; give a URI that they reach, such as gs://bucket/warehouse
    """
    if deployment.lake and deployment.mode != "batch":
        what = f"--lake={masked(deployment.lake)}: what is live is archived by the process that follows it"
        raise UserError(f"{what}, and this one ends; run `pipelines archive` beside it")
    for flag, uri in _places(deployment):
        if not uri or not local(uri):
            continue
        what = f"--{flag}={masked(uri)}: only this machine has it, and the workers of {deployment.runner} are others"
        if flag == "store":
            raise UserError(f"{what}; give a store that they reach, or --store=none")
        if flag == "live":
            raise UserError(f"{what}; give a log that they reach: a SQLite log is none")
        raise UserError(f"{what}; give a URI that they reach, such as gs://bucket/{flag.split()[0]}")


def local(uri: str) -> bool:
    """Whether a place is a file of this machine.

    >>> local("data/store.db"), local("sqlite:///data/store.db"), local("gs://bucket/t")
    (True, True, False)
    """
    scheme, separator, _ = uri.partition("://")
    return not separator or scheme in ("file", "sqlite")


def _places(deployment: Deployment) -> Iterator[tuple[str, str | None]]:
    batch = deployment.mode == "batch"
    yield from (("history", deployment.history), ("lake", deployment.lake)) if batch else ()
    yield from (("live", deployment.live), ("state", deployment.state)) if not batch else ()
    yield from ((f"dimension {name}", uri) for name, uri in deployment.dimensions.items())
    yield from (("warehouse", deployment.warehouse), ("report", deployment.report)) if batch else ()
    yield from (("dead_letters", deployment.dead_letters), ("store", deployment.store))
