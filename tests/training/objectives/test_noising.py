from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from services.models.mini import mini_folder
from services.models.tango.schedulers import SD21_CONFIG
from training.loop.fit import Positions
from training.objectives.noising import Noising, NoisingConfig, draw_noising
from training.objectives.velocity import VelocityObjective

SHAPE = (2, 4, 3)
MINI = NoisingConfig(blank=0.25, late=0.25)


def _drawn(config: NoisingConfig, positions: Positions, batch: int = 8, stream: int = 0) -> Noising:
    return draw_noising(positions, SHAPE, config, batch=batch, seed=3, stream=stream)


def test_noising_depends_on_the_position_alone() -> None:
    positions = np.arange(16, 24)
    whole = _drawn(MINI, positions)
    parts = Noising.joined([_drawn(MINI, positions[start : start + 2]) for start in (0, 2, 4, 6)])
    other = _drawn(MINI, positions, stream=1)
    for name in Noising.__slots__:
        assert torch.equal(getattr(whole, name), getattr(parts, name))
    assert not torch.equal(whole.noise_BX, other.noise_BX)
    assert not torch.equal(whole.noise_BX, draw_noising(positions, SHAPE, MINI, batch=8, seed=4).noise_BX)


def test_timesteps_are_uniform_by_default_one_from_each_part() -> None:
    timesteps = _drawn(NoisingConfig(), np.arange(800)).timesteps_B.reshape(100, 8)
    assert ((timesteps // 125) == torch.arange(8)).all()
    assert timesteps.min() < 20 and timesteps.max() > 980
    assert timesteps.float().mean().item() == pytest.approx(499.5, abs=5)


def test_timesteps_may_be_drawn_each_by_itself() -> None:
    config = NoisingConfig(stratified=False)
    drawn = draw_noising(np.arange(4_000), SHAPE, config, batch=8, seed=3).timesteps_B
    parts = (drawn.reshape(-1, 8) // 125).sort(dim=1).values
    assert (parts == torch.arange(8)).all(dim=1).float().mean() < 0.05  # hardly ever one from each part
    assert drawn.float().mean() == pytest.approx(499.5, abs=4 * 289 / 4_000**0.5)
    assert drawn.float().std() == pytest.approx(1_000 / 12**0.5, rel=0.05)


def test_a_share_is_blank_and_a_share_late() -> None:
    drawn = _drawn(MINI, np.arange(800))
    timesteps, blank = drawn.timesteps_B.reshape(100, 8), drawn.blank_B.reshape(100, 8)
    assert blank[:, :2].all() and not blank[:, 2:].any()
    assert timesteps[:, :2].min() >= 900 and timesteps[:, 2:4].min() >= 800
    assert timesteps[:, 4:].min() < 20 and timesteps.max() <= 999


def test_blank_latents_are_pure_noise_and_the_others_follow_the_schedule() -> None:
    drawn, clean = _drawn(MINI, np.arange(8)), torch.randn(8, *SHAPE)
    noisy = VelocityObjective(mini_folder("mini")).noised(clean, drawn)
    assert torch.equal(noisy[:2], drawn.noise_BX[:2])
    expected = DDPMScheduler(**SD21_CONFIG).add_noise(clean, drawn.noise_BX, drawn.timesteps_B)
    assert torch.equal(noisy[2:], expected[2:])


def test_continuous_timesteps_are_those_before_rounding() -> None:
    whole = _drawn(MINI, np.arange(16)).timesteps_B
    continuous = draw_noising(np.arange(16), SHAPE, MINI, batch=8, seed=3, continuous=True).timesteps_B
    assert continuous.dtype == torch.float32 and torch.equal(continuous.floor().long(), whole)


def test_logit_normal_timesteps_are_the_sigmoid_of_a_normal() -> None:
    config = NoisingConfig(density="logit_normal")
    drawn = draw_noising(np.arange(4_000), SHAPE, config, batch=8, seed=3, continuous=True).timesteps_B
    logits = torch.logit(drawn.double() / 1000)
    assert (logits.mean().item(), logits.std().item()) == pytest.approx((0.0, 1.0), abs=0.02)
    # The share below 500 · (1 - 0.4621) = 269: sigmoid(-1), a standard normal's 15.87 %.
    assert (drawn < 268.94).float().mean().item() == pytest.approx(0.1587, abs=0.01)


def test_two_clips_of_a_pair_share_everything() -> None:
    drawn = _drawn(MINI, np.arange(8))
    twice = Noising.joined([drawn] * 2)
    for name in Noising.__slots__:
        first, second = getattr(twice, name).chunk(2)
        assert torch.equal(first, second)


def test_the_share_of_dropped_prompts_is_that_of_the_config() -> None:
    dropped = _drawn(replace(MINI, condition_dropout=0.1), np.arange(2_000)).unconditional_B
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert not _drawn(MINI, np.arange(100)).unconditional_B.any()


@pytest.mark.parametrize("wrong", [{"blank": 1.2}, {"blank": 0.6, "late": 0.6}, {"blank_from": 1000}])
def test_invalid_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        NoisingConfig(**wrong)  # type: ignore[arg-type]
