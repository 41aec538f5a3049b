"""Distilled denoisers: their schedulers, and how the engine and the pipeline call them."""

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from services.api.engine import EngineConfig
from services.engine import Engine, EngineStats
from services.errors import InvalidInputError
from services.models.architectures import load_generator
from services.models.latent import clip_generator
from services.models.manifest import write_manifest
from services.models.mini import mini_folder
from services.models.pipelines import read_index
from services.models.tango.distilled import (
    DISTILLED_SCHEDULERS,
    STARTS,
    JumpScheduler,
    angle,
    jump,
    jump_scheduler,
    student_of,
)
from services.models.tango.loading import TANGO, load_tango
from services.models.tango.pipeline import TangoPipeline
from services.models.tango.schedulers import SD21_CONFIG
from services.weights.explainers import load_explainer
from services.weights.uri import resolve


@pytest.fixture(scope="module")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a student of mini whose jump condition has an effect: its weights are drawn."""
    folder = tmp_path_factory.mktemp("student") / "student"
    pipeline = load_tango(mini_folder("mini"))
    student = student_of(pipeline.unet)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.nn.init.normal_(student.time_embedding.cond_proj.weight, std=0.3)
    pipeline.register_modules(unet=student)
    pipeline.save_pretrained(folder)
    index = read_index(folder) | {"default_scheduler": "jump", "default_num_inference_steps": 2}
    del index["profiles"]  # the teacher's
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def student(student_folder: Path) -> TangoPipeline:
    return load_tango(student_folder)


def velocity(clean: Tensor, noise: Tensor, phi: float) -> Tensor:
    return math.cos(phi) * noise - math.sin(phi) * clean


def clip_rows(stats: EngineStats) -> int:
    return stats.rows - stats.padding_rows


@pytest.mark.parametrize("steps", STARTS)
def test_jumps_of_the_exact_velocity_end_at_the_clean_latents(steps: int) -> None:
    scheduler = JumpScheduler(SD21_CONFIG, ancestral=False)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn((2, 3, 4), generator=generator) for _ in range(2))
    phi = angle(999, scheduler.alphas)
    latents = math.cos(phi) * clean + math.sin(phi) * noise
    for timestep in scheduler.timesteps:
        exact = velocity(clean, noise, angle(float(timestep), scheduler.alphas))
        latents = scheduler.step(exact, timestep, latents)[0]
    assert len(scheduler.timesteps) == len(scheduler.targets) == steps
    torch.testing.assert_close(latents, clean, rtol=0, atol=1e-5)


def test_ancestral_jumps_lead_to_the_clean_latents_and_add_noise_between() -> None:
    scheduler = JumpScheduler(SD21_CONFIG, ancestral=True)
    scheduler.set_timesteps(2)
    assert scheduler.targets == [-1.0, -1.0]
    clean, noise = torch.full((1, 64, 64), 0.5), torch.randn((1, 64, 64))
    phi = angle(999, scheduler.alphas)
    start = math.cos(phi) * clean + math.sin(phi) * noise
    seeds = (torch.Generator().manual_seed(seed) for seed in (1, 1, 2))
    first, same, other = (
        scheduler.step(velocity(clean, noise, phi), scheduler.timesteps[0], start, generator)[0]
        for generator in seeds
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    phi = angle(float(scheduler.timesteps[1]), scheduler.alphas)
    assert float((first - math.cos(phi) * clean).std()) == pytest.approx(math.sin(phi), rel=0.05)


def test_a_jump_of_no_length_changes_nothing() -> None:
    latents = torch.randn(2, 3)
    assert torch.equal(jump(latents, torch.randn(2, 3), 0.0), latents)


def test_a_new_student_computes_what_its_teacher_does() -> None:
    teacher = TANGO.load_denoiser(mini_folder("mini")).eval()
    student = student_of(teacher).eval()
    latents, text = torch.randn(2, 16, 32, 8), torch.randn(2, 5, 128)
    conditions = torch.randn(2, 128)
    with torch.no_grad():
        expected = teacher(latents, 500, encoder_hidden_states=text).sample
        found = student(latents, 500, encoder_hidden_states=text, timestep_cond=conditions).sample
    torch.testing.assert_close(found, expected)


def test_a_student_is_no_teacher() -> None:
    teacher = TANGO.load_denoiser(mini_folder("mini"))
    with pytest.raises(InvalidInputError, match="start: is a distilled model"):
        student_of(student_of(teacher))


def test_a_student_has_its_own_schedulers(student: TangoPipeline) -> None:
    limits = student.description.limits
    assert limits.schedulers == DISTILLED_SCHEDULERS
    asked = (*range(1, 9), 25, 1000)
    assert [student.steps(one, 2.56) for one in asked] == [1, 2, 4, 4, 8, 8, 8, 8, 8, 8]
    with pytest.raises(InvalidInputError, match="'ddim' is not for a distilled model; use one of jump"):
        student.solver("ddim", 2)
    with pytest.raises(InvalidInputError, match="unknown scheduler 'jump'"):
        load_tango(mini_folder("mini")).solver("jump", 2)
    with pytest.raises(InvalidInputError, match="'dpm'"):
        jump_scheduler("dpm", SD21_CONFIG)


def test_guidance_and_the_length_of_jumps_are_conditions(student: TangoPipeline) -> None:
    noise = student.prepare_latents(1, 0.64, clip_generator(0))
    text = student.encode(["a dog barks"], length=32)

    def predict(guidance: float, until: float) -> Tensor:
        return student.predict(noise, torch.tensor([999]), text, None, torch.tensor([[guidance, until]]))

    base = predict(3.0, -1.0)
    assert torch.equal(base, predict(3.0, -1.0))
    assert not torch.allclose(base, predict(4.0, -1.0))
    assert not torch.allclose(base, predict(3.0, 359.0))


def test_requests_of_different_steps_share_calls_of_one_row(student_folder: Path) -> None:
    pipeline = load_generator(student_folder)
    config = EngineConfig(batch_shapes=(4,), exact=True, threads=1)
    settings = ((1, 3.0, "jump"), (2, 1.5, "jump"), (8, 6.0, "jump"), (4, 3.0, "jump-ancestral"))
    with Engine(pipeline, config) as engine:
        requests = [
            engine.request(
                "a dog barks",
                duration=0.64,
                seed=seed,
                num_inference_steps=steps,
                guidance_scale=guidance,
                scheduler=scheduler,
            )
            for seed, (steps, guidance, scheduler) in enumerate(settings)
        ]
        alone = [engine.generate(request).clips[0].waveform() for request in requests]
        before = engine.stats
        streams = [engine.stream(request) for request in requests]
        together = [list(stream) for stream in streams]
        after = engine.stats
    clips = [next(one for one in events if hasattr(one, "waveform")).waveform() for events in together]
    assert all((one == other).all() for one, other in zip(alone, clips, strict=True))
    assert clip_rows(after) - clip_rows(before) == sum(steps for steps, *_ in settings)


def test_the_pipeline_and_the_engine_agree(student_folder: Path) -> None:
    pipeline = load_tango(student_folder)
    expected = pipeline(
        "a dog barks", 0.64, generator=clip_generator(7), num_inference_steps=2, guidance_scale=3.0
    ).audios[0]
    with Engine(load_generator(student_folder), EngineConfig(batch_shapes=(1,), threads=1)) as engine:
        request = engine.request("a dog barks", duration=0.64, seed=7)
        assert (request.num_inference_steps, request.scheduler) == (2, "jump")
        found = engine.generate(request).clips[0].waveform()
    assert abs(found - expected).max() < 1e-4


def test_a_negative_prompt_has_no_effect_and_a_warning(student_folder: Path) -> None:
    with Engine(load_generator(student_folder), EngineConfig(batch_shapes=(1,), threads=1)) as engine:
        one, other = (
            engine.generate(
                engine.request("a dog barks", duration=0.64, seed=7, negative_prompt=negative_prompt)
            )
            for negative_prompt in ("", "rain")
        )
    assert one.clips == other.clips
    assert not any("negative_prompt" in warning for warning in one.warnings)
    assert any(warning.startswith("negative_prompt has no effect on this clip") for warning in other.warnings)


def test_a_number_of_steps_between_is_rounded_up_with_a_warning(student_folder: Path) -> None:
    with Engine(load_generator(student_folder), EngineConfig(batch_shapes=(1,), threads=1)) as engine:
        request = engine.request("a dog barks", duration=0.64, seed=7, num_inference_steps=3)
        assert any("this model takes 4" in warning for warning in engine.generate(request).warnings)


def test_schedulers_of_other_models_and_explanations_are_refused(
    student: TangoPipeline, student_folder: Path
) -> None:
    student.scheduler = DDIMScheduler.from_config(student.scheduler.config)
    with pytest.raises(InvalidInputError, match="scheduler: not for a distilled model; use one of jump"):
        student("a dog barks", 0.64, num_inference_steps=2)
    write_manifest(student_folder, name="student", version="1", license="Apache-2.0")
    with pytest.raises(InvalidInputError, match="student is a distilled model"):
        load_explainer(resolve(f"file:{student_folder}"))
