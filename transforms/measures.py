"""Measures: what a view computes per key and window, as results over mergeable states.

Nulls are skipped; no values give null, and Count 0. What is exact is a function of the multiset of the values, bit for
bit, whatever the order and split: counts, Min, Max, First, Last, sums of integers, of decimals and of doubles of usual
size, variances of integers and decimals of usual size. ``Measure.exact`` says, as SQL over the states, whether a row's
result is; the rest agrees to about 1e-12.
"""

import dataclasses
from abc import ABC, abstractmethod

from pipelines.transforms.errors import UserError
from pipelines.transforms.sketches import Hashed, Ranked
from pipelines.transforms.states import (
    FLOATS,
    INTEGERS,
    ROWS,
    WIDE,
    Counted,
    Earliest,
    FloatSummed,
    Greatest,
    Latest,
    Least,
    Spread,
    Sql,
    State,
    Summed,
    is_decimal,
    scale,
)


@dataclasses.dataclass(frozen=True)
class Measure(ABC):
    """A named result over states. where: only rows for which this SQL is true."""

    _: dataclasses.KW_ONLY
    where: Sql | None = None

    def check(self, kind: str) -> str | None:
        """Why values of this DuckDB type cannot be aggregated, or None."""
        return None

    @abstractmethod
    def states(self, kind: str) -> tuple[State, ...]:
        """The states the result is computed from. kind: the DuckDB type of the expression."""

    @abstractmethod
    def result(self, kind: str) -> Sql:
        """The result, SQL over the columns of the states and ``_rows``."""

    @abstractmethod
    def type(self, kind: str) -> str:
        """The DuckDB type of the result."""

    def exact(self, kind: str) -> Sql:
        """Whether the result is the same bit for bit in any order and split: SQL over the states' columns."""
        return "true"


@dataclasses.dataclass(frozen=True)
class Count(Measure):
    """How many rows, or how many values of an expression that are not null: BIGINT, never null.

    >>> Count().result(""), Count("tailnum").type("VARCHAR")
    ('_rows', 'BIGINT')
    """

    expr: Sql | None = None

    def states(self, kind: str) -> tuple[State, ...]:
        if self.expr is None and self.where is None:
            return ()
        # Without an expression every row has a value, whatever kind the caller gives.
        return (Counted("true", self.where, "BOOLEAN") if self.expr is None else Counted(self.expr, self.where, kind),)

    def result(self, kind: str) -> Sql:
        return "".join(state.column for state in self.states(kind)) or ROWS

    def type(self, kind: str) -> str:
        return "BIGINT"


@dataclasses.dataclass(frozen=True)
class Sum(Measure):
    """The sum: of integers BIGINT (of wider integers DECIMAL(38,0)), of decimals DECIMAL(38,scale), of floats DOUBLE.

    A sum past its type raises duckdb.ConversionException or OutOfRangeException and is never a wrapped number; cast
    the expression to DECIMAL(38,0) for sums past 64 bits. Sum of a BOOLEAN counts the true ones.

    >>> Sum("units").type("BIGINT"), Sum("price * units").type("DECIMAL(18,2)")
    ('BIGINT', 'DECIMAL(38,2)')
    """

    expr: Sql

    def check(self, kind: str) -> str | None:
        number = kind in INTEGERS or kind in FLOATS or is_decimal(kind)
        return None if number else f"{type(self).__name__} needs a number, not {kind}"

    def states(self, kind: str) -> tuple[State, ...]:
        return ((FloatSummed if kind in FLOATS else Summed)(self.expr, self.where, kind),)

    def result(self, kind: str) -> Sql:
        (state,) = self.states(kind)
        if isinstance(state, FloatSummed):
            return state.total()
        if self.type(kind) != "BIGINT":
            return state.column
        return f"{state.column}::BIGINT"

    def type(self, kind: str) -> str:
        if kind in FLOATS:
            return "DOUBLE"
        return "BIGINT" if kind in INTEGERS and kind not in WIDE else f"DECIMAL(38,{scale(kind)})"

    def exact(self, kind: str) -> Sql:
        state = self.states(kind)[0]
        return state.exact() if isinstance(state, FloatSummed) else "true"


@dataclasses.dataclass(frozen=True)
class Mean(Sum):
    """The sum divided by the count of the values: DOUBLE. Of a BOOLEAN, the share that is true."""

    def states(self, kind: str) -> tuple[State, ...]:
        return (*super().states(kind), Counted(self.expr, self.where, kind))

    def result(self, kind: str) -> Sql:
        total, count = self.states(kind)
        number = total.total() if isinstance(total, FloatSummed) else f"{total.column}::DOUBLE"
        return f"({number} / {count.column})"

    def type(self, kind: str) -> str:
        return "DOUBLE"


@dataclasses.dataclass(frozen=True)
class Min(Measure):
    """The least value, of its own type. NaN is above infinity; text compares by its UTF-8 bytes."""

    expr: Sql

    def check(self, kind: str) -> str | None:
        nested = kind.endswith("]") or kind.startswith(("STRUCT", "MAP", "UNION"))
        return f"{type(self).__name__} needs one value that has an order, not {kind}" if nested else None

    def states(self, kind: str) -> tuple[State, ...]:
        return (Least(self.expr, self.where, kind),)

    def result(self, kind: str) -> Sql:
        return self.states(kind)[0].column

    def type(self, kind: str) -> str:
        return kind


@dataclasses.dataclass(frozen=True)
class Max(Min):
    """The greatest value, of its own type. NaN is above infinity; text compares by its UTF-8 bytes."""

    def states(self, kind: str) -> tuple[State, ...]:
        return (Greatest(self.expr, self.where, kind),)


@dataclasses.dataclass(frozen=True)
class First(Min):
    """The value at the least event time (the least of several), of its own type."""

    def check(self, kind: str) -> str | None:
        return None

    def states(self, kind: str) -> tuple[State, ...]:
        return (Earliest(self.expr, self.where, kind),)

    def result(self, kind: str) -> Sql:
        return f"{self.states(kind)[0].column}.v"


@dataclasses.dataclass(frozen=True)
class Last(First):
    """The value at the greatest event time (the greatest of several), of its own type."""

    def states(self, kind: str) -> tuple[State, ...]:
        return (Latest(self.expr, self.where, kind),)


@dataclasses.dataclass(frozen=True)
class Variance(Sum):
    """The sample variance (n - 1 below the line), DOUBLE; null for fewer than two values, NaN with one not finite."""

    def states(self, kind: str) -> tuple[State, ...]:
        return (Spread(self.expr, self.where, kind),)

    def result(self, kind: str) -> Sql:
        (state,) = self.states(kind)
        assert isinstance(state, Spread)
        return f"list_transform([{state.moments()}], lambda s: CASE WHEN s.n > 1 THEN s.m2 / (s.n - 1) END)[1]"

    def type(self, kind: str) -> str:
        return "DOUBLE"

    def exact(self, kind: str) -> Sql:
        return "false" if kind in FLOATS else f"({self.states(kind)[0].column}_rest IS NULL)"


@dataclasses.dataclass(frozen=True)
class StdDev(Variance):
    """The square root of the sample variance, DOUBLE; null for fewer than two values."""

    def result(self, kind: str) -> Sql:
        return f"sqrt({super().result(kind)})"


@dataclasses.dataclass(frozen=True)
class Quantile(Sum):
    """The value at rank q * (n - 1), DOUBLE, as PERCENTILE_CONT: exact of up to 64 values, then within ``error`` of it.

    The error is relative to the value. -0.0 counts as 0.0, NaN is above infinity. Raises UserError for a q outside 0 to
    1 or an error outside 0.001 to 0.25.

    >>> Quantile("delay", 0.5).states("DOUBLE") == Quantile("delay", 0.95).states("DOUBLE")
    True
    """

    q: float
    _: dataclasses.KW_ONLY
    error: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.q <= 1:
            raise UserError(f"Quantile({self.expr!r}, {self.q!r}): the quantile is 0 to 1; the median is 0.5")
        _bounded(self, self.error, 0.001)

    def states(self, kind: str) -> tuple[State, ...]:
        return (Ranked(self.expr, self.where, kind, self.error),)

    def result(self, kind: str) -> Sql:
        (state,) = self.states(kind)
        assert isinstance(state, Ranked)
        return state.at(self.q)

    def type(self, kind: str) -> str:
        return "DOUBLE"

    def exact(self, kind: str) -> Sql:
        return "true"


@dataclasses.dataclass(frozen=True)
class Distinct(Measure):
    """How many different values, BIGINT, never null: exact up to 64, then with a standard error of at most ``error``.

    NaN is one value, and so are 0.0 and -0.0. Raises UserError for an error outside 0.003 to 0.25.

    >>> Distinct("tailnum").type("VARCHAR")
    'BIGINT'
    """

    expr: Sql
    _: dataclasses.KW_ONLY
    error: float = 0.02

    def __post_init__(self) -> None:
        _bounded(self, self.error, 0.003)

    def states(self, kind: str) -> tuple[State, ...]:
        return (Hashed(self.expr, self.where, kind, self.error),)

    def result(self, kind: str) -> Sql:
        (state,) = self.states(kind)
        assert isinstance(state, Hashed)
        return state.count()

    def type(self, kind: str) -> str:
        return "BIGINT"


def _bounded(measure: Quantile | Distinct, error: float, least: float) -> None:
    if not least <= error <= 0.25:
        name = f"{type(measure).__name__}({measure.expr!r}, error={error!r})"
        raise UserError(f"{name}: the error is {least} to 0.25; 0.01 is one percent")
