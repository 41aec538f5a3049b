from collections.abc import Iterator

import pytest
import torch

from services.models.captioner.model import Captioner
from services.models.clap.model import ClapModel
from tests.services.captioning.serving import Served, serving
from tests.tiny import tiny_captioner, tiny_clap


@pytest.fixture(scope="session")
def captioner() -> Captioner:
    torch.set_num_threads(1)
    return tiny_captioner()


@pytest.fixture(scope="session")
def clap() -> ClapModel:
    return tiny_clap()


@pytest.fixture(scope="session")
def served(captioner: Captioner, clap: ClapModel) -> Iterator[Served]:
    with serving(captioner, clap) as served:
        yield served
