import pytest
import torch

from services.models.tango.pipeline import TangoPipeline
from tests.tiny import tiny_pipeline


@pytest.fixture(scope="session")
def pipeline() -> TangoPipeline:
    torch.set_num_threads(1)
    return tiny_pipeline()
