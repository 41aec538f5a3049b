"""`TangoPipeline` on the tiny random model: its parts apart, and all together.

Shape legend: B batch, C channels, T latent frames, F latent mel bins, L text tokens, D text width, N samples.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from services.audio.resampling import resample
from services.errors import InvalidInputError, ModelFormatError
from services.models.latent import Conditioning, clip_generator, guide, within_full_scale
from services.models.tango.pipeline import TangoPipeline
from services.models.tango.schedulers import SCHEDULERS
from tests.tiny import tiny_hifigan, tiny_pipeline, tiny_unet


def test_generator_depends_on_seed_and_index_alone() -> None:
    draws = {
        (seed, index): torch.randn(4, generator=clip_generator(seed, index))
        for seed in (0, 1, 2, 2**63, 2**64 + 5)
        for index in (0, 1, 2)
    }
    assert len({tuple(draw.tolist()) for draw in draws.values()}) == len(draws)
    assert torch.equal(torch.randn(4, generator=clip_generator(1, 2)), draws[1, 2])
    # Written down: another release must not change what a seed means.
    assert clip_generator(7, 1).initial_seed() == 6635463128224577688


def test_guidance_against_numbers_worked_by_hand() -> None:
    found = guide(torch.tensor([1.0, -2.0]), torch.tensor([2.0, 0.0]), 3.0)
    assert found.tolist() == [4.0, 4.0]


def test_prompts_are_padded_to_the_models_length(pipeline: TangoPipeline) -> None:
    found = pipeline.encode(["a dog barks", ""])
    assert found["embeds"].shape == (2, 16, 16)
    assert found["mask"].sum(1).tolist() == [4, 1]
    assert pipeline.encode(["a dog barks"], length=5)["mask"].tolist() == [[True] * 4 + [False]]
    assert tiny_pipeline(text_length=None).encode(["a dog", "a"])["mask"].shape == (2, 3)


def test_long_prompt_is_cut(pipeline: TangoPipeline) -> None:
    prompt = "a dog barks then " * 10
    assert pipeline.token_count(prompt) == 41
    assert pipeline.encode([prompt])["mask"].tolist() == [[True] * 16]


def test_masked_positions_change_nothing(pipeline: TangoPipeline) -> None:
    latents_BCTF = pipeline.prepare_latents(1, 0.64, clip_generator(0))
    timesteps_B = torch.tensor([500])
    short, long = (pipeline.encode(["a dog barks"], length=length) for length in (4, 16))
    garbage_BLD = long["embeds"].masked_fill(~long["mask"][..., None], 99.0)
    garbage = Conditioning(tensors={"embeds": garbage_BLD, "mask": long["mask"]})
    found = pipeline.predict(latents_BCTF, timesteps_B, short)
    padded = pipeline.predict(latents_BCTF, timesteps_B, garbage)
    torch.testing.assert_close(padded, found, rtol=0, atol=1e-5)


def test_prompt_changes_the_prediction(pipeline: TangoPipeline) -> None:
    latents_BCTF = pipeline.prepare_latents(1, 0.64, clip_generator(0)).expand(2, -1, -1, -1)
    text = pipeline.encode(["a dog barks", "rain falls"])
    v_BCTF = pipeline.predict(latents_BCTF, torch.tensor([500, 500]), text)
    assert float((v_BCTF[0] - v_BCTF[1]).abs().max()) > 1e-4


def test_rows_may_have_their_own_timesteps(pipeline: TangoPipeline) -> None:
    latents_BCTF = pipeline.prepare_latents(2, 0.64, [clip_generator(0), clip_generator(1)])
    prompts = ["a dog barks", "rain falls"]
    both = pipeline.predict(latents_BCTF, torch.tensor([900, 100]), pipeline.encode(prompts))
    for row, timestep in enumerate((900, 100)):
        one = slice(row, row + 1)
        text = pipeline.encode(prompts[one])
        alone = pipeline.predict(latents_BCTF[one], torch.tensor([timestep]), text)
        torch.testing.assert_close(both[one], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_seed_decides_the_clip(pipeline: TangoPipeline, name: str) -> None:
    first, again, other = (
        pipeline("a dog barks", scheduler=name, generator=clip_generator(seed)).audios for seed in (5, 5, 6)
    )
    assert first.shape == (1, 10_240) and first.dtype == np.float32
    assert np.isfinite(first).all() and 0 < np.abs(first).max() <= 1
    assert np.array_equal(first, again)
    assert not np.allclose(first, other, atol=1e-4)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_batch_of_clips_is_the_clips_one_by_one(pipeline: TangoPipeline, name: str) -> None:
    prompts = ["a dog barks", "rain falls"]
    generators = [clip_generator(3, index) for index in range(4)]
    together = pipeline(prompts, num_waveforms_per_prompt=2, scheduler=name, generator=generators).audios
    for index in range(4):
        alone = pipeline(prompts[index // 2], scheduler=name, generator=clip_generator(3, index))
        assert np.abs(together[index] - alone.audios[0]).max() < 1e-4


def test_negative_prompt_stands_for_the_unconditional_text(pipeline: TangoPipeline) -> None:
    def clip(negative: str | None, scale: float) -> np.ndarray:
        return pipeline(
            "a dog barks", negative_prompt=negative, guidance_scale=scale, generator=clip_generator(1)
        ).audios

    assert np.array_equal(clip(None, 3.0), clip("", 3.0))
    assert not np.array_equal(clip("rain", 3.0), clip("", 3.0))
    assert np.array_equal(clip("rain", 1.0), clip("", 1.0))


@pytest.mark.parametrize("duration", [0.04, 0.1, 0.64, 1.0, 2.56])
def test_duration_is_exact(pipeline: TangoPipeline, duration: float) -> None:
    found = pipeline(
        "a dog barks", audio_length_in_s=duration, num_inference_steps=1, generator=clip_generator(0)
    )
    assert found.audios.shape == (1, round(duration * 16_000))


def test_output_is_resampled(pipeline: TangoPipeline) -> None:
    found = pipeline("a dog barks", output_sampling_rate=48_000, generator=clip_generator(0))
    assert found.sampling_rate == 48_000 and found.audios.shape == (1, 30_720)
    tone = np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000, dtype=np.float32)[None]
    wanted = np.sin(2 * np.pi * 440 * np.arange(22_050) / 22_050)
    assert np.abs(resample(tone, 16_000, 22_050)[0] - wanted)[100:-100].max() < 0.01


def test_callback_sees_every_step(pipeline: TangoPipeline) -> None:
    seen: list[tuple[int, int]] = []
    pipeline(
        "a dog barks", callback_on_step_end=lambda _, step, timestep, __: seen.append((step, int(timestep)))
    )
    assert [step for step, _ in seen] == [0, 1, 2, 3]
    assert [timestep for _, timestep in seen] == sorted((timestep for _, timestep in seen), reverse=True)


def test_given_latents_are_used(pipeline: TangoPipeline) -> None:
    latents_BCTF = pipeline.prepare_latents(1, 0.64, clip_generator(8))
    given = pipeline("a dog barks", latents=latents_BCTF, scheduler="unipc").audios
    drawn = pipeline("a dog barks", generator=clip_generator(8), scheduler="unipc").audios
    assert np.array_equal(given, drawn)


def test_a_callback_changes_latents_and_ends_the_denoising(pipeline: TangoPipeline) -> None:
    seen: list[set[str]] = []

    def halve(
        called: TangoPipeline, step: int, _: torch.Tensor, own: dict[str, torch.Tensor]
    ) -> dict[str, Any]:
        seen.append(set(own))
        called._interrupt = step == 1
        return {"latents": own["latents"] * 0}

    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    found = pipeline(
        "a dog barks",
        generator=clip_generator(0),
        output_type="latent",
        callback_on_step_end=halve,
        callback_on_step_end_tensor_inputs=names,
    )
    assert seen == [set(names)] * 2 and not found.audios.any()


def test_a_callback_replaces_the_text(pipeline: TangoPipeline) -> None:
    rain = pipeline.encode_prompt("a dog falls")[0]

    def swap(_: Any, step: int, __: Any, own: dict[str, torch.Tensor]) -> dict[str, Any]:
        return {"prompt_embeds": rain if step == 0 else own["prompt_embeds"]}

    def run(**options: Any) -> np.ndarray:
        clip: np.ndarray = pipeline("a dog barks", generator=clip_generator(0), **options).audios
        return clip

    names = ["prompt_embeds"]
    swapped = run(callback_on_step_end=swap, callback_on_step_end_tensor_inputs=names)
    assert not np.array_equal(swapped, run())
    assert np.array_equal(run(callback_on_step_end=lambda *_: None), run())


def test_forms_of_the_output(pipeline: TangoPipeline) -> None:
    def run(**options: Any) -> Any:
        return pipeline("a dog barks", generator=clip_generator(0), **options)

    whole = run()
    (alone,) = run(return_dict=False)
    tensor = run(output_type="pt").audios
    latents = run(output_type="latent").audios
    assert whole.sampling_rate == 16_000
    assert np.array_equal(alone, whole.audios) and np.array_equal(whole[0], whole.audios)
    assert isinstance(tensor, torch.Tensor) and np.array_equal(tensor.numpy(), whole.audios)
    assert latents.shape == (1, 4, 16, 16)
    assert np.array_equal(pipeline.decode(latents, 10_240).numpy(), whole.audios)


@pytest.mark.parametrize("text_length", [16, None])
def test_embeddings_replace_prompts(text_length: int | None) -> None:
    pipeline = tiny_pipeline(text_length=text_length)
    prompts, negatives = ["a dog barks", "rain falls"], ["a cat", "then a siren wails and a bell"]

    def run(**options: Any) -> np.ndarray:
        generators = [clip_generator(index) for index in range(4)]
        found = pipeline(num_waveforms_per_prompt=2, generator=generators, **options)
        clips: np.ndarray = found.audios
        return clips

    embeds, mask, negative_embeds, negative_mask = pipeline.encode_prompt(prompts, negatives)
    assert mask.dtype == torch.bool and embeds.shape == negative_embeds.shape
    expected = run(prompt=prompts, negative_prompt=negatives)
    text = {"prompt_embeds": embeds, "attention_mask": mask.long()}
    other = {"negative_prompt_embeds": negative_embeds, "negative_attention_mask": negative_mask}
    assert np.array_equal(run(**text, **other), expected)
    for mixed in ({"negative_prompt": negatives, **text}, {"prompt": prompts, **other}):
        np.testing.assert_allclose(run(**mixed), expected, atol=1e-5)
    short = {"prompt_embeds": embeds[:, :4], "attention_mask": mask[:, :4]}
    np.testing.assert_allclose(run(**short, **other), expected, atol=1e-5)


def test_without_a_mask_every_token_counts(pipeline: TangoPipeline) -> None:
    embeds = pipeline.encode(["a dog barks"], length=4)["embeds"]
    clips = [
        pipeline(prompt_embeds=embeds, attention_mask=mask, generator=clip_generator(0)).audios
        for mask in (None, torch.ones(1, 4))
    ]
    assert np.array_equal(*clips)


def test_a_long_negative_prompt_is_read_to_its_end() -> None:
    pipeline = tiny_pipeline(text_length=None)
    clips = [
        pipeline("rain", negative_prompt=f"a dog barks then a {last}", generator=clip_generator(0)).audios
        for last in ("bell rings", "cat sings")
    ]
    assert not np.array_equal(*clips)


@pytest.mark.parametrize(
    "kind",
    [EulerDiscreteScheduler, DDIMScheduler, UniPCMultistepScheduler, DDPMScheduler, HeunDiscreteScheduler],
)
def test_a_scheduler_of_ones_own_is_used(pipeline: TangoPipeline, saved: Path, kind: Any) -> None:
    def run(used: Any) -> np.ndarray:
        used.set_progress_bar_config(disable=True)
        clip: np.ndarray = used("a dog barks", generator=clip_generator(0)).audios
        return clip

    default, schedule = run(pipeline), pipeline.scheduler.config
    assigned = TangoPipeline.from_pretrained(saved)
    assigned.scheduler = kind.from_config(schedule)
    clip = run(assigned)
    assert np.isfinite(clip).all() and not np.array_equal(clip, default)
    given = TangoPipeline.from_pretrained(saved, scheduler=kind.from_config(schedule))
    assert np.array_equal(run(given), clip)
    # The names still mean the model's own schedulers.
    named = assigned("a dog barks", generator=clip_generator(0), scheduler="dpmsolver++").audios
    assert np.array_equal(named, default)


def test_another_scheduler_survives_the_folder(pipeline: TangoPipeline, tmp_path: Path) -> None:
    changed = tiny_pipeline()
    changed.scheduler = EulerDiscreteScheduler.from_config(changed.scheduler.config)
    expected = changed("a dog barks", generator=clip_generator(0)).audios
    changed.save_pretrained(tmp_path / "model")
    again = DiffusionPipeline.from_pretrained(tmp_path / "model")
    assert isinstance(again, TangoPipeline)
    assert np.array_equal(again("a dog barks", generator=clip_generator(0)).audios, expected)


def test_a_scheduler_for_another_prediction_is_refused(pipeline: TangoPipeline, saved: Path) -> None:
    wrong = TangoPipeline.from_pretrained(saved, scheduler=EulerDiscreteScheduler())
    with pytest.raises(InvalidInputError, match="prediction_type is 'epsilon', but this model's is 'v_pred"):
        wrong("a dog barks")


@pytest.mark.parametrize("vocoder", ["griffin-lim", "hifigan"])
def test_offloaded_parts_make_the_same_clip(vocoder: Any) -> None:
    pipeline = tiny_pipeline(vocoder=vocoder)
    expected = pipeline("a dog barks", generator=clip_generator(0)).audios
    pipeline.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert np.array_equal(pipeline("a dog barks", generator=clip_generator(0)).audios, expected)


def test_the_progress_bar_can_be_switched_off(
    pipeline: TangoPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    for disable in (True, False):
        pipeline.set_progress_bar_config(disable=disable)
        pipeline("a dog barks")
        assert ("4/4" in capsys.readouterr().err) is not disable


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ["a dog", None]}, "prompt"),
        ({"prompt": "a dog", "prompt_embeds": torch.zeros(1, 4, 16)}, "prompt_embeds"),
        ({"prompt_embeds": torch.zeros(1, 4, 8)}, "prompt_embeds"),
        ({"prompt_embeds": torch.zeros(1, 4, 16), "attention_mask": torch.ones(1, 5)}, "attention_mask"),
        ({"prompt": "a dog", "attention_mask": torch.ones(1, 4)}, "attention_mask"),
        ({"prompt": "a", "negative_prompt": "a", "negative_prompt_embeds": torch.zeros(1, 4, 16)},
         "negative_prompt_embeds"),
        ({"prompt": ["a", "a"], "negative_prompt_embeds": torch.zeros(1, 4, 16)}, "negative_prompt_embeds"),
        ({"prompt": "a", "negative_attention_mask": torch.ones(1, 4)}, "negative_attention_mask"),
        ({"prompt": "a", "output_type": "wav"}, "output_type"),
        ({"prompt": "a", "callback_on_step_end_tensor_inputs": ["noise"]},
         "callback_on_step_end_tensor_inputs"),
    ],
)  # fmt: skip
def test_wrong_text_and_output_are_named(pipeline: TangoPipeline, options: Any, field: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        pipeline(**options)
    assert [violation.field for violation in caught.value.violations] == [field]


def test_neural_vocoder() -> None:
    neural = tiny_pipeline(vocoder="hifigan")
    found = neural("a dog barks", generator=clip_generator(0)).audios
    assert found.shape == (1, 10_240) and np.isfinite(found).all()


def test_wrong_arguments_are_named_all_at_once(pipeline: TangoPipeline) -> None:
    with pytest.raises(InvalidInputError) as caught:
        pipeline(
            ["a dog", "rain"],
            negative_prompt=["one", "two", "three"],
            audio_length_in_s=3.0,
            num_inference_steps=1001,
            guidance_scale=float("nan"),
            num_waveforms_per_prompt=0,
            generator=[clip_generator(0)],
        )
    fields = [violation.field for violation in caught.value.violations]
    assert fields == [
        *("negative_prompt", "audio_length_in_s", "num_inference_steps", "guidance_scale"),
        *("num_waveforms_per_prompt", "generator"),
    ]
    with pytest.raises(InvalidInputError, match="latents: shape"):
        pipeline("a dog", latents=torch.zeros(1, 4, 8, 8))
    with pytest.raises(InvalidInputError, match="unknown scheduler"):
        pipeline("a dog", scheduler="euler")


def test_folder_round_trip(pipeline: TangoPipeline, saved: Path) -> None:
    again = TangoPipeline.from_pretrained(saved, local_files_only=True, use_safetensors=True)
    assert again.geometry == pipeline.geometry
    assert again.config.default_scheduler == "dpmsolver++" and again.config.text_length == 16
    first, second = (p("a dog barks", generator=clip_generator(0)).audios for p in (pipeline, again))
    assert np.array_equal(first, second)


def test_parts_that_do_not_fit_are_refused(pipeline: TangoPipeline) -> None:
    parts = {**pipeline.components, "vocoder": tiny_hifigan()}
    with pytest.raises(ModelFormatError, match="vocoder's hop is 160 but hop_length is 320"):
        TangoPipeline(**parts, hop_length=320)
    wide = type(tiny_unet()).from_config({**tiny_unet().config, "cross_attention_dim": 24, "in_channels": 5})
    with pytest.raises(ModelFormatError, match=r"cross_attention_dim is 24 .* unet\.in_channels is 5"):
        TangoPipeline(**{**parts, "unet": wide})


def test_parts_neither_train_nor_drop_out(pipeline: TangoPipeline) -> None:
    for part in (pipeline.text_encoder, pipeline.unet, pipeline.vae):
        assert not part.training and not any(parameter.requires_grad for parameter in part.parameters())


def test_a_clip_over_full_scale_is_turned_down_and_others_keep_every_bit() -> None:
    quiet, loud = torch.tensor([0.5, -0.25, 1.0]), torch.tensor([2.0, -4.0, 1.0])
    scaled = within_full_scale(torch.stack([quiet, loud]))
    assert torch.equal(scaled[0], quiet)
    assert torch.equal(scaled[1], torch.tensor([0.5, -1.0, 0.25]))
    assert torch.equal(within_full_scale(torch.zeros(1, 3)), torch.zeros(1, 3))
