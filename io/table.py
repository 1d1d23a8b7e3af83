"""Tables: transactional and columnar, written as one commit of many files, read as an Arrow dataset.

Workers *stage*: they write files that no reader sees. One committer per table then *commits* the staged files and takes
away what they replace, in one transaction. A commit is named by a version (the run counter of the table) and a token
(what ran). Whoever runs it again writes nothing; a run that died before its commit leaves readers on the old answer::

    table = open_table("data/warehouse/flights/delays_by_day", schema)
    version = table.next_version()
    stage = table.stage("bucket-3", token=token, version=version)      # in a worker
    stage.add(rows)                                                    # as often as there are rows
    staged = stage.finish()                                            # pa.Table of STAGED
    table.commit(staged, token=token, version=version, replace="everything")

The Beam side, which stages from a PCollection, is in ``pipelines.io.write``: nothing here imports Beam.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import pyarrow as pa
import pyarrow.dataset as pads

from pipelines.transforms.errors import UserError
from pipelines.transforms.ranges import Ranges, joined


class TableConflict(UserError):
    """Another run has committed the version that this one was given: nothing was written. Look again and run again."""


STAGED = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("rows", pa.int64(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("stats", pa.string(), nullable=False),
    ]
)
"""What a worker hands to the committer, one row per file: its name in the table, its rows, its bytes, and its least and
greatest values as JSON. It is an Arrow table, so it travels as every other element does."""


@dataclasses.dataclass(frozen=True)
class Between:
    """Replace the rows of some time ranges, in one commit. ranges: at least one, in order and apart (``joined``)."""

    column: str
    ranges: Ranges

    def __post_init__(self) -> None:
        if not self.ranges or joined(self.ranges) != self.ranges:
            raise ValueError(f"{self.column}: empty ranges, or not in order and apart: {self.ranges}")


@dataclasses.dataclass(frozen=True)
class Files:
    """Replace these files of the table, by name, with others that hold the same rows: what readers see stays."""

    names: frozenset[str]

    def __str__(self) -> str:
        return f"{len(self.names)} files"


Replace = Literal["nothing", "everything"] | Between | Files
"""What a commit takes away: nothing (it appends), everything, the rows of time ranges, or files that it rewrites."""


@dataclasses.dataclass(frozen=True)
class Commit:
    """One commit of ours. rows and files: what it staged, not what the table then holds. at: ms since 1970 UTC.
    note: what its writer had to say with it, as JSON has it.
    """

    version: int
    token: str
    rows: int
    files: int
    replace: str
    at: int
    note: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Part:
    """A file of a table as last committed. least, greatest: of its columns that have statistics, where not all null."""

    name: str
    rows: int
    bytes: int
    least: Mapping[str, Any]
    greatest: Mapping[str, Any]


class Stage(Protocol):
    """The files of one unit of work, written as the rows come: memory is bounded by one row group."""

    def add(self, rows: pa.Table) -> None:
        """Write rows: at least the table's columns, in any order, of types that cast without loss."""

    def finish(self) -> pa.Table:
        """Close the files and give their names, as STAGED; no row if there were no rows."""


class Table(Protocol):
    """A transactional, columnar table. Picklable: it is opened wherever it is used.

    Guarantee: exactly once. A commit of (token, version) is in the table wholly or not at all, and once, however often
    staging and committing are tried again; readers see the table before it or after it. A run that asks for a version
    of its own after that commit landed is another run: what it appends is there again, what it replaces is not.
    """

    @property
    def uri(self) -> str: ...

    @property
    def schema(self) -> pa.Schema:
        """The columns as declared or, without a declaration, as the table has them."""

    def check(self, replace: Replace) -> None:
        """Raises UserError when a commit with this replace could not be made; ask before computing anything."""

    def next_version(self) -> int:
        """The version of the next commit: the greatest committed so far + 1; 1 for a new table."""

    def stage(self, unit: str, *, token: str, version: int) -> Stage:
        """Start the files of a unit. unit: letters, digits, - and _; two units of one commit never share a name."""

    def commit(
        self, staged: pa.Table, *, token: str, version: int, replace: Replace, note: Mapping[str, Any] | None = None
    ) -> Commit:
        """Make the staged files (STAGED, of all units) the table's, taking away what they replace, in one transaction.

        note: facts that become the table's with these rows and are told by ``last`` and ``history``, such as how far
        the source was read. If (token, version) is already there, gives that commit and writes nothing. Afterwards no
        file of this version is left that is not in the commit. Raises TableConflict when another run has committed this
        version, UserError when the columns do not fit, ValueError for staged rows outside the replaced ranges.
        """

    def dataset(self) -> pads.Dataset:
        """The rows as last committed, for Arrow and DuckDB, which push columns and filters down to its row groups."""

    def files(self) -> list[str]:
        """The Parquet files as last committed, for DuckDB's read_parquet (up to 6 times as fast as the dataset).

        Absolute paths; empty if they are not on this machine's disk, or there is none: then read the dataset.
        """

    def parts(self) -> list[Part]:
        """The files as last committed, by name. One that is replaced later stays readable for a week."""

    def last(self) -> Commit | None:
        """Our last commit; None before the first. Its version + 1 is the next one's."""

    def history(self) -> list[Commit]:
        """Our commits, newest first, as far back as the table's log goes."""


def open_table(uri: str, schema: pa.Schema | None = None) -> Table:
    """The table at a URI: a local folder, ``file://``, ``s3://`` or ``gs://`` (a Delta table).

    schema: the columns it shall have; without it the table must exist. Raises UserError when it does not, or when the
    place cannot be one. Nothing is created before the first commit.
    """
    from pipelines.io.delta import Delta

    scheme, separator, _ = uri.partition("://")
    if separator and scheme not in ("file", "s3", "gs"):
        raise UserError(
            f"table {uri}: no system {scheme!r} is known. A table is a local folder, file://, s3:// or gs://"
        )
    return Delta.open(uri, schema)
