"""What is measured: a job over a dataset, by several programs in turn."""

import dataclasses

from benchmarks.data import DATASETS, Dataset
from benchmarks.peers import BEAM_KEYS, BEAM_WINDOWS, BYTEWAX, DUCKDB, OURS, PATHWAY, POLARS, PYFLINK, PYSPARK, Peer


@dataclasses.dataclass(frozen=True)
class Case:
    """A job over a dataset. In a round every peer runs once, in this order; ``rounds`` rounds, so A B A B."""

    job: str
    dataset: Dataset
    peers: tuple[Peer, ...]
    rounds: int = 5

    @property
    def name(self) -> str:
        return f"{self.job}-{self.dataset.name}"


def _case(job: str, dataset: str, *peers: Peer, rounds: int = 5) -> Case:
    return Case(job, DATASETS[dataset], peers, rounds)


QUICK = (
    _case("base", "3M", OURS, DUCKDB, POLARS, PYSPARK, rounds=1),
    _case("sketch", "3M", OURS, DUCKDB, POLARS, rounds=1),
    _case("base", "300k", OURS, BEAM_KEYS, BEAM_WINDOWS, rounds=1),
)

FULL = (
    _case("base", "3M", OURS, DUCKDB, POLARS, PYSPARK, BEAM_KEYS),
    _case("sketch", "3M", OURS, DUCKDB, POLARS, PYSPARK),
    _case("base", "30M", OURS, DUCKDB, POLARS, PYSPARK),
    _case("sketch", "30M", OURS, DUCKDB, POLARS, PYSPARK),
    _case("identity", "3M", OURS),
    _case("identity", "30M", OURS),
    _case("base", "10M-groups", OURS, DUCKDB, rounds=3),
    _case("base", "300M", OURS, DUCKDB, rounds=3),
    _case("sketch", "300M", OURS, DUCKDB, rounds=1),
    _case("identity", "300M", OURS, rounds=1),
)

# Of those who are slow, or have no sketch, or need an environment of their own: once, for the page.
ONCE = (
    _case("base", "30M", PYFLINK, BYTEWAX, rounds=1),
    _case("sketch", "30M", PYFLINK, rounds=1),
    _case("base", "3M", PATHWAY, BEAM_WINDOWS, rounds=1),
    _case("sketch", "3M", BEAM_KEYS, rounds=1),
)

PROFILES = (("base", "3M"), ("base", "30M"), ("sketch", "3M"), ("sketch", "30M"))
