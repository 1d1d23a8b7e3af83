import dataclasses
import itertools

import numpy as np
import pyarrow as pa
import pytest

from pipelines.transforms.disorder import (
    AGAIN,
    COPY,
    DUE,
    NUMBER,
    POISON,
    ROW,
    TIME,
    WHEN,
    Disorder,
    Mask,
    Partition,
    due,
)
from pipelines.transforms.errors import UserError
from pipelines.transforms.lateness import Lateness, Position, watermarks
from pipelines.transforms.windows import Sliding, Tumbling

N = 8_000
SECOND = 1_000_000
DISORDER = 10 * SECOND
RULES = (Lateness(Tumbling("1m"), 5 * SECOND), Lateness(Sliding("3m", every="1m"), 5 * SECOND))


def rows(first: int = 0, last: int = N) -> pa.Table:
    """A row every 100 ms, each 7 s a null."""
    numbers = np.arange(first, last)
    times = numbers * (SECOND // 10)
    return pa.table(
        {
            NUMBER.name: numbers,
            TIME.name: pa.array(times, pa.int64(), mask=numbers % 70 == 3),
            DUE.name: np.where(numbers % 70 == 3, 2**62, due(RULES, times, DISORDER)),
        }
    )


def sent(disorder: Disorder, *cuts: int) -> pa.Table:
    """What is sent of one partition, in order; the rows cut at these places before."""
    bounds = [0, *cuts, N]
    pieces = [rows(start, stop) for start, stop in itertools.pairwise(bounds)]
    places = [piece[NUMBER.name].to_numpy() * (SECOND // 10) for piece in pieces]
    every = pa.concat_tables([disorder.of(piece, at, DISORDER) for piece, at in zip(pieces, places, strict=True)])
    every = every.sort_by([(WHEN.name, "ascending"), (NUMBER.name, "ascending"), (COPY.name, "ascending")])
    partition = Partition((N - 1) * SECOND // 10)
    taken = [partition.take(every.slice(at, 977))[0] for at in range(0, len(every), 977)]
    rest = partition.rest()
    return pa.concat_tables(taken if rest is None else [*taken, rest])


def late(found: pa.Table) -> Mask:
    """What the speed layer will call late."""
    known = found[TIME.name].is_valid().to_numpy(zero_copy_only=False) & (found[COPY.name].to_numpy() < POISON)
    times = found[TIME.name].fill_null(0).to_numpy()
    before, _ = watermarks(times, known, Position(0), DISORDER)
    late: Mask = known & np.logical_and.reduce([rule.late(times, before) for rule in RULES])
    return late


def test_no_disorder_is_the_order_of_the_history() -> None:
    assert sent(Disorder(seed=3))[NUMBER.name].to_pylist() == list(range(N))


def test_rows_shuffled_within_the_sources_disorder_are_not_late() -> None:
    found = sent(Disorder(shuffle="10s"))
    numbers = found[NUMBER.name].to_numpy()
    assert sorted(numbers) == list(range(N)) and not late(found).any()
    behind = np.maximum.accumulate(numbers) - numbers
    assert 80 < behind.max() <= 100  # 10 s are 100 rows
    assert 0.3 < (behind > 20).mean() < 0.9


@pytest.mark.parametrize("share", [0.01, 0.3])
def test_the_share_that_is_to_be_late_is_late_and_nothing_else(share: float) -> None:
    found = sent(Disorder(shuffle="10s", late=share, seed=1))
    is_late = late(found)
    chosen = found["_tardy"].to_numpy()
    assert sorted(found[NUMBER.name].to_numpy()) == list(range(N))
    assert abs(chosen.mean() - share) < 0.02
    # Those whose time is past the end of the history cannot be.
    assert np.array_equal(is_late, chosen & (found[DUE.name].to_numpy() <= (N - 1) * SECOND // 10))
    assert is_late.mean() > share * 0.6


def test_duplicates_come_after_their_row_and_not_late() -> None:
    found = sent(Disorder(shuffle="4s", duplicate=0.2, seed=2))
    copies, numbers = found[COPY.name].to_numpy(), found[NUMBER.name].to_numpy()
    assert abs((copies == AGAIN).sum() / N - 0.2) < 0.02 and not late(found).any()
    first = {number: at for at, number in enumerate(numbers) if copies[at] == ROW}
    assert all(first[number] < at for at, number in enumerate(numbers) if copies[at] == AGAIN)


def test_bad_messages_are_of_every_kind_and_move_nothing() -> None:
    found = sent(Disorder(corrupt=0.1))
    kinds = np.bincount(found[COPY.name].to_numpy(), minlength=6)
    assert kinds[ROW] == N and not kinds[AGAIN]
    assert abs(kinds[POISON:].sum() / N - 0.1) < 0.02 and kinds[POISON:].min() > 150


def test_a_seed_is_one_disorder_however_rows_are_cut() -> None:
    disorder = Disorder("10s", late=0.1, duplicate=0.1, corrupt=0.1, seed=9)
    once = sent(disorder)
    assert once.equals(sent(disorder, 1, 777, 5_000))
    assert not once.equals(sent(dataclasses.replace(disorder, seed=10)))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"late": 0.6}, "--late=0.6: a share of the rows, from 0 to 0.5, as rows are late only after others"),
        ({"duplicate": -0.1}, "--duplicate=-0.1: a share of the rows, from 0 to 1"),
        ({"corrupt": 1.5}, "--corrupt=1.5: a share of the rows, from 0 to 1"),
        ({"late": float("nan")}, "--late=nan: a share"),
        ({"shuffle": "1mo"}, "--shuffle='1mo': months have no fixed length"),
        ({"seed": 2**64}, "--seed=18446744073709551616: a whole number of 64 bits"),
    ],
)
def test_errors_are_for_people(settings: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Disorder(**settings)  # type: ignore[arg-type]
