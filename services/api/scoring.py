"""CLAP scores, embeddings and rewards, and the port `Scorers`.

Shapes: N samples, B elements of a call, S scorers, D dimensions.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from services.api.generation import Clip
from services.api.model import ModelVersion

Sound = Clip | bytes | Path | tuple[NDArray[np.float32], int]
"""A clip to score: a generated clip, an encoded file (WAV, FLAC, OGG, MP3, AIFF), the path of one, or samples
in [-1, 1] as float32 [N] or [channels, N] with their sampling rate in hertz."""


REWARD: Final = "reward"
"""The reward model's name among scorers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scorer:
    """A named CLAP model."""

    name: str
    model: ModelVersion
    dimension: int
    """Length of its embeddings."""
    sampling_rate: int
    """Sampling rate in hertz that clips are resampled to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """CLAP scores of pairs."""

    scorers: tuple[Scorer, ...]
    """Scorers, in the order of the call, or of the service if the call names none."""
    values: NDArray[np.float32]
    """[B, S] cosine of each pair's prompt and clip, in [-1, 1], by each scorer."""
    readable: NDArray[np.bool_]
    """[B, S] whether the scorer knows a word for a sound in the prompt. Where not, the value is 0 and says
    nothing."""
    warnings: tuple[tuple[str, ...], ...]
    """For each pair, sentences on its clip and prompt that begin with the field: ``clip``, ``prompt``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Embeddings:
    """Embeddings of clips, or of prompts."""

    scorers: tuple[Scorer, ...]
    """Scorers, in the order of the call, or of the service if the call names none."""
    vectors: tuple[NDArray[np.float32], ...]
    """Embeddings [B, D] of each scorer; every row has norm 1."""
    warnings: tuple[tuple[str, ...], ...]
    """For each clip or prompt, sentences that begin with the field: ``clip``, ``prompt``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reward:
    """The reward of one clip for its prompt."""

    logit: float
    """The reward, calibrated. Preferences are functions of differences of it (Bradley-Terry)."""
    probability: float
    """That a listener calls the clip right for the prompt: sigmoid(logit)."""
    warnings: tuple[str, ...] = ()
    """Sentences on the clip and the prompt that begin with the field: ``clip``, ``prompt``."""
    readable: bool = True
    """Whether the model knows a word for a sound in the prompt. If not, logit and probability are 0 and say
    nothing."""

    @classmethod
    def of(cls, logit: float, warnings: tuple[str, ...] = (), readable: bool = True) -> Self:
        """Return the reward of a calibrated logit, which is dropped unless the prompt was `readable`."""
        if not readable:
            return cls(logit=0.0, probability=0.0, warnings=warnings, readable=False)
        return cls(logit=logit, probability=_sigmoid(logit), warnings=warnings)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rewards:
    """Rewards of pairs, in order."""

    rewards: tuple[Reward, ...]
    model: ModelVersion


@dataclass(frozen=True, kw_only=True, slots=True)
class RankedClip:
    """One clip of a ranking."""

    index: int
    """Index of the clip in the call."""
    reward: Reward
    beats_next: float | None
    """Probability that it is preferred to the next place's, in [0.5, 1]; None for the last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranking:
    """Clips of one prompt, best first."""

    places: tuple[RankedClip, ...]
    model: ModelVersion


def merge_warnings(warnings: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Return the distinct warnings of several sources, by name: the names follow unless all agree."""
    sources: dict[str, list[str]] = {}
    for name, found in warnings.items():
        for warning in dict.fromkeys(found):
            sources.setdefault(warning, []).append(name)
    return tuple(
        warning if len(names) == len(warnings) else f"{warning} ({', '.join(names)})"
        for warning, names in sources.items()
    )


def rank(rewards: Sequence[Reward]) -> list[RankedClip]:
    """Return the places of clips with these rewards, best first; equal ones stay in order."""
    order = sorted(range(len(rewards)), key=lambda index: -rewards[index].logit)
    beaten = [_sigmoid(rewards[one].logit - rewards[other].logit) for one, other in itertools.pairwise(order)]
    return [
        RankedClip(index=index, reward=rewards[index], beats_next=probability)
        for index, probability in zip(order, [*beaten, None], strict=True)
    ]


def _sigmoid(logit: float) -> float:
    """The logistic function, for a logit of any size."""
    small = math.exp(-abs(logit))
    return (1.0 if logit >= 0 else small) / (1.0 + small)


class Scorers(Protocol):
    """Scores pairs of prompt and sound: `AudioClient` through services, `services.local.LocalScorers` here.

    Thread-safe. All methods raise the tree of `services.errors`.
    """

    def versions(self) -> Mapping[str, ModelVersion]:
        """Return which weights score, by the scorer's name; those of a reward model by `REWARD`."""
        ...

    def score_audio(
        self, pairs: Sequence[tuple[str, Sound]], *, scorers: Sequence[str] | None = None
    ) -> Scores:
        """Return CLAP scores by every scorer, or by those named."""
        ...

    def compute_rewards(self, pairs: Sequence[tuple[str, Sound]]) -> Rewards:
        """Return the reward of each pair."""
        ...

    def close(self) -> None:
        """Free all resources; calls in progress are cancelled."""
        ...


class CombinedScorers:
    """`Scorers` of two: one gives CLAP scores, the other rewards; either may be missing."""

    def __init__(self, *, clap: Scorers | None, reward: Scorers | None) -> None:
        """Take over both: closing it closes them."""
        self._clap, self._reward = clap, reward

    def versions(self) -> dict[str, ModelVersion]:
        """See `Scorers`."""
        found: dict[str, ModelVersion] = {}
        if self._clap is not None:
            found |= {name: one for name, one in self._clap.versions().items() if name != REWARD}
        if self._reward is not None:
            found[REWARD] = self._reward.versions()[REWARD]
        return found

    def score_audio(
        self, pairs: Sequence[tuple[str, Sound]], *, scorers: Sequence[str] | None = None
    ) -> Scores:
        """See `Scorers`. There must be a scorer."""
        assert self._clap is not None
        return self._clap.score_audio(pairs, scorers=scorers)

    def compute_rewards(self, pairs: Sequence[tuple[str, Sound]]) -> Rewards:
        """See `Scorers`. There must be a reward model."""
        assert self._reward is not None
        return self._reward.compute_rewards(pairs)

    def close(self) -> None:
        """See `Scorers`."""
        for one in dict.fromkeys((self._clap, self._reward)):
            if one is not None:
                one.close()
