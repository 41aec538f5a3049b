"""One Triton with the three embedded models for all tests that change nothing in it."""

from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path

import pytest
import tritonclient.grpc as triton

from services.catalogue import CATALOGUE
from services.cli import run
from tests.programs import EXACT
from tests.services.inference.suite import Addresses
from tests.triton.server import ENVIRONMENT, PYTHON, Server, running

TRITON: pytest.StashKey[str] = pytest.StashKey()
"""Version of the server."""


def pytest_report_header() -> str:
    """When, and with which libraries: the output is what benchmarks/triton-transcript.txt keeps."""
    packages = ENVIRONMENT / "lib" / f"python{PYTHON}" / "site-packages"
    wanted = ("nvidia-pytriton", "numpy", "torch", "diffusers", "transformers")
    found = {one.name: one.version for one in distributions(path=[str(packages)]) if one.name in wanted}
    versions = ", ".join(f"{name} {found[name]}" for name in wanted if name in found)
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, models on {versions}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say which Triton it was."""
    terminalreporter.line(f"Triton {config.stash.get(TRITON, 'was not started')}")


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `milonga triton export` writes it."""
    folder = tmp_path_factory.mktemp("repository") / "models"
    settings = [word for name, value in EXACT.items() for word in ("--set", f"tango.{name}={value}")]
    assert run(["triton", "export", "--model", "mini", *settings, str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def server(
    repository: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Server]:
    with running(repository, tmp_path_factory.mktemp("triton")) as server:
        with triton.InferenceServerClient(server.grpc) as client:
            request.config.stash[TRITON] = client.get_server_metadata().version
        yield server


@pytest.fixture(scope="session")
def served(server: Server) -> Addresses:
    return Addresses(models={entry.model: server.grpc for entry in CATALOGUE.values()}, is_triton=True)
