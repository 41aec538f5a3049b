import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from training.objectives.diffusion import denoising_loss, diffusion_dpo, reward_weighted
from training.objectives.velocity import min_snr_weights, velocity_errors

# Shares of the signal's power left at timesteps 0 and 1: 0.64 and 0.36.
SCHEDULE = DDPMScheduler(
    num_train_timesteps=2, trained_betas=[0.36, 0.4375], prediction_type="v_prediction", clip_sample=False
)
LOG_2 = math.log(2)


def _filled(value: float) -> Tensor:
    return torch.full((1, 2, 3, 2), value)


def _log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def test_the_velocity_error_by_hand() -> None:
    # v = 0.8 · 2 - 0.6 · 1 = 1.0 at timestep 0; 0.6 · 2 - 0.8 · 1 = 0.4 at timestep 1.
    clean, noise = _filled(1.0).repeat(2, 1, 1, 1), _filled(2.0).repeat(2, 1, 1, 1)
    predicted = torch.cat([_filled(1.5), _filled(1.0)])
    errors = velocity_errors(predicted, clean, noise, torch.tensor([0, 1]), SCHEDULE)
    assert errors.tolist() == pytest.approx([0.25, 0.36])
    noisy = SCHEDULE.add_noise(clean, noise, torch.tensor([0, 1]))
    assert noisy[:, 0, 0, 0].tolist() == pytest.approx([0.8 + 0.6 * 2, 0.6 + 0.8 * 2])


def test_the_true_velocity_gives_back_the_clip() -> None:
    clean, noise, timesteps = torch.randn(3, 2, 4, 2), torch.randn(3, 2, 4, 2), torch.tensor([0, 1, 1])
    velocity = SCHEDULE.get_velocity(clean, noise, timesteps)
    assert velocity_errors(velocity, clean, noise, timesteps, SCHEDULE).tolist() == [0, 0, 0]
    noisy = SCHEDULE.add_noise(clean, noise, timesteps)
    left = SCHEDULE.alphas_cumprod[timesteps][:, None, None, None]
    torch.testing.assert_close(left.sqrt() * noisy - (1 - left).sqrt() * velocity, clean)


def test_errors_are_computed_in_float32() -> None:
    predicted = torch.randn(2, 2, 3, 2, dtype=torch.bfloat16)
    errors = velocity_errors(predicted, _filled(0.1), _filled(0.2), torch.tensor([0, 0]), SCHEDULE)
    assert errors.dtype is torch.float32


def test_min_snr_weights_by_hand() -> None:
    # snr is 0.64 / 0.36 = 16 / 9 and 0.36 / 0.64 = 9 / 16; over snr + 1.
    timesteps = torch.tensor([0, 1])
    assert min_snr_weights(timesteps, SCHEDULE, 5.0).tolist() == pytest.approx([0.64, 0.36])
    assert min_snr_weights(timesteps, SCHEDULE, 1.0).tolist() == pytest.approx([0.36, 0.36])


def test_the_denoising_loss_of_parts_is_that_of_the_whole() -> None:
    errors, weights = torch.tensor([1.0, 2.0, 3.0, 6.0]), torch.tensor([1.0, 0.5, 0.0, 0.5])
    assert denoising_loss(errors).item() == 3.0
    assert denoising_loss(errors, weights).item() == pytest.approx((1 + 1 + 0 + 3) / 4)
    halves = [denoising_loss(errors[part], weights[part]) for part in (slice(0, 2), slice(2, 4))]
    assert torch.stack(halves).mean().item() == pytest.approx(denoising_loss(errors, weights).item())


def test_dpo_by_hand() -> None:
    # Drifts of the chosen: -0.25 and 0.5; of the rejected: 0 and 0.25. Times -4 / 2: margins 0.5 and -0.5.
    preference = diffusion_dpo(
        torch.tensor([0.5, 1.0]),
        torch.tensor([0.5, 0.75]),
        torch.tensor([0.75, 0.5]),
        torch.tensor([0.5, 0.5]),
        beta=4.0,
    )
    assert preference.margins_B.tolist() == pytest.approx([0.5, -0.5])
    assert preference.loss.item() == pytest.approx(-(_log_sigmoid(0.5) + _log_sigmoid(-0.5)) / 2)
    assert preference.loss.item() == pytest.approx(0.7240770)  # (0.4740770 + 0.9740770) / 2
    assert preference.accuracy.item() == 0.5
    assert preference.chosen_drifts_B.tolist() == pytest.approx([-0.25, 0.5])
    assert preference.rejected_drifts_B.tolist() == pytest.approx([0.0, 0.25])


def test_dpo_of_equal_policy_and_reference_is_log_2_and_has_opposite_gradients() -> None:
    errors = torch.tensor([0.3, 0.7, 0.1])
    chosen, rejected = errors.clone().requires_grad_(), errors.flip(0).clone().requires_grad_()
    preference = diffusion_dpo(chosen, rejected, errors, errors.flip(0), beta=600.0)
    assert preference.loss.item() == pytest.approx(LOG_2)
    assert preference.accuracy.item() == 0.5
    preference.loss.backward()
    assert chosen.grad is not None and rejected.grad is not None
    # beta / 2 · (1 - sigmoid(0)) / B: errors of the chosen go down, of the rejected up.
    assert chosen.grad.tolist() == pytest.approx([600 / 2 * 0.5 / 3] * 3)
    assert rejected.grad.tolist() == pytest.approx([-600 / 2 * 0.5 / 3] * 3)


def test_a_step_along_dpos_gradient_makes_the_chosen_clip_likelier_and_the_rejected_one_less_so() -> None:
    torch.manual_seed(0)
    denoiser, reference = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
    reference.load_state_dict(denoiser.state_dict())
    clips, noise = torch.randn(2, 2, 8, 4), torch.randn(1, 2, 8, 4).repeat(2, 1, 1, 1)
    timesteps = torch.tensor([1, 1])
    noisy = SCHEDULE.add_noise(clips, noise, timesteps)

    def errors(model: nn.Module) -> tuple[Tensor, Tensor]:
        chosen, rejected = velocity_errors(model(noisy), clips, noise, timesteps, SCHEDULE).chunk(2)
        return chosen, rejected

    with torch.no_grad():
        before = errors(reference)
    loss = diffusion_dpo(*errors(denoiser), *before, beta=10.0).loss
    assert loss.item() == pytest.approx(LOG_2)
    loss.backward()
    with torch.no_grad():
        for parameter in denoiser.parameters():
            assert parameter.grad is not None
            parameter.sub_(1e-3 * parameter.grad)
        after = errors(denoiser)
    assert after[0] < before[0] and after[1] > before[1]
    assert diffusion_dpo(*after, *before, beta=10.0).loss < LOG_2


def test_the_example_in_diffusers_has_half_our_beta() -> None:
    chosen, rejected, ours, theirs = (torch.rand(5) for _ in range(4))
    logits = (ours - theirs) - (chosen - rejected)
    example = -nn.functional.logsigmoid(1000 * logits).mean()
    loss = diffusion_dpo(chosen, rejected, ours, theirs, beta=2000.0).loss
    torch.testing.assert_close(loss, example)


def test_a_drift_that_both_clips_share_does_not_show_in_the_loss_but_in_the_drifts() -> None:
    chosen, rejected, ours, theirs = torch.rand(4, 6)
    good = diffusion_dpo(chosen, rejected, ours, theirs, beta=50.0)
    collapsed = diffusion_dpo(chosen + 3, rejected + 3, ours, theirs, beta=50.0)
    torch.testing.assert_close(collapsed.loss, good.loss)
    torch.testing.assert_close(collapsed.chosen_drifts_B, good.chosen_drifts_B + 3)


def test_crpo_is_dpo_plus_the_chosen_clips_error() -> None:
    # As above, 0.7240770, and the mean of 0.5 and 1.0.
    errors = ([0.5, 1.0], [0.5, 0.75], [0.75, 0.5], [0.5, 0.5])
    chosen, *others = (torch.tensor(values, requires_grad=True) for values in errors)
    preference = diffusion_dpo(chosen, *others, beta=4.0, chosen_weight=1.0)
    assert preference.loss.item() == pytest.approx(0.7240770 + 0.75)
    preference.loss.backward()
    # -beta / 2 · (sigmoid(margin) - 1) / B + 1 / B, at the margins 0.5 and -0.5.
    sigmoids = [1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(0.5))]
    assert chosen.grad is not None
    assert chosen.grad.tolist() == pytest.approx([2 * (1 - s) / 2 + 1 / 2 for s in sigmoids])


def test_dpo_is_finite_for_large_margins() -> None:
    far, zero = torch.tensor([10.0]), torch.zeros(1)
    assert diffusion_dpo(far, zero, zero, zero, beta=2000.0).loss.item() == pytest.approx(1e4)
    assert diffusion_dpo(zero, far, zero, zero, beta=2000.0).loss.item() == 0


def test_batons_loss_by_hand() -> None:
    errors, rewards = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 0.5, 0.0])
    assert reward_weighted(errors, rewards).item() == pytest.approx((1 + 1 + 0) / 3)
    pretraining = torch.tensor([3.0, 5.0])
    loss = reward_weighted(errors, rewards, pretraining, pretraining_weight=0.5)
    assert loss.item() == pytest.approx(2 / 3 + 0.5 * 4)


def test_a_clip_without_reward_has_no_gradient() -> None:
    errors = torch.tensor([1.0, 2.0], requires_grad=True)
    reward_weighted(errors, torch.tensor([0.8, 0.0])).backward()
    assert errors.grad is not None
    assert errors.grad.tolist() == pytest.approx([0.4, 0.0])
