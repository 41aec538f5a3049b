import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import get_scheduler

from services.errors import InvalidInputError, ModelFormatError, ModelNotFoundError, OutputError
from services.models.architectures import architecture_of
from services.models.latent import Conditioning, clip_generator
from services.models.manifest import verify_manifest, write_manifest
from services.models.tango.loading import load_tango
from services.weights.uri import resolve
from tests.training.finetuning.finetune_program import (
    LOOP,
    clip,
    dpo,
    losses_of,
    rows_of,
    some_pairs,
    write_model,
    write_pairs,
)
from training.data.latents import LatentConfig
from training.finetuning.dpo import train_dpo
from training.finetuning.session import LoraConfig, PairData, Policy, build_policy, loop_of
from training.loop.fit import LoopConfig
from training.objectives.noising import NoisingConfig
from training.runs.recipes import DPO, recipe

LAUNCHER: tuple[str, ...] = (
    "-m",
    "torch.distributed.run",
    "--nproc-per-node=2",
    "--master-port=0",
    "--rdzv-backend=c10d",
)
LAUNCHER += ("--rdzv-endpoint=127.0.0.1:0",)
SHORT = replace(LOOP, steps=2)
"""The first steps of a run of `LOOP`: the rate has not begun to fall."""


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "start")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return some_pairs(tmp_path_factory.mktemp("data") / "pairs.parquet")


@pytest.fixture(scope="module")
def trained(start: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "model"
    train_dpo(dpo(start, pairs), output)
    return output


def _program(*arguments: object, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        *launcher,
        "-m",
        "tests.training.finetuning.finetune_program",
        *map(str, arguments),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    return weights


def test_the_first_loss_is_log_2_and_everything_asked_for_is_written_down(trained: Path) -> None:
    rows = rows_of(trained)
    assert len(rows) == LOOP.steps
    assert rows[0]["loss"] == pytest.approx(math.log(2))
    assert (rows[0]["margin"], rows[0]["accuracy"]) == (0, 0.5)
    assert (rows[0]["chosen_drift"], rows[0]["rejected_drift"]) == (0, 0)
    assert rows[-1]["chosen_drift"] != 0
    wanted = {"norm", "rate", "samples_per_second", "chosen_error", "rejected_error", "margin", "accuracy"}
    assert wanted <= rows[-1].keys()


def test_it_learns_to_tell_a_pair_that_it_sees_again_and_again(start: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "one.parquet", [(clip(1), clip(2))])
    loop = replace(LOOP, steps=30, batch=4, ema=0.0, learning_rate=2e-3, checkpoint_seconds=1e9)
    train_dpo(dpo(start, pairs, loop=loop, beta=2000.0), tmp_path / "model")
    rows = rows_of(tmp_path / "model")
    assert sum(row["margin"] for row in rows[-10:]) > 0
    assert sum(row["accuracy"] for row in rows[-10:]) / 10 > 0.7


def test_what_it_writes_is_a_whole_pipeline_of_which_only_the_denoiser_differs(
    trained: Path, start: Path
) -> None:
    manifest, parent = verify_manifest(trained), verify_manifest(start)
    assert (manifest.name, manifest.version, manifest.license) == ("dpo-smoke", "1", "Apache-2.0")
    changed = {path for path, _ in manifest.files.items() ^ parent.files.items()}
    assert changed == {"unet/diffusion_pytorch_model.safetensors", "training.json"}
    report = json.loads((trained / "training.json").read_text())
    assert report["stage"] == "dpo" and report["parent"]["digest"] == parent.digest
    assert report["parameters"]["learn"] == report["parameters"]["all"]
    assert report["data"]["examples"] == 10 and report["settings"]["beta"] == 500.0
    assert "samples_per_second" not in report["figures"]
    card = (trained / "README.md").read_text()
    assert "milonga serve generation" in card and parent.digest in card
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in trained.rglob("*"))
    assert not [path for path in trained.parent.iterdir() if path.name.startswith(".")]
    resolved = resolve(f"file:{trained}")
    clips = [
        load_tango(folder)("a dog barks", generator=clip_generator(0)).audios
        for folder in (resolved.folder, start)
    ]
    assert clips[0].shape == clips[1].shape and (clips[0] != clips[1]).any()


def test_every_weight_of_the_denoiser_learned(trained: Path, start: Path) -> None:
    before, after = _weights(start), _weights(trained)
    assert [name for name in before if torch.equal(before[name], after[name])] == []


def test_supervised_epochs_come_first_in_one_schedule(start: Path, pairs: Path, tmp_path: Path) -> None:
    """One epoch of chosen clips, two of DPO: three steps of 4 and five of the 10 pairs."""
    loop = replace(LOOP, batch=4, ema=0.0)
    config = replace(dpo(start, pairs, loop=loop), epochs=2.0, supervised_epochs=1.0)
    train_dpo(config, tmp_path / "both")
    rows = rows_of(tmp_path / "both")
    assert ["margin" in row for row in rows] == [False] * 3 + [True] * 5
    assert rows[0]["loss"] == rows[0]["chosen_error"] and rows[0]["chosen_drift"] == 0
    assert rows[3]["margin"] != 0  # the reference is the start, from before the supervised epoch
    total = replace(loop, steps=8)
    assert [row["rate"] for row in rows] == pytest.approx(
        [loop.learning_rate * total.rate_at(step) for step in range(8)]
    )
    assert train_dpo(config, tmp_path / "both")["steps"] == 8  # finished: nothing is done again


def test_supervised_epochs_need_those_of_dpo(start: Path, pairs: Path) -> None:
    with pytest.raises(ValueError, match="supervised_epochs needs epochs"):
        replace(dpo(start, pairs), supervised_epochs=1.0)


def test_tango2_as_released_has_upstreams_schedule() -> None:
    """Upstream's scheduler, as its program makes it for 15,025 pairs on two processes: each step of the
    optimiser steps it twice (accelerate's `AcceleratedScheduler`)."""
    batches, processes, accumulation, epochs, supervised = math.ceil(15_025 / 4), 2, 4, 5, 1
    parameter = nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.AdamW([parameter], lr=9.6e-7)
    planned = (epochs + supervised) * math.ceil(batches / accumulation)
    scheduler = get_scheduler(
        "linear",
        optimizer=optimiser,
        num_warmup_steps=200 * accumulation,
        num_training_steps=planned * accumulation,
    )
    upstream = []
    for _ in range(epochs * math.ceil(batches / processes / accumulation)):
        upstream.append(scheduler.get_last_lr()[0])
        optimiser.step()
        for _ in range(processes):
            scheduler.step()
    config = recipe(DPO, "tango2-as-released")
    loop = loop_of(replace(config, epochs=config.epochs + config.supervised_epochs), 15_025)
    ours = [loop.learning_rate * loop.rate_at(step) for step in range(loop.steps)]
    assert len(ours) == pytest.approx(len(upstream), abs=2)
    # Upstream's first step has the rate 0: one step of warm-up apart.
    assert ours == pytest.approx(upstream[: len(ours)], abs=9.6e-7 / 399)
    two_stages = loop_of(recipe(DPO, "tango2"), 15_025)
    aligned = sum(two_stages.learning_rate * two_stages.rate_at(step) for step in range(two_stages.steps))
    assert sum(ours[470:]) / aligned == pytest.approx(1.8, abs=0.03)


def test_killed_by_sigkill_it_goes_on_bit_for_bit(
    trained: Path, start: Path, pairs: Path, tmp_path: Path
) -> None:
    output = tmp_path / "model"
    killed = _program(output, start, pairs, "--kill-at", 4)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert len(losses_of(output)) == 4 and not output.exists()
    train_dpo(dpo(start, pairs), output)
    assert losses_of(output) == losses_of(trained)
    ours, theirs = _weights(output), _weights(trained)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_two_processes_give_the_curve_of_one(trained: Path, start: Path, pairs: Path, tmp_path: Path) -> None:
    done = _program(tmp_path / "two", start, pairs, "--accumulation", 2, launcher=LAUNCHER)
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(trained), rel=1e-5)
    verify_manifest(tmp_path / "two")


def test_a_batch_in_parts_gives_the_curve_of_a_whole_one(
    trained: Path, start: Path, pairs: Path, tmp_path: Path
) -> None:
    train_dpo(dpo(start, pairs, loop=replace(SHORT, accumulation=4)), tmp_path / "parts")
    assert losses_of(tmp_path / "parts") == pytest.approx(losses_of(trained)[: SHORT.steps], rel=1e-5)


def test_of_equal_clips_the_safeguard_leaves_the_chosen_ones_share(start: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.parquet", [(clip(number), clip(number)) for number in range(4)])
    loop = replace(LOOP, steps=10, batch=4, ema=0.0, checkpoint_seconds=1e9)
    plain = dpo(start, pairs, loop=loop, noising=NoisingConfig())
    train_dpo(plain, tmp_path / "plain")
    train_dpo(replace(plain, safeguard=0.5), tmp_path / "safe")
    before, after = rows_of(tmp_path / "plain"), rows_of(tmp_path / "safe")
    # Their gradients cancel up to rounding. Half of the rejected clip's leaves half of the chosen one's.
    assert "rejected_scale" not in before[0] and abs(before[-1]["chosen_drift"]) < 0.02
    assert [row["rejected_scale"] for row in after] == pytest.approx([0.5] * len(after))
    assert after[0]["loss"] == pytest.approx(math.log(2)) and after[-1]["chosen_drift"] < -0.05


def test_a_safeguarded_batch_in_parts_gives_the_curve_of_a_whole_one(
    start: Path, pairs: Path, tmp_path: Path
) -> None:
    config = dpo(start, pairs, safeguard=0.2, loop=SHORT)
    train_dpo(config, tmp_path / "whole")
    train_dpo(replace(config, loop=replace(SHORT, accumulation=4)), tmp_path / "parts")
    assert losses_of(tmp_path / "parts") == pytest.approx(losses_of(tmp_path / "whole"), rel=1e-5)
    whole, parts = (rows_of(tmp_path / name)[-1] for name in ("whole", "parts"))
    assert parts["rejected_scale"] == pytest.approx(whole["rejected_scale"], rel=1e-5)
    with pytest.raises(ValueError, match=r"safeguard is 1\.5"):
        replace(config, safeguard=1.5)


def test_checkpointed_activations_and_latents_made_online_change_nothing(
    trained: Path, start: Path, pairs: Path, tmp_path: Path
) -> None:
    expected = losses_of(trained)[: SHORT.steps]
    train_dpo(dpo(start, pairs, gradient_checkpointing=True, loop=SHORT), tmp_path / "checkpointed")
    assert losses_of(tmp_path / "checkpointed") == pytest.approx(expected, rel=1e-6)
    online = LatentConfig(encode_online=True)
    train_dpo(dpo(start, pairs, latents=online, loop=SHORT), tmp_path / "online")
    assert losses_of(tmp_path / "online") == pytest.approx(expected, rel=1e-5)
    assert not list((tmp_path / "online.run").glob("latents-*"))


def test_the_reference_of_adapters_is_the_base_and_only_they_learn(
    start: Path, pairs: Path, tmp_path: Path
) -> None:
    config = dpo(start, pairs, lora=LoraConfig(rank=2), loop=SHORT)
    policy = build_policy(config, resolve(config.start), resolve(config.start))
    assert policy.reference is None
    assert policy.learned and all("lora_" in name for name in policy.learned)
    assert policy.state_dict().keys() == policy.learned
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    noisy, embeds = torch.randn(2, 4, 16, 16), torch.randn(2, 5, 16)
    timesteps, mask = torch.tensor([3, 900]), torch.ones(2, 5, dtype=torch.bool)
    base: Any = architecture_of(start).load_denoiser(start)
    with torch.no_grad():
        expected = base(noisy, timesteps, embeds, encoder_attention_mask=mask).sample
    text = Conditioning(tensors={"embeds": embeds, "mask": mask})
    predicted = policy(noisy, timesteps, text, torch.zeros(2))
    torch.testing.assert_close(predicted.reference_BX, expected, rtol=0, atol=0)
    assert not predicted.reference_BX.requires_grad
    assert (predicted.policy_BX - expected).abs().max() > 1e-3
    predicted.policy_BX.sum().backward()
    learned = {name for name, p in policy.named_parameters() if p.grad is not None}
    assert learned == policy.learned
    merged = policy.merged()
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]
    with torch.no_grad():
        served = merged(noisy, timesteps, embeds, encoder_attention_mask=mask).sample
    torch.testing.assert_close(served, predicted.policy_BX, rtol=1e-4, atol=1e-5)


def test_an_adapter_run_starts_at_log_2_and_is_merged_into_plain_weights(
    start: Path, pairs: Path, tmp_path: Path
) -> None:
    # In bfloat16: a weight that autocast casts in the reference's pass must not be kept for the policy's.
    loop = replace(SHORT, mixed_precision="bf16")
    config = dpo(start, pairs, lora=LoraConfig(rank=2), loop=loop, gradient_checkpointing=True)
    report = train_dpo(config, tmp_path / "model")
    rows = rows_of(tmp_path / "model")
    assert rows[0]["loss"] == pytest.approx(math.log(2)) and rows[0]["norm"] > 0
    assert report["parameters"]["learn"] < report["parameters"]["all"] / 10
    before, after = _weights(start), _weights(tmp_path / "model")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("attn" in name for name in changed)
    (checkpoint,) = sorted((tmp_path / "model.run" / "checkpoints").iterdir())[-1:]
    held = torch.load(checkpoint / "state.pt", weights_only=True)["module"]
    assert all("lora_" in name for name in held)


def test_frozen_means_frozen(start: Path, pairs: Path) -> None:
    config = dpo(start, pairs)
    policy = build_policy(config, resolve(config.start), resolve(config.start)).train()
    assert policy.reference is not None and not policy.reference.training
    assert policy.learned == {name for name, _ in policy.named_parameters() if name.startswith("denoiser.")}
    with pytest.raises(Exception, match="of another denoiser"):
        policy.load_state_dict({"denoiser.conv_in.bias": torch.zeros(8)})
    assert Policy(nn.Linear(1, 1), None, policy.denoise).reference is None


def test_run_again_it_does_nothing_anew_and_refuses_other_settings_or_data(
    trained: Path, start: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = verify_manifest(trained).digest

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("training.finetuning.dpo.fit", refuse)
    assert train_dpo(dpo(start, pairs), trained)["steps"] == LOOP.steps
    assert verify_manifest(trained).digest == before
    with pytest.raises(InvalidInputError, match=r"beta was 500.0, is 100.0"):
        train_dpo(dpo(start, pairs, beta=100.0), trained)
    content = pairs.read_bytes()
    try:
        some_pairs(pairs, 11)
        with pytest.raises(InvalidInputError, match="data_digests was"):
            train_dpo(dpo(start, pairs), trained)
    finally:
        pairs.write_bytes(content)


def test_epochs_decide_the_number_of_steps(start: Path, pairs: Path, tmp_path: Path) -> None:
    report = train_dpo(dpo(start, pairs.parent, epochs=2.0), tmp_path / "model")
    assert report["steps"] == math.ceil(2 * 10 / LOOP.batch)


def test_a_reference_of_another_architecture_is_refused(start: Path, pairs: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", seed=1, name="other")
    config = json.loads((other / "unet" / "config.json").read_text())
    config["attention_head_dim"] = 4
    (other / "unet" / "config.json").write_text(json.dumps(config))
    write_manifest(other, name="other", version="1", license="Apache-2.0")
    message = r"other has another architecture than the start tiny \(unet.attention_head_dim is 4, not 2\)"
    with pytest.raises(InvalidInputError, match=message):
        train_dpo(dpo(start, pairs, reference=f"file:{other}"), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_another_reference_of_the_same_architecture_is_used(start: Path, pairs: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", seed=1)
    train_dpo(dpo(start, pairs, reference=f"file:{other}", loop=SHORT), tmp_path / "model")
    assert rows_of(tmp_path / "model")[0]["chosen_drift"] != 0
    config = dpo(start, pairs, reference=f"file:{other}", lora=LoraConfig(rank=2))
    with pytest.raises(InvalidInputError, match="reference: is another model than start"):
        train_dpo(config, tmp_path / "lora")


def test_no_pair_left_is_a_clear_error(start: Path, pairs: Path, tmp_path: Path) -> None:
    broken = write_pairs(tmp_path / "broken.parquet", [(b"x", clip(0)), (clip(1), b"y")])
    data = PairData(pairs=(broken,), max_unreadable=1.0)
    with pytest.raises(InvalidInputError, match=r"no example is left: .* 4 clips"):
        train_dpo(dpo(start, broken, data=data), tmp_path / "a")
    with pytest.raises(InvalidInputError, match="2 of 4 clips can't be read, at most 5% may be"):
        train_dpo(dpo(start, broken), tmp_path / "b")
    some = write_pairs(tmp_path / "some.parquet", [(b"x", clip(0)), (clip(1), clip(2))])
    data = PairData(pairs=(some,), max_unreadable=0.5)
    report = train_dpo(dpo(start, some, data=data, loop=SHORT), tmp_path / "c")
    assert report["data"]["examples"] == 1 and len(report["data"]["unreadable"]) == 1


def test_equal_silent_and_cut_clips_are_in_the_report(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    silence = clip(2)[:44] + bytes(len(clip(2)) - 44)
    cut = clip(3)[: len(clip(3)) // 2]
    odd = [(clip(0), clip(0)), (silence, clip(1)), (clip(1), clip(2)), (cut, clip(0))]
    path = write_pairs(tmp_path / "odd.parquet", odd)
    data = PairData(pairs=(path,), max_unreadable=0.5)
    report = train_dpo(dpo(start, path, data=data, loop=SHORT), tmp_path / "model")["data"]
    assert (report["examples"], report["equal_pairs"], report["silent_chosen"]) == (3, 1, 1)
    (reason,) = report["unreadable"].values()
    assert reason.startswith("is cut short: as WAV")
    err = capsys.readouterr().err
    assert "warning: 1 of 3 pairs have equal clips" in err and "warning: 1 of 3 clips to learn" in err


def test_unusable_prompts_are_left_out_by_row_up_to_the_limit(start: Path, tmp_path: Path) -> None:
    clips = [(clip(number), clip(100 + number)) for number in range(4)]
    bad = write_pairs(tmp_path / "bad.parquet", clips, ["A dog barks", None, "A bell rings", "Birds sing"])
    with pytest.raises(InvalidInputError, match=r"1 of 4 prompts are .*: bad\.parquet, row 1: has no"):
        train_dpo(dpo(start, bad), tmp_path / "a")
    data = PairData(pairs=(bad,), max_unreadable=0.25)
    report = train_dpo(dpo(start, bad, data=data, loop=SHORT), tmp_path / "b")
    assert report["data"]["examples"] == 3
    assert report["data"]["unusable_prompts"] == {"bad.parquet, row 1": "has no prompt"}
    none = write_pairs(tmp_path / "none.parquet", clips, [None, " "])
    with pytest.raises(InvalidInputError, match="4 of 4 prompts are unusable"):
        train_dpo(dpo(start, none), tmp_path / "c")
    data = PairData(pairs=(none,), max_unreadable=1.0)
    with pytest.raises(InvalidInputError, match="no example is left"):
        train_dpo(dpo(start, none, data=data), tmp_path / "d")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data": PairData()}, InvalidInputError, "data.pairs: is empty; give Parquet files"),
        ({"start": "file:/nowhere"}, ModelNotFoundError, "is no folder"),
        ({"lora": LoraConfig(rank=2, targets=("nothing",))}, InvalidInputError, "lora.targets: is nothing"),
        ({"loop": replace(LOOP, accumulation=3)}, InvalidInputError, "batch: is 8, must be a multiple"),
    ],
)
def test_what_can_not_be_trained_is_one_clear_line(
    start: Path, pairs: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        train_dpo(replace(dpo(start, pairs), **changes), tmp_path / "model")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_only_v_prediction_can_be_trained(pairs: Path, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "start")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace("v_prediction", "epsilon"))
    write_manifest(folder, name="tiny", version="1", license="Apache-2.0")
    with pytest.raises(ModelFormatError, match="predicts 'epsilon'; only v_prediction"):
        train_dpo(dpo(folder, pairs), tmp_path / "model")


def test_a_folder_with_something_else_is_left_alone(start: Path, pairs: Path) -> None:
    before = verify_manifest(start).digest
    with pytest.raises(OutputError, match="was not made by a training; give another --output"):
        train_dpo(dpo(start, pairs), start)
    assert verify_manifest(start).digest == before


def test_a_full_disk_leaves_no_half_model(
    start: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.finetuning.session.shutil.copytree", full)
    with pytest.raises(OutputError, match="No space left on device; make room"):
        train_dpo(dpo(start, pairs, loop=SHORT), tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.run"]
    monkeypatch.undo()
    train_dpo(dpo(start, pairs, loop=SHORT), tmp_path / "model")
    verify_manifest(tmp_path / "model")


@pytest.mark.parametrize(
    "wrong", [{"beta": 0.0}, {"chosen_weight": -1.0}, {"epochs": -1.0}, {"lora": {"rank": -1}}]
)
def test_settings_that_can_not_be(start: Path, pairs: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        dpo(start, pairs, **{k: LoraConfig(**v) if k == "lora" else v for k, v in wrong.items()})


def test_the_chosen_clips_own_loss_joins_with_its_weight(start: Path, pairs: Path, tmp_path: Path) -> None:
    loop: LoopConfig = replace(SHORT, steps=1)
    train_dpo(dpo(start, pairs, loop=loop, chosen_weight=2.0), tmp_path / "model")
    (row,) = rows_of(tmp_path / "model")
    assert row["loss"] == pytest.approx(math.log(2) + 2 * row["chosen_error"])
