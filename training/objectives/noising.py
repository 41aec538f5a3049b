"""Which timestep and which noise each example of a training gets: a function of the seed and its position.

Shape legend: B batch, C latent channels, T latent frames, F latent mel bins.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.loop.fit import Positions

_STREAM = 0x6E6F6973
"""Keeps these random numbers apart from others of the same seed and position."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NoisingConfig:
    """How timesteps are distributed. The default is uniform, as in the paper."""

    blank: float = 0.0
    """Share of a batch with nothing of the clip left, as at the start of inference. Stable Diffusion's
    schedule ends with 0.5 % of the signal's power left, enough to read a clip's whole layout from; what comes
    first and what second is decided where there is less (compare arXiv 2305.08891)."""
    blank_from: int = 900
    """First timestep that blank latents are told to be at."""
    late: float = 0.0
    """Share of a batch at late timesteps."""
    late_from: int = 800
    """First of the late timesteps."""
    condition_dropout: float = 0.0
    """Share of the prompts replaced by the empty one, for classifier-free guidance."""

    def __post_init__(self) -> None:
        for name in ("blank", "late", "condition_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must lie in [0, 1]")
        if self.blank + self.late > 1:
            raise ValueError(f"blank ({self.blank}) and late ({self.late}) are more than all")
        for name in ("blank_from", "late_from"):
            if not 0 <= getattr(self, name) < 1000:
                raise ValueError(f"{name} is {getattr(self, name)}, must lie in [0, 1000)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Noising:
    """How the clips of a batch are noised."""

    timesteps_B: Tensor
    """int64."""
    noise_BCTF: Tensor
    """Unit noise, float32."""
    blank_B: Tensor
    """Bool: nothing of the clip is left."""
    unconditional_B: Tensor
    """Bool: the prompt is dropped."""

    def to(self, device: torch.device) -> "Noising":
        """The same on another device."""
        return Noising(**{name: getattr(self, name).to(device) for name in self.__slots__})

    @classmethod
    def joined(cls, parts: "Sequence[Noising]") -> "Noising":
        """One batch after another. The same one twice: two clips an example, which share everything."""
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in cls.__slots__})

    def apply(self, clean_BCTF: Tensor, scheduler: Any) -> Tensor:
        """The noised clips."""
        noisy_BCTF = scheduler.add_noise(clean_BCTF, self.noise_BCTF, self.timesteps_B)
        return torch.where(self.blank_B[:, None, None, None], self.noise_BCTF, noisy_BCTF)


def draw_noising(
    positions: Positions,
    shape_CTF: tuple[int, ...],
    config: NoisingConfig,
    *,
    batch: int,
    seed: int,
    timesteps: int = 1000,
    stream: int = 0,
) -> Noising:
    """Draw for the examples at `positions`.

    Each stratum (blank, late, the others) is cut into equal parts, one for each of its places in the batch,
    and a timestep is drawn from within the part: as uniform as independent draws, with less variance. The
    first places of a batch are the blank ones, then come the late ones.

    Args:
        positions: step × batch + place in the batch.
        shape_CTF: of a clip's latents.
        config: how timesteps are distributed.
        batch: examples a step, of all processes and parts.
        seed: of everything.
        timesteps: of the schedule.
        stream: another one for other examples at the same positions.
    """
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
        share = (place - first + rng.uniform()) / count
        drawn.append(min(timesteps - 1, int(low + share * (timesteps - low))))
        dropped.append(rng.uniform() < config.condition_dropout)
        noise.append(rng.standard_normal(shape_CTF, dtype=np.float32))
    return Noising(
        timesteps_B=torch.tensor(drawn),
        noise_BCTF=torch.from_numpy(np.stack(noise)),
        blank_B=torch.from_numpy(places < blank),
        unconditional_B=torch.tensor(dropped),
    )
