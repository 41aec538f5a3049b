import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from services.errors import ModelFormatError
from training.objectives.diffusion import denoising_loss, diffusion_dpo, reward_weighted, safe_scales
from training.objectives.noising import Noising, mean_products, residuals
from training.objectives.velocity import VelocityObjective, min_snr_weights

# Shares of the signal's power left at timesteps 0 and 1: 0.64 and 0.36.
SCHEDULE = DDPMScheduler(
    num_train_timesteps=2, trained_betas=[0.36, 0.4375], prediction_type="v_prediction", clip_sample=False
)
LOG_2 = math.log(2)


def _filled(value: float) -> Tensor:
    return torch.full((1, 2, 3, 2), value)


@pytest.fixture
def objective(tmp_path: Path) -> VelocityObjective:
    """The objective of a model with `SCHEDULE`."""
    SCHEDULE.save_pretrained(tmp_path / "scheduler")
    return VelocityObjective(tmp_path)


def _noising(noise: Tensor, timesteps: list[int]) -> Noising:
    never = torch.zeros(len(noise), dtype=torch.bool)
    return Noising(timesteps_B=torch.tensor(timesteps), noise_BX=noise, blank_B=never, unconditional_B=never)


def _errors(predicted: Tensor, target: Tensor) -> Tensor:
    differences = residuals(predicted, target)
    return mean_products(differences, differences)


def _log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def test_the_velocity_error_by_hand(objective: VelocityObjective) -> None:
    # v = 0.8 · 2 - 0.6 · 1 = 1.0 at timestep 0; 0.6 · 2 - 0.8 · 1 = 0.4 at timestep 1.
    clean, noise = _filled(1.0).repeat(2, 1, 1, 1), _filled(2.0).repeat(2, 1, 1, 1)
    predicted = torch.cat([_filled(1.5), _filled(1.0)])
    noising = _noising(noise, [0, 1])
    errors = _errors(predicted, objective.target(clean, noising))
    assert errors.tolist() == pytest.approx([0.25, 0.36])
    noisy = objective.noised(clean, noising)
    assert noisy[:, 0, 0, 0].tolist() == pytest.approx([0.8 + 0.6 * 2, 0.6 + 0.8 * 2])


def test_the_true_velocity_gives_back_the_clip(objective: VelocityObjective) -> None:
    clean, noising = torch.randn(3, 2, 4, 2), _noising(torch.randn(3, 2, 4, 2), [0, 1, 1])
    velocity, noisy = objective.target(clean, noising), objective.noised(clean, noising)
    left = SCHEDULE.alphas_cumprod[noising.timesteps_B][:, None, None, None]
    torch.testing.assert_close(left.sqrt() * noisy - (1 - left).sqrt() * velocity, clean)


def test_errors_are_computed_in_float32() -> None:
    predicted = torch.randn(2, 2, 3, 2, dtype=torch.bfloat16)
    target = predicted.float() + 1e-3
    assert _errors(predicted, target).tolist() == pytest.approx([1e-6] * 2, rel=1e-2)


def test_a_model_that_predicts_noise_is_refused(tmp_path: Path) -> None:
    SCHEDULE.save_pretrained(tmp_path / "scheduler")
    config = tmp_path / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "epsilon"}))
    with pytest.raises(ModelFormatError, match="predicts 'epsilon'; only v_prediction can be trained"):
        VelocityObjective(tmp_path)


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


def test_a_step_along_dpos_gradient_makes_the_chosen_clip_likelier_and_the_rejected_one_less_so(
    objective: VelocityObjective,
) -> None:
    torch.manual_seed(0)
    denoiser, reference = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
    reference.load_state_dict(denoiser.state_dict())
    clips, noise = torch.randn(2, 2, 8, 4), torch.randn(1, 2, 8, 4).repeat(2, 1, 1, 1)
    noising = _noising(noise, [1, 1])
    noisy, target = objective.noised(clips, noising), objective.target(clips, noising)

    def errors(model: nn.Module) -> tuple[Tensor, Tensor]:
        chosen, rejected = _errors(model(noisy), target).chunk(2)
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


def test_the_safeguards_scales_by_hand() -> None:
    # <c, c> is 5 in all rows; <c, r> is 10, 4, 0, -5 and 5 · 1.25.
    chosen = torch.tensor([[1.0, 2.0]]).repeat(5, 1)
    rejected = torch.tensor([[2.0, 4.0], [0.0, 2.0], [2.0, -1.0], [-1.0, -2.0], [1.25, 2.5]])
    assert safe_scales(chosen, rejected).tolist() == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.8])
    assert safe_scales(chosen, rejected, margin=0.6).tolist() == pytest.approx([0.2, 0.5, 1.0, 1.0, 0.32])
    assert safe_scales(chosen, rejected, margin=1.0).tolist() == [0.0, 0.0, 1.0, 1.0, 0.0]
    assert safe_scales(torch.zeros(1, 2), torch.zeros(1, 2)).tolist() == [1.0]


def test_the_safeguards_scales_are_those_of_the_outputs_gradients() -> None:
    """As the released code computes them, by differentiating the errors of one pair."""
    torch.manual_seed(0)
    chosen = torch.randn(1, 3, 4, requires_grad=True)
    rejected = (chosen.detach() * 2 + torch.randn(1, 3, 4)).requires_grad_()
    target = torch.randn(1, 3, 4)
    first, second = (
        torch.autograd.grad(_errors(one, target).sum(), one)[0].flatten() for one in (chosen, rejected)
    )
    assert first @ second > first @ first
    scales = safe_scales(residuals(chosen, target).detach(), residuals(rejected, target).detach(), margin=0.9)
    assert scales.item() == pytest.approx((0.1 * (first @ first) / (first @ second)).item())


@pytest.mark.parametrize(
    ("margin", "factor"),
    # The chosen clip asks for 1, the rejected one for 3, and the bias is 0: their gradients are -2 and -6.
    # DPO's direction is -(-2 + 6) = -4, away from both. With 6 · 1/3 it is 0; with 6 · 1/6 it is +1.
    [(None, -4.0), (0.0, 0.0), (0.5, 1.0), (1.0, 2.0)],
)
def test_the_safeguard_keeps_the_chosen_clips_error_from_rising(margin: float | None, factor: float) -> None:
    bias = torch.zeros(1, requires_grad=True)
    targets = torch.tensor([[1.0], [3.0]])
    ours = residuals(bias.expand(2, 1), targets)
    chosen, rejected = mean_products(ours, ours).chunk(2)
    scales = None if margin is None else safe_scales(*ours.detach().chunk(2), margin=margin)
    reference = chosen.detach(), rejected.detach()
    preference = diffusion_dpo(chosen, rejected, *reference, beta=4.0, rejected_scales_B=scales)
    assert preference.loss.item() == pytest.approx(LOG_2)
    preference.loss.backward()
    # beta / 2 · (1 - sigmoid(0)) is 1.
    assert bias.grad is not None and bias.grad.item() == pytest.approx(-factor)
    moved = -0.01 * bias.grad.item()
    assert ((moved - 1) ** 2 > 1) == (factor < 0)


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
