from collections.abc import Iterator

import pytest

from tests.services.client.serving import FACES, Told, serving


@pytest.fixture(params=FACES)
def face(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def target(told: Told) -> Iterator[str]:
    """Where one gateway serves everything."""
    with serving(told) as target:
        yield target
