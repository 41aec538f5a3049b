"""Fixtures of the model tests: everything is real and tiny, and made once."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from services.models.tango.checkpoint import convert_checkpoint
from services.models.tango.loading import load_tango
from services.models.tango.pipeline import TangoPipeline
from tests.services.models.tango.released import write_released
from tests.tiny import tiny_pipeline


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from threads, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in upstream's released format. Read only."""
    return write_released(tmp_path_factory.mktemp("released") / "tango2-tiny")


@pytest.fixture(scope="session")
def converted_folder(released: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`released` as a model folder. Read only."""
    target = tmp_path_factory.mktemp("converted") / "tango2-tiny"
    return convert_checkpoint(released, target, text_encoder=str(released / "flan-t5-tiny"))


@pytest.fixture(scope="session")
def converted(converted_folder: Path) -> TangoPipeline:
    """The converted checkpoint, loaded."""
    return load_tango(converted_folder)


@pytest.fixture(scope="session")
def pipeline() -> TangoPipeline:
    """The tiny pipeline with Griffin-Lim. Read only."""
    return tiny_pipeline()


@pytest.fixture(scope="session")
def saved(pipeline: TangoPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline's folder. Read only: tests that damage it copy it first."""
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    pipeline.save_pretrained(folder)
    return folder
