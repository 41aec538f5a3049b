"""The reward service's model under Triton."""

from collections.abc import Mapping
from pathlib import Path

from services.reward.inference import JudgeModel
from services.reward.serve import RewardSettings, load
from services.reward.servicer import RewardServicer
from services.reward.tensors import CLAP, REWARD
from services.runtime.clips import AudioBounds
from services.triton.backend import Opened
from services.triton.serving import file_uri, read_settings, served_models


async def open_model(folder: Path, parameters: Mapping[str, str]) -> Opened:
    """Load the judge of a version folder. Raises `MilongaError`."""
    versions = served_models(folder)
    settings = read_settings(
        RewardSettings, parameters, model=file_uri(versions[REWARD]), clap=file_uri(versions[CLAP])
    )
    judge = load(settings)
    judge.version = versions[REWARD]
    bounds = AudioBounds(max_batch_size=settings.max_batch_size)
    servicer = RewardServicer(judge, bounds, max_request_bytes=settings.max_request_bytes)
    return Opened(model=JudgeModel(servicer, judge, bounds), close=judge.close)
