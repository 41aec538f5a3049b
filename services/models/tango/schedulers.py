"""The schedulers by name, on one noise schedule: Stable Diffusion 2.1's, which Tango was trained with."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, SchedulerMixin, UniPCMultistepScheduler
from torch import Tensor

from services.errors import FieldViolation, InvalidInputError
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
"""What the model was trained with. Everything else in a scheduler's config is the solver's own choice."""


class AncestralScheduler(DDPMScheduler):  # type: ignore[misc]
    """`DDPMScheduler` that also takes as many steps as there were in training.

    At 1000 of 1000 steps 'leading' spacing with `steps_offset` 1 begins at the timestep 1000, one past the
    end of the tables: the offset is left out there, so that all of 999, …, 0 are visited.
    """

    timesteps: torch.Tensor

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """As in diffusers, with every timestep inside the tables."""
        super().set_timesteps(num_inference_steps, device, timesteps)
        last = self.config.num_train_timesteps - 1
        self.timesteps = self.timesteps - (self.timesteps.max() - last).clamp(min=0)


def _ddpm(schedule: Mapping[str, Any]) -> SchedulerMixin:
    """Ancestral sampling as upstream's `inference` does it: a fresh noise at every step."""
    return AncestralScheduler(
        **schedule, clip_sample=False, steps_offset=1, timestep_spacing="leading", variance_type="fixed_small"
    )


def _ddim(schedule: Mapping[str, Any]) -> SchedulerMixin:
    """DDIM without noise, from the last timestep to the clean estimate.

    DPM-Solver of first order is DDIM (arXiv 2206.00927, section 4.1). It is taken here because diffusers'
    `DDIMScheduler` with 'trailing' spacing stops short of the clean sample where the number of steps does
    not divide 1000.
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
    """Predictor and corrector; exponential sigmas are even log signal-to-noise ratios in its spelling."""
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
"""Names that `make_scheduler` knows."""


def make_scheduler(name: str, base_config: Mapping[str, Any] = SD21_CONFIG) -> SchedulerMixin:
    """A fresh scheduler called `name` on the noise schedule of `base_config`.

    Every one of them takes 1 to 1000 steps, needs no input scaling, begins from unit noise and ends on a
    clean sample. Only `ddpm` draws noise in `step`, from the generator given there. A scheduler has state:
    make one for each clip or batch that is denoised.

    Raises `InvalidInputError` (field ``scheduler``) for an unknown name.
    """
    factory = _FACTORIES.get(name)
    if factory is None:
        known = ", ".join(SCHEDULERS)
        raise InvalidInputError(
            FieldViolation("scheduler", f"unknown scheduler {name!r}; use one of {known}")
        )
    return factory({key: base_config[key] for key in _NOISE_SCHEDULE if key in base_config})


class VelocitySolver(Solver):
    """Steps along v-predictions."""

    def clean_estimate(self, output: Tensor, index: int, latents: Tensor) -> Tensor:
        """Return ``alpha x - sigma v`` (arXiv 2202.00512, appendix D)."""
        alpha_squared = float(self._scheduler.alphas_cumprod[int(self.timesteps[index])])
        return math.sqrt(alpha_squared) * latents - math.sqrt(1 - alpha_squared) * output
