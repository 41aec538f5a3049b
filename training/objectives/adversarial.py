"""Losses of adversarial training, as pure functions of a discriminator's outputs.

Shape legend: B batch, any further dimensions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Return the discriminator's hinge loss (arXiv 1705.02894): real logits above 1, fake ones below -1."""
    return 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())


def hinge_generator(fake: Tensor) -> Tensor:
    """Return the generator's loss against a hinge discriminator: minus the mean of the fake logits."""
    return -fake.mean()


def feature_matching(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """Return the mean L1 distance of a discriminator's features (arXiv 1910.06711, eq. 8), layers equal.

    Each layer is divided by the mean size of its real features, so that no layer outweighs the others. The
    real features have no gradient.
    """
    gaps = [
        (ours - theirs.detach()).abs().mean() / theirs.detach().abs().mean().clamp(min=1e-6)
        for theirs, ours in zip(real, fake, strict=True)
    ]
    return torch.stack(gaps).mean()
