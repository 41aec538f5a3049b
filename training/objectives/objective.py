"""The registry of objectives: how clips are noised, and what error of the denoiser is minimised.

Shape legend: B batch, X a family's own shape of latents.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Protocol

from torch import Tensor

from training.objectives.flow import FlowObjective
from training.objectives.noising import Noising
from training.objectives.velocity import VelocityObjective


class Objective(Protocol):
    """A training objective of denoisers."""

    continuous: bool
    """Whether timesteps are real numbers in [0, 1000); otherwise integers."""

    def noised(self, clean_BX: Tensor, noising: Noising) -> Tensor:
        """Return clips with noise added, [B, X]: the denoiser's input."""

    def target(self, clean_BX: Tensor, noising: Noising) -> Tensor:
        """Return what the denoiser ought to predict, [B, X]; its error is the mean square of the residual."""

    def min_snr_weights(self, timesteps_B: Tensor, gamma: float) -> Tensor:
        """Return the min-SNR weights [B] of the errors."""


OBJECTIVES: Final[Mapping[str, Callable[[Path], Objective]]] = {
    "v_prediction": VelocityObjective,
    "flow": FlowObjective,
}
"""Constructors by name. Each takes a model folder and raises `ModelFormatError` if it does not fit."""
