"""The scoring service's model under Triton."""

from collections.abc import Mapping
from pathlib import Path

from services.runtime.clips import AudioBounds
from services.scoring.inference import ClapModel
from services.scoring.serve import ScoringSettings, close, load
from services.scoring.servicer import ScoringServicer
from services.triton.backend import Opened
from services.triton.serving import file_uri, read_settings, served_models


async def open_model(folder: Path, parameters: Mapping[str, str]) -> Opened:
    """Load the scorers of a version folder. Raises `MilongaError`."""
    versions = served_models(folder)
    uris = {name: file_uri(version) for name, version in versions.items()}
    settings = read_settings(ScoringSettings, parameters, scorers=uris)
    scorers = load(settings)
    for name, scorer in scorers.items():
        scorer.version = versions[name]
    bounds = AudioBounds(max_batch_size=settings.max_batch_size)
    servicer = ScoringServicer(scorers, bounds, max_request_bytes=settings.max_request_bytes)
    return Opened(model=ClapModel(servicer, scorers, bounds), close=lambda: close(scorers))
