import pytest

from pipelines import runners
from pipelines.runners import flags
from pipelines.transforms.errors import UserError


def test_what_beam_knows_passes_in_either_spelling() -> None:
    given = ["--direct-num-workers", "2", "--job-name=a-b_c", "--experiments=x-y", "--streaming"]
    assert flags.accepted(given) == [
        "--direct_num_workers", "2", "--job_name=a-b_c", "--experiments=x-y", "--streaming",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--warehose=x"], "no option --warehose.*Nearest: --warehouse"),
        (["--dead-leters", "x"], "no option --dead-leters.*Nearest: --dead_letters"),
        (["--job_nam=x"], "no option --job_nam.*Nearest: --job_name"),
        (["--direct_num_workers=many"], "direct_num_workers.*many"),
        (["--state_backend=heap"], "invalid choice: 'heap' .*rocksdb"),
        (["flights"], "unexpected argument 'flights'"),
        (["--streaming", "--zzzzzzzz"], "no option --zzzzzzzz"),
    ],
)
def test_what_nobody_knows_is_refused_with_the_nearest_name(given: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        flags.accepted(given, ["--warehouse", "--dead_letters"])


def test_an_unknown_runner_is_refused() -> None:
    with pytest.raises(UserError, match=r"--runner=DirectRuner: no such runner here; one of .*DirectRunner"):
        runners.named("DirectRuner")
