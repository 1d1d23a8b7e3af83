"""The budget of the unit tests: all not marked slow or engine take at most 60 seconds together, or the run fails.

Counted in CPU seconds of this process and its children, so that a busy machine fails nobody.
"""

import os
from collections.abc import Iterator

import hypothesis
import pytest

hypothesis.settings.register_profile("unit", max_examples=20, deadline=None)
hypothesis.settings.load_profile("unit")

BUDGET_SECONDS = 60.0
_SPENT = pytest.StashKey[float]()


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Unit tests first: they tell sooner, and whole runs, which give DuckDB every core, leave their budget alone."""
    items.sort(key=lambda item: not _unit(item))


def _unit(item: pytest.Item) -> bool:
    return not any(item.get_closest_marker(marker) for marker in ("slow", "engine"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    before = _cpu_seconds()
    try:
        return (yield)
    finally:
        if _unit(item):
            item.config.stash[_SPENT] = item.config.stash.get(_SPENT, 0.0) + _cpu_seconds() - before


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == pytest.ExitCode.OK and session.config.stash.get(_SPENT, 0.0) > BUDGET_SECONDS:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    spent = terminalreporter.config.stash.get(_SPENT, 0.0)
    over = " – over budget: make them faster, or mark what must take long slow" if spent > BUDGET_SECONDS else ""
    terminalreporter.write_line(f"unit tests: {spent:.1f} CPU-s of {BUDGET_SECONDS:.0f}{over}")
