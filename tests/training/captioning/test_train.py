import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from services.api.reading import EVENTS, read_events
from services.errors import InvalidInputError, OutputError
from services.models.captioner.model import Captioner
from services.models.manifest import verify_manifest, write_manifest
from tests.tiny import tiny_captioner
from training.captioning import train as train_module
from training.captioning.data import CaptionData, WorldClips, load_examples
from training.captioning.folder import summary
from training.captioning.train import CaptionerTraining, Learner, train_captioner
from training.commands.main import train as train_app
from training.loop.fit import Positions
from training.loop.run_folder import JOURNAL, read_journal
from training.runs.recipes import CAPTIONING, captioning_smoke
from training.soundworld.reading import grammar_events, grammar_reader


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    tiny_captioner().save_pretrained(folder)
    (folder / EVENTS).write_text(grammar_events())
    write_manifest(folder, name="tiny-captioner", version="1", license="Apache-2.0")
    return folder


@pytest.fixture(scope="module")
def config(start: Path) -> CaptionerTraining:
    return replace(captioning_smoke(), start=f"file:{start}")


@pytest.fixture(scope="module")
def trained(config: CaptionerTraining, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "smoke"
    train_captioner(config, output)
    return output


def losses(output: Path) -> list[float]:
    rows = read_journal(output.with_name(f"{output.name}.run") / JOURNAL)
    return [row["loss"] for row in rows if "loss" in row]


def state(folder: Path) -> dict[str, Tensor]:
    return dict(Captioner.from_pretrained(folder, merge=False).state_dict())


def test_only_projector_and_adapters_learn_and_the_folder_can_be_loaded(trained: Path, start: Path) -> None:
    before, after = state(start), state(trained)
    plain = {name.replace("base_model.model.", "").replace(".base_layer", ""): v for name, v in after.items()}
    changed = {name for name, value in before.items() if not torch.equal(value, plain[name])}
    assert changed == {f"projector.linear{n}.{part}" for n in (1, 2) for part in ("weight", "bias")}
    added = {name for name in after if ".lora_" in name}
    assert added
    assert any(after[name].abs().sum() > 0 for name in added if ".lora_B." in name)
    verify_manifest(trained)
    assert read_events(trained) == grammar_reader()
    served = Captioner.from_pretrained(trained)
    clip = served.prepare(np.random.default_rng(0).uniform(-0.1, 0.1, 16_000).astype(np.float32), 16_000)
    assert len(served.generate(served.encode([clip]))[0]) == 2


def test_the_report_has_data_settings_and_the_best_step(trained: Path, config: CaptionerTraining) -> None:
    report = json.loads((trained / "training.json").read_text())
    assert (report["data"]["train"], report["data"]["validation"]) == (8, 4)
    assert 0 < report["parameters"]["learn"] < report["parameters"]["all"]
    assert report["figures"]["validation_loss"] > 0
    assert report["figures_before"]["validation_loss"] > 0
    lines = summary(report)
    assert lines[2] == f"loss before the first step: {report['figures_before']['validation_loss']:.4f}"
    unhelpful = report | {"figures_before": report["figures"]}
    assert "training did not lower the loss" in summary(unhelpful)[3]
    rows = read_journal(trained.with_name("smoke.run") / JOURNAL)
    evaluated = {row["step"] + 1: row["evaluation"]["validation_loss"] for row in rows if "evaluation" in row}
    assert report["best_step"] == min(evaluated, key=evaluated.__getitem__)
    assert report["figures"]["validation_loss"] == pytest.approx(evaluated[report["best_step"]], abs=1e-5)
    assert train_captioner(config, trained) == report
    assert "milonga serve captioning" in (trained / "README.md").read_text()


def test_a_killed_run_resumes_with_the_same_losses(
    config: CaptionerTraining, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, loop=replace(config.loop, checkpoint_seconds=0))
    loss_of, calls = train_module.loss_of, []

    def killed(learner: nn.Module, positions: Positions, **options: Any) -> tuple[Tensor, dict[str, float]]:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return loss_of(learner, positions, **options)

    monkeypatch.setattr(train_module, "loss_of", killed)
    with pytest.raises(KeyboardInterrupt):
        train_captioner(config, tmp_path / "model")
    checkpoints = sorted((tmp_path / "model.run" / "checkpoints").iterdir())
    content = torch.load(checkpoints[-1] / "state.pt", weights_only=True)
    # No frozen weight: a language model of 7 billion would fill the disk.
    assert all("projector" in name or ".lora_" in name for name in content["module"])
    monkeypatch.undo()
    train_captioner(config, tmp_path / "model")
    assert losses(tmp_path / "model") == losses(trained)
    assert (tmp_path / "model" / "projector.safetensors").read_bytes() == (
        trained / "projector.safetensors"
    ).read_bytes()


def test_without_lora_the_projector_learns_alone_and_from_scratch_it_is_new(
    config: CaptionerTraining, start: Path, tmp_path: Path
) -> None:
    config = replace(config, use_lora=False, scratch=True, loop=replace(config.loop, steps=1))
    report = train_captioner(config, tmp_path / "model")
    assert not (tmp_path / "model" / "adapter").exists()
    assert report["parameters"]["learn"] == sum(
        value.numel() for name, value in state(start).items() if name.startswith("projector.")
    )
    before, after = state(start), state(tmp_path / "model")
    assert (before["projector.linear1.weight"] - after["projector.linear1.weight"]).abs().mean() > 0.01


def test_a_second_training_continues_the_adapters(
    config: CaptionerTraining, trained: Path, tmp_path: Path
) -> None:
    config = replace(config, start=f"file:{trained}", loop=replace(config.loop, steps=1, learning_rate=1e-9))
    train_captioner(config, tmp_path / "model")
    before, after = state(trained), state(tmp_path / "model")
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(value, after[name], atol=1e-5, rtol=0)
    with pytest.raises(InvalidInputError, match="scratch: is true, but captioner-smoke has adapters"):
        train_captioner(replace(config, scratch=True), tmp_path / "other")


def test_the_frozen_encoder_stays_in_evaluation_mode() -> None:
    learner = Learner(tiny_captioner())
    learner.train()
    assert learner.captioner.language_model.training
    assert not learner.captioner.encoder.training
    assert not any(module.training for module in learner.captioner.encoder.modules())


def write_list(folder: Path, clips: dict[str, np.ndarray[Any, Any]]) -> Path:
    for name, waveform in clips.items():
        soundfile.write(folder / name, waveform, 16_000, subtype="FLOAT")
    rows = [{"source": name, "target": f"A dog barks {number}"} for number, name in enumerate(clips)]
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "list.jsonl"


def test_unusable_clips_are_left_out_and_reported_up_to_a_share(
    config: CaptionerTraining, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    good = {f"{n}.wav": rng.uniform(-0.1, 0.1, 8_000) for n in range(20)}
    nan = np.full(8_000, np.nan)
    path = write_list(
        tmp_path, {**good, "short.wav": np.full(100, 0.1), "silent.wav": np.zeros(8_000), "nan.wav": nan}
    )
    with path.open("a") as file:
        file.write('{"source": "gone.wav", "target": "A dog barks"}\n{"source": "0.wav", "target": " "}\n')
    data = CaptionData(train=(path,), held_out=0.3, max_unreadable=0.2)
    config = replace(config, data=data, loop=replace(config.loop, steps=1))
    report = train_captioner(config, tmp_path / "model")
    unreadable = {Path(name).name: why for name, why in report["data"]["unreadable"].items()}
    assert unreadable.keys() == {"short.wav", "silent.wav", "nan.wav", "gone.wav"}
    assert "silent" in unreadable["silent.wav"]
    assert list(report["data"]["unusable_captions"]) == ["list.jsonl:25"]
    with pytest.raises(InvalidInputError, match="4 of 24 clips can't be read"):
        train_captioner(replace(config, data=replace(data, max_unreadable=0.05)), tmp_path / "other")


def test_other_settings_other_data_and_other_folders_are_refused(
    config: CaptionerTraining, trained: Path, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInputError, match="holds a run with other settings"):
        train_captioner(replace(config, evaluate_every=1), trained)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(OutputError, match="was not made by a training"):
        train_captioner(config, tmp_path / "full")
    if not torch.cuda.is_available():
        fp16 = replace(config, loop=replace(config.loop, mixed_precision="fp16"))
        with pytest.raises(InvalidInputError, match=r"loop\.mixed_precision: is fp16, which needs a GPU"):
            train_captioner(fp16, tmp_path / "model")


def test_the_recipes_have_the_sources_settings() -> None:
    pretrain, audiocaps, clotho = (
        CAPTIONING[f"slam-aac-{name}"]() for name in ("pretrain", "audiocaps", "clotho")
    )
    for config, rate, batch, seed in (
        (pretrain, 1e-4, 16, 666),
        (audiocaps, 8e-6, 4, 42),
        (clotho, 8e-6, 4, 10086),
    ):
        loop = replace(config.loop, steps=20_000)
        assert (loop.learning_rate, loop.batch, loop.seed, loop.weight_decay) == (rate, batch, seed, 0)
        assert [loop.rate_at(step) for step in (499, 999, 50_500, 100_000, 100_001)] == pytest.approx(
            [0.5, 1, 0.5, 0, 0]
        )
        assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (8, 32, 0.05)
        assert config.lora.modules == ("q_proj", "v_proj")
    assert (pretrain.scratch, audiocaps.scratch, clotho.scratch) == (True, False, False)
    assert (pretrain.evaluate_every, audiocaps.evaluate_every, clotho.evaluate_every) == (0, 500, 500)


def test_the_command_trains_and_shows(start: Path, tmp_path: Path) -> None:
    arguments = ["captioning", "--recipe", "smoke", "--set", f"start=file:{start}", "--set", "loop.steps=1"]
    shown = CliRunner().invoke(train_app, [*arguments, "--show"])
    assert "data.world.scenes=8" in shown.output
    result = CliRunner().invoke(train_app, [*arguments, "--output", str(tmp_path / "model")])
    assert result.exit_code == 0, result.output
    assert "milonga serve captioning --model file:" in result.output


def test_world_captions_are_worded_in_many_ways() -> None:
    data = CaptionData(world=WorldClips(scenes=1, held_out=1, rebuilt=0.0))
    example = load_examples(data, {}).train[0]
    captions = {train_module.worded(example, 3, position) for position in range(40)}
    assert len(captions) > 5
    assert captions == {train_module.worded(example, 3, position) for position in range(40)}
