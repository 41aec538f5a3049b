"""Released checkpoints: every format, every key, and files that are hostile, damaged or do not fit."""

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from services.errors import ModelFormatError, ModelNotFoundError, OutputError
from services.models.captioner.checkpoint import convert_captioner
from services.models.captioner.eat import EatEncoder
from services.models.captioner.eat_checkpoint import load_eat
from services.models.captioner.language import save_adapter
from services.models.captioner.model import Captioner
from services.models.foreign_pickle import read_foreign_pickle
from services.models.lora import LoraSettings
from services.models.manifest import verify_manifest
from tests.services.models.captioner.released import (
    CAPTIONS,
    Exploit,
    eat_weights,
    projector_weights,
    write_eat,
    write_legacy,
    write_released,
)

NORM = "model.blocks.0.norm1.bias"
"""A key of EAT."""


def convert(released: Path, target: Path, **options: Any) -> Path:
    options = {"language_model": str(released / "llm"), "heads": 4, **options}
    return convert_captioner(released / "eat.pt", released / "model.pt", target, **options)


@pytest.fixture
def own(released: Path, tmp_path: Path) -> Path:
    """A copy of the released checkpoint, to damage."""
    return Path(shutil.copytree(released, tmp_path / "released"))


def same(found: EatEncoder, wanted: EatEncoder) -> bool:
    ours, theirs = found.state_dict(), wanted.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


# ------------------------------------------------------------------------------------------------- EAT


def pretrained_weights() -> dict[str, Any]:
    """Keys of a pre-trained file: no first ``model.``, with decoder, teacher and projections."""
    inner = {
        key.removeprefix("model."): value
        for key, value in eat_weights().items()
        if not key.startswith(("head.", "fc_norm."))
    }
    return {
        **inner,
        "modality_encoders.IMAGE.decoder.blocks.0.0.weight": torch.ones(2),
        "cls_proj.weight": torch.ones(2, 2),
        "_ema": {"blocks.0.norm1.weight": torch.ones(64)},
    }


def hub_weights() -> dict[str, Tensor]:
    """Keys of the hub's layout."""
    renamed = {}
    for key, value in eat_weights().items():
        if key.startswith(("head.", "fc_norm.")):
            renamed[f"model.{key}"] = value
        else:
            short = key.replace("modality_encoders.IMAGE.", "").replace("context_encoder.norm", "pre_norm")
            renamed[short] = value
    return renamed


def write_hub(folder: Path, *, pickled: bool = False) -> Path:
    folder.mkdir()
    config = {"model_type": "eat", "num_heads": 4, "embed_dim": 64, "depth": 2}
    (folder / "config.json").write_text(json.dumps(config))
    if pickled:
        torch.save(hub_weights(), folder / "pytorch_model.bin")
    else:
        save_file(hub_weights(), folder / "model.safetensors")
    return folder


def test_every_layout_of_eat_gives_the_same_encoder(
    released: Path, converted: Captioner, tmp_path: Path
) -> None:
    heads = 4
    found = [
        load_eat(released / "eat.pt", heads),
        load_eat(write_eat(tmp_path / "pretrained.pt", pretrained_weights()), heads),
        load_eat(write_legacy(tmp_path / "old.pt", {"cfg": None, "model": eat_weights()}), heads),
        load_eat(write_hub(tmp_path / "hub")),
        load_eat(write_hub(tmp_path / "pickled", pickled=True)),
    ]
    assert all(same(one, converted.encoder) for one in found)
    assert {one.config for one in found} == {converted.encoder.config}


def test_heads_are_64_wide_unless_stated(released: Path) -> None:
    assert load_eat(released / "eat.pt").config.heads == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w.pop("model.blocks.1.mlp.fc2.bias"), r"missing keys: blocks\.1\.mlp\.fc2\.bias"),
        (lambda w: w.pop("model.modality_encoders.IMAGE.extra_tokens"), r"missing keys: class_token"),
        (lambda w: w.update({"model.norm.weight": torch.ones(64)}), r"unknown keys: norm\.weight"),
        (
            lambda w: w.update({"model.blocks.0.norm1.bias": torch.ones(3)}),
            r"blocks\.0\.norm1\.bias is \[3\]",
        ),
        (
            lambda w: w.update({"model.blocks.0.norm1.bias": "text"}),
            r"without a tensor: blocks\.0\.norm1\.bias",
        ),
        (lambda w: w["model.blocks.0.norm1.bias"].fill_(torch.nan), "NaN or infinity"),
        (
            lambda w: w.update({"model.blocks.0.norm1.bias": w["model.blocks.0.norm1.bias"].int()}),
            r"blocks\.0\.norm1\.bias has int32, not floats",
        ),
    ],
)
def test_every_key_of_eat_is_accounted_for(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], says: str
) -> None:
    weights: dict[str, Any] = dict(eat_weights())
    change(weights)
    with pytest.raises(ModelFormatError, match=says):
        load_eat(write_eat(tmp_path / "eat.pt", weights), 4)


def test_other_models_are_not_read_as_eat(tmp_path: Path) -> None:
    torch.save({"state": 1}, tmp_path / "other.pt")
    with pytest.raises(ModelFormatError, match="no EAT checkpoint"):
        load_eat(tmp_path / "other.pt")
    folder = write_hub(tmp_path / "hub")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelFormatError, match="holds a llama model"):
        load_eat(folder)
    with pytest.raises(ModelNotFoundError):
        load_eat(tmp_path / "nothing.pt")


# ----------------------------------------------------------------------------------------- hostile files


@pytest.mark.parametrize("legacy", [False, True])
def test_no_code_of_a_checkpoint_runs(tmp_path: Path, legacy: bool) -> None:
    path, trace = tmp_path / "eat.pt", tmp_path / "it ran"
    data = {"cfg": Exploit(trace), "model": {**eat_weights(), "_ema": [Exploit(trace)]}}
    if legacy:
        write_legacy(path, data)
    else:
        torch.save(data, path)
    assert load_eat(path, 4).config.depth == 2
    assert not trace.exists()
    # The file does run code where it is unpickled.
    unpickled(path)
    assert trace.exists()


@pytest.mark.parametrize("name", ["_rebuild_tensor_v2", "_import_dotted_name"])
def test_nothing_outside_the_file_is_changed(tmp_path: Path, name: str) -> None:
    """A pickle may set attributes of what it names: here of a function of torch."""
    whole, path = tmp_path / "whole.pt", tmp_path / "eat.pt"
    torch.save({"model": {}}, whole)
    build = f"\x80\x02}}Vmodel\nctorch._utils\n{name}\n(N}}V__defaults__\n(I1\nI2\ntstbs.".encode("latin-1")
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w") as target:
        for entry in source.namelist():
            target.writestr(entry, build if entry.endswith("data.pkl") else source.read(entry))
    with pytest.raises(ModelFormatError, match=r"eat\.pt"):
        load_eat(path)
    assert torch._utils._rebuild_tensor_v2.__defaults__ == (None,)
    # Where it is unpickled, it does change the function.
    assert "(1, 2)" in unpickled(path, f"print(torch._utils.{name}.__defaults__)")


def unpickled(path: Path, then: str = "") -> str:
    """What a process prints that loads `path` with all its code."""
    program = f"import torch; torch.load({str(path)!r}, weights_only=False); {then}"
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout


def test_programs_and_archives_are_refused(tmp_path: Path) -> None:
    class Double(torch.nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return 2 * value

    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.save(torch.jit.script(Double()), tmp_path / "program.pt")
    with pytest.raises(ModelFormatError, match="TorchScript"):
        read_foreign_pickle(tmp_path / "program.pt")
    for name, content in (("cut.pt", b"\x80\x02}q"), ("text.pt", b"not a checkpoint")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelFormatError, match=name):
            read_foreign_pickle(tmp_path / name)


def test_hostile_trained_weights_are_refused(own: Path, tmp_path: Path) -> None:
    trace = tmp_path / "it ran"
    torch.save({**projector_weights(), "x": Exploit(trace)}, own / "model.pt")
    with pytest.raises(ModelFormatError, match="could run code"):
        convert(own, tmp_path / "out")
    assert not trace.exists() and not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------- adapters


@pytest.fixture(scope="module")
def adapted(converted_folder: Path) -> Captioner:
    """The converted model with random adapters, unmerged."""
    captioner = Captioner.from_pretrained(converted_folder, merge=False)
    captioner.prepare_training(LoraSettings())
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(captioner.named_parameters()):
            if ".lora_" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(seed))
    return captioner.eval()


def inside(captioner: Captioner) -> dict[str, Tensor]:
    """``model.pt`` of today's upstream: projector and adapters."""
    adapters = {
        "llm." + name.removeprefix("language_model."): value
        for name, value in captioner.trainable_state().items()
        if ".lora_" in name
    }
    assert "llm.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight" in adapters
    return {**projector_weights(), **adapters}


def write_peft(captioner: Captioner, folder: Path, *, pickled: bool = False) -> Path:
    save_adapter(captioner.language_model, folder)
    if pickled:
        weights = folder / "adapter_model.safetensors"
        torch.save(load_file(weights), folder / "adapter_model.bin")
        weights.unlink()
    return folder


@pytest.mark.parametrize("place", ["inside", "folder", "pickled folder"])
def test_adapters_inside_and_next_to_the_checkpoint(
    own: Path, adapted: Captioner, tmp_path: Path, place: str
) -> None:
    if place == "inside":
        torch.save(inside(adapted), own / "model.pt")
        folder = convert(own, tmp_path / "out")
    else:
        peft = write_peft(adapted, tmp_path / "peft", pickled=place == "pickled folder")
        folder = convert(own, tmp_path / "out", peft=peft)
    verify_manifest(folder)
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    mels = torch.zeros(1, 1024, 128)
    with torch.no_grad():
        wanted = adapted(mels, CAPTIONS[:1]).logits_BLV
        for merge in (False, True):
            found = Captioner.from_pretrained(folder, merge=merge)(mels, CAPTIONS[:1]).logits_BLV
            assert torch.allclose(found, wanted, atol=1e-4)
        # With another alpha, or without the folder of adapters, it is another model.
        changed = {"lora_alpha": 8.0} if place == "inside" else {}
        other = Captioner.from_pretrained(convert(own, tmp_path / "other", **changed))
        assert not torch.allclose(other(mels, CAPTIONS[:1]).logits_BLV, wanted, atol=1e-3)


def test_adapters_in_both_places_are_refused(own: Path, adapted: Captioner, tmp_path: Path) -> None:
    torch.save(inside(adapted), own / "model.pt")
    peft = write_peft(adapted, tmp_path / "peft")
    with pytest.raises(ModelFormatError, match="holds adapters itself"):
        convert(own, tmp_path / "out", peft=peft)


def _drop_adapter(weights: dict[str, Tensor]) -> None:
    del weights["llm.base_model.model.model.layers.1.self_attn.v_proj.lora_B.default.weight"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w.pop("encoder_projector.linear2.bias"), r"missing keys: linear2\.bias"),
        (lambda w: w.update({"encoder_projector.norm.bias": torch.ones(2)}), r"unknown keys: norm\.bias"),
        (lambda w: w.update({"decoder.bias": torch.ones(2)}), r"unknown keys: decoder\.bias"),
        (lambda w: w.update({"llm.lm_head.weight": torch.ones(2)}), r"unknown keys: llm\.lm_head\.weight"),
        (_drop_adapter, r"missing keys: .*layers\.1\.self_attn\.v_proj\.lora_B"),
        (lambda w: w["encoder_projector.linear2.bias"].fill_(torch.inf), "NaN or infinity"),
        (
            lambda w: w.update({"encoder_projector.linear2.bias": w["encoder_projector.linear2.bias"].int()}),
            r"linear2\.bias has int32, not floats",
        ),
        (lambda w: w.update({"epoch": 3}), "must map names to tensors"),
    ],
)
def test_every_trained_key_is_accounted_for(
    own: Path, adapted: Captioner, tmp_path: Path, change: Callable[[dict[str, Any]], Any], says: str
) -> None:
    weights: dict[str, Any] = inside(adapted)
    change(weights)
    torch.save(weights, own / "model.pt")
    with pytest.raises(ModelFormatError, match=says):
        convert(own, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------- parts that don't fit


def test_a_projector_of_another_encoder_or_language_model_is_refused(own: Path, tmp_path: Path) -> None:
    weights = projector_weights()
    wide = {**weights, "encoder_projector.linear1.weight": torch.zeros(2048, 3840)}
    torch.save(wide, own / "model.pt")
    with pytest.raises(
        ModelFormatError, match="takes 3840 features, but 5 encoder tokens of width 64 have 320"
    ):
        convert(own, tmp_path / "out")
    deep = {**weights, "encoder_projector.linear2.weight": torch.zeros(4096, 2048)}
    torch.save({**deep, "encoder_projector.linear2.bias": torch.zeros(4096)}, own / "model.pt")
    with pytest.raises(ModelFormatError, match="width 4096, but the language model's have 32"):
        convert(own, tmp_path / "out")


def _drop(path: Path, key: str) -> None:
    weights = load_file(path)
    del weights[key]
    save_file(weights, path)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            lambda llm: _drop(llm / "model.safetensors", "model.norm.weight"),
            "missing keys: model.norm.weight",
        ),
        (lambda llm: (llm / "model.safetensors").unlink(), "can't be loaded"),
        (lambda llm: (llm / "config.json").write_text('{"model_type": "eat"}'), "causal language model"),
        (lambda llm: [path.unlink() for path in llm.glob("tokenizer*")], "tokenizer"),
    ],
)
def test_language_models_that_are_not_complete_are_refused(
    own: Path, tmp_path: Path, damage: Callable[[Path], Any], says: str
) -> None:
    damage(own / "llm")
    with pytest.raises(ModelFormatError, match=says):
        convert(own, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_language_model_of_pickles_becomes_safetensors(own: Path, tmp_path: Path) -> None:
    """As Vicuna is published, with constants of old classes, in half precision."""
    path = own / "llm" / "model.safetensors"
    weights = {key: value.half() for key, value in load_file(path).items()}
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    torch.save(weights, own / "llm" / "pytorch_model.bin")
    path.unlink()
    config = json.loads((own / "llm" / "config.json").read_text()) | {"torch_dtype": "float16"}
    (own / "llm" / "config.json").write_text(json.dumps(config))
    folder = convert(own, tmp_path / "out")
    written = load_file(folder / "language_model" / "model.safetensors")
    assert written.keys() == weights.keys() - {"model.layers.0.self_attn.rotary_emb.inv_freq"}
    assert all(torch.equal(value, weights[key]) for key, value in written.items())
    assert not list(folder.rglob("*.bin"))
    assert {p.dtype for p in Captioner.from_pretrained(folder).parameters()} == {torch.float32}


def test_missing_files_and_an_existing_target_are_named(released: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="nothing is not a folder; give one, or hf:lmsys/vicuna-7b"):
        convert(released, tmp_path / "out", language_model=str(tmp_path / "nothing"))
    with pytest.raises(ModelNotFoundError, match=r"peft does not exist"):
        convert(released, tmp_path / "out", peft=tmp_path / "peft")
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        convert(released, tmp_path / "out")


def test_a_converted_folder_has_its_manifest(released: Path, converted_folder: Path, tmp_path: Path) -> None:
    manifest = verify_manifest(converted_folder)
    assert manifest.name == "slam" and manifest.version == "1"
    again = convert(released, tmp_path / "slam")
    assert verify_manifest(again).digest == manifest.digest
    stages: list[str] = []
    convert(write_released(tmp_path / "more"), tmp_path / "other", progress=stages.append, name="slam-aac")
    assert stages == ["audio encoder", "trained weights", "language model", "model folder"]
    assert verify_manifest(tmp_path / "other").name == "slam-aac"
