"""The losses of aligning a latent diffusion model: pure functions of tensors.

All of them stand on one figure, the mean squared error of the predicted velocity of a clip, noised to one
timestep: `velocity_errors`. What is noised how, `training.objectives.noising` decides.

Shape legend: B batch, C latent channels, T latent frames, F latent mel bins.
"""

from typing import Any, NamedTuple

from torch import Tensor, nn


def velocity_errors(
    predicted_BCTF: Tensor, clean_BCTF: Tensor, noise_BCTF: Tensor, timesteps_B: Tensor, scheduler: Any
) -> Tensor:
    """Mean squared error of v-prediction, a value a clip: float32 [B].

    The target is ``v = sqrt(a) noise - sqrt(1 - a) clean`` (arXiv 2202.00512), a the share of the signal's
    power that is left at the timestep.

    Args:
        predicted_BCTF: what the denoiser says, of any float type.
        clean_BCTF: the clip's latents.
        noise_BCTF: the noise they were mixed with.
        timesteps_B: int64.
        scheduler: one of diffusers', for its noise schedule.
    """
    target_BCTF = scheduler.get_velocity(clean_BCTF, noise_BCTF, timesteps_B)
    return (predicted_BCTF.float() - target_BCTF.float()).square().mean((1, 2, 3))


def min_snr_weights(timesteps_B: Tensor, scheduler: Any, gamma: float) -> Tensor:
    """``min(snr, gamma) / (snr + 1)``: min-SNR weights for v-prediction (arXiv 2303.09556, section 3.4).

    They go to zero with the signal. Upstream's `compute_snr` divides by snr instead, the form for
    noise prediction, although Tango predicts velocities.
    """
    left_B = scheduler.alphas_cumprod.to(timesteps_B.device)[timesteps_B]
    snr_B = left_B / (1 - left_B)
    weights_B: Tensor = snr_B.clamp(max=gamma) / (snr_B + 1)
    return weights_B


def denoising_loss(errors_B: Tensor, weights_B: Tensor | None = None) -> Tensor:
    """The mean of the errors, each times its weight. The sum is divided by B, not by the sum of weights, so
    that a batch and its parts have one mean, however it is split up."""
    return (errors_B if weights_B is None else weights_B * errors_B).mean()


class Preference(NamedTuple):
    """Diffusion-DPO on a batch of pairs."""

    loss: Tensor
    margins_B: Tensor
    """Implicit reward of the chosen clip less that of the rejected one. Above 0: the pair is told right."""
    chosen_drifts_B: Tensor
    """Denoising error of the chosen clip less the reference's. Both drifts rising is the sign of collapse."""
    rejected_drifts_B: Tensor
    """The same of the rejected clip."""

    @property
    def accuracy(self) -> Tensor:
        """Share of pairs that are told right; where both are level (as at the start), one half."""
        return (self.margins_B.sign() + 1).mean() / 2


def diffusion_dpo(
    chosen_B: Tensor,
    rejected_B: Tensor,
    reference_chosen_B: Tensor,
    reference_rejected_B: Tensor,
    *,
    beta: float,
) -> Preference:
    """Diffusion-DPO's loss, the mean of ``-log s(-beta/2 [(c - c_ref) - (r - r_ref)])``, s the sigmoid.

    Equation 17 of the Tango 2 paper (arXiv 2404.09956) as practice has it (upstream's `DPOAudioDiffusion`
    and Salesforce's DiffusionDPO): the errors are means over a clip's latents, the weighting is constant and
    part of beta. log 2 where policy and reference are equal.

    The convention: ``beta/2`` stands in front, so a clip's implicit reward is
    ``-beta/2 (error - reference's error)``. The example in diffusers multiplies by its `beta_dpo` without the
    half: its 1000 is 2000 here.

    Args:
        chosen_B: `velocity_errors` of the policy on the chosen clips.
        rejected_B: on the rejected ones, noised with the same noise to the same timestep.
        reference_chosen_B: the reference's on the chosen.
        reference_rejected_B: the reference's on the rejected.
        beta: how dear it is to leave the reference; the paper takes 2000.
    """
    chosen_drifts_B = chosen_B - reference_chosen_B
    rejected_drifts_B = rejected_B - reference_rejected_B
    margins_B = -beta / 2 * (chosen_drifts_B - rejected_drifts_B)
    return Preference(
        loss=-nn.functional.logsigmoid(margins_B).mean(),
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
    """BATON's loss (arXiv 2402.00744): the denoising loss of labelled clips, each times its reward, plus the
    plain denoising loss of pretraining data as a regulariser.

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
