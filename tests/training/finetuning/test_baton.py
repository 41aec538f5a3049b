import json
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from services.errors import InvalidInputError
from services.models.clap.loading import load_clap
from services.models.manifest import verify_manifest, write_manifest
from services.models.reward.model import load_reward
from tests.tiny import tiny_clap, tiny_reward
from tests.training.finetuning.finetune_program import LOOP, PROMPTS, clip, rows_of, some_pairs, write_model
from training.commands.finetune import baton as command
from training.finetuning import baton as train_baton_module
from training.finetuning.baton import BatonData, BatonTraining, read_pretraining, read_rewarded, train_baton
from training.loop.fit import Positions
from training.runs.recipes import BATON, DPO, baton_smoke, recipe

SHORT = replace(LOOP, steps=2)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "start")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return some_pairs(tmp_path_factory.mktemp("data") / "pairs.parquet", 4)


@pytest.fixture(scope="module")
def config(start: Path, pairs: Path) -> BatonTraining:
    data = BatonData(pairs=(pairs,), scenes=3)
    return replace(baton_smoke(), start=f"file:{start}", data=data, loop=SHORT)


def _json(folder: Path, name: str, labels: list[float | None]) -> Path:
    rows = []
    for number, label in enumerate(labels):
        (folder / f"{name}-{number}.wav").write_bytes(clip(number))
        row = {"captions": PROMPTS[number % 4], "location": f"{name}-{number}.wav"}
        rows.append(row if label is None else row | {"label": label})
    path = folder / f"{name}.json"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_the_loss_is_the_rewarded_part_plus_pretraining(config: BatonTraining, tmp_path: Path) -> None:
    report = train_baton(replace(config, pretraining_weight=0.5), tmp_path / "model")
    assert report["stage"] == "baton"
    data = report["data"]
    assert (data["examples"], data["pretraining"], data["mean_reward"]) == (8, 3, 0.5)
    row = rows_of(tmp_path / "model")[0]
    assert row["reward"] == 0.5
    assert row["loss"] < row["rewarded_error"] + 0.5 * row["pretraining_error"]
    assert row["loss"] > 0.5 * row["pretraining_error"]
    verify_manifest(tmp_path / "model")
    plain = train_baton(replace(config, pretraining_weight=0.0), tmp_path / "plain")
    assert plain["data"]["pretraining"] == 0
    assert "pretraining_error" not in rows_of(tmp_path / "plain")[0]


def test_where_all_rewards_are_one_it_is_the_denoising_loss(config: BatonTraining, tmp_path: Path) -> None:
    data = BatonData(labelled=(_json(tmp_path, "HD", [1.0] * 3),))
    train_baton(replace(config, data=data), tmp_path / "model")
    rows = rows_of(tmp_path / "model")
    assert len(rows) == config.loop.steps
    for row in rows:
        assert row["loss"] == pytest.approx(row["rewarded_error"])


def test_batons_files_are_enough(config: BatonTraining, tmp_path: Path) -> None:
    human, machine = _json(tmp_path, "HD", [1, 0]), _json(tmp_path, "RD", [0.7, 0.2])
    data = BatonData(labelled=(human, machine), pretraining=(_json(tmp_path, "PD", [None] * 3),))
    report = train_baton(replace(config, data=data), tmp_path / "model")
    assert report["data"]["examples"] == 4 and report["data"]["pretraining"] == 3
    assert report["data"]["mean_reward"] == pytest.approx((1 + 0 + 0.7 + 0.2) / 4)
    assert set(report["data"]["files"]) == {"HD.json", "RD.json", "PD.json"}


def test_a_reward_model_judges_the_clips_of_pairs(
    config: BatonTraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clap_folder, reward_folder = tmp_path / "clap", tmp_path / "reward"
    tiny_clap().save(clap_folder)
    clap_digest = write_manifest(clap_folder, name="clap", version="1", license="Apache-2.0").digest
    tiny_reward(tiny_clap(), clap_digest).save(reward_folder)
    write_manifest(reward_folder, name="reward", version="1", license="Apache-2.0")
    labels: list[float] = []
    inner = train_baton_module.loss_of

    def loss_of(policy, positions: Positions, **rest):  # type: ignore[no-untyped-def]
        labels[:] = [example.label for example in rest["rewarded"]]
        return inner(policy, positions, **rest)

    monkeypatch.setattr(train_baton_module, "loss_of", loss_of)
    judged = replace(config, reward=f"file:{reward_folder}", clap=f"file:{clap_folder}")
    report = train_baton(judged, tmp_path / "model")
    assert len(labels) == 8 and len(set(labels)) > 1 and all(0 < label < 1 for label in labels)
    model = load_reward(reward_folder, load_clap(clap_folder), clap_digest)
    _, paired = read_rewarded(config.data)
    logits = [
        model.reward([one.prompt], [model.prepare(*one.clip.read())]).sigmoid().item() for one in paired
    ]
    assert labels == pytest.approx(logits, abs=2e-3)
    assert report["settings"]["reward_digest"].startswith("sha256:")


def test_scenes_are_the_same_each_time_and_often_captioned_wrong() -> None:
    data = BatonData(scenes=40)
    scenes = read_pretraining(data)
    assert scenes == read_pretraining(data)
    assert len({example.prompt for example in scenes}) > 30


def test_nothing_rewarded_is_a_clear_error(config: BatonTraining, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="data: holds no rewarded clips; give"):
        train_baton(replace(config, data=BatonData(scenes=2)), tmp_path / "a")
    data = BatonData(labelled=(_json(tmp_path, "HD", [0, 0]),))
    with pytest.raises(InvalidInputError, match="none of 2 clips has a reward above 0"):
        train_baton(replace(config, data=data), tmp_path / "b")


def test_the_papers_settings() -> None:
    config = recipe(DPO, "tango2")
    assert (config.beta, config.epochs, config.loop.learning_rate, config.loop.warmup) == (
        2000.0,
        4.0,
        9.6e-7,
        200,
    )
    assert config.loop.batch == 32 and config.noising.blank == 0
    assert recipe(BATON, "tango2").loop.batch == 32
    with pytest.raises(InvalidInputError, match="--recipe: is 'none', must be one of mini, smoke, tango2"):
        recipe(BATON, "none")


def test_the_command_prints_settings_and_figures(start: Path, pairs: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(command)
    arguments = ["--recipe", "smoke", "--set", f"start=file:{start}", "--set", f"data.pairs={pairs}"]
    arguments += ["--set", "loop.steps=1", "--output", str(tmp_path / "model")]
    shown = CliRunner().invoke(app, [*arguments, "--show"])
    assert shown.exit_code == 0 and "data.scenes=4" in shown.output and not (tmp_path / "model").exists()
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "serve generation --model file:" in done.output and "1 steps on 8 examples" in done.output
