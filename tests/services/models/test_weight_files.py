"""Every loader of weights names a file that holds none for what it is, and refuses NaN."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.errors import DigestMismatchError, ModelFormatError
from services.models.architectures import load_generator
from services.models.captioner.eat_checkpoint import load_eat
from services.models.captioner.model import Captioner
from services.models.clap.laion import load_laion
from services.models.clap.loading import load_clap
from services.models.folders import read_pickle
from services.models.lora import LoraSettings
from services.models.manifest import verify_manifest, write_manifest
from services.models.reward.model import load_reward
from tests.tiny import tiny_captioner, tiny_clap, tiny_pipeline, tiny_reward, tiny_tangoflux

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
DIGEST = "sha256:" + "0" * 64

Case = tuple[Path, Callable[[], object]]
"""A file of weights, and what loads it."""


def _tango(folder: Path) -> Case:
    tiny_pipeline().save_pretrained(folder)
    return folder / "unet" / "diffusion_pytorch_model.safetensors", partial(load_generator, folder)


def _text_encoder(folder: Path) -> Case:
    tiny_pipeline().save_pretrained(folder)
    return folder / "text_encoder" / "model.safetensors", partial(load_generator, folder)


def _tangoflux(folder: Path) -> Case:
    tiny_tangoflux().save_pretrained(folder)
    return folder / "transformer" / "diffusion_pytorch_model.safetensors", partial(load_generator, folder)


def _clap(folder: Path) -> Case:
    tiny_clap().save(folder)
    return folder / "model.safetensors", partial(load_clap, folder)


def _reward(folder: Path) -> Case:
    clap = tiny_clap()
    tiny_reward(clap, DIGEST).save(folder)
    return folder / "model.safetensors", partial(load_reward, folder, clap, DIGEST)


def _captioner(part: str) -> Callable[[Path], Case]:
    def make(folder: Path) -> Case:
        captioner = tiny_captioner()
        captioner.prepare_training(LoraSettings(rank=2))
        captioner.save_pretrained(folder)
        return folder / part, partial(Captioner.from_pretrained, folder)

    return make


LOADERS = (
    *(_tango, _text_encoder, _tangoflux, _clap, _reward),
    _captioner("encoder/model.safetensors"),
    _captioner("projector.safetensors"),
    _captioner("language_model/model.safetensors"),
    _captioner("adapter/adapter_model.safetensors"),
)


@pytest.mark.parametrize("make", LOADERS)
def test_a_file_that_holds_no_weights_is_named(make: Callable[[Path], Case], tmp_path: Path) -> None:
    path, load = make(tmp_path / "model")
    whole = path.read_bytes()
    kinds = (
        (POINTER, "is a Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"", "is an empty file"),
        (bytes(len(whole)), "is a file of zero bytes"),
        (b"PK\x03\x04" + bytes(100), "end is missing"),
        (b"\x80\x02}q\x00.", "is a pickle"),
        (b"\x1f\x8b\x08" + bytes(100), "is an archive"),
        (whole[: len(whole) // 2], "is truncated"),
    )
    for content, says in kinds:
        path.write_bytes(content)
        with pytest.raises(ModelFormatError) as caught:
            load()
        message = str(caught.value)
        assert f"{path} {says}" in message or (says in message and str(path) in message)
        assert "\n" not in message and "weights_only" not in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("make", LOADERS)
def test_weights_that_are_not_finite_are_refused(
    make: Callable[[Path], Case], value: float, tmp_path: Path
) -> None:
    path, load = make(tmp_path / "model")
    load()
    weights = load_file(path)
    name = max(weights, key=lambda key: weights[key].numel() if weights[key].is_floating_point() else 0)
    weights[name].view(-1)[-1] = value
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelFormatError, match=r"1 of \d+ tensors hold NaN or infinity|2 of \d+ tensors"):
        load()


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (torch.int32, "1 wrong types: {key} has int32, not floats"),
        (torch.int8, "1 wrong types: {key} has int8, not floats"),
        (torch.bool, "1 wrong types: {key} has bool, not floats"),
        (torch.complex64, "1 wrong types: {key} has complex64, not floats"),
        (torch.float8_e4m3fn, "types that no model here has: {key} (F8_E4M3)"),
    ],
)
@pytest.mark.parametrize("make", LOADERS)
def test_weights_that_are_no_floats_are_named(
    make: Callable[[Path], Case], kind: torch.dtype, says: str, tmp_path: Path
) -> None:
    path, load = make(tmp_path / "model")
    weights = load_file(path)
    name = next(key for key in sorted(weights) if weights[key].is_floating_point() and "shared" not in key)
    weights[name] = weights[name].to(kind)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelFormatError, match=re.escape(says.format(key=name))):
        load()


def test_weights_in_double_precision_are_read(tmp_path: Path) -> None:
    path, load = _tango(tmp_path / "model")
    weights = load_file(path)
    save_file({key: weight.double() for key, weight in weights.items()}, path, metadata={"format": "pt"})
    load()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (POINTER, "is a Git LFS pointer"),
        (b"<html>", "is a web page"),
        (b"", "is an empty file"),
        (b'{"error":"Unauthorized"}', "is a server's reply"),
        (b"PK\x03\x04" + bytes(100), "end is missing"),
        (b"\x1f\x8b\x08" + bytes(100), "is an archive"),
        (b'\x08\0\0\0\0\0\0\0{"a":{}}', "is a safetensors file"),
        (b"\x80\x02}q\x00", "truncated or no PyTorch checkpoint"),
        (b"RIFF", "truncated or no PyTorch checkpoint"),
    ],
)
@pytest.mark.parametrize("load", [read_pickle, load_laion, load_eat])
def test_a_checkpoint_that_is_none_is_named(
    load: Callable[[Path], object], content: bytes, says: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(ModelFormatError) as caught:
        load(path)
    assert says in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)


def test_half_precision_that_overflows_names_the_type(tmp_path: Path) -> None:
    path, _ = _tango(tmp_path / "model")
    weights = load_file(path)
    next(iter(weights.values())).view(-1)[0] = 1e6
    save_file(weights, path, metadata={"format": "pt"})
    load_generator(tmp_path / "model")
    with pytest.raises(ModelFormatError, match=r"\(float16\)"):
        load_generator(tmp_path / "model", dtype="float16")


def test_a_clone_without_its_large_files_is_named_where_a_manifest_is_checked(tmp_path: Path) -> None:
    path, _ = _tango(tmp_path / "model")
    write_manifest(tmp_path / "model", name="m", version="1", license="MIT")
    path.write_bytes(POINTER)
    with pytest.raises(DigestMismatchError, match=r"unet/diffusion_pytorch_model\.safetensors is a Git LFS"):
        verify_manifest(tmp_path / "model")


def test_old_format_is_read(tmp_path: Path) -> None:
    path = tmp_path / "old.bin"
    torch.save({"weight": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    assert torch.equal(read_pickle(path)["weight"], torch.ones(3))
