"""`load_tango`: a model folder becomes a `TangoPipeline`, or is refused in one line.

A folder comes from outside. Nothing in it is executed: classes are taken from a fixed table, weights from
safetensors alone, and every key and shape is compared with the module before anything is loaded.
"""

import json
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig, T5Config, T5EncoderModel

from services.errors import (
    FieldViolation,
    InvalidInputError,
    MilongaError,
    ModelFormatError,
    ModelNotFoundError,
)
from services.models.state_dicts import check_weights, on_meta, quiet_loading
from services.models.tango.pipeline import TangoPipeline
from services.models.vocoder import GriffinLimVocoder

Dtype = Literal["float32", "float16", "bfloat16"]
"""Float types by the names that flags and settings use."""

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

PICKLE_SUFFIXES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Files that run code when they are read carelessly."""

UPSTREAM_WEIGHTS: Final = "pytorch_model_main.bin"
"""Its presence tells a released checkpoint, which `convert_checkpoint` must convert first."""

_BUILDERS: Final[Mapping[tuple[str, str, str], Callable[[dict[str, Any]], nn.Module]]] = {
    ("text_encoder", "transformers", "T5EncoderModel"): lambda config: T5EncoderModel(T5Config(**config)),
    ("unet", "diffusers", "UNet2DConditionModel"): UNet2DConditionModel.from_config,
    ("vae", "diffusers", "AutoencoderKL"): AutoencoderKL.from_config,
    ("vocoder", "transformers", "SpeechT5HifiGan"): lambda config: SpeechT5HifiGan(
        SpeechT5HifiGanConfig(**config)
    ),
    ("vocoder", "services.models.vocoder", "GriffinLimVocoder"): GriffinLimVocoder.from_config,
}
"""Every class that a part may have, and how it is built from its `config.json`."""

_WEIGHTED: Final = ("text_encoder", "unet", "vae", "vocoder")
_SCHEDULERS: Final = (
    "DDPMScheduler",
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)


def load_tango(
    folder: Path, *, device: str = "cpu", dtype: str = "float32", decoder_dtype: str = "float32"
) -> TangoPipeline:
    """The pipeline that `folder` holds, on `device`, ready for inference.

    `device` is torch's name of one, or ``auto``: cuda where there is one, otherwise cpu. `dtype` is that of
    text encoder and denoiser, `decoder_dtype` that of autoencoder and vocoder: half precision saves
    them little and is heard sooner. Whatever was stored is converted.

    Raises `ModelNotFoundError` for a missing folder, `ModelFormatError` for one that is something else
    (another architecture, truncated or missing weights, a pickle payload), `InvalidInputError` for a device
    or type that does not exist.
    """
    target = pick_device(device)
    types = {"default": _dtype("dtype", dtype)} | dict.fromkeys(
        ("vae", "vocoder"), _dtype("decoder_dtype", decoder_dtype)
    )
    check_tango_folder(folder)
    try:
        with quiet_loading():
            pipeline: TangoPipeline = TangoPipeline.from_pretrained(
                folder,
                dtype=types,
                use_safetensors=True,
                local_files_only=True,
                low_cpu_mem_usage=find_spec("accelerate") is not None,
            )
    except MilongaError:
        raise
    except Exception as error:  # whatever the libraries raise here, the folder is to blame
        raise ModelFormatError(f"{folder} can't be loaded: {one_line(error)}") from error
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(target)
    return pipeline


def check_tango_folder(folder: Path) -> None:
    """Raise `ModelNotFoundError` or `ModelFormatError` unless `folder` holds a `TangoPipeline`, unloaded."""
    index = _read_index(folder)
    for part in _WEIGHTED:
        build = _BUILDERS.get((part, *_class_of(index, part)))
        if build is None:
            raise ModelFormatError(
                f"{folder}: {part} is a {'.'.join(_class_of(index, part))}, which is not supported"
            )
        _check_part(folder / part, build)
    library, scheduler = _class_of(index, "scheduler")
    if library != "diffusers" or scheduler not in _SCHEDULERS:
        raise ModelFormatError(f"{folder}: scheduler is a {library}.{scheduler}, which is not supported")
    library, tokenizer = _class_of(index, "tokenizer")
    if library != "transformers" or not ("Tokenizer" in tokenizer and tokenizer.isidentifier()):
        raise ModelFormatError(f"{folder}: tokenizer is a {library}.{tokenizer}, which is not supported")
    # Without these files the libraries ask the hub, and say so in the place of what is wrong.
    read_json(folder / "scheduler" / "scheduler_config.json")
    read_json(folder / "tokenizer" / "tokenizer_config.json")


def _read_index(folder: Path) -> dict[str, Any]:
    """`model_index.json` of a `TangoPipeline`."""
    if not folder.is_dir():
        raise ModelNotFoundError(f"{folder} is not a folder; give the path of a model folder")
    path = folder / "model_index.json"
    if not path.is_file():
        remedy = (
            "this is a released checkpoint: run `milonga convert` on it first"
            if (folder / UPSTREAM_WEIGHTS).exists()
            else "give a folder that `milonga convert` or `save_pretrained` wrote"
        )
        raise ModelFormatError(f"{folder} has no model_index.json; {remedy}")
    index = read_json(path)
    architecture = index.get("_class_name")
    if architecture != TangoPipeline.__name__:
        raise ModelFormatError(f"{folder} holds a {architecture}, not a {TangoPipeline.__name__}")
    return index


def _class_of(index: Mapping[str, Any], part: str) -> tuple[str, str]:
    """Library and class of `part` as the index names them."""
    match index.get(part):
        case [str(library), str(name)]:
            return library, name
        case other:
            raise ModelFormatError(f"model_index.json: {part} is {other!r}, not a library and a class")


def _check_part(folder: Path, build: Callable[[dict[str, Any]], nn.Module]) -> None:
    """Compare the weights in `folder` with the module that its `config.json` describes."""
    config = read_json(folder / "config.json")
    try:
        with quiet_loading():
            module = on_meta(lambda: build(config))
    except MilongaError:
        raise
    except Exception as error:  # a config that its own class refuses
        raise ModelFormatError(f"{folder}/config.json is not valid: {one_line(error)}") from error
    if not module.state_dict():
        return
    check_weights(str(folder), module, read_shapes(folder))


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in the safetensors files of `folder`; `ModelFormatError` where there are none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = [path.name for path in sorted(folder.iterdir()) if path.suffix in PICKLE_SUFFIXES]
        found = f"only a pickle payload ({', '.join(pickles)})" if pickles else "no weights"
        raise ModelFormatError(f"{folder} holds {found}; weights must be safetensors")
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        shapes |= safetensors_shapes(path)
    return shapes


def safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in a safetensors file; `ModelFormatError` where it is not one, or cut short."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelFormatError(
            f"{path} is truncated or not safetensors ({one_line(error)}); fetch it again"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; `ModelFormatError` where there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelFormatError(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise ModelFormatError(f"{path} can't be read: {one_line(error)}") from error
    if not isinstance(data, dict):
        raise ModelFormatError(f"{path} holds no JSON object")
    return data


def _dtype(field: str, name: str) -> torch.dtype:
    if name not in DTYPES:
        raise InvalidInputError(
            FieldViolation(field, f"unknown type {name!r}; use one of {', '.join(DTYPES)}")
        )
    return DTYPES[name]


def pick_device(name: str) -> torch.device:
    """The device called `name` (``auto``: cuda where there is one), tried with one small tensor."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidInputError(
            FieldViolation("device", f"{name!r} can't be used: {one_line(error)}")
        ) from error
    return device


def one_line(error: BaseException) -> str:
    """The first line of what a library says, or the name of its error."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
