"""Conversion of released checkpoints: every key accounted for, and nothing half-made."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from services.errors import ModelFormatError, ModelNotFoundError, OutputError
from services.models.manifest import verify_manifest
from services.models.tango import checkpoint as tc
from services.models.tango.loading import load_tango
from tests.services.models.tango.released import keys_and_shapes, named_tensor

STFT_CONFIG = {"filter_length": 1024, "hop_length": 160, "win_length": 1024, "n_mel_channels": 64,
               "sampling_rate": 16_000, "mel_fmin": 0, "mel_fmax": 8000}  # fmt: skip
VAE_CONFIG = {
    "embed_dim": 8,
    "scale_factor": 0.9227914214134216,
    "ddconfig": {
        "double_z": True,
        "z_channels": 8,
        "resolution": 256,
        "downsample_time": False,
        "in_channels": 1,
        "out_ch": 1,
        "ch": 128,
        "ch_mult": [1, 2, 4],
        "num_res_blocks": 2,
        "attn_resolutions": [],
    },
}
FLAN_T5_LARGE = T5Config(
    d_model=1024,
    d_ff=2816,
    d_kv=64,
    num_heads=16,
    num_layers=24,
    vocab_size=32_128,
    feed_forward_proj="gated-gelu",
)


@pytest.fixture(scope="module")
def fullsize() -> dict[str, dict[str, Tensor]]:
    """Everything that the released files hold, at full size and without memory."""
    return {
        file: {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        for file, shapes in keys_and_shapes("fullsize_keys").items()
    }


def parameters(module: torch.nn.Module) -> float:
    """Millions of parameters."""
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


def test_every_released_key_and_shape_fits(fullsize: dict[str, dict[str, Tensor]]) -> None:
    assert [len(fullsize[name]) for name in (tc.MAIN, tc.VAE, tc.STFT)] == [906, 398, 3]
    main, vae = tc.split_main(fullsize[tc.MAIN]), tc.split_vae(fullsize[tc.VAE])
    assert len(main["unet"]) == 686 and len(main["text_encoder"]) == 220
    assert len(vae["vae"]) == 204 and len(vae["vocoder"]) == 194
    sizes = (
        parameters(tc.build_unet(tc.UNET_CONFIG, main["unet"])),
        parameters(tc.build_text_encoder(FLAN_T5_LARGE, main["text_encoder"])),
        parameters(tc.build_vae(VAE_CONFIG, vae["vae"])),
        parameters(tc.build_vocoder(STFT_CONFIG, vae["vocoder"])),
    )
    assert [round(size) for size in sizes] == [866, 341, 55, 55]
    tc.check_stft(STFT_CONFIG, fullsize[tc.STFT])


def _convert_all(weights: dict[str, dict[str, Tensor]]) -> None:
    main, vae = tc.split_main(weights[tc.MAIN]), tc.split_vae(weights[tc.VAE])
    tc.check_stft(STFT_CONFIG, weights[tc.STFT])
    tc.build_vocoder(STFT_CONFIG, vae["vocoder"])
    tc.build_vae(VAE_CONFIG, vae["vae"])
    tc.build_text_encoder(FLAN_T5_LARGE, main["text_encoder"])
    tc.build_unet(tc.UNET_CONFIG, main["unet"])


@pytest.mark.parametrize(
    ("file", "key", "shown"),
    [
        (tc.MAIN, "unet.conv_out.bias", "conv_out.bias"),
        (tc.MAIN, "text_encoder.encoder.final_layer_norm.weight", "encoder.final_layer_norm.weight"),
        (tc.VAE, "decoder.up.2.upsample.conv.weight", "decoder.up_blocks.0.upsamplers.0.conv.weight"),
        (tc.VAE, "encoder.mid.attn_1.q.bias", "encoder.mid_block.attentions.0.to_q.bias"),
        (tc.VAE, "vocoder.ups.3.bias", "upsampler.3.bias"),
        (tc.STFT, "stft_fn.inverse_basis", "stft_fn.inverse_basis"),
    ],
)
def test_missing_and_misshapen_keys_are_named(
    fullsize: dict[str, dict[str, Tensor]], file: str, key: str, shown: str
) -> None:
    rest = {name: tensor for name, tensor in fullsize[file].items() if name != key}
    with pytest.raises(ModelFormatError, match=f"1 missing keys: {shown}"):
        _convert_all({**fullsize, file: rest})
    with pytest.raises(ModelFormatError, match=rf"1 wrong shapes: {shown} is \[3, 5\]"):
        _convert_all({**fullsize, file: {**rest, key: torch.empty(3, 5, device="meta")}})


@pytest.mark.parametrize(
    ("file", "key"),
    [
        (tc.MAIN, "group_in.0.weight"),
        (tc.MAIN, "unet.extra.weight"),
        (tc.MAIN, "text_encoder.decoder.weight"),
        (tc.VAE, "loss.logvar"),
        (tc.VAE, "vocoder.mean"),
        (tc.VAE, "vocoder.conv_pre.weight_g"),
        (tc.STFT, "window"),
    ],
)
def test_unknown_keys_are_named(fullsize: dict[str, dict[str, Tensor]], file: str, key: str) -> None:
    more = {**fullsize[file], key: torch.empty(3, device="meta")}
    shown = key.removeprefix("unet.").removeprefix("text_encoder.").removeprefix("vocoder.")
    with pytest.raises(ModelFormatError, match=f"1 unknown keys: .*{shown}"):
        _convert_all({**fullsize, file: more})


def test_all_faults_are_listed_at_once(fullsize: dict[str, dict[str, Tensor]]) -> None:
    rest = {key: tensor for key, tensor in fullsize[tc.VAE].items() if not key.startswith("quant_conv")}
    rest["loss.logvar"] = torch.empty((), device="meta")
    with pytest.raises(ModelFormatError) as caught:
        _convert_all({**fullsize, tc.VAE: rest})
    assert "2 missing keys: quant_conv.weight, quant_conv.bias" in str(caught.value)
    assert "1 unknown keys: loss.logvar" in str(caught.value)


def test_either_name_of_the_tied_embedding_is_enough() -> None:
    config = T5Config(d_model=8, d_ff=8, d_kv=4, num_heads=2, num_layers=1, vocab_size=20)
    weights = {
        key: named_tensor(key, list(tensor.shape))
        for key, tensor in T5EncoderModel(config).state_dict().items()
        if key != "shared.weight"
    }
    encoder = tc.build_text_encoder(config, weights)
    assert torch.equal(encoder.shared.weight, weights["encoder.embed_tokens.weight"])
    assert encoder.shared.weight.data_ptr() == encoder.encoder.embed_tokens.weight.data_ptr()


def test_converted_folder_is_complete(released: Path, converted_folder: Path) -> None:
    files = [path for path in converted_folder.rglob("*") if path.is_file()]
    names = {path.relative_to(converted_folder).as_posix() for path in files}
    assert not [name for name in names if name.endswith((".bin", ".pt"))]
    assert {"model_index.json", "milonga.json", "unet/diffusion_pytorch_model.safetensors"} <= names
    manifest = verify_manifest(converted_folder)
    assert (manifest.name, manifest.version) == ("tango2-tiny", "1")
    assert "non-commercial" in manifest.license
    for path in converted_folder.rglob("*.json"):
        assert str(released.parent) not in path.read_text()
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in files)


def test_conversion_is_reproducible(released: Path, converted_folder: Path, tmp_path: Path) -> None:
    told: list[str] = []
    again = tmp_path / "new" / "again"
    tc.convert_checkpoint(released, again, text_encoder=str(released / "flan-t5-tiny"), progress=told.append)
    assert verify_manifest(again).digest == verify_manifest(converted_folder).digest
    assert told == ["mel filters", "autoencoder and vocoder", "text encoder", "denoiser", "manifest"]


def test_subset_of_main_config_is_enough(released: Path, tmp_path: Path) -> None:
    source = _copy(released, tmp_path)
    config = {"unet_model_config_path": "configs/diffusion_model_config.json"}
    (source / "main_config.json").write_text(json.dumps(config))
    target = tc.convert_checkpoint(source, tmp_path / "out", text_encoder=str(source / "flan-t5-tiny"))
    assert load_tango(target).geometry.latent_channels == 8


def test_unet_config_is_embedded(tmp_path: Path) -> None:
    assert tc.unet_config(tmp_path, {}) == dict(tc.UNET_CONFIG)
    config = {"unet_model_config_path": "configs/diffusion_model_xl_config.json"}
    assert tc.unet_config(tmp_path, config)["cross_attention_dim"] == 2048
    with pytest.raises(ModelFormatError, match=r"other\.json, which is unknown"):
        tc.unet_config(tmp_path, {"unet_model_config_path": "other.json"})


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


class _Hostile:
    """Would make a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self.path), "w")


def _copy(released: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(released, tmp_path / "source"))


def _truncate(source: Path) -> None:
    path = source / tc.MAIN
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _make_hostile(source: Path) -> None:
    (source / tc.VAE).write_bytes(pickle.dumps({"encoder.conv_in.weight": _Hostile(source / "executed")}))


def _replace(file: str, content: bytes) -> Callable[[Path], object]:
    return lambda source: (source / file).write_bytes(content)


def _poison(file: str, key: str, value: float) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        weights = torch.load(source / file, weights_only=True)
        weights[key].view(-1)[-1] = value
        torch.save(weights, source / file)

    return change


def _cast(file: str, key: str, dtype: torch.dtype) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        weights = torch.load(source / file, weights_only=True)
        torch.save({**weights, key: weights[key].to(dtype)}, source / file)

    return change


def _drop_key(source: Path) -> None:
    weights = torch.load(source / tc.MAIN, weights_only=True)
    del weights["unet.conv_in.bias"]
    torch.save(weights, source / tc.MAIN)


def _change_filters(source: Path) -> None:
    weights = torch.load(source / tc.STFT, weights_only=True)
    torch.save({**weights, "mel_basis": weights["mel_basis"] * 1.1}, source / tc.STFT)


def _set(file: str, key: str, value: object) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        config = json.loads((source / file).read_text())
        (source / file).write_text(json.dumps({**config, key: value}))

    return change


def _empty_vocabulary(source: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (source / "flan-t5-tiny" / name).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "whose end is missing (truncated)"),
        (_make_hostile, "no PyTorch checkpoint"),
        (_replace(tc.MAIN, POINTER), "pytorch_model_main.bin is a Git LFS pointer"),
        (_replace(tc.VAE, b"<!doctype html><title>Log in</title>"), "is a web page (HTML)"),
        (_replace(tc.STFT, b""), "pytorch_model_stft.bin is an empty file"),
        (_replace("vae_config.json", POINTER), "vae_config.json is a Git LFS pointer"),
        (_replace("flan-t5-tiny/tokenizer.json", POINTER), "tokenizer.json is a Git LFS pointer"),
        (_poison(tc.MAIN, "unet.conv_in.bias", float("nan")), "hold NaN or infinity (float32): unet.conv_in"),
        (_poison(tc.VAE, "vocoder.conv_pre.bias", float("-inf")), "1 of 346 tensors hold NaN"),
        (
            _cast(tc.MAIN, "unet.conv_in.bias", torch.int32),
            "unet: these weights are not this model's: 1 wrong ",
        ),
        (_cast(tc.MAIN, "unet.conv_in.bias", torch.int8), "conv_in.bias has int8, not floats"),
        (_cast(tc.MAIN, "unet.conv_in.bias", torch.float8_e4m3fn), "conv_in.bias has float8_e4m3fn, not"),
        (_cast(tc.VAE, "vocoder.conv_pre.bias", torch.bool), "conv_pre.bias has bool, not floats"),
        (_drop_key, "unet: these weights are not this model's: 1 missing keys: conv_in.bias"),
        (_change_filters, "mel_basis differs"),
        (_set("main_config.json", "unet_model_name", "stabilityai/sd"), "unet_model_name is"),
        (_set("main_config.json", "scheduler_name", "other"), "scheduler_name is 'other'"),
        (_set("vae_config.json", "time_shuffle", 2), "time_shuffle is 2"),
        (_set("vae_config.json", "ddconfig", None), "ddconfig is missing"),
        (_set("flan-t5-tiny/config.json", "model_type", "bert"), "holds a 'bert' model"),
        (_set("flan-t5-tiny/config.json", "vocab_size", 100), "159 tokens for 100 embeddings"),
        (_empty_vocabulary, "empty vocabulary"),
    ],
)
def test_damaged_checkpoint_is_refused(
    released: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    source = _copy(released, tmp_path)
    damage(source)
    with pytest.raises(ModelFormatError) as caught:
        tc.convert_checkpoint(source, tmp_path / "out", text_encoder=str(source / "flan-t5-tiny"))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert not (source / "executed").exists()


def test_every_pointer_of_a_clone_is_named_before_anything_is_converted(
    released: Path, tmp_path: Path
) -> None:
    source = _copy(released, tmp_path)
    for name in (tc.MAIN, tc.VAE, tc.STFT):
        (source / name).write_bytes(POINTER)
    stages: list[str] = []
    with pytest.raises(ModelFormatError) as caught:
        tc.convert_checkpoint(
            source, tmp_path / "out", text_encoder=str(source / "flan-t5-tiny"), progress=stages.append
        )
    assert str(caught.value).count("is a Git LFS pointer") == 3 and not stages


def test_missing_files_are_named(released: Path, tmp_path: Path) -> None:
    source = _copy(released, tmp_path)
    (source / "stft_config.json").unlink()
    (source / tc.VAE).unlink()
    with pytest.raises(ModelNotFoundError, match=r"stft_config\.json, pytorch_model_vae\.bin missing"):
        tc.convert_checkpoint(source, tmp_path / "out", text_encoder=str(source / "flan-t5-tiny"))
    with pytest.raises(ModelNotFoundError, match="is not a folder"):
        tc.convert_checkpoint(tmp_path / "nowhere", tmp_path / "out", text_encoder="flan")
    with pytest.raises(ModelNotFoundError, match="text encoder"):
        tc.convert_checkpoint(released, tmp_path / "out", text_encoder=str(tmp_path / "nowhere"))


def test_target_is_never_overwritten(released: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    with pytest.raises(OutputError, match="exists already"):
        tc.convert_checkpoint(released, target, text_encoder=str(released / "flan-t5-tiny"))
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OutputError, match="can't be written"):
        tc.convert_checkpoint(released, blocked / "out", text_encoder=str(released / "flan-t5-tiny"))
