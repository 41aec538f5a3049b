from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from milonga.v1 import scoring_pb2_grpc as rpc
from tests.services.scoring.serving import Served, save_tiny_clap, serving


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("scorers")
    return {name: save_tiny_clap(parent / f"tiny-{name}", seed) for seed, name in enumerate(("a", "b"))}


@pytest.fixture(scope="session")
def uris(folders: dict[str, Path]) -> dict[str, str]:
    """Three names, two models."""
    return {name: f"file:{folder}" for name, folder in folders.items()} | {"a2": f"file:{folders['a']}"}


@pytest.fixture(scope="session")
def served(uris: dict[str, str]) -> Iterator[Served]:
    with serving(uris) as served:
        yield served


@pytest.fixture(scope="session")
def stub(served: Served) -> Iterator[rpc.ScoringServiceStub]:
    with grpc.insecure_channel(served.hosted.target) as channel:
        yield rpc.ScoringServiceStub(channel)
