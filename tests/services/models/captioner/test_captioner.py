"""The captioner as a class: clips, folders, captions of batches, LoRA in training and merged."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from services.errors import InvalidInputError, ModelFormatError
from services.models.captioner.model import (
    IGNORED_LABEL,
    CaptionClip,
    Captioner,
    Projector,
    check_captioner,
)
from services.models.lora import LoraSettings
from tests.tiny import tiny_captioner

CAPTIONS = ["a dog barks", "rain falls then a bell rings"]


def noise(seconds: float, rate: int = 16_000, seed: int = 0) -> NDArray[np.float32]:
    samples = np.random.default_rng(seed).standard_normal(round(seconds * rate)).astype(np.float32)
    return (0.1 * samples).astype(np.float32)


@pytest.fixture(scope="module")
def captioner() -> Captioner:
    """Read only."""
    return tiny_captioner()


@pytest.fixture(scope="module")
def clips(captioner: Captioner) -> list[CaptionClip]:
    return [captioner.prepare(noise(0.2 + 0.2 * seed, seed=seed), 16_000) for seed in range(3)]


@pytest.fixture
def folder(captioner: Captioner, tmp_path: Path) -> Path:
    captioner.save_pretrained(tmp_path / "captioner")
    return tmp_path / "captioner"


def test_a_folder_keeps_the_model(captioner: Captioner, clips: list[CaptionClip], folder: Path) -> None:
    check_captioner(folder)
    loaded = Captioner.from_pretrained(folder)
    assert loaded.config == captioner.config
    audio = captioner.encode(clips)
    assert torch.equal(loaded.encode(clips), audio)
    assert loaded.generate(audio) == captioner.generate(audio)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_half_precision_files_are_loaded_in_float32(captioner: Captioner, tmp_path: Path) -> None:
    captioner.save_pretrained(tmp_path, dtype="float16")
    for path in tmp_path.rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
    loaded = Captioner.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_batches_give_what_clips_and_beams_give_alone(captioner: Captioner, clips: list[CaptionClip]) -> None:
    together = captioner.generate(captioner.encode(clips), beams=(1, 3, 2))
    for clip, row in zip(clips, together, strict=True):
        assert [one.beams for one in row] == [1, 3, 2]
        for one in row:
            [[alone]] = captioner.generate(captioner.encode([clip]), beams=(one.beams,))
            assert alone.text == one.text
            assert alone.log_probability == pytest.approx(one.log_probability, abs=1e-4)


def test_more_tokens_than_wanted_are_not_generated(captioner: Captioner, clips: list[CaptionClip]) -> None:
    audio = captioner.encode(clips[:1])
    assert all(len(one.text.split()) <= 2 for one in captioner.generate(audio, max_new_tokens=2)[0])


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"beams": ()}, "beams"),
        ({"beams": (0,)}, "beams"),
        ({"beams": (2, 17)}, "beams"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 1_025}, "max_new_tokens"),
    ],
)
def test_options_out_of_range_are_named(
    captioner: Captioner, clips: list[CaptionClip], options: dict[str, int], field: str
) -> None:
    with pytest.raises(InvalidInputError) as caught:
        captioner.generate(captioner.encode(clips), **options)  # type: ignore[arg-type]
    assert caught.value.violations[0].field == field


def test_channels_are_averaged_and_rates_converted(captioner: Captioner) -> None:
    left, right = noise(0.3, 48_000, 1), noise(0.3, 48_000, 2)
    stereo = captioner.prepare(np.stack([left, right]), 48_000)
    mono = captioner.prepare(np.stack([left, right]).mean(axis=0, dtype=np.float32), 48_000)
    assert torch.allclose(stereo.waveform_N, mono.waveform_N, atol=1e-6)
    assert len(mono.waveform_N) == 4_800 and mono.warnings == ()


def test_a_long_clip_is_cut_with_a_warning(captioner: Captioner) -> None:
    long = noise(60.0)
    clip = captioner.prepare(long, 16_000)
    assert clip.seconds == 60.0
    assert clip.warnings == (
        "clip is 60.00 s long and the model reads its first 0.64 s; caption parts of it",
    )
    # The mean of the whole clip is removed, as upstream does before it cuts.
    shorter = captioner.prepare(long[:16_000] - long.mean() + long[:16_000].mean(), 16_000)
    assert torch.allclose(captioner.mel(clip), captioner.mel(shorter), atol=1e-3)


def test_a_silent_clip_is_captioned_with_a_warning(captioner: Captioner) -> None:
    clip = captioner.prepare(np.zeros(8_000, dtype=np.float32), 16_000)
    assert clip.warnings == ("clip is silent; its caption says nothing",)
    assert captioner.generate(captioner.encode([clip]))[0][0].text


def test_nan_and_clips_shorter_than_a_frame_are_refused(captioner: Captioner) -> None:
    broken = noise(0.5)
    broken[77] = np.nan
    for waveform, says in ((broken, "NaN"), (noise(0.02), "0.02 s"), (noise(0)[:0], "0 s")):
        with pytest.raises(InvalidInputError, match=says) as caught:
            captioner.prepare(waveform, 16_000)
        assert caught.value.violations[0].field == "audio"
    # 0.05 s is longer than a frame: it is padded, as any short clip.
    assert len(captioner.prepare(noise(0.05), 16_000).waveform_N) == 800


# -------------------------------------------------------------------------------------------- training


def test_only_projector_and_lora_are_trained(clips: list[CaptionClip]) -> None:
    captioner = tiny_captioner()
    captioner.prepare_training(LoraSettings(rank=2, alpha=4))
    captioner.train()
    captioner.loss(captioner.mels(clips[:2]), CAPTIONS).backward()
    trained = {name for name, parameter in captioner.named_parameters() if parameter.grad is not None}
    assert trained == captioner.trainable_state().keys()
    assert {name.partition(".")[0] for name in trained} == {"projector", "language_model"}
    assert all(".lora_" in name for name in trained if name.startswith("language_model"))
    assert sum("lora_A" in name for name in trained) == 4  # q and v of two layers


def test_without_lora_only_the_projector_is_trained() -> None:
    captioner = tiny_captioner()
    captioner.prepare_training()
    assert {name.partition(".")[0] for name in captioner.trainable_state()} == {"projector"}


def test_everything_can_be_trained() -> None:
    captioner = tiny_captioner()
    captioner.prepare_training(everything=True)
    assert captioner.trainable_state().keys() == dict(captioner.named_parameters()).keys()


def test_labels_are_the_caption_and_its_end(captioner: Captioner) -> None:
    ids, labels, mask = captioner.tokenize(CAPTIONS)
    prompt = len(captioner.prompt_ids())
    end = captioner.tokenizer.eos_token_id
    words = captioner.tokenizer.convert_tokens_to_ids
    assert labels[0].tolist()[prompt:] == [*words(["a", "dog", "barks"]), end, *[IGNORED_LABEL] * 3]
    assert labels[1].tolist()[prompt:] == [*words(["rain", "falls", "then", "a", "bell", "rings"]), end]
    assert (labels[:, :prompt] == IGNORED_LABEL).all()
    assert mask.sum(1).tolist() == [prompt + 4, prompt + 7]
    assert ids[0, 0] == captioner.tokenizer.bos_token_id


def test_padding_does_not_change_the_loss(captioner: Captioner, clips: list[CaptionClip]) -> None:
    mels = captioner.mels(clips[:2])
    alone = [float(captioner.loss(mels[i : i + 1], [CAPTIONS[i]])) for i in range(2)]
    tokens = [4, 7]
    mean = sum(loss * count for loss, count in zip(alone, tokens, strict=True)) / sum(tokens)
    assert float(captioner.loss(mels, CAPTIONS)) == pytest.approx(mean, abs=1e-5)


def adapted(seed: int = 0) -> Captioner:
    captioner = tiny_captioner(seed)
    captioner.prepare_training(LoraSettings(rank=2, alpha=8))
    with torch.no_grad():
        for name, parameter in captioner.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(seed))
    return captioner.eval()


def test_merged_adapters_give_what_unmerged_give(clips: list[CaptionClip], tmp_path: Path) -> None:
    captioner = adapted()
    captioner.save_pretrained(tmp_path)
    merged, unmerged = Captioner.from_pretrained(tmp_path), Captioner.from_pretrained(tmp_path, merge=False)
    mels = captioner.mels(clips[:2])
    with torch.no_grad():
        wanted = captioner(mels, CAPTIONS).logits_BLV
        assert torch.equal(unmerged(mels, CAPTIONS).logits_BLV, wanted)
        assert torch.allclose(merged(mels, CAPTIONS).logits_BLV, wanted, atol=1e-4)
        assert not torch.allclose(tiny_captioner()(mels, CAPTIONS).logits_BLV, wanted, atol=1e-2)
    merged.save_pretrained(tmp_path / "merged")
    assert not (tmp_path / "merged" / "adapter").exists()
    again = Captioner.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.equal(again(mels, CAPTIONS).logits_BLV, merged(mels, CAPTIONS).logits_BLV)


def test_the_trained_state_can_be_restored(clips: list[CaptionClip]) -> None:
    trained, fresh = adapted(), tiny_captioner()
    fresh.prepare_training(LoraSettings(rank=2, alpha=8))
    fresh.load_trainable_state(trained.trainable_state())
    mels = trained.mels(clips[:2])
    with torch.no_grad():
        assert torch.equal(fresh(mels, CAPTIONS).logits_BLV, trained(mels, CAPTIONS).logits_BLV)
    state = trained.trainable_state()
    state["stranger"] = state.pop("projector.linear1.bias")
    with pytest.raises(ModelFormatError, match=r"missing keys: projector\.linear1\.bias.*unknown.*stranger"):
        fresh.load_trainable_state(state)


# ------------------------------------------------------------------------------------------ bad folders


def _drop(path: Path, key: str) -> None:
    weights = load_file(path)
    del weights[key]
    save_file(weights, path)


def _other_encoder(folder: Path) -> None:
    path = folder / "encoder" / "config.json"
    path.write_text(path.read_text().replace('"width": 16', '"width": 32'))


def _other_language_model(folder: Path) -> None:
    save_file(Projector(5, 16, 16, 40).state_dict(), folder / "projector.safetensors")


def _other_projector(folder: Path) -> None:
    save_file(Projector(4, 16, 16, 24).state_dict(), folder / "projector.safetensors")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "config.json").write_text("{}"), "not a captioner"),
        (lambda f: _drop(f / "encoder" / "model.safetensors", "class_token"), "class_token"),
        (lambda f: _drop(f / "projector.safetensors", "linear2.bias"), "linear2.bias"),
        (lambda f: _drop(f / "language_model" / "model.safetensors", "lm_head.weight"), "lm_head.weight"),
        (lambda f: (f / "language_model" / "tokenizer_config.json").unlink(), "tokenizer_config.json"),
        (
            lambda f: (f / "language_model" / "config.json").write_text('{"model_type": "eat"}'),
            "language model",
        ),
        (_other_encoder, "pre_norm"),
        (_other_projector, "takes 64 features, but 5 encoder tokens of width 16 have 80"),
        (_other_language_model, "audio tokens of width 40, but the language model's have 24"),
    ],
)
def test_damaged_folders_are_refused(folder: Path, damage: Callable[[Path], object], says: str) -> None:
    damage(folder)
    for load in (check_captioner, Captioner.from_pretrained):
        with pytest.raises(ModelFormatError, match=says):
            load(folder)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ('"use_dora": true', "use_dora=True, which is not supported"),
        ('"modules_to_save": ["lm_head"]', "modules_to_save"),
        ('"r": 3', "wrong shapes"),
        ('"target_modules": ["q_proj"]', "unknown keys"),
        ('"target_modules": ["nothing"]', "no layers nothing"),
        ('"peft_type": "IA3"', "only LORA"),
    ],
)
def test_other_adapters_are_refused(tmp_path: Path, setting: str, says: str) -> None:
    adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(path.read_text().rstrip().removesuffix("}") + f", {setting}}}")
    with pytest.raises(ModelFormatError, match=says):
        Captioner.from_pretrained(tmp_path)


def test_a_model_that_reads_more_than_its_encoder_takes_is_refused(captioner: Captioner) -> None:
    config = replace(captioner.config, frames=256)
    with pytest.raises(ModelFormatError, match="reads 256 frames, but the encoder takes 128 at most"):
        tiny_captioner(config=config)
