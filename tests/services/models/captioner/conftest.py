"""The tiny SLAM-AAC of the references, as released and converted; made once."""

from pathlib import Path

import pytest

from services.models.captioner.checkpoint import convert_captioner
from services.models.captioner.model import Captioner
from tests.services.models.captioner.released import write_released


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return write_released(tmp_path_factory.mktemp("released") / "slam")


@pytest.fixture(scope="session")
def converted_folder(released: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    target = tmp_path_factory.mktemp("converted") / "slam"
    return convert_captioner(
        released / "eat.pt",
        released / "model.pt",
        target,
        language_model=str(released / "llm"),
        heads=4,
    )


@pytest.fixture(scope="session")
def converted(converted_folder: Path) -> Captioner:
    """Read only."""
    return Captioner.from_pretrained(converted_folder)
