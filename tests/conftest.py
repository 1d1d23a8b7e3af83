"""The budget of the unit tests: all that are not marked slow take at most 60 seconds together, or the run fails."""

from collections.abc import Iterator

import pytest

BUDGET_SECONDS = 60.0
_SPENT = pytest.StashKey[float]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    if item.get_closest_marker("slow") is None:
        item.config.stash[_SPENT] = item.config.stash.get(_SPENT, 0.0) + call.duration
    return (yield)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == pytest.ExitCode.OK and session.config.stash.get(_SPENT, 0.0) > BUDGET_SECONDS:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    spent = terminalreporter.config.stash.get(_SPENT, 0.0)
    over = " – over budget: mark slow ones @pytest.mark.slow, or make them faster" if spent > BUDGET_SECONDS else ""
    terminalreporter.write_line(f"unit tests: {spent:.1f} s of {BUDGET_SECONDS:.0f} s{over}")
