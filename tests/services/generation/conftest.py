from collections.abc import Iterator

import pytest

from services.client import AudioClient
from services.engine import Engine
from tests.services.generation.serving import Serving, serving, tiny_engine


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    with tiny_engine() as engine:
        yield engine


@pytest.fixture(scope="session")
def served(engine: Engine) -> Iterator[Serving]:
    with serving(engine) as served:
        yield served


@pytest.fixture(scope="session")
def client(served: Serving) -> Iterator[AudioClient]:
    with AudioClient(served.target, retries=0, timeout=60) as client:
        yield client
