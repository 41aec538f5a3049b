from collections.abc import Iterator

import pytest

from tests.programs import Services, all_services


@pytest.fixture(scope="session")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    """The three services, started once. A test that stops one, or changes what it serves, starts its own."""
    with all_services(tmp_path_factory.mktemp("logs")) as services:
        yield services
