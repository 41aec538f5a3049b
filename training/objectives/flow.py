"""The objective of rectified flows (arXiv 2209.03003), as TangoFlux is trained (arXiv 2412.21037).

The convention is that of diffusers' `FlowMatchEulerDiscreteScheduler`: time s runs from the clip, 0, to
noise, 1. So ``x_s = (1 - s) clean + s noise`` at the timestep ``1000 s``, and the velocity is ``x_1 - x_0``,
``noise - clean``. Where papers let t run from noise to the clip, t is ``1 - s`` and the velocity is negated.

Shape legend: B batch, X a family's own shape of latents.
"""

from pathlib import Path

from torch import Tensor

from training.objectives.noising import TIMESTEPS, Noising, by_row


class FlowObjective:
    """The `Objective` of models that predict a rectified flow's velocity."""

    continuous = True

    def __init__(self, folder: Path) -> None:
        """Ignore `folder`: the schedule is the same for every model."""

    def noised(self, clean_BX: Tensor, noising: Noising) -> Tensor:
        """See `Objective`."""
        return noising.blanked(flow_position(clean_BX, noising.noise_BX, noising.timesteps_B))

    def target(self, clean_BX: Tensor, noising: Noising) -> Tensor:
        """Return the velocity ``noise - clean``, the same at every timestep."""
        return noising.noise_BX - clean_BX

    def min_snr_weights(self, timesteps_B: Tensor, gamma: float) -> Tensor:
        """See `flow_min_snr_weights`."""
        return flow_min_snr_weights(timesteps_B, gamma)


def flow_position(clean_BX: Tensor, noise_BX: Tensor, timesteps_B: Tensor) -> Tensor:
    """Return the point ``(1 - s) clean + s noise`` of each clip's straight path, s the timestep / 1000."""
    share_B = by_row(timesteps_B / TIMESTEPS, clean_BX)
    return (1 - share_B) * clean_BX + share_B * noise_BX


def flow_min_snr_weights(timesteps_B: Tensor, gamma: float) -> Tensor:
    """Return min-SNR weights (arXiv 2303.09556) of a flow's velocity: ``min((1 - s)^2, gamma s^2)``.

    An error of the velocity is ``s`` times as large in the predicted clip, which has the weight
    ``min(snr, gamma)`` with ``snr = ((1 - s) / s)^2``.
    """
    share_B = timesteps_B / TIMESTEPS
    return ((1 - share_B) ** 2).minimum(gamma * share_B**2)
