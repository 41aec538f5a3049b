from collections.abc import Iterator

import pytest
import torch

from services.models.reward.model import RewardModel
from tests.services.reward.serving import Served, serving
from tests.tiny import tiny_clap, tiny_reward


@pytest.fixture(scope="session")
def model() -> RewardModel:
    torch.set_num_threads(1)
    return tiny_reward(tiny_clap())


@pytest.fixture(scope="session")
def served(model: RewardModel) -> Iterator[Served]:
    with serving(model) as served:
        yield served
