"""Where a pipeline's data lives and how much of it a run takes: the deployment, which a definition never names.

Values come in layers, each stronger than the next: flags, the environment (``PIPELINES_WAREHOUSE`` …),
``pipelines.toml``, and the embedded defaults below, which need no server. Beam-free.
"""

import dataclasses
import datetime
import os
import re
from collections.abc import Mapping
from typing import Literal

from pipelines.transforms.errors import UserError

MODES = ("batch", "stream", "micro-batch")

_VARIABLE = re.compile(r"\$\{([^}]*)\}")
_PASSWORD = re.compile(r"(\w://[^\s:/@]*:)[^\s/]+@")
_SECRET = "pass|pwd|secret|token|credential|signature|access_?key|api_?key"
_PARAMETER = re.compile(rf"([?&][^=&\s]*(?:{_SECRET})[^=&\s]*=)[^&\s]+", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Deployment:
    """Everything a graph needs to know beside the definition. All places are URIs with ``${ENV}`` already expanded.

    history: the files to read. dimensions: name → files. warehouse: tables ``<warehouse>/<pipeline>/<view>``.
    store: the low-latency store, None when switched off. dead_letters: the table of refused rows. from_, to: the event
    times [from_, to) to recompute, aware, None = open. max_rejected: the share of read rows past which the run is
    refused. buckets: parts of a view's merge, None = the runner's default.

    live: the log that a live run follows. lake: what is archived of it, which batch reads in place of a history.
    state: where a micro-batch run commits its turns, ``<state>/<pipeline>``. trigger: µs between results. until: when a
    live run ends: "end" once it has read what the log holds, or once its watermark is at an event time. since: "last"
    recomputes only the windows that the lake has new rows of since the last run. ahead: µs that an event time may be
    past the time at which the log took the event. refresh: µs after which dimensions are read again. rebuild: forget
    the live state and read the log again from its first offset.
    """

    history: str | None = None
    dimensions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    warehouse: str = "data/warehouse"
    store: str | None = "data/store.db"
    dead_letters: str = "data/dead_letters"
    from_: datetime.datetime | None = None
    to: datetime.datetime | None = None
    max_rejected: float | None = None
    buckets: int | None = None
    live: str | None = None
    lake: str | None = None
    state: str = "data/live"
    trigger: int = 1_000_000
    until: Literal["end"] | datetime.datetime | None = None
    since: Literal["last"] | None = None
    ahead: int = 3_600_000_000
    refresh: int = 60_000_000
    rebuild: bool = False
    report: str = "data/run.json"
    mode: str = "batch"
    runner: str = "DirectRunner"

    def __post_init__(self) -> None:
        if self.from_ is not None and self.to is not None and self.from_ >= self.to:
            raise UserError(f"--from={self.from_.isoformat()} is not before --to={self.to.isoformat()} (exclusive)")
        if self.max_rejected is not None and not 0 <= self.max_rejected <= 1:
            raise UserError(f"--max_rejected={self.max_rejected}: a share of the read rows, from 0 to 1")
        if self.buckets is not None and self.buckets < 1:
            raise UserError(f"--buckets={self.buckets}: at least 1")

    @property
    def facts(self) -> str:
        """Where the graph's commit step writes what it did, as JSON, for the report: beside the report."""
        return self.report.removesuffix(".json") + ".facts.json"


def expand(uri: str) -> str:
    """The URI with every ``${NAME}`` replaced from the environment. Raises UserError for a name that is not set.

    >>> os.environ["BUCKET"] = "b"
    >>> expand("s3://${BUCKET}/p/*.parquet")
    's3://b/p/*.parquet'
    """

    def value(match: re.Match[str]) -> str:
        try:
            return os.environ[match[1]]
        except KeyError:
            raise UserError(f"{masked(uri)}: the environment variable {match[1]} is not set") from None

    return _VARIABLE.sub(value, uri)


def masked(text: str) -> str:
    """The text with the secrets of every URI in it as ``***``: passwords, and parameters that are named like a secret.

    >>> masked("redis://app:hunter2@host:6379/0?token=abc&db=1")
    'redis://app:***@host:6379/0?token=***&db=1'
    """
    return _PARAMETER.sub(r"\1***", _PASSWORD.sub(r"\1***@", text))


def instant(text: str) -> datetime.datetime:
    """An ISO 8601 date or time as an aware time; UTC unless it has an offset. Raises UserError.

    >>> instant("2013-01-01").isoformat(), instant("2013-01-01T10:00-05:00").isoformat()
    ('2013-01-01T00:00:00+00:00', '2013-01-01T10:00:00-05:00')
    """
    try:
        time = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise UserError(f"{text!r} is not a time; write 2013-01-31 or 2013-01-31T10:00 (UTC, or with offset)") from None
    return time if time.tzinfo else time.replace(tzinfo=datetime.UTC)
