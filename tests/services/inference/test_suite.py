"""Our own services through the Open Inference Protocol: the suite that a real Triton has to pass as well."""

import pytest

from tests.programs import Services
from tests.services.inference.suite import *  # noqa: F403  # its tests
from tests.services.inference.suite import Addresses


@pytest.fixture(scope="module")
def served(services: Services) -> Addresses:
    return Addresses(models=services.by_model)
