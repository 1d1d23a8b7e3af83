"""What the tests on engines share: a cluster of theirs alone, and the flights as a direct run has them."""

import importlib
from collections.abc import Iterator
from typing import Any

import pytest

from pipelines import definition
from pipelines.examples import flights
from pipelines.io.log import open_log
from pipelines.replay import messages
from pipelines.runners import clusters, prism_cluster
from pipelines.runners.clusters import Cluster
from tests.engines.flights import Views, views

COMPOSED = ("lib", "job-server.jar", "job-server.pom.xml")


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of the module's ENGINE, out of the programs that are here, or are made now."""
    engine, place = request.module.ENGINE, tmp_path_factory.mktemp("clusters")
    usual, options = clusters.folder(engine), dict[str, Any]()
    (place / engine).mkdir()
    if engine == "prism":
        options["prism_location"] = str(prism_cluster.binary(None, print))
    else:
        importlib.import_module(f"pipelines.runners.{engine}_cluster").server().jar()
        for name in COMPOSED:
            if (usual / name).exists():
                (place / engine / name).symlink_to(usual / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIPELINES_CLUSTERS", str(place))
        try:
            yield clusters.up(engine, **options)
        finally:
            clusters.down(engine)


@pytest.fixture(scope="session")
def direct(tmp_path_factory: pytest.TempPathFactory) -> Views:
    """The flights in batch, on DirectRunner."""
    return views(tmp_path_factory.mktemp("direct"), "DirectRunner")


@pytest.fixture(scope="session")
def log(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A log of all flights, in order."""
    path = f"{tmp_path_factory.mktemp('log')}/log.db"
    with open_log(path) as made:
        for sent in messages(definition.load("flights"), flights.HISTORY(), partitions=["0", "1"]):
            made.append(sent)
    return path
