from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from services.models.mini import mini_folder
from services.models.tango.distilled import jump
from services.models.tango.loading import load_tango
from training.objectives.trajectory import JUMPS, Jump, Trajectory


@pytest.fixture(scope="module")
def trajectory() -> Trajectory:
    return Trajectory(mini_folder("mini"))


def test_jumps_of_each_number_of_steps_lead_from_noise_to_the_clip() -> None:
    assert JUMPS[1] == (Jump(0, 8),)
    assert JUMPS[2] == (Jump(0, 4), Jump(4, 8))
    for steps, jumps in JUMPS.items():
        assert len(jumps) == steps
        assert (jumps[0].start, jumps[-1].end) == (0, 8)
        assert all(one.end == other.start for one, other in pairwise(jumps))


def test_the_targets_lead_exactly_from_point_to_point(trajectory: Trajectory) -> None:
    points = [torch.randn(2, 3, 4) for _ in trajectory.timesteps]
    for one in {one for jumps in JUMPS.values() for one in jumps}:
        turn = trajectory.angles[one.start] - trajectory.angles[one.end]
        found = jump(points[one.start], trajectory.target(points, one), turn)
        torch.testing.assert_close(found, points[one.end], rtol=0, atol=1e-5)


def test_the_path_of_an_exact_teacher_is_a_circle(trajectory: Trajectory) -> None:
    """Worked by hand: between one clip and one noise, the latents are their mix by the angle."""
    clean, noise = torch.randn((2, 1, 5), generator=torch.Generator().manual_seed(0))
    phi = dict(zip(trajectory.timesteps, map(torch.tensor, trajectory.angles), strict=True))

    def velocity(latents: Tensor, timestep: float) -> Tensor:
        return phi[timestep].cos() * noise - phi[timestep].sin() * clean

    start = phi[999].cos() * clean + phi[999].sin() * noise
    points = trajectory.follow(start, velocity)
    for point, angle in zip(points, trajectory.angles, strict=True):
        expected = torch.tensor(angle).cos() * clean + torch.tensor(angle).sin() * noise
        torch.testing.assert_close(point, expected, rtol=0, atol=3e-3)
    exact = velocity(start, 999)
    for steps in JUMPS.values():
        torch.testing.assert_close(trajectory.target(points, steps[0]), exact, rtol=0, atol=3e-2)


def test_the_points_are_those_of_the_guided_sampling_that_users_get(trajectory: Trajectory) -> None:
    pipeline = load_tango(mini_folder("mini"))
    text, empty = pipeline.encode(["a dog barks"], length=32), pipeline.encode([""], length=32)
    noise = pipeline.prepare_latents(1, 0.64, torch.Generator().manual_seed(0))
    expected = pipeline.denoise(
        noise, text, empty, guidance_scale=3.0, num_inference_steps=8, scheduler="ddim"
    )

    def velocity(latents: Tensor, timestep: float) -> Tensor:
        timesteps = torch.tensor([timestep])
        unconditional, conditional = (pipeline.predict(latents, timesteps, one) for one in (empty, text))
        return unconditional + 3.0 * (conditional - unconditional)

    torch.testing.assert_close(trajectory.follow(noise, velocity)[-1], expected, rtol=0, atol=1e-4)


def test_the_schedule_is_read_from_the_models_folder(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="scheduler_config"):
        Trajectory(tmp_path)
