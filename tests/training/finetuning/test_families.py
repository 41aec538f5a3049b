"""Fine-tuning of a second family: a flow's objective, CRPO, adapters, resumption."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from services.errors import InvalidInputError
from services.models.architectures import load_generator
from services.models.latent import LatentPipeline
from services.models.manifest import verify_manifest, write_manifest
from services.weights.uri import resolve
from tests.tiny import tiny_tangoflux
from tests.training.finetuning.finetune_program import LOOP, dpo, losses_of, rows_of, some_pairs, write_model
from training.data.captions import CaptionExample
from training.finetuning import sft as sft_module
from training.finetuning.baton import BatonData, train_baton
from training.finetuning.dpo import train_dpo
from training.finetuning.session import LoraConfig, PairData, build_policy, open_session, readable
from training.finetuning.sft import SftTraining, train_sft
from training.loop.fit import examples_at
from training.objectives.noising import NoisingConfig
from training.runs.recipes import baton_smoke, sft_smoke

SHORT = replace(LOOP, steps=2)
FLOW = NoisingConfig(density="logit_normal")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models") / "flux"
    tiny_tangoflux().save_pretrained(folder)
    write_manifest(folder, name="flux", version="1", license="Apache-2.0")
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return some_pairs(tmp_path_factory.mktemp("data") / "pairs.parquet")


@pytest.fixture(scope="module")
def sft(start: Path, pairs: Path) -> SftTraining:
    data = PairData(pairs=(pairs,))
    return replace(sft_smoke(), start=f"file:{start}", data=data, loop=LOOP, noising=FLOW)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def _velocity(pipeline: LatentPipeline) -> torch.Tensor:
    text = pipeline.encode(["a dog barks"], length=16)
    return pipeline.predict(torch.ones(1, 40, 4), torch.tensor([500.0]), text, torch.tensor([0.64]))


def test_sft_lowers_the_flow_error_and_writes_a_generator(
    sft: SftTraining, start: Path, tmp_path: Path
) -> None:
    loop = replace(LOOP, steps=16, learning_rate=3e-3, checkpoint_seconds=1e9)
    report = train_sft(replace(sft, loop=loop), tmp_path / "model")
    losses = losses_of(tmp_path / "model")
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    assert report["stage"] == "sft" and report["parameters"]["learn"] == report["parameters"]["all"]
    before, after = verify_manifest(start), verify_manifest(tmp_path / "model")
    changed = {path for path, _ in before.files.items() ^ after.files.items()}
    assert changed == {"transformer/diffusion_pytorch_model.safetensors", "training.json"}
    assert "flow-matching" in (tmp_path / "model" / "README.md").read_text()
    ours, theirs = (_velocity(load_generator(folder)) for folder in (tmp_path / "model", start))
    assert torch.isfinite(ours).all() and not torch.equal(ours, theirs)


def test_the_loss_is_the_flow_error_worked_out_from_the_definition(sft: SftTraining, tmp_path: Path) -> None:
    session, _ = open_session(sft, tmp_path / "model", sft.data.files(), {}, fresh=False)
    read = [CaptionExample(clip=pair.chosen, caption=pair.prompt) for pair in sft.data.read()]
    examples, _ = readable(read, lambda one: [one.clip], lambda one: one.caption, session, 0.0)
    policy = build_policy(sft, session.start)
    positions = np.arange(8)
    unweighted = replace(sft, noising=replace(FLOW, condition_dropout=0.0))
    session = replace(session, config=unweighted)
    with torch.no_grad():
        loss, _ = sft_module.loss_of(
            policy, positions, config=unweighted, batch=8, examples=examples, session=session
        )
        picked = [examples[index] for index in examples_at(positions, len(examples), sft.loop.seed)]
        clean = session.latents.clips([example.clip for example in picked])
        drawn = session.noising(positions, clean, 8)
        share = drawn.timesteps_B[:, None, None] / 1000
        text = session.latents.text([example.caption for example in picked])
        predicted = policy.denoiser(
            (1 - share) * clean + share * drawn.noise_BX,
            drawn.timesteps_B,
            text["embeds"],
            text["mask"],
            torch.full((8,), 0.64),
        )
        expected = ((predicted - (drawn.noise_BX - clean)) ** 2).mean()
    assert drawn.timesteps_B.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_crpo_begins_at_log_2_plus_the_chosen_error_and_resumes(
    start: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dpo(start, pairs, chosen_weight=1.0, noising=FLOW)
    train_dpo(config, tmp_path / "whole")
    first, *_, last = rows_of(tmp_path / "whole")
    assert first["loss"] == pytest.approx(math.log(2) + first["chosen_error"], rel=1e-6)
    assert (first["margin"], first["accuracy"], first["chosen_drift"]) == (0, 0.5, 0)
    assert last["chosen_drift"] != 0
    inner = train_dpo.__globals__["loss_of"]

    def stop_at_4(policy, positions, **rest):  # type: ignore[no-untyped-def]
        if int(positions[0]) // LOOP.batch == 4:
            raise KeyboardInterrupt
        return inner(policy, positions, **rest)

    monkeypatch.setitem(train_dpo.__globals__, "loss_of", stop_at_4)
    with pytest.raises(KeyboardInterrupt):
        train_dpo(config, tmp_path / "parts")
    monkeypatch.setitem(train_dpo.__globals__, "loss_of", inner)
    train_dpo(config, tmp_path / "parts")
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "whole")
    ours, theirs = _weights(tmp_path / "parts"), _weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_adapters_learn_alongside_the_transformer_and_are_merged(
    start: Path, pairs: Path, tmp_path: Path
) -> None:
    config = dpo(start, pairs, lora=LoraConfig(rank=2), loop=SHORT, noising=FLOW, gradient_checkpointing=True)
    policy = build_policy(config, resolve(config.start), resolve(config.start))
    assert policy.learned and all("lora_" in name for name in policy.learned)
    report = train_dpo(config, tmp_path / "model")
    assert rows_of(tmp_path / "model")[0]["loss"] == pytest.approx(math.log(2))
    assert 0 < report["parameters"]["learn"] < report["parameters"]["all"] / 5
    before, after = _weights(start), _weights(tmp_path / "model")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("attn" in name for name in changed)
    verify_manifest(tmp_path / "model")
    assert torch.isfinite(_velocity(load_generator(tmp_path / "model"))).all()


def test_min_snr_and_baton(sft: SftTraining, start: Path, pairs: Path, tmp_path: Path) -> None:
    train_sft(replace(sft, loop=SHORT, min_snr=5.0), tmp_path / "snr")
    rows = rows_of(tmp_path / "snr")
    assert len(rows) == SHORT.steps
    assert all(0 < row["loss"] < row["chosen_error"] for row in rows)
    data = BatonData(pairs=(pairs,), scenes=3)
    baton = replace(baton_smoke(), start=f"file:{start}", data=data, loop=SHORT, noising=FLOW)
    assert train_baton(baton, tmp_path / "baton")["data"]["examples"] == 20


def test_a_reference_of_another_family_is_refused(start: Path, pairs: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other")
    message = "reference: tiny is a TangoPipeline, and the start flux a TangoFluxPipeline"
    with pytest.raises(InvalidInputError, match=message):
        train_dpo(dpo(start, pairs, reference=f"file:{other}"), tmp_path / "model")


def test_latents_hold_the_clip_and_its_duration(sft: SftTraining, tmp_path: Path) -> None:
    session, _ = open_session(sft, tmp_path / "model", sft.data.files(), {}, fresh=False)
    assert session.latents.seconds == 0.64
    pairs = sft.data.read()
    session.latents.add([pair.chosen for pair in pairs], [])
    latents = session.latents.clips([pair.chosen for pair in pairs])
    assert latents.shape == (10, 40, 4)
    # Ten frames of sound, and silence after them, which is the same for all.
    assert torch.equal(latents[0, 20:], latents[1, 20:]) and not torch.equal(latents[0, :10], latents[1, :10])
    index = json.loads((resolve(sft.start).folder / "model_index.json").read_text())
    assert index["default_duration"] == 0.64
