"""The registry of objectives: how a family's clips are noised, and how its denoiser's error is measured.

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
    """What a denoiser learns to predict."""

    continuous: bool
    """Whether timesteps are any numbers in [0, 1000), not whole ones."""

    def noised(self, clean_BX: Tensor, noising: Noising) -> Tensor:
        """Return clips mixed with noise, [B, X]: the denoiser's input."""

    def errors(self, predicted_BX: Tensor, clean_BX: Tensor, noising: Noising) -> Tensor:
        """Return the mean squared error of each clip's prediction, float32 [B]."""

    def min_snr_weights(self, timesteps_B: Tensor, gamma: float) -> Tensor:
        """Return min-SNR weights [B] for `errors`."""


OBJECTIVES: Final[Mapping[str, Callable[[Path], Objective]]] = {
    "v_prediction": VelocityObjective,
    "flow": FlowObjective,
}
"""Each makes the objective of the model in a folder, or raises `ModelFormatError`."""
