"""Mergeable states: what a view keeps per key and window, as columns, and the DuckDB SQL that makes and merges them.

A state is a commutative monoid over columns: ``partial`` aggregates rows into it, ``merge`` aggregates states into one,
in any order and any split. Equal states have equal names, so measures that need the same one share its columns.
"""

import dataclasses
import hashlib
from abc import ABC, abstractmethod
from decimal import Decimal
from typing import ClassVar

Sql = str

VERSION = 1
"""Of the encoding of states. A change of any state's columns or meaning must raise it: it is part of every name."""

ROWS = "_rows"
"""The column every partial has beside its states: how many rows it is of, BIGINT."""

COUNTER = "DECIMAL(38,0)"
"""An integer of 128 bits, in the type that Arrow, Parquet and Delta also have."""

WIDE = frozenset(("HUGEINT", "UHUGEINT", "UBIGINT"))
"""Integers whose sum may not fit BIGINT by design, and not by accident."""

INTEGERS = WIDE | {"BOOLEAN", "TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER"}
FLOATS = frozenset(("FLOAT", "DOUBLE"))


def is_decimal(kind: str) -> bool:
    """Whether a DuckDB type is ``DECIMAL(width,scale)``."""
    return kind.startswith("DECIMAL")


def scale(kind: str) -> int:
    """Decimal places of ``DECIMAL(width,scale)``; 0 of an integer."""
    return int(kind.rstrip(")").split(",")[1]) if is_decimal(kind) else 0


@dataclasses.dataclass(frozen=True)
class State(ABC):
    """A mergeable aggregate of the values of ``expr`` (of DuckDB type ``kind``) in the rows where ``where`` is true.

    ``columns`` are its columns, ``_`` + name + suffix, and their DuckDB types: what shuffle, warehouse and store hold.
    """

    label: ClassVar[str]

    expr: Sql
    where: Sql | None
    kind: str

    @property
    def name(self) -> str:
        """Derived from the content, so equal in every process and release: ``sum_`` and 10 hex digits."""
        content = "\0".join([str(VERSION), self.label, *map(repr, dataclasses.astuple(self))])
        return f"{self.label}_{hashlib.blake2b(content.encode(), digest_size=5).hexdigest()}"

    @property
    def column(self) -> str:
        return "_" + self.name

    @property
    def value(self) -> Sql:
        """The value to aggregate, null where ``where`` is not true: there ``expr`` is not even evaluated."""
        return f"({self.expr})" if self.where is None else f"(CASE WHEN ({self.where}) THEN ({self.expr}) END)"

    @abstractmethod
    def columns(self) -> dict[str, str]:
        """Column to DuckDB type."""

    @abstractmethod
    def partial(self, time: Sql) -> dict[str, Sql]:
        """Column to SQL aggregate over rows. time: SQL of the event time in µs, BIGINT."""

    @abstractmethod
    def merge(self) -> dict[str, Sql]:
        """Column to SQL aggregate over states."""


@dataclasses.dataclass(frozen=True)
class Counted(State):
    """How many values there are: BIGINT."""

    label = "count"

    def columns(self) -> dict[str, str]:
        return {self.column: "BIGINT"}

    def partial(self, time: Sql) -> dict[str, Sql]:
        return {self.column: f"count({self.value})"}

    def merge(self) -> dict[str, Sql]:
        return {self.column: f"sum({self.column})::BIGINT"}


@dataclasses.dataclass(frozen=True)
class Summed(State):
    """The sum of integers (DECIMAL(38,0)) or decimals (DECIMAL(38,scale)). Past 38 digits DuckDB raises."""

    label = "sum"

    def columns(self) -> dict[str, str]:
        return {self.column: f"DECIMAL(38,{scale(self.kind)})"}

    def partial(self, time: Sql) -> dict[str, Sql]:
        value = f"{self.value}::TINYINT" if self.kind == "BOOLEAN" else self.value
        value = f"{value}::{COUNTER}" if self.kind in WIDE else value
        return {name: f"sum({value})::{kind}" for name, kind in self.columns().items()}

    def merge(self) -> dict[str, Sql]:
        return {self.column: f"sum({self.column})"}


ONE = 1 << 56
"""Fixed point of float sums: a value counts in units of 2^-56 (1.4e-17)."""

GREAT, SMALL = 1 << 38, 2.0**-20
"""Where float sums are exact: the greatest magnitude of the values is below 2^38 (2.7e11), and at least 1e-6 or 0."""


@dataclasses.dataclass(frozen=True)
class FloatSummed(State):
    """The sum of doubles in fixed point, an integer that any order adds up alike, and as a double for all other values.

    _units counts 2^-56 (each value is rounded to one: exact from 2^-4 up, within 7e-18 below), _reach is the greatest
    magnitude, _plain the sum in whatever order it came. A reach below 2^38 leaves room for 2^32 values at it.
    """

    label = "sum"

    def columns(self) -> dict[str, str]:
        return {f"{self.column}_units": COUNTER, f"{self.column}_plain": "DOUBLE", f"{self.column}_reach": "DOUBLE"}

    def partial(self, time: Sql) -> dict[str, Sql]:
        value = f"{self.value}::DOUBLE"
        fixed = f"(CASE WHEN abs({value}) < {GREAT}::DOUBLE THEN {value} * {ONE}::DOUBLE END)::HUGEINT"
        units, plain, reach = self.columns()
        return {
            units: f"sum({fixed})::{COUNTER}",
            plain: f"sum({value})",
            reach: f"max(abs({value}))",
        }

    def merge(self) -> dict[str, Sql]:
        units, plain, reach = self.columns()
        return {units: f"sum({units})", plain: f"sum({plain})", reach: f"max({reach})"}

    def total(self) -> Sql:
        """The sum, DOUBLE; null without values."""
        units, plain, _ = self.columns()
        return f"(CASE WHEN {self.exact()} THEN {units}::DOUBLE / {ONE}::DOUBLE ELSE {plain} END)"

    def exact(self) -> Sql:
        """Whether the fixed point holds the sum."""
        _, _, reach = self.columns()
        return f"coalesce({reach} < {GREAT}::DOUBLE AND ({reach} >= {SMALL!r}::DOUBLE OR {reach} = 0), true)"


@dataclasses.dataclass(frozen=True)
class _Extreme(State):
    function = "min"

    @property
    def ordered(self) -> Sql:
        # 0.0 and -0.0 are equal, and which of the two is met first must not show; adding 0 leaves one zero.
        return f"({self.value} + 0)" if self.kind in FLOATS else self.value

    def columns(self) -> dict[str, str]:
        return {self.column: self.kind}

    def partial(self, time: Sql) -> dict[str, Sql]:
        return {self.column: f"{self.function}({self.ordered})"}

    def merge(self) -> dict[str, Sql]:
        return {name: f"{self.function}({name})" for name in self.columns()}


@dataclasses.dataclass(frozen=True)
class Least(_Extreme):
    """The least value, of the value's own type. NaN is above infinity, as in DuckDB and PostgreSQL."""

    label = "min"


@dataclasses.dataclass(frozen=True)
class Greatest(_Extreme):
    """The greatest value, of the value's own type. NaN is above infinity, as in DuckDB and PostgreSQL."""

    label = "max"
    function = "max"


@dataclasses.dataclass(frozen=True)
class _Timed(_Extreme):
    """STRUCT(t BIGINT, v …): an event time in µs and a value; compared by time, then value."""

    def columns(self) -> dict[str, str]:
        return {self.column: f"STRUCT(t BIGINT, v {self.kind})"}

    def partial(self, time: Sql) -> dict[str, Sql]:
        pair = f"{{'t': ({time})::BIGINT, 'v': {self.ordered}}}"
        return {self.column: f"{self.function}(CASE WHEN {self.value} IS NOT NULL THEN {pair} END)"}


@dataclasses.dataclass(frozen=True)
class Earliest(_Timed):
    """The value of least event time, the least of several."""

    label = "first"


@dataclasses.dataclass(frozen=True)
class Latest(_Timed):
    """The value of greatest event time, the greatest of several."""

    label = "last"
    function = "max"


@dataclasses.dataclass(frozen=True)
class Spread(State):
    """Count, mean and squared deviations. Exact sums where the values allow, else Chan, Golub and LeVeque 1983.

    Integers (and decimals, in units of their last place) below 2^45: _n, _s1 and _s2 are count, sum and sum of squares,
    null without any. All other values: _rest STRUCT(n, mean, m2), merged pair by pair in sorted order; NaN for a value
    that is not finite or whose square is not (1e150 and up).
    """

    label = "variance"

    def columns(self) -> dict[str, str]:
        rest = {f"{self.column}_rest": "STRUCT(n BIGINT, mean DOUBLE, m2 DOUBLE)"}
        if self.kind in FLOATS:
            return rest
        return {f"{self.column}_n": "BIGINT", f"{self.column}_s1": COUNTER, f"{self.column}_s2": COUNTER, **rest}

    def partial(self, time: Sql) -> dict[str, Sql]:
        if self.kind in FLOATS:
            return {f"{self.column}_rest": _chan(f"{self.value}::DOUBLE")}
        places = scale(self.kind)
        value = self.value if is_decimal(self.kind) else f"{self.value}::HUGEINT"
        bound = f"abs({value}) < {Decimal(1 << 45).scaleb(-places)}"
        small = f"(CASE WHEN {bound} THEN {value} * 1{'0' * places} END)::HUGEINT"
        large = f"(CASE WHEN NOT {bound} THEN {value}::DOUBLE END)"
        n, s1, s2, rest = self.columns()
        return {
            n: f"nullif(count({small}), 0)",
            s1: f"sum({small}::BIGINT)::{COUNTER}",
            s2: f"sum({small} * {small})::{COUNTER}",
            rest: _chan(large),
        }

    def merge(self) -> dict[str, Sql]:
        rest = f"{self.column}_rest"
        sums = {name: f"sum({name})::{kind}" for name, kind in self.columns().items() if name != rest}
        return {**sums, rest: _chan_merged(f"list_sort(list({rest}) FILTER ({rest} IS NOT NULL))")}

    def moments(self) -> Sql:
        """STRUCT(n, mean, m2) of all values, or null."""
        rest = f"{self.column}_rest"
        if self.kind in FLOATS:
            return rest
        n, s1, s2 = (f"{name}::HUGEINT" for name in list(self.columns())[:3])
        # Around the integer next to the mean the squares are small, and at most one bit cancels.
        near = f"round({s1}::DOUBLE / {n})::HUGEINT"
        left = f"({s1} - {n} * {near})"
        squares = f"(({s2} - {near} * {s1}) - {near} * {left})"
        m2 = f"({squares}::DOUBLE - {left}::DOUBLE * {left}::DOUBLE / {n}) / 1e{2 * scale(self.kind)}"
        mean = f"({s1}::DOUBLE / {n} / 1e{scale(self.kind)})"
        exact = f"(CASE WHEN {self.column}_n IS NOT NULL THEN {{'n': {self.column}_n, 'mean': {mean}, 'm2': {m2}}} END)"
        return _chan_merged(f"list_filter([{exact}, {rest}], lambda s: s IS NOT NULL)")


def _chan(value: Sql) -> Sql:
    usable = f"(CASE WHEN abs({value}) < 1e150 THEN {value} END)"
    spoilt = f"bool_or(NOT abs({value}) < 1e150)"
    m2 = f"CASE WHEN {spoilt} THEN 'nan'::DOUBLE ELSE var_pop({usable}) * count({value}) END"
    mean = f"CASE WHEN {spoilt} THEN 'nan'::DOUBLE ELSE avg({usable}) END"
    return f"CASE WHEN count({value}) > 0 THEN {{'n': count({value}), 'mean': {mean}, 'm2': {m2}}} END"


def _chan_merged(states: Sql) -> Sql:
    delta, n = "(b.mean - a.mean)", "(a.n + b.n)"
    mean = f"a.mean + {delta} * b.n / {n}"
    m2 = f"a.m2 + b.m2 + {delta} * {delta} * a.n * b.n / {n}"
    pair = f"lambda a, b: {{'n': {n}, 'mean': {mean}, 'm2': {m2}}}"
    return f"(CASE WHEN len({states}) > 0 THEN list_reduce({states}, {pair}) END)"
