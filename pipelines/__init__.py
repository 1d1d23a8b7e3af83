"""One definition of a data product, run as batch and as streaming on any Beam runner.

Every folder of the repository is a subpackage of ``pipelines`` (Python's own ``io`` would win over a top-level ``io``).
An installed package has them inside; a checkout has them beside this folder, which the next lines add to the path.
Names are imported when they are first used, so that a command that needs none of them answers at once.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

_root = Path(__file__).parent.parent
if (_root / "transforms" / "__init__.py").exists():
    __path__.append(str(_root))

if TYPE_CHECKING:
    from pipelines.definition import DefinitionError, Dimension, Pipeline, Source, View, load
    from pipelines.transforms.measures import (
        Count,
        Distinct,
        First,
        Last,
        Max,
        Mean,
        Min,
        Quantile,
        StdDev,
        Sum,
        Variance,
    )
    from pipelines.transforms.protect import Mask, Pseudonym
    from pipelines.transforms.schema import Column
    from pipelines.transforms.steps import Apply, Check, Derive, Drop, Explode, Filter, Lookup, Protect
    from pipelines.transforms.windows import Session, Sliding, Tumbling, Whole

_HOMES = {
    "definition": "DefinitionError Dimension Pipeline Source View load",
    "transforms.measures": "Count Distinct First Last Max Mean Min Quantile StdDev Sum Variance",
    "transforms.protect": "Mask Pseudonym",
    "transforms.schema": "Column",
    "transforms.steps": "Apply Check Derive Drop Explode Filter Lookup Protect",
    "transforms.windows": "Session Sliding Tumbling Whole",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}
__all__ = [
    "Apply",
    "Check",
    "Column",
    "Count",
    "DefinitionError",
    "Derive",
    "Dimension",
    "Distinct",
    "Drop",
    "Explode",
    "Filter",
    "First",
    "Last",
    "Lookup",
    "Mask",
    "Max",
    "Mean",
    "Min",
    "Pipeline",
    "Protect",
    "Pseudonym",
    "Quantile",
    "Session",
    "Sliding",
    "Source",
    "StdDev",
    "Sum",
    "Tumbling",
    "Variance",
    "View",
    "Whole",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
