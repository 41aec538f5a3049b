"""One Triton with the three embedded models for all tests that change nothing in it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from services.cli import run
from tests.inference_suite import SETTINGS, Addresses
from tests.triton.server import Server, running


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `milonga triton export` writes it."""
    folder = tmp_path_factory.mktemp("repository") / "models"
    settings = [word for name, value in SETTINGS.items() for word in ("--set", f"tango.{name}={value}")]
    assert run(["triton", "export", "--model", "mini", *settings, str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(repository, tmp_path_factory.mktemp("triton")) as server:
        yield server


@pytest.fixture(scope="session")
def served(server: Server) -> Addresses:
    return Addresses(tango=server.grpc, clap=server.grpc, reward=server.grpc, is_triton=True)
