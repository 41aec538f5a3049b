import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn, tensor
from typer.testing import CliRunner

from services.errors import (
    DigestMismatchError,
    InvalidInputError,
    ModelFormatError,
    ModelNotFoundError,
    OutputError,
)
from services.models.clap.loading import load_clap
from services.models.clap.model import ClapModel
from services.models.manifest import verify_manifest, write_manifest
from services.models.reward.model import load_reward
from services.weights.uri import resolve
from tests.tiny import tiny_clap
from training.commands.main import train as train_app
from training.data.scenes import soundworld_examples
from training.loop.config import override
from training.loop.fit import Positions
from training.loop.run_folder import JOURNAL, read_journal
from training.objectives.calibration import Scaling
from training.reward import train as train_reward_module
from training.reward.data import DataConfig
from training.reward.report import HeadOutputs, reliability_plot
from training.reward.train import RewardTraining, build_model, continue_head, train_reward
from training.runs.recipes import reward_smoke
from training.soundworld.scenes import split_of


@pytest.fixture(scope="module")
def clap_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clap")
    tiny_clap().save(folder)
    write_manifest(folder, name="tiny-clap", version="1", license="Apache-2.0")
    return folder


@pytest.fixture(scope="module")
def config(clap_folder: Path) -> RewardTraining:
    return replace(reward_smoke(), clap=f"file:{clap_folder}")


@pytest.fixture(scope="module")
def trained(config: RewardTraining, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "smoke"
    train_reward(config, output)
    return output


def _losses(output: Path) -> list[float]:
    rows = read_journal(output.with_name(f"{output.name}.run") / JOURNAL)
    return [row["loss"] for row in rows if "loss" in row]


def _clap(folder: Path) -> tuple[ClapModel, str]:
    return load_clap(folder), verify_manifest(folder).digest


def test_the_output_is_a_model_that_can_be_loaded(trained: Path, clap_folder: Path) -> None:
    clap, digest = _clap(clap_folder)
    model = load_reward(trained, clap, digest)
    manifest = verify_manifest(trained)
    assert (manifest.name, manifest.version, manifest.license) == ("smoke", "1", "Apache-2.0")
    report = json.loads((trained / "evaluation.json").read_text())
    assert (model.config.temperature, model.config.bias) == (report["temperature"], report["bias"])
    clip = model.prepare(np.zeros(16_000, dtype=np.float32), 16_000)
    assert model.reward(["a dog barks"], [clip]).isfinite().all()
    with pytest.raises(DigestMismatchError):
        load_reward(trained, clap, "sha256:" + "0" * 64)
    assert not [path for path in trained.parent.iterdir() if path.name.startswith(".")]
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in trained.iterdir())


def test_a_training_can_start_from_the_head_of_another(
    trained: Path, config: RewardTraining, clap_folder: Path, tmp_path: Path
) -> None:
    clap, digest = _clap(clap_folder)
    resolved = resolve(config.clap)
    model, earlier = build_model(config, clap, resolved), load_reward(trained, clap, digest)
    continue_head(model, trained)
    for name, value in earlier.head.state_dict().items():
        assert model.head.state_dict()[name].equal(value)
    other = replace(config, head=replace(config.head, width=32))
    with pytest.raises(ModelFormatError):
        continue_head(build_model(other, clap, resolved), trained)
    with pytest.raises(ModelFormatError, match=r"config\.json"):
        train_reward(replace(config, init=tmp_path), tmp_path / "out")
    diverged = shutil.copytree(trained, tmp_path / "diverged")
    weights = load_file(diverged / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] = torch.nan
    save_file(weights, diverged / "model.safetensors")
    with pytest.raises(ModelFormatError, match="NaN or infinity"):
        continue_head(model, diverged)


def test_the_report_has_all_metrics(trained: Path) -> None:
    report = json.loads((trained / "evaluation.json").read_text())
    for metrics in (report["pair_accuracy"], report["clap_pair_accuracy"]):
        assert {"all", "swapped", "swapped, real"} <= metrics.keys()
        assert metrics["all"]["count"] == 12
        assert all(0 <= f["low"] <= f["value"] <= f["high"] <= 1 for f in metrics.values())
    assert set(report["calibration"]["expected_calibration_error"]) == {"before", "after"}
    assert 0 <= report["labelled"]["auc"] <= 1
    labelled = soundworld_examples(reward_smoke().data.soundworld, "train").labelled
    assert report["examples"]["train"]["liked"] == sum(example.label for example in labelled)
    assert report["settings"]["loop.steps"] == 6
    assert (trained / "reliability.png").read_bytes().startswith(b"\x89PNG")
    card = (trained / "README.md").read_text()
    assert "swapped, real" in card and "tiny-clap" in card


def test_the_reliability_plot_is_a_png_and_always_the_same() -> None:
    outputs = HeadOutputs(labelled=(), logits_B=tensor([]), pairs=(), margins_B=tensor([-2.0, 0.5, 3.0]))
    image = reliability_plot(outputs, Scaling(temperature=2.0))
    assert image.startswith(b"\x89PNG")
    assert image == reliability_plot(outputs, Scaling(temperature=2.0))


def test_an_interrupted_training_is_resumed_bit_for_bit(
    config: RewardTraining, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exception prevents any saving, like a kill. `test_loop` sends SIGKILL."""
    output, inner = tmp_path / "smoke", train_reward_module.loss_of

    def loss_of(head: nn.Module, positions: Positions, **rest: Any) -> tuple[Tensor, dict[str, Tensor]]:
        if positions[0] >= 4 * config.loop.batch:
            raise KeyError("killed")
        return inner(head, positions, **rest)

    monkeypatch.setattr(train_reward_module, "loss_of", loss_of)
    often = replace(config, loop=replace(config.loop, checkpoint_seconds=0.0))
    with pytest.raises(KeyError, match="killed"):
        train_reward(often, output)
    assert len(_losses(output)) == 4
    assert not output.exists()
    monkeypatch.undo()
    train_reward(config, output)
    assert _losses(output) == _losses(trained)
    ours, theirs = (verify_manifest(folder).files["model.safetensors"] for folder in (output, trained))
    assert ours == theirs


def test_a_finished_training_is_not_repeated_and_refuses_other_settings(
    config: RewardTraining, trained: Path
) -> None:
    before = verify_manifest(trained).digest
    train_reward(config, trained)
    assert verify_manifest(trained).digest == before
    with pytest.raises(InvalidInputError, match=r"loop\.batch was \d+, is 7"):
        train_reward(override(config, ["loop.batch=7"]), trained)


@pytest.mark.parametrize("objective", ["bce", "bradley_terry"])
def test_each_objective_learns_from_its_own_examples(
    config: RewardTraining, tmp_path: Path, objective: str
) -> None:
    changed = override(config, [f"objective={objective}", "loop.steps=2"])
    train_reward(changed, tmp_path / "x")
    row = read_journal(tmp_path / "x.run" / JOURNAL)[0]
    assert ("accuracy" in row, "pair_accuracy" in row) == (objective == "bce", objective != "bce")


def _prompts(split: str, count: int) -> list[str]:
    prompts = (f"a dog barks {'then a bell rings ' * (n % 3)}before {n}" for n in range(10_000))
    return [prompt for prompt in prompts if split_of(prompt) == split][:count]


def test_training_on_batons_json_alone(config: RewardTraining, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for split in ("train", "validation", "test"):
        for number, prompt in enumerate(_prompts(split, 4)):
            for label in (0, 1):
                name = f"{split}-{number}-{label}.wav"
                soundfile.write(tmp_path / name, rng.standard_normal(4_000) * 0.1, 16_000)
                rows.append({"captions": prompt, "location": name, "label": label})
    (tmp_path / "HD.json").write_text(json.dumps(rows))
    data = DataConfig(labelled=(tmp_path / "HD.json",), max_unreadable=0.1)
    changed = replace(config, data=data, objective="bce")
    report = train_reward(changed, tmp_path / "model")
    assert report["examples"]["train"] == {"liked": 4, "not liked": 4}
    # Held-out pairs are derived from the labels of a prompt.
    assert report["pair_accuracy"]["labelled"]["count"] == 4
    (tmp_path / "train-0-0.wav").write_bytes(b"")
    report = train_reward(changed, tmp_path / "other")
    assert list(report["unreadable"]) == [str(tmp_path / "train-0-0.wav")]
    assert report["examples"]["train"] == {"liked": 4, "not liked": 3}
    with pytest.raises(InvalidInputError, match="1 of 24 clips can't be read, at most 0% may be"):
        train_reward(replace(changed, data=replace(data, max_unreadable=0.0)), tmp_path / "third")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["data.soundworld.contrasts=0"],
            "objective: is both, which learns from labelled, and there are none",
        ),
        (["data.labelled=no.json"], "data.labelled: no.json can't be read"),
        (["loop.batch=3", "loop.accumulation=2"], "batch: is 3, must be a multiple"),
    ],
)
def test_invalid_settings_give_a_one_line_error(
    config: RewardTraining, tmp_path: Path, settings: list[str], message: str
) -> None:
    with pytest.raises(InvalidInputError) as caught:
        train_reward(override(config, settings), tmp_path / "x")
    assert message in str(caught.value)


def test_a_folder_with_other_content_is_not_overwritten(config: RewardTraining, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("Hello")
    with pytest.raises(OutputError, match="is not a reward model; give another --output"):
        train_reward(config, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_missing_clap_model(config: RewardTraining, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        train_reward(override(config, [f"clap=file:{tmp_path}/none"]), tmp_path / "x")


def test_the_command_prints_settings_and_metrics(config: RewardTraining, tmp_path: Path) -> None:
    runner = CliRunner()
    command = ["reward", "--recipe", "smoke", "--set", f"clap={config.clap}", "--set", "loop.steps=2"]
    shown = runner.invoke(train_app, [*command, "--show"])
    assert shown.exit_code == 0 and "loop.steps=2" in shown.output
    assert not list(tmp_path.iterdir())
    output = tmp_path / "models" / "a"
    done = runner.invoke(train_app, [*command, "--output", str(output)])
    assert done.exit_code == 0, done.output
    assert "swapped, real" in done.output and f"serve reward --model file:{output}" in done.output
    other = runner.invoke(train_app, [*command, "--set", "loop.seed=1", "--output", str(output)])
    assert isinstance(other.exception, InvalidInputError)
    fresh = runner.invoke(train_app, [*command, "--set", "loop.seed=1", "--output", str(output), "--fresh"])
    assert fresh.exit_code == 0, fresh.output
