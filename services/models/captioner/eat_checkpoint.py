"""Read EAT checkpoints: fairseq's files, and folders in the layout of the Hugging Face hub.

A fairseq file is a pickle with ``cfg`` (objects of omegaconf and fairseq) and ``model`` (tensors). Only the
tensors are read: `read_foreign_pickle` creates no object of another library and runs no code of the file. A
folder of the hub (``worstchan/EAT-…``) has ``config.json`` and the same tensors by other keys.

Every key is accounted for: it is the encoder's, or one of `IGNORED`, or the file is refused.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from safetensors.torch import load_file
from torch import Tensor

from services.errors import ModelFormatError, ModelNotFoundError
from services.models.captioner.config import PATCH
from services.models.captioner.eat import EatConfig, EatEncoder
from services.models.folders import read_json, read_pickle, safetensors_layout
from services.models.foreign_pickle import read_foreign_pickle
from services.models.state_dicts import FLOATS, assign_weights, on_meta, report_faults

MEL_BINS: Final = 128
"""Of every released EAT."""
HEAD_WIDTH: Final = 64
"""Width of an attention head of every released EAT; the number of heads is in no weight."""

IGNORED: Final = (
    *("fc_norm.", "head."),  # classification
    *("modality_encoders.IMAGE.decoder.", "shared_decoder.", "recon_proj.", "cls_proj.", "_ema", "center"),
)
"""Beginnings of keys that are not the encoder's: of fine-tuning's classifier, and of pre-training."""

_RENAMES: Final = (
    ("modality_encoders.IMAGE.local_encoder.proj.", "patches."),
    ("modality_encoders.IMAGE.extra_tokens", "class_token"),
    ("modality_encoders.IMAGE.fixed_positional_encoder.positions", "positions"),
    ("modality_encoders.IMAGE.context_encoder.norm.", "pre_norm."),
    ("local_encoder.proj.", "patches."),
    ("extra_tokens", "class_token"),
    ("fixed_positional_encoder.positions", "positions"),
)
"""Beginnings of keys of fairseq and of the hub, and ours."""


def load_eat(path: Path, heads: int | None = None) -> EatEncoder:
    """Return the encoder of a fairseq file, or of a folder in the hub's layout, in float32.

    `heads` is the number of attention heads; None: the hub's config, or one per `HEAD_WIDTH`.

    Raises:
        ModelNotFoundError: there is no such file or folder.
        ModelFormatError: it holds other weights; lists every missing, unknown and misshapen key.
    """
    if not path.exists():
        raise ModelNotFoundError(f"{path} does not exist; give EAT's checkpoint (.pt), or its folder")
    weights = rename_eat_keys(str(path), _read_folder(path) if path.is_dir() else _read_fairseq(path))
    if heads is None and path.is_dir():
        heads = read_json(path / "config.json").get("num_heads")
    config = eat_config(str(path), weights, heads)
    return assign_weights(str(path), on_meta(lambda: EatEncoder(config)), weights)


def rename_eat_keys(part: str, weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return `weights` by our keys, in float32, without those of `IGNORED`.

    Keys without a rule stay, and are reported as unknown when they are loaded. Raises `ModelFormatError` for
    values that are no tensors.
    """
    found: dict[str, Any] = {}
    for key, value in weights.items():
        short = key.removeprefix("model.")
        if short.startswith(IGNORED):
            continue
        for old, new in _RENAMES:
            if short.startswith(old):
                short = new + short.removeprefix(old)
                break
        found[short] = value
    others = [key for key, value in found.items() if not isinstance(value, Tensor)]
    report_faults(part, [("keys without a tensor", others)])
    # Others than floats are refused when they are loaded.
    return {key: value.detach().float() if value.dtype in FLOATS else value for key, value in found.items()}


def eat_config(part: str, weights: Mapping[str, Tensor], heads: int | None = None) -> EatConfig:
    """Return the sizes of an encoder by the shapes of its weights. Raises `ModelFormatError`."""
    needed = ("class_token", "positions", "blocks.0.mlp.fc1.weight")
    report_faults(part, [("missing keys", [key for key in needed if key not in weights])])
    width = weights["class_token"].shape[-1]
    depth = 1 + max(int(found[1]) for key in weights if (found := re.match(r"blocks\.(\d+)\.", key)))
    return EatConfig(
        width=width,
        depth=depth,
        heads=heads or max(1, width // HEAD_WIDTH),
        mlp_ratio=weights["blocks.0.mlp.fc1.weight"].shape[0] // width,
        mel_bins=MEL_BINS,
        max_steps=weights["positions"].shape[-2] // (MEL_BINS // PATCH),
    )


def _read_fairseq(path: Path) -> Mapping[str, Any]:
    data = read_foreign_pickle(path)
    model = data.get("model") if isinstance(data, dict) else None
    if not isinstance(model, dict):
        raise ModelFormatError(
            f"{path} is no EAT checkpoint of fairseq: it must hold a dictionary with 'model'; give "
            "EAT's file, then SLAM-AAC's model.pt"
        )
    return model


def _read_folder(folder: Path) -> Mapping[str, Any]:
    kind = read_json(folder / "config.json").get("model_type")
    if kind != "eat":
        raise ModelFormatError(f"{folder} holds a {kind} model, not EAT; give a copy of worstchan/EAT-…")
    path = folder / "model.safetensors"
    if path.is_file():
        safetensors_layout(path)
        return load_file(path)
    data = read_pickle(folder / "pytorch_model.bin")
    if not isinstance(data, dict):
        raise ModelFormatError(f"{folder / 'pytorch_model.bin'} is no state dictionary")
    return data
