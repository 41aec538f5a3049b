from collections.abc import Iterator

import pytest
import torch

from services.models.explaining.explainer import DiffusionExplainer
from tests.services.explanation.serving import Served, serving, tiny_explainer


@pytest.fixture(scope="session")
def explainer() -> DiffusionExplainer:
    torch.set_num_threads(1)
    return tiny_explainer()


@pytest.fixture(scope="session")
def served(explainer: DiffusionExplainer) -> Iterator[Served]:
    with serving(explainer) as served:
        yield served
