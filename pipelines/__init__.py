"""One definition of a data product, run as batch and as streaming on any Beam runner.

Every folder of the repository is a subpackage of ``pipelines`` (Python's own ``io`` would win over a top-level ``io``).
An installed package has them inside; a checkout has them beside this folder, which the next lines add to the path.
"""

from pathlib import Path

_root = Path(__file__).parent.parent
if (_root / "transforms" / "__init__.py").exists():
    __path__.append(str(_root))
