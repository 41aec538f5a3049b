"""Losses for fine-tuning a generator: denoising loss, Diffusion-DPO, BATON. Pure functions of tensors.

Their inputs are errors: one number per clip, the mean squared error of the denoiser's prediction for the clip
noised to one timestep. They are computed by an `Objective`, see `training.objectives.objective`.

Shape legend: B batch.
"""

from typing import NamedTuple

from torch import Tensor, nn


def denoising_loss(errors_B: Tensor, weights_B: Tensor | None = None) -> Tensor:
    """Return the mean of the errors times their weights.

    It is divided by B, not by the sum of weights, so that it does not depend on how a batch is split.
    """
    return (errors_B if weights_B is None else weights_B * errors_B).mean()


class Preference(NamedTuple):
    """Loss and statistics of Diffusion-DPO on a batch of pairs."""

    loss: Tensor
    margins_B: Tensor
    """Implicit reward of the chosen clip minus that of the rejected one; positive if ranked correctly."""
    chosen_drifts_B: Tensor
    """Error on the chosen clip minus the reference model's. Both drifts rise when a model collapses."""
    rejected_drifts_B: Tensor
    """The same for the rejected clip."""

    @property
    def accuracy(self) -> Tensor:
        """Return the share of positive margins; ties, as at the start, count one half."""
        return (self.margins_B.sign() + 1).mean() / 2


def diffusion_dpo(
    chosen_B: Tensor,
    rejected_B: Tensor,
    reference_chosen_B: Tensor,
    reference_rejected_B: Tensor,
    *,
    beta: float,
    chosen_weight: float = 0.0,
) -> Preference:
    """Return Diffusion-DPO's loss: the mean of ``-log s(-beta/2 [(c - c_ref) - (r - r_ref)])``, s sigmoid.

    With v-prediction's errors this is equation 17 of the Tango 2 paper (arXiv 2404.09956) as upstream's
    `DPOAudioDiffusion` and Salesforce's DiffusionDPO implement it: the errors are means over a clip's
    latents, the weighting is constant and part of beta. log 2 where policy and reference are equal. With a
    flow's errors and a `chosen_weight` of 1 it is CRPO's loss (arXiv 2412.21037; TangoFlux's `forward`).

    Convention: the factor is ``beta/2``, so the implicit reward of a clip is
    ``-beta/2 (error - reference error)``. The example in diffusers multiplies by `beta_dpo` without the 1/2:
    its 1000 is 2000 here.

    Args:
        chosen_B: the policy's errors on the chosen clips.
        rejected_B: the policy's errors on the rejected clips, with the same noise and timesteps.
        reference_chosen_B: the reference model's errors on the chosen clips.
        reference_rejected_B: the reference model's errors on the rejected clips.
        beta: strength of the penalty for moving away from the reference model; 2000 in Tango 2 and TangoFlux.
        chosen_weight: weight of the denoising loss of the chosen clips, added to keep their errors low.
    """
    chosen_drifts_B = chosen_B - reference_chosen_B
    rejected_drifts_B = rejected_B - reference_rejected_B
    margins_B = -beta / 2 * (chosen_drifts_B - rejected_drifts_B)
    loss = -nn.functional.logsigmoid(margins_B).mean()
    return Preference(
        loss=loss + chosen_weight * denoising_loss(chosen_B) if chosen_weight else loss,
        margins_B=margins_B.detach(),
        chosen_drifts_B=chosen_drifts_B.detach(),
        rejected_drifts_B=rejected_drifts_B.detach(),
    )


def reward_weighted(
    errors_B: Tensor,
    rewards_B: Tensor,
    pretraining_errors_B: Tensor | None = None,
    *,
    pretraining_weight: float = 1.0,
) -> Tensor:
    """Return BATON's loss (arXiv 2402.00744): the denoising loss of labelled clips, weighted by reward.

    The denoising loss of pretraining data is added as a regulariser.

    Args:
        errors_B: errors on clips labelled by people (HD) or by the reward model (RD).
        rewards_B: their rewards in [0, 1]. A clip with reward 0 does not contribute.
        pretraining_errors_B: errors on pretraining data (PD).
        pretraining_weight: weight of the regulariser.
    """
    loss = denoising_loss(errors_B, rewards_B)
    if pretraining_errors_B is None:
        return loss
    return loss + pretraining_weight * denoising_loss(pretraining_errors_B)
