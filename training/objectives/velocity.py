"""The objective of v-prediction on Stable Diffusion's noise schedule, as Tango is trained.

Shape legend: B batch, X a family's own shape of latents.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from services.errors import ModelFormatError
from services.models.folders import read_json
from services.models.tango.schedulers import make_scheduler
from training.objectives.noising import Noising


class VelocityObjective:
    """The `Objective` of models that predict ``v = sqrt(a) noise - sqrt(1 - a) clean``."""

    continuous = False

    def __init__(self, folder: Path) -> None:
        """Read the noise schedule of a model. Raises `ModelFormatError` unless the model predicts v."""
        schedule = read_json(folder / "scheduler" / "scheduler_config.json")
        if schedule.get("prediction_type") != "v_prediction":
            raise ModelFormatError(
                f"{folder} predicts {schedule.get('prediction_type')!r}; only v_prediction can be trained"
            )
        self._scheduler: Any = make_scheduler("ddpm", schedule)

    def noised(self, clean_BX: Tensor, noising: Noising) -> Tensor:
        """See `Objective`."""
        noisy_BX = self._scheduler.add_noise(clean_BX, noising.noise_BX, noising.timesteps_B)
        return noising.blanked(noisy_BX)

    def target(self, clean_BX: Tensor, noising: Noising) -> Tensor:
        """Return v (arXiv 2202.00512); a is the share of the signal's power left at the timestep."""
        velocity_BX: Tensor = self._scheduler.get_velocity(clean_BX, noising.noise_BX, noising.timesteps_B)
        return velocity_BX

    def min_snr_weights(self, timesteps_B: Tensor, gamma: float) -> Tensor:
        """See `min_snr_weights`."""
        return min_snr_weights(timesteps_B, self._scheduler, gamma)


def min_snr_weights(timesteps_B: Tensor, scheduler: Any, gamma: float) -> Tensor:
    """Return min-SNR weights of v-prediction, ``min(snr, gamma) / (snr + 1)`` (arXiv 2303.09556, 3.4).

    They go to zero with the signal. Upstream Tango divides by snr instead, the form for noise prediction,
    although it predicts v.
    """
    signal_B = scheduler.alphas_cumprod.to(timesteps_B.device)[timesteps_B]
    snr_B = signal_B / (1 - signal_B)
    weights_B: Tensor = snr_B.clamp(max=gamma) / (snr_B + 1)
    return weights_B
