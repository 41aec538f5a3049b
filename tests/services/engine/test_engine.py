"""Requests share the device step by step, each as if it were alone."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from services.api.generation import (
    Clip,
    Event,
    Finished,
    GenerationRequest,
    Preview,
    Progress,
    Queued,
    quantise_mel,
)
from services.engine import Engine, EngineConfig
from services.errors import InvalidInputError
from services.models.latent import clip_generator
from services.models.tango.pipeline import TangoPipeline
from services.models.tango.schedulers import SCHEDULERS
from tests.services.engine.watching import Watch, denoiser_calls
from tests.tiny import tiny_pipeline

ONE = EngineConfig(threads=1)
ONE_PLACE = EngineConfig(threads=1, batch_shapes=(1,))


def steps_of(watch: Watch) -> list[int]:
    return [event.step for event in watch.of(Progress)]


def at_step(step: int, act: Callable[[], object]) -> Callable[[Event], None]:
    """A `then` for `Watch` that calls `act` once the request has made `step` steps."""

    def then(event: Event) -> None:
        if isinstance(event, Progress) and event.step == step:
            act()

    return then


def together(engine: Engine, requests: list[GenerationRequest], opener_steps: int = 60) -> list[Watch]:
    """Submit `requests` between two steps of another request, so that all join at the same step."""
    watches = [Watch() for _ in requests]

    def submit(event: Event) -> None:
        if isinstance(event, Progress) and event.step == 1:
            for request, watch in zip(requests, watches, strict=True):
                engine.submit(request, watch)
            cancel.set()

    cancel = threading.Event()
    opener = Watch(submit)
    handle = engine.submit(engine.request("rain falls", seed=1, num_inference_steps=opener_steps), opener)
    assert cancel.wait(60)
    for watch in watches:
        watch.wait()
    handle.cancel()
    opener.wait()
    return watches


def test_events_come_in_order_and_progress_is_exact(pipeline: TangoPipeline) -> None:
    with Engine(pipeline, ONE) as engine:
        request = engine.request("a dog barks", seed=3, num_inference_steps=5, clip_count=3)
        events = list(engine.stream(request))
    assert events[0] == Queued(position=0)
    progress = [event for event in events if isinstance(event, Progress)]
    assert [event.step for event in progress] == [1, 2, 3, 4, 5]
    assert [event.fraction for event in progress] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert {event.num_inference_steps for event in progress} == {5}
    assert all(event.seconds_left is not None and event.seconds_left >= 0 for event in progress[1:])
    clips = [event for event in events if isinstance(event, Clip)]
    assert [clip.index for clip in clips] == [0, 1, 2]
    assert {(clip.seed, clip.sampling_rate, clip.waveform().shape) for clip in clips} == {
        (3, 16_000, (10_240,))
    }
    assert all(clip.waveform().dtype == np.float32 and np.abs(clip.waveform()).max() <= 1 for clip in clips)
    assert isinstance(events[-1], Finished)
    timings = events[-1].timings
    assert min(timings.queued, timings.encode, timings.denoise, timings.decode) >= 0
    assert timings.denoise > 0


def test_clips_that_wait_for_a_place_keep_the_fraction_exact(pipeline: TangoPipeline) -> None:
    with Engine(pipeline, EngineConfig(threads=1, batch_shapes=(1, 2))) as engine:
        events = list(engine.stream(engine.request("a dog", seed=3, num_inference_steps=2, clip_count=3)))
    progress = [event for event in events if isinstance(event, Progress)]
    assert [(event.clip_index, event.step) for event in progress] == [(0, 1), (0, 2), (2, 1), (2, 2)]
    assert [event.fraction for event in progress] == pytest.approx([2 / 6, 4 / 6, 5 / 6, 1])
    first_ready = next(index for index, event in enumerate(events) if isinstance(event, Clip))
    assert first_ready < events.index(progress[-1]), "clips are sent as they are done"


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_lone_request_gives_the_pipelines_own_bits(
    pipeline: TangoPipeline, scheduler: str, guidance_scale: float
) -> None:
    prompt, negative = "a dog barks then a siren wails", "rain falls"
    with Engine(pipeline, ONE) as engine:
        request = engine.request(
            prompt,
            negative_prompt=negative,
            seed=11,
            scheduler=scheduler,
            guidance_scale=guidance_scale,
            duration=0.5,
        )
        (clip,) = engine.generate(request).clips
    expected = pipeline(
        prompt,
        negative_prompt=negative,
        audio_length_in_s=0.5,
        scheduler=scheduler,
        guidance_scale=guidance_scale,
        generator=clip_generator(11, 0),
    )
    assert np.array_equal(clip.waveform(), expected.audios[0])


def test_a_second_request_joins_between_two_steps_of_the_first(pipeline: TangoPipeline) -> None:
    with denoiser_calls(pipeline) as calls, Engine(pipeline, ONE) as engine:
        second = Watch()
        late = engine.request("a cat", seed=2, num_inference_steps=2, scheduler="ddim", guidance_scale=5)
        first = Watch(at_step(3, lambda: engine.submit(late, second)))
        engine.submit(engine.request("a dog", seed=1, num_inference_steps=8, scheduler="ddpm"), first)
        first.wait()
        second.wait()
    assert [call.rows for call in calls] == [2, 2, 2, 4, 4, 2, 2, 2]
    shared = calls[3].timesteps
    assert shared[0] == shared[1] != shared[2] == shared[3], "each at its own timestep"
    assert steps_of(first) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert steps_of(second) == [1, 2]
    assert isinstance(second.wait(), Finished)


def test_a_lone_request_does_not_pay_for_a_full_batch(pipeline: TangoPipeline) -> None:
    with denoiser_calls(pipeline) as calls, Engine(pipeline, ONE) as engine:
        engine.generate(engine.request("a dog", seed=1, guidance_scale=3))
        engine.generate(engine.request("a dog", seed=1, guidance_scale=1))
        assert engine.stats.padding_rows == 0
    assert [call.rows for call in calls] == [2] * 4 + [1] * 4


def test_after_guidance_stops_a_clip_takes_one_row(pipeline: TangoPipeline) -> None:
    with denoiser_calls(pipeline) as calls, Engine(pipeline, ONE) as engine:
        partly: dict[str, Any] = {"seed": 1, "num_inference_steps": 4, "guidance_scale": 3}
        engine.generate(engine.request("a dog", **partly, guidance_stop=0.5))
        assert [call.rows for call in calls] == [2, 2, 1, 1]
        engine.generate(engine.request("a dog", **partly, guidance_stop=0.5, clip_count=3))
        assert [call.rows for call in calls[4:]] == [8, 8, 4, 4], "three clips: six rows, then three"
        assert engine.stats.padding_rows == 2 * 2 + 2 * 1
        with pytest.raises(InvalidInputError, match=r"guidance_stop: is 1\.5, must be between 0 and 1"):
            engine.generate(engine.request("a dog", **partly, guidance_stop=1.5))


@pytest.mark.parametrize("stop", [0.0, 0.5, 0.7, 1.0])
def test_a_clip_whose_guidance_stops_is_the_pipelines(pipeline: TangoPipeline, stop: float) -> None:
    with Engine(pipeline, ONE) as engine:
        request = engine.request("a dog", seed=11, guidance_scale=3.0, guidance_stop=stop, duration=0.5)
        (clip,) = engine.generate(request).clips
    options: dict[str, Any] = {"audio_length_in_s": 0.5, "generator": clip_generator(11, 0)}
    expected = pipeline("a dog", guidance_scale=3.0, guidance_stop=stop, **options).audios[0]
    assert np.array_equal(clip.waveform(), expected)
    same = {0.0: 1.0, 1.0: 3.0}
    if stop in same:
        options["generator"] = clip_generator(11, 0)
        assert np.array_equal(expected, pipeline("a dog", guidance_scale=same[stop], **options).audios[0])


def test_guidance_that_stops_next_to_others_changes_no_bit(pipeline: TangoPipeline) -> None:
    config = EngineConfig(threads=1, batch_shapes=(4,), exact=True, max_clip_count=4)
    with Engine(pipeline, config) as engine:
        requests = [
            engine.request("a dog", seed=5, num_inference_steps=6, guidance_scale=3.0, guidance_stop=0.5),
            engine.request("a bird sings", seed=8, num_inference_steps=5, guidance_scale=7),
            engine.request("rain", seed=9, num_inference_steps=9, guidance_scale=2, guidance_stop=0.2),
        ]
        alone = [engine.generate(request).clips[0].waveform() for request in requests]
        watches = together(engine, requests)
        for watch, expected in zip(watches, alone, strict=True):
            assert np.array_equal(watch.clips()[0].waveform(), expected)


def test_with_exact_every_call_has_the_largest_shape(pipeline: TangoPipeline) -> None:
    with denoiser_calls(pipeline) as calls, Engine(pipeline, EngineConfig(threads=1, exact=True)) as engine:
        engine.generate(engine.request("a dog", seed=1, guidance_scale=3))
        engine.generate(engine.request("a dog", seed=1, clip_count=3, guidance_scale=1))
    assert [call.rows for call in calls] == [16] * 8


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_companions_and_slot_change_no_bit(pipeline: TangoPipeline, scheduler: str) -> None:
    config = EngineConfig(threads=1, batch_shapes=(4,), exact=True, max_clip_count=4)
    with Engine(pipeline, config) as engine:
        request = engine.request("a dog barks", seed=5, num_inference_steps=6, scheduler=scheduler)
        (alone,) = engine.generate(request).clips
        others = [
            engine.request(
                "a bird sings", seed=8, num_inference_steps=2, scheduler="unipc", guidance_scale=7
            ),
            engine.request("rain", negative_prompt="a bell", seed=9, num_inference_steps=9, guidance_scale=1),
        ]
        for slot in range(3):
            requests = [*others[:slot], request, *others[slot:]]
            (clip,) = together(engine, requests)[slot].clips()
            assert np.array_equal(clip.waveform(), alone.waveform()), f"in slot {slot + 1}"


def test_a_place_that_is_taken_over_keeps_nothing_of_its_last_clip(pipeline: TangoPipeline) -> None:
    """Two places, of which the opener keeps one: the others follow each other in the second."""
    with Engine(pipeline, EngineConfig(threads=1, batch_shapes=(2,), exact=True)) as engine:
        requests = [
            engine.request("a dog barks", seed=5),
            engine.request("a bell rings", negative_prompt="rain", seed=6),
            engine.request("a bird sings", seed=7, guidance_scale=1),
        ]
        alone = [engine.generate(request).clips[0].waveform() for request in requests]
        in_a_row = [watch.clips()[0].waveform() for watch in together(engine, requests)]
    assert all(np.array_equal(one, other) for one, other in zip(alone, in_a_row, strict=True))


@pytest.mark.parametrize("vocoder", ["griffin-lim", "hifigan"])
def test_the_difference_between_batch_shapes_is_inaudible(vocoder: str) -> None:
    pipeline = tiny_pipeline(vocoder=vocoder)  # type: ignore[arg-type]
    clips = []
    for exact in (False, True):
        with Engine(pipeline, EngineConfig(threads=1, exact=exact)) as engine:
            request = engine.request("a dog barks", seed=5, num_inference_steps=10)
            clips.append(engine.generate(request).clips[0].waveform().astype(np.float64))
    lone, full = clips
    noise = np.sum((lone - full) ** 2)
    assert 10 * np.log10(np.sum(lone**2) / max(noise, 1e-30)) >= 60


def test_a_clip_depends_on_seed_and_index_alone(pipeline: TangoPipeline) -> None:
    with Engine(pipeline, EngineConfig(threads=1, exact=True)) as engine:
        three = engine.generate(engine.request("a dog", seed=5, clip_count=3)).clips
        one = engine.generate(engine.request("a dog", seed=5)).clips
        other = engine.generate(engine.request("a dog", seed=6)).clips
    assert np.array_equal(three[0].waveform(), one[0].waveform())
    waveforms = [clip.waveform().tobytes() for clip in (*three, *other)]
    assert len(set(waveforms)) == 4


def test_lengths_take_turns_and_each_clip_gets_its_share(pipeline: TangoPipeline) -> None:
    with denoiser_calls(pipeline) as calls, Engine(pipeline, ONE) as engine:
        short = Watch()
        draft = engine.request("a cat", seed=2, num_inference_steps=12, duration=0.64)
        long = Watch(at_step(2, lambda: engine.submit(draft, short)))
        engine.submit(engine.request("a dog", seed=1, num_inference_steps=20, duration=2.56), long)
        short.wait()
        behind = len(long.of(Progress))
        long.wait()
    assert {call.frames for call in calls} == {16, 64}
    assert behind <= 2 + 12 / 4 + 2, "a short clip takes four steps for one of a clip four times as long"
    assert steps_of(long) == list(range(1, 21))


def test_the_queue_reports_positions_and_lets_newcomers_before_second_clips(pipeline: TangoPipeline) -> None:
    with (
        denoiser_calls(pipeline) as calls,
        Engine(pipeline, ONE_PLACE) as engine,
    ):
        requests = [
            engine.request("a cat", seed=2, num_inference_steps=1, clip_count=2),
            engine.request("a bird", seed=3, num_inference_steps=1),
        ]
        two_clips, one_clip = together(engine, requests, opener_steps=3)
        assert [event.position for event in two_clips.of(Queued)] == [0]
        assert [event.position for event in one_clip.of(Queued)] == [1, 0]
    assert len(calls) == 6
    last_of_two = two_clips.of(Progress)[-1]
    assert last_of_two.fraction == 1.0
    assert engine.stats.clips == 4


def test_prompts_are_embedded_once(pipeline: TangoPipeline) -> None:
    embedded: list[int] = []
    hook = pipeline.text_encoder.register_forward_pre_hook(lambda *_: embedded.append(1))
    try:
        with Engine(pipeline, EngineConfig(threads=1, prompt_cache_size=2)) as engine:
            for prompt in ("a dog", "a dog", "a cat", "a cat", "a dog"):
                engine.generate(engine.request(prompt, seed=1, num_inference_steps=1))
    finally:
        hook.remove()
    assert len(embedded) == 4, "unconditional, dog, cat, and dog again, which the cat had pushed out"


def test_prompts_are_encoded_when_their_clips_start(pipeline: TangoPipeline) -> None:
    encoded: list[int] = []
    hook = pipeline.text_encoder.register_forward_pre_hook(lambda *_: encoded.append(1))
    try:
        with Engine(pipeline, ONE_PLACE) as engine:
            requests = [
                engine.request(f"{word} then rain", num_inference_steps=1) for word in ("dog", "cat", "bird")
            ]
            before: list[int] = []

            def count(event: Event) -> None:
                if isinstance(event, Progress) and event.step == 2:
                    before.append(len(encoded))

            opener = Watch(count)
            engine.submit(engine.request("a bell rings", seed=1, num_inference_steps=2), opener)
            watches = [Watch() for _ in requests]
            for request, watch in zip(requests, watches, strict=True):
                engine.submit(request, watch)
            assert all(isinstance(watch.wait(), Finished) for watch in (opener, *watches))
            assert before == [2], "the opener's, and the empty one"
            assert len(encoded) == 5
    finally:
        hook.remove()


def test_what_the_model_cannot_read_is_said(pipeline: TangoPipeline) -> None:
    with Engine(pipeline, ONE) as engine:
        plain = engine.generate(engine.request("a dog barks", seed=1))
        unknown = engine.generate(engine.request("a zebra barks", negative_prompt="a yak", seed=1))
        long = engine.generate(engine.request("a dog and " * 10, seed=1))
    assert plain.warnings == ()
    first, second = unknown.warnings
    assert first.startswith("prompt has words that the model does not know: zebra")
    assert second.startswith("negative_prompt has words that the model does not know: yak")
    assert "31 tokens and the model reads the first 16" in long.warnings[0]


def test_text_of_any_length_is_padded_to_a_fixed_one() -> None:
    pipeline = tiny_pipeline(text_length=None)
    with Engine(pipeline, ONE) as engine:
        (clip,) = engine.generate(engine.request("a dog barks", seed=1)).clips
    expected = pipeline("a dog barks", generator=clip_generator(1, 0)).audios[0]
    assert np.allclose(clip.waveform(), expected, atol=1e-4)


def test_previews_come_as_asked_and_change_no_bit(pipeline: TangoPipeline) -> None:
    with Engine(pipeline, ONE) as engine:
        request = engine.request("a dog", seed=1, num_inference_steps=7, duration=0.5, clip_count=2)
        plain = engine.generate(request)
        watch = Watch()
        engine.submit(replace(request, preview_interval_steps=3), watch)
        clips = watch.clips()
    previews = watch.of(Preview)
    assert [(preview.clip_index, preview.step) for preview in previews] == [(0, 3), (0, 6)]
    assert {preview.mel_TM.shape for preview in previews} == {(50, 64)}
    assert all(np.array_equal(a.waveform(), b.waveform()) for a, b in zip(plain.clips, clips, strict=True))


def test_the_preview_after_the_last_step_is_the_clip(pipeline: TangoPipeline) -> None:
    """DDIM's last step lands on its clean estimate: an independent check of the estimate's formula."""
    with Engine(pipeline, ONE) as engine:
        watch = Watch()
        request = engine.request(
            "a dog", seed=1, num_inference_steps=4, scheduler="ddim", preview_interval_steps=4
        )
        engine.submit(request, watch)
        watch.wait()
    final_BCTF = []
    pipeline(
        "a dog",
        num_inference_steps=4,
        scheduler="ddim",
        generator=clip_generator(1, 0),
        callback_on_step_end=lambda _, step, timestep, own: final_BCTF.append(own["latents"]),
    )
    expected = quantise_mel(pipeline.decode_mel(final_BCTF[-1])[0].numpy()[:64])
    difference = watch.of(Preview)[0].mel_TM.astype(int) - expected.astype(int)
    assert abs(difference).max() <= 1


def test_many_threads_submit_at_once(pipeline: TangoPipeline) -> None:
    results: dict[int, bytes] = {}

    def work(seed: int) -> None:
        request = engine.request("a dog", seed=seed % 4, num_inference_steps=2 + seed % 3)
        results[seed] = engine.generate(request).clips[0].waveform().tobytes()

    with Engine(pipeline, EngineConfig(threads=1, exact=True)) as engine:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        stats = engine.stats
    assert len(results) == 24
    assert all(results[seed] == results[seed + 12] for seed in range(12))
    assert (stats.finished, stats.clips, stats.queue_depth, stats.running) == (24, 24, 0, 0)
    assert stats.clip_steps == sum(2 + seed % 3 for seed in range(24))
    assert stats.calls < stats.clip_steps


def test_clips_that_end_together_do_not_hold_up_the_steps_of_others(
    pipeline: TangoPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, most, between = pipeline.decode, 0, 0

    def slowly(*inputs: Any) -> Any:
        time.sleep(0.2)  # longer than a step
        return decode(*inputs)

    def count(event: Event) -> None:
        nonlocal most, between
        if isinstance(event, Progress):
            most, between = max(most, between), 0

    def decoded(event: Event) -> None:
        nonlocal between
        between += isinstance(event, Clip)

    monkeypatch.setattr(pipeline, "decode", slowly)
    with Engine(pipeline, ONE) as engine:
        long = Watch(count)
        handle = engine.submit(engine.request("rain falls", seed=1, num_inference_steps=200), long)
        short = [Watch(decoded) for _ in range(6)]
        for seed, watch in enumerate(short):
            engine.submit(engine.request("a dog", seed=seed, num_inference_steps=2), watch)
        for watch in short:
            watch.wait()
        handle.cancel()
        long.wait()
    assert 0 < most < len(short)
