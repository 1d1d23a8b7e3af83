"""States of fixed size for quantiles and distinct counts: every value while there are few, then a sketch of them all.

Both forms are functions of the multiset of the values alone: which form it is depends on how many there are, never on
the order or split, and all arithmetic is of integers or single IEEE operations, so every machine gets the same bits.
Merging only concatenates lists; ``pipelines.transforms.gather`` turns those that have grown long into the sketch.
"""

import dataclasses
import math
import sys
from abc import abstractmethod

import numpy as np
import numpy.typing as npt

from pipelines.transforms.lists import Ints, Lists
from pipelines.transforms.states import FLOATS, INTEGERS, WIDE, Sql, State

LIMIT = 64
"""How many values are kept as they are; one more makes the sketch."""

NUMBER = "_row"
"""Column with the number of a row, from 0, in whatever a query makes sketches of."""


@dataclasses.dataclass(frozen=True)
class Sketch(State):
    """Two lists: _raw of the values while they are few, _packed of the sketch's cells; null when empty.

    No list passes through a query, where it costs several times as much time and memory: what SQL puts into _raw are
    the numbers of a group's rows, and ``pipelines.transforms.gather`` puts the lists in their place.
    """

    error: float

    @property
    def raw(self) -> str:
        return f"{self.column}_raw"

    @property
    def packed(self) -> str:
        return f"{self.column}_packed"

    @property
    @abstractmethod
    def sample(self) -> Sql:
        """What _raw holds of a row, SQL; null where it has no value."""

    def numbers(self, rows: Sql) -> dict[str, Sql]:
        """The columns with the numbers of a group's rows, a list."""
        kinds = self.columns()
        return {self.raw: f"{rows}::{kinds[self.raw]}", self.packed: f"NULL::{kinds[self.packed]}"}

    def partial(self, time: Sql) -> dict[str, Sql]:
        return self.numbers(f"list({NUMBER})")

    def merge(self) -> dict[str, Sql]:
        return self.numbers(f"list({NUMBER})")

    @abstractmethod
    def collapsed(self, raw: Lists, packed: Lists) -> tuple[Lists, Lists]:
        """The same multisets in canonical form: sorted, and packed where there are more values than LIMIT."""


COUNTS = 40
"""Bits of a cell that count its values; above them is the bucket."""

ZERO = 1 << 20
"""Bucket of |x| is ZERO + floor(log), so positive and below 2^21 for any double; of -x the negative; of 0 zero."""

INFINITE = 1 << 22


@dataclasses.dataclass(frozen=True)
class Ranked(Sketch):
    """DDSketch (Masson, Rim and Lee 2019): counts in buckets so narrow that one value stands for all within ``error``.

    The logarithm is the quadratic interpolation of the DDSketch libraries: of basic operations, so equal everywhere.
    _raw DOUBLE[], _packed BIGINT[]: bucket * 2^40 + count, ascending. NaN is above infinity.
    """

    label = "quantile"

    @property
    def width(self) -> float:
        """Of a bucket, on the interpolated binary logarithm: its slope is at most 3/4 of the natural one."""
        return 8 * self.error / 3

    def columns(self) -> dict[str, str]:
        return {self.raw: "DOUBLE[]", self.packed: "BIGINT[]"}

    @property
    def sample(self) -> Sql:
        return f"({self.value}::DOUBLE + 0)"

    def buckets(self, values: npt.NDArray[np.float64]) -> Ints:
        """The bucket of every value, ascending with it."""
        mantissa, exponent = np.frexp(np.abs(values))
        beyond = 2 * mantissa - 1
        place = np.floor((exponent - 1 + beyond * (4 - beyond) / 3) / self.width)
        usual = np.isfinite(values)
        place = np.where(usual, place + ZERO, INFINITE)
        buckets = np.where(np.isnan(values), INFINITE + 1, np.sign(values) * place)
        return buckets.astype(np.int64)

    def collapsed(self, raw: Lists, packed: Lists) -> tuple[Lists, Lists]:
        keys = np.sort((raw.rows() << 24) + self.buckets(raw.values.astype(np.float64)) + (1 << 23))
        keys, counts = _summed(keys, np.ones(len(keys), np.int64))
        if len(packed.values):
            other = (packed.rows() << 24) + (packed.values >> COUNTS) + (1 << 23)
            keys = np.concatenate([keys, other])
            counts = np.concatenate([counts, packed.values & ((1 << COUNTS) - 1)])
            order = np.argsort(keys)
            keys, counts = _summed(keys[order], counts[order])
        groups = len(raw.lengths)
        cells = (((keys & ((1 << 24) - 1)) - (1 << 23)) << COUNTS) + counts
        lengths = np.bincount(keys >> 24, minlength=groups)
        return Lists(np.zeros(groups, np.int64), raw.values[:0]), Lists(lengths, cells)

    def at(self, q: float) -> Sql:
        """The quantile, DOUBLE: between the two values next to rank q * (n - 1), as PERCENTILE_CONT."""
        exact = f"list_aggregate({self.raw}, 'quantile_cont', {q!r})"
        count = f"(x & {(1 << COUNTS) - 1})"
        total = f"list_sum(list_transform({self.packed}, lambda x: {count}))"
        # Counts the rank down; where it ends: minus twice the place of the cell, and one less at the cell's last value.
        step = f"CASE WHEN a < 0 THEN a WHEN a < {count} THEN -2 * i - (a = {count} - 1)::BIGINT ELSE a - {count} END"
        place = f"list_reduce({self.packed}, lambda a, x, i: {step}, floor(r)::BIGINT)"
        ends = f"[{self.packed}[-a // 2], {self.packed}[(1 - a) // 2]]"
        between = (
            "CASE WHEN r = floor(r) OR v[1] = v[2] THEN v[1] ELSE v[1] * (1 - r + floor(r)) + v[2] * (r - floor(r)) END"
        )
        values = f"list_transform({ends}, lambda c: {self._middle('(c >> 40)')})"
        found = f"list_transform([{place}], lambda a: list_transform([{values}], lambda v: {between})[1])[1]"
        sketched = f"list_transform([{q!r}::DOUBLE * ({total} - 1)], lambda r: {found})[1]"
        return f"(CASE WHEN {self.packed} IS NULL THEN {exact} ELSE {sketched} END)"

    def _middle(self, bucket: Sql) -> Sql:
        """The value a bucket stands for: as far, relatively, from its lower as from its upper end."""
        place = f"((abs({bucket}) - {ZERO}) * {self.width!r}::DOUBLE)"
        lower = f"(pow(2::DOUBLE, floor({place})) * (3 - sqrt(4 - 3 * ({place} - floor({place})))))"
        usual = f"least({lower} * {1 + self.error!r}::DOUBLE, {sys.float_info.max!r}::DOUBLE)"
        size = f"CASE WHEN abs({bucket}) < {INFINITE} THEN {usual} ELSE 'inf'::DOUBLE END"
        return f"CASE WHEN {bucket} = 0 THEN 0 WHEN {bucket} > {INFINITE} THEN 'nan' ELSE sign({bucket}) * {size} END"


def _summed(keys: Ints, counts: Ints) -> tuple[Ints, Ints]:
    """Each of the sorted keys once, with the sum of its counts."""
    starts = np.flatnonzero(np.diff(keys, prepend=-1))
    return keys[starts], np.add.reduceat(counts, starts) if len(starts) else counts


@dataclasses.dataclass(frozen=True)
class Hashed(Sketch):
    """HyperLogLog (Flajolet et al. 2007) over 48 bits of a stable hash, estimated after Ertl 2017, sections 4 and 5.

    _raw BIGINT[]: the hashes, perhaps repeated; two values share one by a chance of 2^-48. _packed INTEGER[]: the
    registers that are set, place * 64 + rank, ascending; their number 2^p gives a standard error of at most ``error``.
    """

    label = "distinct"

    @property
    def p(self) -> int:
        """Bits of a hash that choose the register."""
        return int(np.ceil(2 * np.log2(1.04 / self.error)))

    def columns(self) -> dict[str, str]:
        return {self.raw: "BIGINT[]", self.packed: "INTEGER[]"}

    @property
    def sample(self) -> Sql:
        return f"({stable_hash(self.value, self.kind)} >> 16)::BIGINT"

    def registers(self, hashes: Ints) -> Ints:
        """The register (place * 64 + rank) that each hash sets: the rank is of its first bit set after the place."""
        left = 48 - self.p
        _, bits = np.frexp((hashes & ((1 << left) - 1)).astype(np.float64))
        return np.asarray(((hashes >> left) << 6) + (left + 1 - bits), np.int64)

    def collapsed(self, raw: Lists, packed: Lists) -> tuple[Lists, Lists]:
        groups = len(raw.lengths)
        keys = np.sort((raw.rows() << 48) + raw.values)
        keys = keys[np.diff(keys, prepend=-1) != 0]
        lengths = np.bincount(keys >> 48, minlength=groups)
        many = (lengths > LIMIT) | (packed.lengths > 0)
        over = many[keys >> 48]
        few = Lists(np.where(many, 0, lengths), keys[~over] & ((1 << 48) - 1))
        keys = keys[over]
        set_ = ((keys >> 48) << 24) + self.registers(keys & ((1 << 48) - 1))
        set_ = np.sort(np.concatenate([set_, (packed.rows() << 24) + packed.values]))
        set_ = set_[np.diff(set_ >> 6, append=-1) != 0]  # the greatest rank of each place
        return few, Lists(np.bincount(set_ >> 24, minlength=groups), (set_ & ((1 << 24) - 1)).astype(np.int32))

    def count(self) -> Sql:
        """How many different values, BIGINT, never null."""
        m = 1 << self.p
        unset = f"(({m} - len({self.packed})) / {m}::DOUBLE)"
        doubled = f"list_transform(range(1, 25), lambda k: pow({unset}, pow(2, k)) * pow(2, k - 1))"
        power = f"list_sum(list_transform({self.packed}, lambda x: pow(2::DOUBLE, -(x & 63))))"
        estimate = f"{m * m / (2 * math.log(2))!r}::DOUBLE / ({m} * ({unset} + list_sum({doubled})) + {power})"
        few = f"coalesce(list_unique({self.raw}), 0)::BIGINT"
        return f"(CASE WHEN {self.packed} IS NULL THEN {few} ELSE round({estimate})::BIGINT END)"


_ALL = "18446744073709551615::UHUGEINT"
_TIMES = ("DATE", "TIMESTAMP", "TIMESTAMP WITH TIME ZONE")


def stable_hash(expr: Sql, kind: str) -> Sql:
    """SQL of 64 bits (UBIGINT) that depend on the value alone, never on a library's version; null of null.

    Integers up to 64 bits, booleans, dates and times: two folded multiplications of 128 bits, as in wyhash (Wang Yi).
    Floats: of their bits, with one zero and one NaN. Anything else: the upper half of MD5 over its text.

    >>> stable_hash("name", "VARCHAR")
    '(md5_number(name) >> 64)::UBIGINT'
    """
    if kind in FLOATS:
        expr = f"(CASE WHEN isnan({expr}) THEN 'nan' ELSE {expr} + 0 END)::DOUBLE::BIT::BIGINT"
    elif kind in _TIMES:
        expr = f"epoch_us({expr})"
    elif kind in INTEGERS - WIDE:
        expr = f"({expr})"
    else:
        return f"(md5_number({expr if kind in ('VARCHAR', 'BLOB') else f'({expr})::VARCHAR'}) >> 64)::UBIGINT"
    seeded = f"xor(({expr}::HUGEINT + 9223372036854775808)::UHUGEINT, 11562461410679940143::UHUGEINT)"
    once = f"xor({_folded(seeded, 16646288086500911323)}, 10285213230658275043::UHUGEINT)"
    return f"({_folded(once, 6384245875588680899)})::UBIGINT"


def _folded(word: Sql, factor: int) -> Sql:
    product = f"({word} * {factor}::UHUGEINT)"
    return f"xor({product} & {_ALL}, {product} >> 64)"
