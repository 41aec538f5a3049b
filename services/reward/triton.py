"""The reward service's model under Triton."""

from collections.abc import Mapping
from pathlib import Path

from services.audio.clips import AudioBounds
from services.inference.triton.backend import Opened
from services.inference.triton.serving import file_uri, read_settings, served_models
from services.reward.inference import JudgeModel
from services.reward.judge import load
from services.reward.servicer import RewardServicer
from services.reward.settings import RewardSettings
from services.reward.tensors import CLAP, REWARD


async def open_model(folder: Path, parameters: Mapping[str, str]) -> Opened:
    """Load the judge of a version folder. Raises `MilongaError`."""
    versions = served_models(folder)
    settings = read_settings(
        RewardSettings, parameters, model=file_uri(versions[REWARD]), clap=file_uri(versions[CLAP])
    )
    judge = load(settings)
    judge.version = versions[REWARD].identity
    bounds = AudioBounds(max_batch_size=settings.max_batch_size)
    servicer = RewardServicer(judge, bounds, max_request_bytes=settings.max_request_bytes)
    return Opened(model=JudgeModel(servicer, judge, bounds), close=judge.close)
