"""The generation service's model under Triton."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from services.generation.inference import TangoModel
from services.generation.settings import GenerationSettings
from services.generation.slot import EngineSlot, Served, load_engine
from services.generation.tensors import PART
from services.inference.triton.backend import Opened
from services.inference.triton.serving import file_uri, read_settings, served_models


async def open_model(folder: Path, parameters: Mapping[str, str]) -> Opened:
    """Load the engine of a version folder. Raises `MilongaError`."""
    version = served_models(folder)[PART]
    settings = read_settings(GenerationSettings, parameters, model=file_uri(version))
    slot = EngineSlot(Served(load_engine(settings, version), version.folder), partial(load_engine, settings))
    return Opened(model=TangoModel(slot), close=slot.close)
