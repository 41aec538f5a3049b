"""`train_new` from recordings to a model that generates, resumed, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import transformers

from services.errors import InvalidInputError, ModelNotFoundError
from services.models.latent import clip_generator
from services.models.manifest import read_manifest
from services.models.ready_made import ready_text_encoder, ready_vocoder
from services.models.tango.loading import load_tango
from tests.services.models.hifigan_release import write_release
from tests.tiny import WORDS, tiny_tokenizer
from training.data.recorded_scenes import RecordedSceneConfig
from training.finetuning.sft import SftTraining
from training.loop.config import override
from training.loop.fit import LoopConfig
from training.objectives.noising import NoisingConfig
from training.pretraining.autoencoder import AutoencoderTraining
from training.pretraining.budget import FEWEST, steps_in
from training.pretraining.config import DenoiserArchitecture, NewModel
from training.pretraining.train import Sounds, attributions, read_sounds, train_new

RATE = 8_000
CLASSES = {"low_tone": 300, "high_tone": 2_000}


def write_sounds(folder: Path, clips: int, classes: dict[str, int] = CLASSES) -> Path:
    """Write tones of one second, a folder per class."""
    for sound, hertz in classes.items():
        (folder / sound).mkdir(parents=True)
        for number in range(clips):
            wave = 0.3 * np.sin(2 * np.pi * (hertz + 20 * number) * np.arange(RATE) / RATE)
            soundfile.write(folder / sound / f"{number}.wav", wave, RATE)
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> NewModel:
    """Settings of seconds, with a tiny vocoder and a tiny text encoder from files."""
    folder = tmp_path_factory.mktemp("parts")
    vocoder = write_release(
        folder,
        num_mels=16,
        hop_size=64,
        upsample_rates=[8, 8],
        upsample_kernel_sizes=[16, 16],
    )
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(words=(*WORDS, "low", "high", "tone"))
    encoder = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        )
    )
    encoder.save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    loop = LoopConfig(steps=3, batch=2, warmup=1, device="cpu", threads=1, ema=0.5)
    return NewModel(
        name="tones",
        data=write_sounds(folder / "sounds", 6),
        minutes=0,
        scenes=RecordedSceneConfig(duration=1.0, single=0.4, sequence=0.4),
        count=8,
        autoencoder_count=4,
        vocoder=str(vocoder),
        text_encoder=str(folder / "text"),
        text_length=12,
        autoencoder=AutoencoderTraining(
            loop=loop, widths=(8, 8), latent_channels=2, crop=16, discriminator_widths=(4, 4)
        ),
        architecture=DenoiserArchitecture(widths=(16, 16), heads=2),
        denoiser=SftTraining(
            name="denoiser", loop=loop, noising=NoisingConfig(condition_dropout=0.1), weights="float16"
        ),
        num_inference_steps=2,
        license="CC-BY-4.0",
    )


def test_a_model_is_trained_and_generates_and_the_same_call_does_nothing_again(
    config: NewModel, tmp_path: Path
) -> None:
    output = tmp_path / "tones"
    report = train_new(config, output)
    assert report["steps"] == 3
    assert report["data"]["classes"] == ["high_tone", "low_tone"]
    assert (report["data"]["recordings"], report["data"]["held_out_recordings"]) == (10, 2)
    assert report["data"]["held_out"]["clips"] > 0
    manifest = read_manifest(output)
    assert (manifest.name, manifest.license) == ("tones", "CC-BY-4.0")
    pipeline = load_tango(output)
    assert pipeline.geometry.sampling_rate == RATE
    assert type(pipeline.text_encoder).__name__ == "BertModel"
    clip = pipeline(["a dog barks"], generator=clip_generator(0))
    assert clip.audios.shape == (1, RATE)
    assert np.isfinite(clip.audios).all()

    journal = (tmp_path / "tones.run" / "journal.jsonl").read_text()
    assert train_new(config, output) == json.loads(json.dumps(report))
    assert (tmp_path / "tones.run" / "journal.jsonl").read_text() == journal
    with pytest.raises(InvalidInputError, match="count was 8, is 7"):
        train_new(replace(config, count=7), output)


def test_other_recordings_are_another_run(config: NewModel, tmp_path: Path) -> None:
    sounds = write_sounds(tmp_path / "sounds", 6)
    config = replace(config, data=sounds)
    train_new(config, tmp_path / "model")
    soundfile.write(sounds / "low_tone" / "0.wav", np.sin(np.arange(RATE)), RATE)
    with pytest.raises(InvalidInputError, match="data_digest was"):
        train_new(config, tmp_path / "model")


def test_minutes_decide_the_steps_once(config: NewModel, tmp_path: Path) -> None:
    long = replace(config.denoiser, loop=replace(config.denoiser.loop, steps=1_000))
    # Too little time for anything: the fewest steps.
    report = train_new(replace(config, minutes=1e-6, denoiser=long), tmp_path / "model")
    assert report["steps"] == FEWEST
    plan = (tmp_path / "model.parts" / "plan.json").read_text()
    assert train_new(replace(config, minutes=1e-6, denoiser=long), tmp_path / "model") == json.loads(
        json.dumps(report)
    )
    assert (tmp_path / "model.parts" / "plan.json").read_text() == plan


@pytest.mark.parametrize(
    ("seconds", "per_step", "most", "steps"),
    [(60, 0.5, 1_000, 120), (60, 0.01, 1_000, 1_000), (1, 10, 1_000, FEWEST), (1, 10, 5, 5)],
)
def test_steps_in_some_seconds(seconds: float, per_step: float, most: int, steps: int) -> None:
    assert steps_in(seconds, per_step, most) == steps


def sounds_of(config: NewModel, data: Path) -> Sounds:
    return read_sounds(replace(config, data=data), ready_text_encoder(config.text_encoder).tokenizer)


def test_captions_in_another_language_are_refused_or_left_out(
    config: NewModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_sounds(tmp_path / "sounds", 10, {"犬": 300, "雨": 2_000})
    with pytest.raises(InvalidInputError, match="20 of 20 recordings have no caption with a word") as caught:
        sounds_of(config, folder)
    assert "--set model.text_encoder=FOLDER" in str(caught.value)
    write_sounds(folder, 10)
    sounds = sounds_of(config, folder)
    assert {one.sound for one in sounds.splits.train} == {"low_tone", "high_tone"}
    assert "warning: 20 of 40 recordings have no caption with a word" in capsys.readouterr().err


def test_too_few_clips_are_refused(config: NewModel, tmp_path: Path) -> None:
    few = write_sounds(tmp_path / "sounds", 2)
    with pytest.raises(InvalidInputError, match="has 2 readable clips with captions to train on"):
        sounds_of(config, few)


def test_one_class_gives_single_sounds_with_a_warning(
    config: NewModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sounds = sounds_of(config, write_sounds(tmp_path / "s", 12, {"low_tone": 300}))
    assert {scene.truth.relation for scene in sounds.scenes(10)} == {"single"}
    assert "all recordings are of one class (low_tone)" in capsys.readouterr().err


def test_unreadable_clips_are_left_out_and_named(
    config: NewModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_sounds(tmp_path / "sounds", 12)
    (folder / "low_tone" / "3.wav").write_bytes(b"no sound")
    sounds = sounds_of(config, folder)
    assert [Path(name).name for name in sounds.unreadable] == ["3.wav"]
    assert "1 of 24 clips can't be read and are left out" in capsys.readouterr().err
    for number in range(4, 9):
        (folder / "low_tone" / f"{number}.wav").write_bytes(b"")
    with pytest.raises(InvalidInputError, match="6 of 24 clips can't be read, at most 10% may be"):
        sounds_of(config, folder)


def test_stated_licences_are_passed_on(config: NewModel, tmp_path: Path) -> None:
    write_sounds(tmp_path, 1, {"bell": 500})
    (tmp_path / "list.csv").write_text(
        "audio,caption,license,author\nbell/0.wav,a bell rings,CC BY 3.0,Ann\n"
    )
    from training.data.recordings import read_recordings

    assert attributions(read_recordings(tmp_path)) == [
        {"clip": "0.wav", "license": "CC BY 3.0", "author": "Ann"}
    ]


def test_parts_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="is not a file; give the path of a HiFi-GAN checkpoint"):
        ready_vocoder(str(tmp_path / "hifi"))
    with pytest.raises(ModelNotFoundError, match=r"text encoder: .* is not a folder"):
        ready_text_encoder(str(tmp_path / "text"))


def test_every_setting_can_be_given(config: NewModel) -> None:
    changed = override(config, ["autoencoder.loop.steps=7", "denoiser.loop.batch=4", "scenes.single=0.1"])
    assert changed.autoencoder.loop.steps == 7
    assert changed.denoiser.loop.batch == 4
    assert changed.scenes.single == 0.1
