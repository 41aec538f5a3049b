"""Write the adapters of a training as a folder of their own, which services apply by request."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from services.models.lora import ADAPTER_WEIGHTS
from services.models.manifest import ADAPTER_CONFIG, Manifest, write_manifest
from services.models.writing import replaced_folder
from services.weights.uri import ModelURI, ResolvedModel

_PREFIX = "base_model.model."
"""Of every key in PEFT's files."""


def adapter_folder(output: Path) -> Path:
    """Return the folder of the adapters of the model in `output`."""
    return output.with_name(f"{output.name}-adapter")


def write_adapters(
    denoiser: Any, output: Path, start: str, base: ResolvedModel, *, name: str, version: str, license: str
) -> Manifest:
    """Write the adapters of `denoiser` as a PEFT folder with a manifest; it states `base`, pinned.

    `start` is the model URI of `base`. Raises `OutputError`; an existing folder is then unchanged.
    """
    from peft import get_peft_model_state_dict

    assert isinstance(denoiser, nn.Module)
    weights = get_peft_model_state_dict(denoiser, adapter_name="default")
    settings = denoiser.peft_config["default"].to_dict()  # type: ignore[union-attr, index]
    settings |= {"base_model_name_or_path": pinned(start, base), "inference_mode": True}
    settings["target_modules"] = sorted(settings["target_modules"])
    kept = {key: value for key, value in settings.items() if value is not None}
    with replaced_folder(output) as temporary:
        save_file(
            {f"{_PREFIX}{key}": value.detach().cpu().float().contiguous() for key, value in weights.items()},
            temporary / ADAPTER_WEIGHTS,
        )
        text = json.dumps(kept, indent=2, default=str) + "\n"
        (temporary / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
        return write_manifest(temporary, name=name, version=version, license=license)


def pinned(text: str, model: ResolvedModel) -> str:
    """Return the model URI `text` of `model` without alias or relative path, and with its digest."""
    uri = ModelURI.parse(text)
    location = text.partition("#")[0]
    if uri.scheme == "models":
        location = f"models:/{model.identity.name}/{model.identity.version}"
    elif uri.scheme == "file":
        location = f"file:{model.own_folder}"
    return f"{location}#{model.digest}"
