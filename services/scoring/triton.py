"""The scoring service's model under Triton."""

from collections.abc import Mapping
from pathlib import Path

from services.audio.clips import AudioBounds
from services.inference.triton.backend import Opened
from services.inference.triton.serving import file_uri, read_settings, served_models
from services.scoring.inference import ClapModel
from services.scoring.scorers import close, load
from services.scoring.servicer import ScoringServicer
from services.scoring.settings import ScoringSettings


async def open_model(folder: Path, parameters: Mapping[str, str]) -> Opened:
    """Load the scorers of a version folder. Raises `MilongaError`."""
    versions = served_models(folder)
    uris = {name: file_uri(version) for name, version in versions.items()}
    settings = read_settings(ScoringSettings, parameters, scorers=uris)
    scorers = load(settings)
    for name, scorer in scorers.items():
        scorer.version = versions[name].identity
    bounds = AudioBounds(max_batch_size=settings.max_batch_size)
    servicer = ScoringServicer(scorers, bounds, max_request_bytes=settings.max_request_bytes)
    return Opened(model=ClapModel(servicer, scorers, bounds), close=lambda: close(scorers))
