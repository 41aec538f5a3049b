"""SpecAugment (arXiv 1904.08779) on normalised mels: stripes of time and of mel bins become zeros.

As torchlibrosa's ``SpecAugmentation``, which SLAM-AAC trains with. Zero is the mean of a normalised mel.

Shape legend: B batch, T mel frames, M mel bins.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from training.loop.checks import Count, Natural, check_ranges


@dataclass(frozen=True, kw_only=True, slots=True)
class SpecAugmentConfig:
    """Number and width of the stripes; the defaults are SLAM-AAC's."""

    time_stripes: Natural = 2
    """Stripes of frames in each mel; 0: none."""
    time_width: Count = 64
    """Frames that a stripe is narrower than: widths are drawn from 0 to this, exclusive."""
    mel_stripes: Natural = 2
    """Stripes of mel bins in each mel; 0: none."""
    mel_width: Count = 8
    """Mel bins that a stripe is narrower than."""

    def __post_init__(self) -> None:
        check_ranges(self)


def spec_augment(mels_BTM: Tensor, config: SpecAugmentConfig, seeds: Sequence[Sequence[int]]) -> Tensor:
    """Return a copy of mels with stripes of zeros; `seeds` has the numbers of each mel's random generator."""
    augmented_BTM = mels_BTM.clone()
    for mel_TM, numbers in zip(augmented_BTM, seeds, strict=True):
        rng = np.random.default_rng(list(numbers))
        for start, stop in _stripes(rng, config.time_stripes, config.time_width, mel_TM.shape[0]):
            mel_TM[start:stop] = 0.0
        for start, stop in _stripes(rng, config.mel_stripes, config.mel_width, mel_TM.shape[1]):
            mel_TM[:, start:stop] = 0.0
    return augmented_BTM


def _stripes(rng: np.random.Generator, count: int, width: int, total: int) -> list[tuple[int, int]]:
    stripes = []
    for _ in range(count):
        length = int(rng.integers(min(width, total)))
        start = int(rng.integers(total - length))
        stripes.append((start, start + length))
    return stripes
