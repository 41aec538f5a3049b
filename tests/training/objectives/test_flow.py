from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from training.objectives.flow import FlowObjective, flow_min_snr_weights, flow_position
from training.objectives.noising import Noising, mean_products, residuals


def _filled(value: float) -> Tensor:
    return torch.full((1, 3, 2), value)


def _target(clean: Tensor, noise: Tensor) -> Tensor:
    """The objective's, which does not depend on the timesteps."""
    never = torch.zeros(len(clean), dtype=torch.bool)
    noising = Noising(
        timesteps_B=torch.zeros(len(clean)), noise_BX=noise, blank_B=never, unconditional_B=never
    )
    return FlowObjective(Path()).target(clean, noising)


def test_position_and_error_by_hand() -> None:
    # A clip of ones and noise of threes: a quarter of the way it is at 0.75 · 1 + 0.25 · 3 = 1.5.
    clean, noise = _filled(1.0).repeat(2, 1, 1), _filled(3.0).repeat(2, 1, 1)
    position = flow_position(clean, noise, torch.tensor([250.0, 1000.0]))
    assert position[:, 0, 0].tolist() == pytest.approx([1.5, 3.0])
    # The velocity is 3 - 1 = 2 everywhere: 1.5 is off by 0.5, 2 by nothing.
    off = residuals(torch.cat([_filled(1.5), _filled(2.0)]), _target(clean, noise))
    assert mean_products(off, off).tolist() == pytest.approx([0.25, 0.0])


def test_the_true_velocity_leads_from_any_point_back_to_the_clip() -> None:
    clean, noise = torch.randn(4, 5, 2), torch.randn(4, 5, 2)
    timesteps = torch.tensor([0.0, 123.4, 500.0, 999.0])
    velocity = _target(clean, noise)
    position = flow_position(clean, noise, timesteps)
    torch.testing.assert_close(position - timesteps[:, None, None] / 1000 * velocity, clean)


def test_the_convention_is_that_of_diffusers_scheduler() -> None:
    """Noised as it noises; and its steps along the true velocity end in the clip."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    clean, noise = torch.randn(2, 5, 2), torch.randn(2, 5, 2)
    timesteps = scheduler.timesteps[[10, 700]]
    expected = scheduler.scale_noise(clean, timesteps, noise)
    torch.testing.assert_close(flow_position(clean, noise, timesteps), expected)
    scheduler.set_timesteps(7)
    latents = noise
    for timestep in scheduler.timesteps:
        latents = scheduler.step(noise - clean, timestep, latents, return_dict=False)[0]
    torch.testing.assert_close(latents, clean, rtol=1e-4, atol=1e-4)


def test_blank_rows_are_pure_noise(tmp_path: object) -> None:
    noising = Noising(
        timesteps_B=torch.tensor([900.0, 900.0]),
        noise_BX=torch.randn(2, 5, 2),
        blank_B=torch.tensor([True, False]),
        unconditional_B=torch.tensor([False, False]),
    )
    clean = torch.randn(2, 5, 2)
    objective = FlowObjective(tmp_path)  # type: ignore[arg-type]
    noisy = objective.noised(clean, noising)
    assert torch.equal(noisy[0], noising.noise_BX[0])
    torch.testing.assert_close(noisy[1], 0.1 * clean[1] + 0.9 * noising.noise_BX[1])
    torch.testing.assert_close(objective.target(clean, noising), noising.noise_BX - clean)


def test_min_snr_weights_by_hand() -> None:
    # snr is (0.8 / 0.2)^2 = 16 and (0.4 / 0.6)^2 = 4 / 9; times s^2 = 0.04 and 0.36.
    timesteps = torch.tensor([200.0, 600.0])
    assert flow_min_snr_weights(timesteps, 5.0).tolist() == pytest.approx([0.04 * 5, 0.36 * 4 / 9])
    assert flow_min_snr_weights(timesteps, 100.0).tolist() == pytest.approx([0.64, 0.16])
