"""`load_tango`: a model folder becomes a `TangoPipeline`, or is refused in one line.

A folder comes from outside. Nothing in it is executed: classes are taken from a fixed table, weights from
safetensors alone, and every key and shape is compared with the module before anything is loaded.
"""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig, T5Config, T5EncoderModel

from services.errors import MilongaError, ModelFormatError, ModelNotFoundError
from services.models.folders import one_line, pick_device, pick_dtype, read_json, read_shapes
from services.models.state_dicts import check_weights, on_meta, quiet_loading
from services.models.tango.pipeline import TangoPipeline
from services.models.vocoder import GriffinLimVocoder

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
    types = {"default": pick_dtype("dtype", dtype)} | dict.fromkeys(
        ("vae", "vocoder"), pick_dtype("decoder_dtype", decoder_dtype)
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
