"""Losses for fine-tuning a generator: denoising loss, Diffusion-DPO, BATON. Pure functions of tensors.

Their inputs are errors: one number per clip, the mean squared error of the denoiser's prediction for the clip
noised to one timestep. What it ought to predict is its `Objective`'s, see `training.objectives.objective`.

Shape legend: B batch, X a family's own shape of latents.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from training.objectives.noising import mean_products


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
    rejected_scales_B: Tensor | None = None,
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
        rejected_scales_B: factors of the gradients of the rejected clips' errors (`safe_scales`). The loss
            and the margins are as without them.
    """
    if rejected_scales_B is not None:
        fixed_B = rejected_B.detach()
        rejected_B = fixed_B + rejected_scales_B * (rejected_B - fixed_B)
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


def safe_scales(chosen_BX: Tensor, rejected_BX: Tensor, *, margin: float = 0.0) -> Tensor:
    """Return the factors of Diffusion-SDPO (arXiv 2511.03317) for the rejected clips' gradients, in [0, 1].

    DPO's step moves the weights along ``-(g_c - s g_r)``, g the gradients of the errors of the two clips and
    s their factor, 1 in plain DPO. To first order, it changes the chosen clip's error by a multiple of
    ``-(<g_c, g_c> - s <g_c, g_r>)``, which is an increase as soon as ``s <g_c, g_r>`` exceeds ``<g_c, g_c>``.
    To lower the error by at least the share `margin` of ``<g_c, g_c>``::

        s = min(1, (1 - margin) <g_c, g_c> / <g_c, g_r>) if <g_c, g_r> > 0, else 1

    The gradients are taken with respect to the denoiser's output, where they are ``2 / X`` times the
    residuals, so that no second backward pass is needed. This equals the weights' gradients if both clips
    have one Jacobian, of orthogonal rows: noise, timestep and prompt are the same for both, the noisy clips
    are not. It holds for a step of gradient descent; momentum, AdamW's scaling and the other pairs of the
    batch change the direction.

    Checked against the released code (AIDC-AI/Diffusion-SDPO, `get_adaptive_lose_l_scale`), which has one
    factor for all pairs on a device; here each pair has its own, so that the loss does not depend on how a
    batch is split. Its scripts for Diffusion-DPO have margins of .9 (SD 1.5) and .6 (SDXL). The paper's
    proof and experiments were not verified.

    Args:
        chosen_BX: predictions minus targets for the chosen clips, without gradients.
        rejected_BX: the same for the rejected clips, with the same noise and timesteps.
        margin: mu in the paper, from 0 to 1.
    """
    squares_B = mean_products(chosen_BX, chosen_BX)
    overlaps_B = mean_products(chosen_BX, rejected_BX)
    bounds_B = (1 - margin) * squares_B / overlaps_B.clamp(min=1e-12)
    return torch.where(overlaps_B > 0, bounds_B.clamp(max=1.0), 1.0)


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
