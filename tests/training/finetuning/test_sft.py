import json
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import soundfile
import torch
from peft import PeftModel

from services.local import open_clip_maker
from services.models.architectures import load_generator
from services.models.manifest import verify_manifest
from services.weights.uri import resolve
from tests.training.finetuning.finetune_program import (
    LOOP,
    clip,
    losses_of,
    rows_of,
    some_pairs,
    write_model,
    write_pairs,
)
from training.data.captions import CaptionExample
from training.finetuning.session import LoraConfig, PairData, build_policy, open_session, readable
from training.finetuning.sft import SftTraining, loss_of, train_sft
from training.objectives.noising import NoisingConfig
from training.runs.recipes import SFT, recipe, sft_smoke

SHORT = replace(LOOP, steps=2)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "start")


@pytest.fixture(scope="module")
def config(start: Path, tmp_path_factory: pytest.TempPathFactory) -> SftTraining:
    pairs = some_pairs(tmp_path_factory.mktemp("data") / "pairs.parquet")
    return replace(sft_smoke(), start=f"file:{start}", data=PairData(pairs=(pairs,)), loop=SHORT)


def test_the_error_falls_and_what_it_writes_is_a_pipeline(config: SftTraining, tmp_path: Path) -> None:
    loop = replace(LOOP, steps=12, learning_rate=3e-3, checkpoint_seconds=1e9)
    noising = NoisingConfig()
    report = train_sft(replace(config, loop=loop, noising=noising), tmp_path / "model")
    losses = losses_of(tmp_path / "model")
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    assert report["stage"] == "sft" and report["data"]["examples"] == 10
    manifest = verify_manifest(tmp_path / "model")
    assert manifest.name == "sft-smoke" and "unet/config.json" in manifest.files
    assert rows_of(tmp_path / "model")[0]["chosen_error"] == pytest.approx(losses[0])


def test_prompts_that_the_text_encoder_does_not_read_are_counted(
    config: SftTraining, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = [(clip(number), clip(1_000 + number)) for number in range(6)]
    prompts = ("a dog barks", "Le chien aboie", "a dog barks 🐕", " ".join(["dog"] * 40), "rain", "犬")
    pairs = write_pairs(tmp_path / "pairs.parquet", clips, prompts)
    report = train_sft(replace(config, data=PairData(pairs=(pairs,))), tmp_path / "model")
    found = report["data"]["prompt_warnings"]
    assert (found["by"], found["prompts"], found["with_warnings"]) == ("tiny", 6, 4)
    assert found["examples"][0]["row"] == "pairs.parquet, row 1"
    assert "Le, chien, aboie" in found["examples"][0]["warnings"][0]
    assert "has 41 tokens and the model reads the first 16" in found["examples"][2]["warnings"][0]
    assert capsys.readouterr().err.count("not read in full") == 1


def test_only_the_chosen_clips_are_read(config: SftTraining, tmp_path: Path) -> None:
    train_sft(config, tmp_path / "model")
    session, report = open_session(config, tmp_path / "model", config.data.files(), {}, fresh=False)
    assert report is not None
    pairs = config.data.read()
    assert session.latents.add([pair.chosen for pair in pairs], []) == {}
    with pytest.raises(KeyError):
        session.latents.clips([pairs[0].rejected])


def test_clips_with_captions_are_examples_too(config: SftTraining, tmp_path: Path) -> None:
    rows = []
    for number in range(3):
        samples = np.random.default_rng(number).uniform(-0.3, 0.3, 8_000)
        soundfile.write(tmp_path / f"{number}.wav", samples, 16_000)
        rows.append({"key": str(number), "source": f"{number}.wav", "target": "A dog barks"})
    rows.append({"key": "x", "source": "0.wav", "target": ""})
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    captions = (tmp_path / "captions.jsonl",)
    data = PairData(max_unreadable=0.3)
    alone = train_sft(replace(config, data=data, captions=captions), tmp_path / "alone")
    assert alone["data"]["examples"] == 3
    assert list(alone["data"]["files"]) == ["captions.jsonl"]
    assert list(alone["data"]["unusable_prompts"]) == ["captions.jsonl:4"]
    pairs = replace(config.data, max_unreadable=0.3)
    both = train_sft(replace(config, data=pairs, captions=captions), tmp_path / "both")
    assert both["data"]["examples"] == 13


def test_min_snr_weighs_the_errors(config: SftTraining, tmp_path: Path) -> None:
    weighted = replace(config, min_snr=5.0, noising=NoisingConfig())
    session, _ = open_session(weighted, tmp_path / "model", weighted.data.files(), {}, fresh=False)
    read = [CaptionExample(clip=pair.chosen, caption=pair.prompt) for pair in weighted.data.read()]
    examples, _ = readable(read, lambda one: [one.clip], lambda one: one.caption, session, 0.0)
    policy = build_policy(weighted, resolve(weighted.start))
    with torch.no_grad():
        loss, figures = loss_of(
            policy, np.arange(8), config=weighted, batch=8, examples=examples, session=session
        )
    assert 0 < loss < figures["chosen_error"]


def test_adapters_are_merged_and_also_written_alone(
    config: SftTraining, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILONGA_CACHE", str(tmp_path / "cache"))
    loop = replace(SHORT, learning_rate=3e-2)
    report = train_sft(replace(config, lora=LoraConfig(rank=2, alpha=6), loop=loop), tmp_path / "model")
    assert 0 < report["parameters"]["learn"] < report["parameters"]["all"] / 10
    verify_manifest(tmp_path / "model")

    options: Any = {"seed": 3, "num_inference_steps": 3}
    model, adapter = (f"file:{tmp_path / name}" for name in ("model", "model-adapter"))
    found = resolve(adapter)
    assert found.identity.name == "sft-smoke-adapter" and found.own_folder == tmp_path / "model-adapter"
    with ExitStack() as stack:
        uris = {"start": f"file:{start}", "model": model, "both": adapter}
        makers = {
            name: stack.enter_context(closing(open_clip_maker(resolve(uri)))) for name, uri in uris.items()
        }
        clips = {name: one.generate("a dog", **options).clips[0].waveform() for name, one in makers.items()}
        by_request = makers["start"].generate("a dog", adapter=adapter, **options)
    effect = np.abs(clips["model"] - clips["start"]).max()
    assert effect > 1e-5
    assert np.abs(clips["both"] - clips["model"]).max() < 1e-2 * effect
    assert np.abs(by_request.clips[0].waveform() - clips["model"]).max() < 1e-2 * effect
    assert by_request.adapter == found.identity and not by_request.warnings

    unet = cast(Any, load_generator(start)).unet
    read_by_peft = PeftModel.from_pretrained(unet, str(tmp_path / "model-adapter")).merge_and_unload()
    for name, weight in cast(Any, load_generator(tmp_path / "model")).unet.state_dict().items():
        torch.testing.assert_close(read_by_peft.state_dict()[name], weight, atol=1e-6, rtol=1e-5)


def test_the_papers_settings() -> None:
    config = recipe(SFT, "tango2")
    assert (config.epochs, config.loop.batch, config.loop.learning_rate, config.loop.warmup) == (
        1.0,
        32,
        9.6e-7,
        200,
    )
    assert config.loop.rate_at(199) == pytest.approx(1.0)
    assert config.loop.rate_at(469) == pytest.approx(1 / 270)


def test_a_negative_gamma_can_not_be(config: SftTraining) -> None:
    with pytest.raises(ValueError, match=r"min_snr is .*, must be 0 or more"):
        replace(config, min_snr=-1.0)
