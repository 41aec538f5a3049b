"""CLAP scorers and reward models in this process.

Shapes: B clips or prompts, W windows, S samples of a window, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from services.api.model import ModelVersion
from services.models.clap.model import ClapModel
from services.models.reward.model import RewardModel, load_reward
from services.weights.uri import ModelURI, resolve
from training.data.store import invalid


class ClapScorer(Protocol):
    """What is used of `services.models.clap.model.ClapModel`, and laion_clap's own class has."""

    @property
    def sampling_rate(self) -> int:
        """Hertz."""

    def prepare(self, waveform: NDArray[np.float32], sampling_rate: int) -> Tensor:
        """Windows [W, S] of a clip."""

    def embed_windows(self, clips: Sequence[Tensor]) -> Tensor:
        """Embeddings [B, D] of prepared clips."""

    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings [B, D] of sentences."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedScorer:
    """A scorer, and which weights it is."""

    model: ClapScorer
    version: ModelVersion


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedReward:
    """A reward model, and which weights it is."""

    model: RewardModel
    version: ModelVersion


def load_clap_scorer(uri: str, device: str = "auto") -> LoadedScorer:
    """The CLAP model of a URI: a folder's, or LAION's checkpoint.

    Raises `ModelError` where it was refused, `InvalidInputError` for what is no URI, or no device.
    """
    parsed = ModelURI.parse(uri)
    version = resolve(parsed)
    # Inside: each backend is imported only where it is used.
    model: Any
    match parsed.scheme:
        case "laion":
            from services.models.clap.laion import load_laion

            model = load_laion(version.folder, device=device)
        case "laion-clap":
            from services.models.clap.laion_package import load_laion_clap

            model = load_laion_clap(version.folder, device)
        case _:
            from services.models.clap.loading import load_clap

            model = load_clap(version.folder, device=device)
    return LoadedScorer(model=model, version=version.identity)


def load_reward_scorer(uri: str, clap: str, device: str = "auto") -> LoadedReward:
    """The reward model of a URI, on the CLAP model of another. Raises as `load_clap_scorer`."""
    stand = load_clap_scorer(clap, device)
    if not isinstance(stand.model, ClapModel):
        raise invalid("clap", f"is {clap}, which shows no tokens; give laion:PATH")
    version = resolve(ModelURI.parse(uri))
    reward = load_reward(version.folder, stand.model, stand.version.digest)
    return LoadedReward(model=reward, version=version.identity)
