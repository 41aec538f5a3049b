import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from services.errors import InvalidInputError
from services.models.architectures import load_generator
from services.models.manifest import verify_manifest
from services.models.mini import mini_folder
from services.models.pipelines import read_index
from services.models.tango.loading import load_tango
from tests.training.finetuning.finetune_program import LOOP, losses_of, rows_of, some_pairs, write_model
from training.finetuning.distill import DistillTraining, WorldPrompts, train_distill
from training.finetuning.session import LoraConfig, PairData
from training.finetuning.sft import SftTraining, train_sft
from training.objectives.noising import NoisingConfig
from training.runs.recipes import DISTILL, recipe


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "start")


@pytest.fixture(scope="module")
def config(start: Path, tmp_path_factory: pytest.TempPathFactory) -> DistillTraining:
    prompts = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    rows = ("a dog barks then a siren wails", "a bird sings", "rain falls")
    prompts.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    return DistillTraining(
        name="student",
        start=f"file:{start}",
        prompts=(prompts,),
        loop=replace(LOOP, steps=3, batch=2, ema=0.0),
    )


def test_the_error_falls_and_what_it_writes_is_a_student(config: DistillTraining, tmp_path: Path) -> None:
    loop = replace(config.loop, steps=30, batch=4, learning_rate=3e-3, checkpoint_seconds=1e9)
    report = train_distill(replace(config, loop=loop, guidance=(2.0, 4.0)), tmp_path / "model")
    losses = losses_of(tmp_path / "model")
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    assert report["stage"] == "distill" and report["data"]["examples"] == 3
    assert list(report["data"]["files"]) == ["prompts.jsonl"]
    assert {"error_1_1", "error_2_1", "error_2_2"} <= rows_of(tmp_path / "model")[0].keys()
    verify_manifest(tmp_path / "model")
    index = read_index(tmp_path / "model")
    assert (index["default_scheduler"], index["default_num_inference_steps"]) == ("jump", 2)
    student = load_generator(tmp_path / "model")
    assert student.folds_guidance
    profiles = {one.name: one.num_inference_steps for one in student.description.defaults.profiles}
    assert profiles == {"quality": 8, "balanced": 2, "draft": 1}
    assert np.abs(load_tango(tmp_path / "model")("rain falls", 0.64).audios).max() > 0


def test_a_killed_distillation_resumes_bit_for_bit(config: DistillTraining, tmp_path: Path) -> None:
    whole = train_distill(config, tmp_path / "whole")
    with pytest.raises(SystemExit):
        stopping(config, tmp_path / "parts")
    resumed = train_distill(config, tmp_path / "parts")
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "whole")
    assert resumed["figures"] == whole["figures"]
    ours, theirs = (load_tango(tmp_path / name).unet.state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert train_distill(config, tmp_path / "parts") == json.loads(json.dumps(resumed))


def stopping(config: DistillTraining, output: Path) -> None:
    """Run it, and have SIGTERM stop it after the first step."""
    import os
    import signal

    from training.finetuning import distill as program

    inner = program.loss_of

    def loss_of(*arguments: object, **rest: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return inner(*arguments, **rest)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "loss_of", loss_of)
        train_distill(config, output)


def test_durations_take_turns(config: DistillTraining, tmp_path: Path) -> None:
    loop = replace(config.loop, steps=2)
    report = train_distill(replace(config, loop=loop, durations=(0.32, 0.64)), tmp_path / "model")
    assert report["steps"] == 2


def test_prompts_of_the_sound_world_are_distinct_and_of_its_training_split(tmp_path: Path) -> None:
    tiny = replace(recipe(DISTILL, "smoke"), start=f"file:{mini_folder('mini')}")
    tiny = replace(tiny, world=WorldPrompts(count=6), loop=replace(tiny.loop, steps=1))
    assert 1 < train_distill(tiny, tmp_path / "model")["data"]["examples"] <= 6


def test_a_student_is_not_trained_further(config: DistillTraining, tmp_path: Path) -> None:
    train_distill(replace(config, loop=replace(config.loop, steps=1)), tmp_path / "student")
    student = f"file:{tmp_path / 'student'}"
    with pytest.raises(InvalidInputError, match="start: is a distilled model"):
        train_distill(replace(config, start=student), tmp_path / "again")
    data = PairData(pairs=(some_pairs(tmp_path / "pairs.parquet", 2),))
    with pytest.raises(InvalidInputError, match="start: is a distilled model"):
        train_sft(SftTraining(name="sft", start=student, data=data, loop=config.loop), tmp_path / "sft")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": LoraConfig(rank=2)}, "lora has no effect"),
        ({"noising": NoisingConfig(blank=0.5)}, "noising has no effect"),
        ({"epochs": 2.0}, "epochs has no effect"),
        ({"guidance": (4.0, 2.0)}, "give the lower bound first"),
        ({"guidance": (0.5, 2.0)}, "guidance"),
        ({"durations": (0.0,)}, "durations"),
        ({"jumps": 0}, "jumps"),
    ],
)
def test_settings_without_effect_or_out_of_range(
    config: DistillTraining, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(config, **changes)  # type: ignore[arg-type]


def test_prompts_are_needed(config: DistillTraining, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"prompts: is empty; .*world\.count"):
        train_distill(replace(config, prompts=()), tmp_path / "model")


def test_recipes() -> None:
    assert recipe(DISTILL, "mini").start == "mini"
    tango2 = recipe(DISTILL, "tango2")
    assert (tango2.loop.batch, tango2.loop.learning_rate, tango2.durations) == (64, 1e-5, (10.24,))
