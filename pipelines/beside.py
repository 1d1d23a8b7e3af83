"""The tests that stand beside a definition: functions test_… of its module."""

import ast
import inspect
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path


def fault(test: Callable[[], None]) -> str:
    """Why a test fails: the place and the words of what it raises; nothing if it passes."""
    try:
        test()
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[1:2]
        where = "".join(f"{Path(frame.filename).name}:{frame.lineno}: {frame.line}: " for frame in place)
        return f"FAILED {where}{type(error).__name__} {error}".rstrip() + _sides(error)
    return ""


def _sides(error: Exception) -> str:
    """What the two sides of a failed ``assert … == …`` of a test were, computed again; nothing for other errors."""
    trace = error.__traceback__ and error.__traceback__.tb_next
    if trace is None or trace.tb_next is not None or not isinstance(error, AssertionError) or error.args:
        return ""
    frame = trace.tb_frame
    at = trace.tb_lineno - frame.f_code.co_firstlineno + 1
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(frame.f_code)))):
        if not isinstance(node, ast.Assert) or not node.lineno <= at <= (node.end_lineno or at):
            continue
        if isinstance(node.test, ast.Compare):
            sides = {"found": node.test.left, "expected": node.test.comparators[0]}
            values = {name: eval(ast.unparse(side), frame.f_globals, frame.f_locals) for name, side in sides.items()}
            return "".join(f"\n    {name:8} {value!r}" for name, value in values.items())
    return ""
