"""Distilled denoisers of Tango: one call makes a jump along the path that the guided teacher takes.

A distilled denoiser is Tango's UNet with one more condition, a *jump*: the guidance scale, and the timestep
that the step leads to. Guidance is part of its weights, so a clip takes one row of a call instead of two.
`training.finetuning.distill` makes such denoisers.

Shapes: B batch, X shape of the latents.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from services.errors import invalid
from services.models.latent import Solver
from services.models.tango.schedulers import make_scheduler

TEACHER_SCHEDULER: Final = "ddim"
"""The best for `mini` at 8 steps: others waste some near the clip (benchmarks/README.md)."""
TEACHER_STEPS: Final = 8
"""Steps of the teacher's path. The student jumps between its points."""
CLEAN: Final = -1.0
"""Timestep of the clean latents, where a jump ends."""

STARTS: Final[Mapping[int, tuple[int, ...]]] = {
    steps: tuple(range(0, TEACHER_STEPS, TEACHER_STEPS // steps)) for steps in (1, 2, 4, 8)
}
"""Points of the teacher's path where the jumps start, by the number of steps; the last ends at the clip."""

DISTILLED_SCHEDULERS: Final = ("jump", "jump-ancestral")
"""Schedulers of distilled denoisers."""

_WIDTH: Final = 128
"""Width of a jump's embedding: half for the guidance scale, half for the timestep."""
_GUIDANCE_UNITS: Final = 20.0
"""Guidance scales are embedded as timesteps, this many per unit."""


def path_timesteps(schedule: Mapping[str, Any]) -> list[float]:
    """Return the timesteps of the teacher's path, from noise to `CLEAN`: `TEACHER_STEPS` + 1."""
    teacher: Any = make_scheduler(TEACHER_SCHEDULER, schedule)
    teacher.set_timesteps(TEACHER_STEPS)
    return [*teacher.timesteps.tolist(), CLEAN]


def angle(timestep: float, alphas_cumprod: Sequence[float]) -> float:
    """Return phi of ``noisy = cos(phi) clean + sin(phi) noise``, in radians; 0 at `CLEAN`."""
    return 0.0 if timestep < 0 else math.acos(math.sqrt(alphas_cumprod[int(timestep)]))


def jump(latents_BX: Tensor, velocity_BX: Tensor, turn: Tensor | float) -> Tensor:
    """Return the latents after a step of DDIM by the angle `turn` towards the clip.

    On a circle: with ``v = cos(phi) noise - sin(phi) clean`` (arXiv 2202.00512, appendix D), the latents at
    the angle phi - turn are ``cos(turn) latents - sin(turn) v``.
    """
    turn = torch.as_tensor(turn, dtype=latents_BX.dtype, device=latents_BX.device)
    return turn.cos() * latents_BX - turn.sin() * velocity_BX


def jump_embedding(jumps_B2: Tensor) -> Tensor:
    """Return the condition [B, width] of jumps: guidance scales and the timesteps that they lead to."""
    guidance_B, until_B = jumps_B2.float().unbind(1)
    half = _WIDTH // 2
    parts = (_GUIDANCE_UNITS * guidance_B, until_B - CLEAN)
    return torch.cat([get_timestep_embedding(part_B, half) for part_B in parts], dim=1)


def is_distilled(unet: UNet2DConditionModel) -> bool:
    """Return whether a denoiser is conditioned on jumps."""
    return unet.config.time_cond_proj_dim is not None


def student_of(teacher: UNet2DConditionModel) -> UNet2DConditionModel:
    """Return a distilled denoiser that computes what `teacher` does, whatever the jump: it has yet to learn.

    Raises `InvalidInputError` (field ``start``) if the teacher is distilled itself.
    """
    if is_distilled(teacher):
        raise invalid("start", "is a distilled model; give the model that it was distilled from")
    student: UNet2DConditionModel = UNet2DConditionModel.from_config(
        {**teacher.config, "time_cond_proj_dim": _WIDTH}
    )
    learned = student.time_embedding.cond_proj.weight
    torch.nn.init.zeros_(learned)
    student.load_state_dict({**teacher.state_dict(), "time_embedding.cond_proj.weight": learned.detach()})
    return student


class JumpScheduler:
    """Scheduler of distilled denoisers: 1, 2, 4 or 8 jumps, the last to the clean latents.

    ``jump`` follows the teacher's path. ``jump-ancestral`` jumps to the clean latents at each step and adds
    new noise, as consistency models do (arXiv 2303.01469, algorithm 1).
    """

    def __init__(self, schedule: Mapping[str, Any], *, ancestral: bool) -> None:
        """Take the noise schedule of a model's folder."""
        self._path = tuple(path_timesteps(schedule))
        self.alphas: list[float] = make_scheduler(TEACHER_SCHEDULER, schedule).alphas_cumprod.tolist()
        self._ancestral = ancestral
        self.config = {"prediction_type": "v_prediction"}
        self.set_timesteps(TEACHER_STEPS)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Prepare for a number of steps in `STARTS`."""
        starts = STARTS[num_inference_steps]
        self.timesteps = torch.tensor([self._path[start] for start in starts], device=device)
        ends = [*(self._path[start] for start in starts[1:]), CLEAN]
        self.targets: list[float] = [CLEAN] * len(ends) if self._ancestral else ends
        """Timestep that each jump leads to."""
        self._next = dict(zip([self._path[start] for start in starts], ends, strict=True))

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generator | list[Generator] | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """Return the latents after the jump that starts at `timestep`."""
        start = float(timestep)
        end = self._next[start]
        phi, phi_end = angle(start, self.alphas), angle(end, self.alphas)
        if not self._ancestral:
            return (jump(sample, model_output, phi - phi_end),)
        clean = jump(sample, model_output, phi)
        if end == CLEAN:
            return (clean,)
        noise = randn_tensor(
            sample.shape, generator=generator, device=sample.device if generator is None else None
        ).to(sample.device)
        return (math.cos(phi_end) * clean + math.sin(phi_end) * noise,)


def jump_scheduler(name: str, schedule: Mapping[str, Any]) -> JumpScheduler:
    """Return a new scheduler of a distilled denoiser by name.

    Raises `InvalidInputError` (field ``scheduler``) for another name.
    """
    if name not in DISTILLED_SCHEDULERS:
        known = ", ".join(DISTILLED_SCHEDULERS)
        raise invalid("scheduler", f"{name!r} is not for a distilled model; use one of {known}")
    return JumpScheduler(schedule, ancestral=name == "jump-ancestral")


class JumpSolver(Solver):
    """Steps along jumps."""

    def clean_estimate(self, output: Tensor, index: int, latents: Tensor) -> Tensor:
        """Return the clean latents of a jump's path, continued straight on."""
        return jump(latents, output, angle(self.timesteps[index], self._scheduler.alphas))
