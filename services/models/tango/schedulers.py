"""Tango's schedulers by name, all with its noise schedule, which is Stable Diffusion 2.1's."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, SchedulerMixin, UniPCMultistepScheduler
from torch import Tensor

from services.errors import invalid
from services.models.latent import Solver

SD21_CONFIG: Final[Mapping[str, Any]] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
    "trained_betas": None,
    "clip_sample": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "variance_type": "fixed_small",
}
"""`stabilityai/stable-diffusion-2-1`, folder `scheduler/`, as upstream's DDPMScheduler completes it.

Embedded because the repository that every released `main_config.json` names has left the hub.
"""

_NOISE_SCHEDULE = (
    "num_train_timesteps",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "trained_betas",
    "prediction_type",
)
"""Fields of a scheduler's config that define the noise schedule of training; the others are the solver's."""


class AncestralScheduler(DDPMScheduler):  # type: ignore[misc]
    """`DDPMScheduler` that also supports as many steps as in training.

    With 1000 of 1000 steps, 'leading' spacing with `steps_offset` 1 begins at timestep 1000, one past the end
    of the tables: the offset is then left out, so that all of 999, …, 0 are visited.
    """

    timesteps: torch.Tensor

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Set the timesteps as diffusers does, but within the tables."""
        super().set_timesteps(num_inference_steps, device, timesteps)
        last = self.config.num_train_timesteps - 1
        self.timesteps = self.timesteps - (self.timesteps.max() - last).clamp(min=0)


def _ddpm(schedule: Mapping[str, Any]) -> SchedulerMixin:
    """Ancestral sampling as in upstream's `inference`: new noise at every step."""
    return AncestralScheduler(
        **schedule, clip_sample=False, steps_offset=1, timestep_spacing="leading", variance_type="fixed_small"
    )


def _ddim(schedule: Mapping[str, Any]) -> SchedulerMixin:
    """DDIM without noise, from the last timestep to the clean estimate.

    First-order DPM-Solver is DDIM (arXiv 2206.00927, section 4.1). It is used because diffusers'
    `DDIMScheduler` with 'trailing' spacing stops short of the clean sample if the number of steps does not
    divide 1000.
    """
    return DPMSolverMultistepScheduler(
        **schedule,
        algorithm_type="dpmsolver++",
        solver_order=1,
        timestep_spacing="trailing",
        final_sigmas_type="zero",
    )


def _dpmsolver(schedule: Mapping[str, Any]) -> SchedulerMixin:
    """Second-order multistep solver with steps evenly spaced in log signal-to-noise ratio."""
    return DPMSolverMultistepScheduler(
        **schedule,
        algorithm_type="dpmsolver++",
        solver_order=2,
        use_lu_lambdas=True,
        timestep_spacing="trailing",
        final_sigmas_type="zero",
    )


def _unipc(schedule: Mapping[str, Any]) -> SchedulerMixin:
    """Predictor-corrector; `use_exponential_sigmas` means even steps in log signal-to-noise ratio."""
    return UniPCMultistepScheduler(
        **schedule,
        solver_order=2,
        use_exponential_sigmas=True,
        timestep_spacing="trailing",
        final_sigmas_type="zero",
    )


_FACTORIES: Final[dict[str, Callable[[Mapping[str, Any]], SchedulerMixin]]] = {
    "ddpm": _ddpm,
    "ddim": _ddim,
    "dpmsolver++": _dpmsolver,
    "unipc": _unipc,
}

SCHEDULERS: Final[tuple[str, ...]] = tuple(_FACTORIES)
"""Names of the schedulers."""


def make_scheduler(name: str, base_config: Mapping[str, Any] = SD21_CONFIG) -> SchedulerMixin:
    """Return a new scheduler with the noise schedule of `base_config`.

    Every scheduler takes 1 to 1000 steps, needs no input scaling, starts from unit noise and ends at a clean
    sample. Only `ddpm` draws noise in `step`, from its generator. A scheduler has state: make one for each
    clip or batch.

    Raises `InvalidInputError` (field ``scheduler``) for an unknown name.
    """
    factory = _FACTORIES.get(name)
    if factory is None:
        known = ", ".join(SCHEDULERS)
        raise invalid("scheduler", f"unknown scheduler {name!r}; use one of {known}")
    return factory({key: base_config[key] for key in _NOISE_SCHEDULE if key in base_config})


class VelocitySolver(Solver):
    """Steps along v-predictions."""

    def clean_estimate(self, output: Tensor, index: int, latents: Tensor) -> Tensor:
        """Return ``alpha x - sigma v`` (arXiv 2202.00512, appendix D)."""
        alpha_squared = float(self._scheduler.alphas_cumprod[int(self.timesteps[index])])
        return math.sqrt(alpha_squared) * latents - math.sqrt(1 - alpha_squared) * output
