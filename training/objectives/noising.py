"""Timestep and noise of each training example, as a function of the seed and its position.

Shape legend: B batch, X a family's own shape of latents.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Annotated, Final, Literal

import numpy as np
import torch
from torch import Tensor

from training.loop.checks import Range, Share, check_ranges
from training.loop.fit import Positions

TIMESTEPS: Final = 1000
"""Timesteps of the noise schedule of every family, from 0 (the clip) to this (noise)."""

Timestep = Annotated[int, Range(0, TIMESTEPS, below=True)]

_STREAM = 0x6E6F6973
"""Separates these random numbers from others with the same seed and position."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NoisingConfig:
    """Distribution of timesteps."""

    density: Literal["uniform", "logit_normal"] = "uniform"
    """uniform, as Tango is trained; logit_normal, the sigmoid of a standard normal (arXiv 2403.03206, section
    3.1), as TangoFlux is trained."""

    stratified: bool = True
    """Spread the timesteps of a batch evenly, which has less variance; otherwise draw each by itself."""
    blank: Share = 0.0
    """Share of a batch that is pure noise, as at the start of inference. Stable Diffusion's schedule ends
    with 0.5 % of the signal's power left, enough to reveal the layout of a clip; the order of events is
    decided below that (compare arXiv 2305.08891)."""
    blank_from: Timestep = 900
    """Lowest timestep of pure noise."""
    late: Share = 0.0
    """Share of a batch at late timesteps, drawn uniformly."""
    late_from: Timestep = 800
    """Lowest of the late timesteps."""
    condition_dropout: Share = 0.0
    """Share of the prompts replaced by the empty one, for classifier-free guidance."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.blank + self.late > 1:
            raise ValueError(f"blank ({self.blank}) and late ({self.late}) must not exceed 1 together")


@dataclass(frozen=True, kw_only=True, slots=True)
class Noising:
    """Timesteps and noise of a batch of clips."""

    timesteps_B: Tensor
    """int64, or float32 if the objective's time is continuous."""
    noise_BX: Tensor
    """Standard normal noise, float32."""
    blank_B: Tensor
    """Bool: the noised clip is pure noise."""
    unconditional_B: Tensor
    """Bool: the prompt is replaced by the empty one."""

    def to(self, device: torch.device) -> "Noising":
        """Return a copy on `device`."""
        return Noising(**{name: getattr(self, name).to(device) for name in self.__slots__})

    @classmethod
    def joined(cls, parts: "Sequence[Noising]") -> "Noising":
        """Concatenate batches. The same one twice gives both clips of a pair the same noise and timestep."""
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in cls.__slots__})

    def blanked(self, noisy_BX: Tensor) -> Tensor:
        """Return `noisy_BX` with pure noise in the rows of `blank_B`."""
        return torch.where(by_row(self.blank_B, noisy_BX), self.noise_BX, noisy_BX)


def by_row(values_B: Tensor, like_BX: Tensor) -> Tensor:
    """Return `values_B` in a shape that broadcasts over the rows of `like_BX`."""
    return values_B.reshape(-1, *[1] * (like_BX.ndim - 1))


def residuals(predicted_BX: Tensor, target_BX: Tensor) -> Tensor:
    """Return predictions, of any float type, minus their targets, in float32."""
    return predicted_BX.float() - target_BX.float()


def mean_products(first_BX: Tensor, second_BX: Tensor) -> Tensor:
    """Return the mean of the products of each row [B]; of residuals with themselves it is the error."""
    return (first_BX * second_BX).mean(tuple(range(1, first_BX.ndim)))


def draw_noising(
    positions: Positions,
    shape_X: tuple[int, ...],
    config: NoisingConfig,
    *,
    batch: int,
    seed: int,
    continuous: bool = False,
    stream: int = 0,
) -> Noising:
    """Draw the noising of the examples at `positions`.

    Timesteps are drawn by stratified sampling: each stratum (blank, late, the others) is divided into equal
    parts, one per row of the batch that belongs to it, and a timestep is drawn from each part. This has less
    variance than independent draws. The first rows of a batch are the blank ones, followed by the late ones.

    Args:
        positions: step × batch + row in the batch.
        shape_X: shape of a clip's latents.
        config: the distribution of timesteps.
        batch: examples per step, over all processes and accumulated parts.
        seed: seed of all random numbers.
        continuous: draw timesteps in [0, 1000) instead of integers from 0 to 999.
        stream: distinguishes several examples at the same position.
    """
    place_of = _logit_normal if config.density == "logit_normal" else float
    blank, late = round(config.blank * batch), round(config.late * batch)
    strata = (
        (0, blank, config.blank_from),
        (blank, late, config.late_from),
        (blank + late, batch - blank - late, 0),
    )
    drawn, noise, dropped = [], [], []
    places = positions % batch
    for position, place in zip(positions.tolist(), places.tolist(), strict=True):
        rng = np.random.default_rng([seed, position, stream, _STREAM])
        first, count, low = next(s for s in reversed(strata) if s[0] <= place and s[1])
        share = (place - first + rng.uniform()) / count if config.stratified else rng.uniform()
        timestep = low + share * (TIMESTEPS - low) if low else place_of(share) * TIMESTEPS
        drawn.append(timestep if continuous else min(TIMESTEPS - 1, int(timestep)))
        dropped.append(rng.uniform() < config.condition_dropout)
        noise.append(rng.standard_normal(shape_X, dtype=np.float32))
    return Noising(
        timesteps_B=torch.tensor(drawn),
        noise_BX=torch.from_numpy(np.stack(noise)),
        blank_B=torch.from_numpy(places < blank),
        unconditional_B=torch.tensor(dropped),
    )


def _logit_normal(share: float) -> float:
    """Return the quantile of the logit-normal distribution below which `share` of it lies."""
    return 1 / (1 + math.exp(-NormalDist().inv_cdf(min(max(share, 1e-12), 1 - 1e-12))))
