"""Distil a denoiser: a student that makes a clip in 1, 2, 4 or 8 calls, without the unconditional half.

    milonga train distill --recipe mini
    milonga train distill --recipe tango2 --set start=file:tango2 --set prompts=captions.csv

The teacher's guided paths are computed from noise as the student learns them, so only prompts are needed, no
clips. `training.objectives.trajectory` has the objective. The student is a model folder like its teacher's:
`milonga serve generation --model file:…` serves it; it is evaluated, registered and promoted as any other.

Shape legend: B paths, R rows of the student's call (a row per path and jump), X a family's shape of latents.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from services.errors import invalid
from services.lists import read_list
from services.models.architectures import architecture_of
from services.models.latent import Conditioning, guide
from services.models.pipelines import read_index
from training.finetuning.session import (
    FineTuning,
    LoraConfig,
    Policy,
    Session,
    finish_session,
    open_session,
)
from training.loop.checks import ClipSeconds, Count, Natural, Range, Share, check_ranges
from training.loop.fit import Positions, adamw, examples_at, fit
from training.objectives.noising import NoisingConfig, mean_products
from training.objectives.trajectory import JUMPS, Jump, Trajectory
from training.soundworld.scenes import SHORT, SceneConfig, draw_caption

_STREAM: Final = 0x70617468
"""Separates these random numbers from others with the same seed and position."""
PROFILE_STEPS: Final[Mapping[str, int]] = {"quality": 8, "balanced": 2, "draft": 1}
"""Steps of a student's profiles."""
Guidance = Annotated[float, Range(1, 20)]


@dataclass(frozen=True, kw_only=True, slots=True)
class WorldPrompts:
    """Prompts of the sound world's training split."""

    count: Natural = 0
    """Prompts in all, divided among the durations."""
    seed: Natural = 808


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillTraining(FineTuning):
    """One distillation."""

    prompts: tuple[Path, ...] = ()
    """Lists of prompts (`services.lists`); their clips, if they name any, are not read."""
    world: WorldPrompts = WorldPrompts()
    durations: tuple[ClipSeconds, ...] = ()
    """Seconds of the clips: the steps of the training take turns. None: the model's default."""
    guidance: tuple[Guidance, Guidance] = (1.0, 6.0)
    """Range of the guidance scales that the student learns."""
    default_guidance: Share = 0.5
    """Share of the paths with the model's default guidance scale."""
    jumps: Count = 1
    """Jumps per path drawn from those of 4 and 8 steps, in addition to those of 1 and 2 steps."""
    robust: Annotated[float, Range(0, 100)] = 0.0
    """Constant c of the loss ``sqrt(error + c^2) - c``, less drawn to the mean of what is uncertain than the
    error itself (pseudo-Huber, arXiv 2310.14189, section 3.3); 0: the error."""

    def __post_init__(self) -> None:
        FineTuning.__post_init__(self)
        check_ranges(self.world)
        if self.guidance[0] > self.guidance[1]:
            raise ValueError(f"guidance is {self.guidance}; give the lower bound first")
        for name, unused in (("lora", LoraConfig()), ("noising", NoisingConfig()), ("epochs", 0.0)):
            if getattr(self, name) != unused:
                raise ValueError(f"{name} has no effect on a distillation; leave it out")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Path:
    """A path of the teacher: what it starts from."""

    prompt: str
    guidance: float
    noise_X: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class _Teacher:
    """The guided teacher, and the paths that it takes."""

    denoiser: nn.Module
    denoise: Callable[..., Tensor]
    trajectory: Trajectory
    default_guidance: float

    def paths(
        self, noise_BX: Tensor, texts: tuple[Conditioning, Conditioning], guidance_B: Tensor, seconds: float
    ) -> list[Tensor]:
        """Return the points of the paths; `texts` are the unconditional ones and those of the prompts."""
        text = Conditioning.cat(texts)
        scale_B = guidance_B.reshape(-1, *[1] * (noise_BX.ndim - 1))

        def velocity(latents_BX: Tensor, timestep: float) -> Tensor:
            rows = 2 * len(latents_BX)
            timesteps, seconds_ = (latents_BX.new_full((rows,), value) for value in (timestep, seconds))
            output = self.denoise(self.denoiser, torch.cat([latents_BX] * 2), timesteps, text, seconds_)
            unconditional_BX, conditional_BX = output.float().chunk(2)
            return guide(unconditional_BX, conditional_BX, scale_B)

        return self.trajectory.follow(noise_BX, velocity)


def train_distill(config: DistillTraining, output: Path, *, fresh: bool = False) -> dict[str, Any]:
    """Run the whole program; `output` is then a generator's folder. Returns the report in its training.json.

    ``NAME.run``, next to `output`, has the journal, the checkpoints and the encoded prompts. However a run
    ended, the same call resumes it; with `fresh` it starts over.

    Raises:
        InvalidInputError: settings or prompts are wrong, or the run that is there has other settings.
        ModelError: the start was refused.
        OutputError: `output` can't be written, or holds something else.
    """
    session, report = open_session(config, output, config.prompts, {}, fresh=fresh)
    if report is not None:
        return report
    architecture = architecture_of(session.start.folder)
    if architecture.student is None or architecture.denoise is None:
        raise invalid("start", f"is a {architecture.pipeline.__name__}, which can't be distilled; give Tango")
    denoiser = architecture.load_denoiser(session.start.folder)
    policy = Policy(architecture.student(denoiser).requires_grad_(True), None, architecture.denoise)
    if config.gradient_checkpointing:
        policy.denoiser.enable_gradient_checkpointing()
    teacher = _Teacher(
        denoiser=denoiser.eval().requires_grad_(False).to(session.accelerator.device),
        denoise=architecture.denoise,
        trajectory=Trajectory(session.start.folder),
        default_guidance=float(read_index(session.start.folder).get("default_guidance_scale", 3.0)),
    )
    durations = config.durations or (session.latents.seconds,)
    prompts = {duration: _prompts(config, duration) for duration in dict.fromkeys(durations)}
    session.latents.add([], [prompt for group in prompts.values() for prompt in group])
    pipeline = session.latents.encoder.pipeline
    shapes = {one: tuple(pipeline.noise(one, torch.Generator()).shape[1:]) for one in prompts}
    fitted = fit(
        policy,
        adamw(policy, config.loop),
        partial(
            loss_of,
            config=config,
            teacher=teacher,
            prompts=prompts,
            shapes=shapes,
            durations=durations,
            session=session,
        ),
        config.loop,
        session.run,
        accelerator=session.accelerator,
        title=f"distill {config.name}",
    )
    data = {"examples": sum(map(len, prompts.values()))}
    return finish_session(
        session, policy, "distill", fitted.steps, data, changes=_changes(policy, teacher.default_guidance)
    )


def loss_of(
    policy: nn.Module,
    positions: Positions,
    *,
    config: DistillTraining,
    teacher: _Teacher,
    prompts: Mapping[float, Sequence[str]],
    shapes: Mapping[float, tuple[int, ...]],
    durations: Sequence[float],
    session: Session,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the student's error on jumps of the paths at `positions`, and those of 1 and of 2 steps."""
    step = int(positions[0]) // config.loop.batch
    seconds = durations[step % len(durations)]
    device = session.accelerator.device
    group = prompts[seconds]
    indices = examples_at(positions, len(group), config.loop.seed)
    paths = [
        _draw(config, teacher, group[index], shapes[seconds], int(position))
        for index, position in zip(indices, positions, strict=True)
    ]
    guidance_B = torch.tensor([path.guidance for path in paths], device=device)
    noise_BX = torch.stack([path.noise_X for path in paths]).to(device)
    text = session.latents.text([path.prompt for path in paths])
    empty = session.latents.text([""] * len(paths))
    points = teacher.paths(noise_BX, (empty, text), guidance_B, seconds)

    jumps = _jumps(config, step)
    ends = teacher.trajectory.timesteps
    starts_R = torch.cat([guidance_B.new_full((len(paths),), ends[one.start]) for one in jumps])
    until_R = torch.cat([guidance_B.new_full((len(paths),), ends[one.end]) for one in jumps])
    predicted_RX = policy(
        torch.cat([points[one.start] for one in jumps]),
        starts_R,
        Conditioning.cat([text] * len(jumps)),
        torch.full_like(starts_R, seconds),
        torch.stack([guidance_B.repeat(len(jumps)), until_R], dim=1),
    ).policy_BX
    residuals_RX = predicted_RX.float() - torch.cat([teacher.trajectory.target(points, one) for one in jumps])
    errors_R = mean_products(residuals_RX, residuals_RX)
    loss_R = (errors_R + config.robust**2).sqrt() - config.robust if config.robust else errors_R
    by_jump = dict(zip(jumps, errors_R.detach().chunk(len(jumps)), strict=True))
    figures = {
        f"error_{steps}_{number}": by_jump[one].mean()
        for steps in (1, 2)
        for number, one in enumerate(JUMPS[steps], start=1)
    }
    return loss_R.mean(), figures


def _jumps(config: DistillTraining, step: int) -> list[Jump]:
    """Return the jumps of a step of the training: those of 1 and 2 steps, and some of the others."""
    always = list(dict.fromkeys((*JUMPS[1], *JUMPS[2])))
    others = sorted({*JUMPS[4], *JUMPS[8]} - {*always})
    picked = np.random.default_rng([config.loop.seed, step, _STREAM]).choice(
        len(others), min(config.jumps, len(others)), replace=False
    )
    return always + [others[index] for index in picked]


def _draw(
    config: DistillTraining, teacher: _Teacher, prompt: str, shape_X: tuple[int, ...], position: int
) -> _Path:
    """Draw the path at a position."""
    rng = np.random.default_rng([config.loop.seed, position, _STREAM])
    usual = rng.uniform() < config.default_guidance
    guidance = teacher.default_guidance if usual else float(rng.uniform(*config.guidance))
    noise = rng.standard_normal(shape_X, dtype=np.float32)
    return _Path(prompt=prompt, guidance=guidance, noise_X=torch.from_numpy(noise))


def _prompts(config: DistillTraining, duration: float) -> list[str]:
    """Return the distinct prompts of clips of `duration` seconds. Raises `InvalidInputError`."""
    found = {entry.prompt: None for path in config.prompts for entry in read_list(path, "prompts")}
    if config.world.count:
        long = duration > SHORT.duration
        scenes = SceneConfig(duration=duration, single=0.2, sequence=0.55, three=0.35 if long else 0.0)
        share = -(-config.world.count // len({*config.durations} or {duration}))
        for index in range(share):
            rng = np.random.default_rng([config.world.seed, index, round(1000 * duration)])
            found.setdefault(draw_caption(rng, scenes)[0])
    if not found:
        raise invalid("prompts", "is empty; give lists of prompts, or world.count for the sound world's")
    return list(found)


def _changes(policy: Policy, guidance: float) -> dict[str, dict[str, Any]]:
    """Return how the student's folder differs from its teacher's, apart from the weights."""
    profiles = {
        name: {"num_inference_steps": steps, "guidance_scale": guidance, "scheduler": "jump"}
        for name, steps in PROFILE_STEPS.items()
    }
    return {
        "unet/config.json": {"time_cond_proj_dim": policy.denoiser.config.time_cond_proj_dim},
        "model_index.json": {
            "default_scheduler": "jump",
            "default_num_inference_steps": PROFILE_STEPS["balanced"],
            "profiles": profiles,
        },
    }
