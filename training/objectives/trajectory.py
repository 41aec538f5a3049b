"""Distillation along the path of a guided teacher: what the student ought to predict for each jump.

From noise, the teacher's solver visits the points of its path, each of which is two calls of the denoiser
with guidance. The student learns to jump from one point to a later one by a single call::

    target = (cos(turn) latents_from - latents_to) / sin(turn)

which is the velocity whose step of DDIM by the angle `turn` (`services.models.tango.distilled.jump`) leads
there. Jumps to the end of the path are what a consistency model learns (arXiv 2303.01469, 2309.10740), but
from the path's end itself rather than from the student's own estimate of it: exact targets, no second copy of
the student, no schedule. Jumps between points are those of progressive distillation (arXiv 2202.00512), all
at once instead of one halving after another.

Shape legend: B batch, X a family's own shape of latents.
"""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from services.models.folders import read_json
from services.models.tango.distilled import (
    STARTS,
    TEACHER_SCHEDULER,
    TEACHER_STEPS,
    angle,
    path_timesteps,
)
from services.models.tango.schedulers import make_scheduler


class Jump(NamedTuple):
    """Two points of a path, by their indices."""

    start: int
    end: int


JUMPS: dict[int, tuple[Jump, ...]] = {
    steps: tuple(Jump(*pair) for pair in pairwise((*starts, TEACHER_STEPS)))
    for steps, starts in STARTS.items()
}
"""The jumps of a clip by its number of steps."""


class Trajectory:
    """Paths of a teacher that predicts v."""

    def __init__(self, folder: Path) -> None:
        """Read the noise schedule of the model in `folder`."""
        self._schedule = read_json(folder / "scheduler" / "scheduler_config.json")
        self.timesteps = path_timesteps(self._schedule)
        """Timesteps of the points; the last is the clip."""
        alphas = make_scheduler(TEACHER_SCHEDULER, self._schedule).alphas_cumprod.tolist()
        self.angles = [angle(timestep, alphas) for timestep in self.timesteps]
        """Angles of the points: clip and noise are mixed by their cosine and sine."""

    @torch.no_grad()
    def follow(self, noise_BX: Tensor, velocity: Callable[[Tensor, float], Tensor]) -> list[Tensor]:
        """Return the points of the paths from `noise_BX`, the noise first and the clips last, in float32.

        `velocity` is the teacher's guided output for latents [B, X] at a timestep.
        """
        solver: Any = make_scheduler(TEACHER_SCHEDULER, self._schedule)
        solver.set_timesteps(TEACHER_STEPS)
        solver.set_begin_index(0)
        points = [noise_BX.float()]
        for timestep in self.timesteps[:-1]:
            output_BX = velocity(points[-1], timestep).float()
            points.append(solver.step(output_BX, int(timestep), points[-1], return_dict=False)[0])
        return points

    def target(self, points: list[Tensor], jump: Jump) -> Tensor:
        """Return the velocity of a jump along the paths through `points`."""
        turn = torch.tensor(self.angles[jump.start] - self.angles[jump.end])
        return (turn.cos() * points[jump.start] - points[jump.end]) / turn.sin()
