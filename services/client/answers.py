"""What the services answer, as plain values.

Shapes: N samples, T frames, M mel bins, B elements of a call, S scorers, D dimensions.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from services.audio import encoding as audio


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelVersion:
    """Immutable identity of the weights that answered."""

    name: str
    version: str
    digest: str
    """`sha256:` and hexadecimal digits."""
    license: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSwitch:
    """What a service serves now, and what it served before."""

    previous: ModelVersion
    current: ModelVersion
    seconds: float
    """Until new requests started on `current`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timings:
    """Seconds by stage."""

    queued: float
    encode: float
    denoise: float
    decode: float
    total: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Queued:
    """The request waits; `position` clips stand before it."""

    position: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """A denoising step is done."""

    clip_index: int
    step: int
    num_inference_steps: int
    fraction: float
    """Share of the whole request, 0 to 1."""
    seconds_left: float | None
    """Estimate to the end of the request; None while it can't be told."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preview:
    """How a clip looks so far."""

    clip_index: int
    step: int
    mel_TM: NDArray[np.uint8]
    """[frames, mel bins], 0 silence (ln 1e-5) to 255 loudest (ln 10), linear in the natural logarithm."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """One clip, encoded."""

    audio: bytes = field(repr=False)
    encoding: str
    sampling_rate: int
    duration: float
    """Seconds."""
    index: int
    seed: int

    def waveform(self) -> NDArray[np.float32]:
        """[N] decoded samples in [-1, 1]."""
        return audio.decode_audio(self.audio, self.encoding, self.sampling_rate)[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """The last event of a stream."""

    model: ModelVersion
    warnings: tuple[str, ...]
    timings: Timings


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """The answer to one prompt."""

    clips: tuple[Clip, ...]
    seed: int
    """Given, or drawn by the service."""
    model: ModelVersion
    warnings: tuple[str, ...]
    timings: Timings


Update = Queued | Progress | Preview | Clip | Finished
"""What `stream` yields: `Queued` and `Progress` events, each `Clip` as it is done, one `Finished` last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scorer:
    """One CLAP model of the scoring service, under its name."""

    name: str
    model: ModelVersion
    dimension: int
    """Length of its embeddings."""
    sampling_rate: int
    """Hertz that clips are resampled to before it hears them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """CLAP scores of pairs."""

    scorers: tuple[Scorer, ...]
    """Those that were asked, in the order of the call, or of the service."""
    values: NDArray[np.float32]
    """[B, S] cosine of each pair's prompt and clip, in [-1, 1], by each scorer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Embeddings:
    """Embeddings of clips, or of prompts."""

    scorers: tuple[Scorer, ...]
    """Those that were asked, in the order of the call, or of the service."""
    vectors: tuple[NDArray[np.float32], ...]
    """For each scorer [B, D], every row of length 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reward:
    """The reward model's judgement of one clip."""

    logit: float
    """The reward, calibrated. Differences are what preferences are made of (Bradley-Terry)."""
    probability: float
    """That a listener calls the clip right for the prompt: sigmoid(logit)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rewards:
    """Rewards of pairs, in order."""

    rewards: tuple[Reward, ...]
    model: ModelVersion


@dataclass(frozen=True, kw_only=True, slots=True)
class RankedClip:
    """One place of a ranking."""

    index: int
    """Which clip of the call."""
    reward: Reward
    beats_next: float | None
    """Probability that it is preferred to the next place's, in [0.5, 1]; None for the last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranking:
    """Clips of one prompt, best first."""

    places: tuple[RankedClip, ...]
    model: ModelVersion


RankBy = Literal["reward", "clap"]
"""What chooses among candidates: the reward model, or the mean of the scorers' CLAP scores."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgedClip:
    """A candidate, and what it is worth."""

    clip: Clip
    value: float
    """The reward (its logit), or the mean CLAP score."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Best:
    """Candidates of one prompt, best first; equal ones stay in the order they were made in."""

    clips: tuple[JudgedClip, ...]
    generation: Generation
    """How they were made: clips in order, the first call's seed, timings added up over the calls."""
    rank_by: RankBy
    judges: tuple[ModelVersion, ...]
    """The reward model, or the scorers."""
