"""The engine's guarantees for a second family: another denoiser, another scheduler, other conditioning."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from numpy.typing import NDArray

from services.api.generation import Clip, Finished, Preview, Progress, quantise_mel
from services.engine import Engine, EngineConfig
from services.models.latent import clip_generator
from services.models.tangoflux.pipeline import TangoFluxPipeline
from tests.services.engine.test_engine import at_step, together
from tests.services.engine.watching import Watch, denoiser_calls
from tests.tiny import tiny_tangoflux

ONE = EngineConfig(threads=1)
PROMPT, NEGATIVE = "a dog barks then a siren wails", "rain falls"


@pytest.fixture(scope="module")
def flux() -> TangoFluxPipeline:
    torch.set_num_threads(1)
    return tiny_tangoflux()


def _by_hand(flux: TangoFluxPipeline, steps: int, scale: float, seconds: float) -> NDArray[np.float32]:
    """The clip as diffusers' own loop would make it: guidance in one call, Euler steps, the autoencoder."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
    latents = torch.randn((1, 40, 4), generator=clip_generator(11, 0))
    text = flux.encode([NEGATIVE, PROMPT] if scale > 1 else [PROMPT], length=16)
    rows = len(text["mask"])
    for timestep in scheduler.timesteps:
        timesteps, duration = timestep.expand(rows), torch.full((rows,), seconds)
        velocity = flux.predict(latents.expand(rows, -1, -1), timesteps, text, duration)
        if scale > 1:
            velocity = velocity[:1] + scale * (velocity[1:] - velocity[:1])
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    with torch.no_grad():
        decoded = flux.vae.decode(latents.transpose(1, 2)).sample.mean(1)[0]
    waveform: NDArray[np.float32] = decoded[: round(seconds * 16_000)].numpy()
    return waveform


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("duration", [0.5, 2.56])
def test_a_lone_request_gives_the_bits_of_the_plain_loop(
    flux: TangoFluxPipeline, guidance_scale: float, duration: float
) -> None:
    with Engine(flux, ONE) as engine:
        request = engine.request(
            PROMPT,
            negative_prompt=NEGATIVE,
            seed=11,
            num_inference_steps=5,
            guidance_scale=guidance_scale,
            duration=duration,
        )
        (clip,) = engine.generate(request).clips
    assert np.array_equal(clip.waveform(), _by_hand(flux, 5, guidance_scale, duration))


def test_requests_with_other_steps_join_between_two_steps(flux: TangoFluxPipeline) -> None:
    with denoiser_calls(flux) as calls, Engine(flux, ONE) as engine:
        second = Watch()
        late = engine.request("a cat", seed=2, num_inference_steps=2, guidance_scale=5, duration=2.0)
        first = Watch(at_step(3, lambda: engine.submit(late, second)))
        engine.submit(engine.request("a dog", seed=1, num_inference_steps=8), first)
        first.wait()
        assert isinstance(second.wait(), Finished)
    assert [call.rows for call in calls] == [2, 2, 2, 4, 4, 2, 2, 2]
    assert calls[3].timesteps == pytest.approx((625.0, 625.0, 1000.0, 1000.0)), "each at its own timestep"
    assert [event.step for event in first.of(Progress)] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [len(clip.waveform()) for clip in second.clips()] == [32_000]


def test_companions_slot_and_their_durations_change_no_bit(flux: TangoFluxPipeline) -> None:
    with Engine(flux, EngineConfig(threads=1, batch_shapes=(4,), exact=True, max_clip_count=4)) as engine:
        request = engine.request("a dog barks", seed=5, num_inference_steps=6, duration=1.0)
        (alone,) = engine.generate(request).clips
        others = [
            engine.request("a bird sings", seed=8, num_inference_steps=2, guidance_scale=7, duration=2.56),
            engine.request("rain", negative_prompt="a bell", seed=9, num_inference_steps=9, guidance_scale=1),
        ]
        for slot in range(3):
            requests = [*others[:slot], request, *others[slot:]]
            (clip,) = together(engine, requests)[slot].clips()
            assert clip.audio == alone.audio, f"in slot {slot + 1}"


def test_between_batch_shapes_the_difference_is_inaudible(flux: TangoFluxPipeline) -> None:
    clips = []
    for exact in (False, True):
        with Engine(flux, EngineConfig(threads=1, exact=exact)) as engine:
            request = engine.request(PROMPT, seed=5, num_inference_steps=10)
            clips.append(engine.generate(request).clips[0].waveform().astype(np.float64))
    lone, full = clips
    assert 10 * np.log10(np.sum(lone**2) / max(np.sum((lone - full) ** 2), 1e-30)) >= 60


def test_text_of_any_length_is_padded_to_a_fixed_one() -> None:
    clips = []
    for flux in (tiny_tangoflux(), tiny_tangoflux(text_length=None)):
        with Engine(flux, ONE) as engine:
            clips.append(engine.generate(engine.request(PROMPT, seed=1)).clips[0].waveform())
    assert np.allclose(clips[0], clips[1], atol=1e-4), "padding does not change a clip"


def test_previews_change_no_bit_and_the_last_is_the_clip(flux: TangoFluxPipeline) -> None:
    with Engine(flux, ONE) as engine:
        request = engine.request("a dog", seed=1, num_inference_steps=4, duration=0.5, clip_count=2)
        plain = engine.generate(request)
        watch = Watch()
        engine.submit(replace(request, preview_interval_steps=2), watch)
        clips = watch.clips()
    previews = watch.of(Preview)
    assert [(preview.clip_index, preview.step) for preview in previews] == [(0, 2), (0, 4)]
    assert all(ours.audio == theirs.audio for ours, theirs in zip(plain.clips, clips, strict=True))
    solver, text = flux.solver("euler", 4), flux.encode(["", "a dog"])
    latents = flux.noise(0.5, clip_generator(1, 0))
    for index, timestep in enumerate(solver.timesteps):
        timesteps, seconds = torch.full((2,), timestep), torch.full((2,), 0.5)
        plain_1TC, guided_1TC = flux.predict(latents.repeat(2, 1, 1), timesteps, text, seconds).split(1)
        velocity = plain_1TC + 3.0 * (guided_1TC - plain_1TC)
        latents = solver.step(velocity, index, latents, clip_generator(0))
    expected = quantise_mel(flux.preview(latents, 8_000)[0].numpy())
    assert np.abs(previews[1].mel_TM.astype(int) - expected).max() <= 1


def test_what_the_model_cannot_read_is_reported(flux: TangoFluxPipeline) -> None:
    with Engine(flux, ONE) as engine:
        made = engine.generate(engine.request("a zebra barks", seed=1))
    assert "zebra" in made.warnings[0]
    assert [type(clip) for clip in made.clips] == [Clip]
