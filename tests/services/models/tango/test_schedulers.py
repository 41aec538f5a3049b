"""Every scheduler against the closed form: with the exact v of one clean sample it must end on that sample.

Shape legend: B batch, C channels, T latent frames, F latent mel bins.
"""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from services.errors import InvalidInputError
from services.models.tango.schedulers import SCHEDULERS, SD21_CONFIG, make_scheduler

ALPHAS = DDPMScheduler(**SD21_CONFIG).alphas_cumprod
SHAPE = (1, 2, 4, 4)


def exact_v(latents_BCTF: Tensor, clean_BCTF: Tensor, timestep: Tensor) -> Tensor:
    """The v-prediction of a model that knows `clean_BCTF`: v = alpha eps - sigma x0."""
    alpha, sigma = ALPHAS[timestep].sqrt(), (1 - ALPHAS[timestep]).sqrt()
    return alpha * (latents_BCTF - alpha * clean_BCTF) / sigma - sigma * clean_BCTF


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 7, 10, 25, 99, 333, 501, 999, 1000])
def test_exact_predictions_lead_to_the_clean_sample(name: str, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(SHAPE, generator=generator)
    scheduler = make_scheduler(name)
    scheduler.set_timesteps(steps)
    assert len(scheduler.timesteps) == steps
    assert scheduler.init_noise_sigma == 1
    latents = torch.randn(SHAPE, generator=generator)
    for timestep in scheduler.timesteps:
        assert 0 <= int(timestep) <= 999
        assert torch.equal(scheduler.scale_model_input(latents, timestep), latents)
        v = exact_v(latents, clean, timestep)
        noise = {"generator": generator} if name == "ddpm" else {}
        latents = scheduler.step(v, timestep, latents, **noise).prev_sample
    # Upstream's ddpm ends on the first entry of its tables, where 3 % of the deviation is noise.
    if name != "ddpm":
        assert float((latents - clean).abs().max()) < 2e-3
    elif steps > 1:
        assert float((latents - clean).abs().max()) < 0.15


def test_ddpm_is_upstreams() -> None:
    scheduler = make_scheduler("ddpm")
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() == [801, 601, 401, 201, 1]
    scheduler.set_timesteps(1000)
    assert scheduler.timesteps.tolist() == list(range(999, -1, -1))
    wanted = {key: value for key, value in SD21_CONFIG.items() if key != "_class_name"}
    assert {key: scheduler.config[key] for key in wanted} == wanted


@pytest.mark.parametrize("steps", [4, 10, 25])
def test_ddim_is_diffusers_own_where_that_one_ends_clean(steps: int) -> None:
    clean, latents = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    ours = make_scheduler("ddim")
    theirs = DDIMScheduler.from_config(
        {**SD21_CONFIG, "timestep_spacing": "trailing", "set_alpha_to_one": True, "steps_offset": 0}
    )
    found = wanted = latents
    ours.set_timesteps(steps)
    theirs.set_timesteps(steps)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    for timestep in ours.timesteps:
        # A prediction that is wrong on purpose: an exact one would hide a wrong step.
        found = ours.step(torch.tanh(found) - clean, timestep, found).prev_sample
        wanted = theirs.step(torch.tanh(wanted) - clean, timestep, wanted).prev_sample
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_noise_schedule_comes_from_the_model() -> None:
    scheduler = make_scheduler("ddim", {**SD21_CONFIG, "beta_end": 0.02, "timestep_spacing": "leading"})
    assert scheduler.config.beta_end == 0.02
    assert scheduler.config.timestep_spacing == "trailing"


def test_unknown_name_is_the_callers_fault() -> None:
    with pytest.raises(InvalidInputError, match="unknown scheduler 'euler'; use one of ddpm, ddim"):
        make_scheduler("euler")
