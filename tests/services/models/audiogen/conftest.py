"""The tiny AudioGen of the references, as released and converted; made once."""

from pathlib import Path

import pytest

from services.models.architectures import load_generator
from services.models.audiogen.checkpoint import convert_audiogen
from services.models.audiogen.pipeline import AudioGenPipeline
from tests.services.models.audiogen.released import write_released


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return write_released(tmp_path_factory.mktemp("released") / "audiogen-tiny")


@pytest.fixture(scope="session")
def converted_folder(released: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    target = tmp_path_factory.mktemp("converted") / "audiogen"
    return convert_audiogen(released, target, text_encoder=str(released / "t5"))


@pytest.fixture(scope="session")
def converted(converted_folder: Path) -> AudioGenPipeline:
    """Read only."""
    pipeline = load_generator(converted_folder)
    assert isinstance(pipeline, AudioGenPipeline)
    return pipeline
