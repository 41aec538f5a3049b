"""The losses of fine-tuning a generator: pure functions of tensors.

All are built on one number a clip: the mean squared error of the denoiser's prediction of the clip, noised
to one timestep. An `Objective` computes it: `training.objectives.velocity`, `training.objectives.flow`.

Shape legend: B batch.
"""

from typing import NamedTuple

from torch import Tensor, nn


def denoising_loss(errors_B: Tensor, weights_B: Tensor | None = None) -> Tensor:
    """Return the mean of the errors, each times its weight.

    The sum is divided by B, not by the sum of weights, so that it does not depend on how a batch is split.
    """
    return (errors_B if weights_B is None else weights_B * errors_B).mean()


class Preference(NamedTuple):
    """Diffusion-DPO on a batch of pairs."""

    loss: Tensor
    margins_B: Tensor
    """Implicit reward of the chosen clip minus that of the rejected one. Above 0: ranked right."""
    chosen_drifts_B: Tensor
    """Denoising error of the chosen clip minus the reference's. Both drifts rise when a model collapses."""
    rejected_drifts_B: Tensor
    """The same for the rejected clip."""

    @property
    def accuracy(self) -> Tensor:
        """Return the share of pairs that are ranked right; ties, as at the start, count one half."""
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

    The convention: ``beta/2`` stands in front, so a clip's implicit reward is
    ``-beta/2 (error - reference's error)``. The example in diffusers multiplies by its `beta_dpo` without the
    half: its 1000 is 2000 here.

    Args:
        chosen_B: errors of the policy on the chosen clips.
        rejected_B: on the rejected ones, noised with the same noise to the same timestep.
        reference_chosen_B: the reference's on the chosen.
        reference_rejected_B: the reference's on the rejected.
        beta: strength of the penalty for moving away from the reference; both papers take 2000.
        chosen_weight: of the chosen clips' denoising loss beside DPO's, which keeps their errors down.
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
    """Return BATON's loss (arXiv 2402.00744): the denoising loss of labelled clips, each times its reward.

    To it comes the plain denoising loss of pretraining data as a regulariser.

    Args:
        errors_B: of clips labelled by people (HD) or by the reward model (RD).
        rewards_B: their rewards in [0, 1]. A clip of reward 0 counts for nothing.
        pretraining_errors_B: of pretraining data (PD).
        pretraining_weight: of the second part.
    """
    loss = denoising_loss(errors_B, rewards_B)
    if pretraining_errors_B is None:
        return loss
    return loss + pretraining_weight * denoising_loss(pretraining_errors_B)
