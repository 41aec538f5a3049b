"""A random HiFi-GAN in the format of a release."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SETTINGS: dict[str, Any] = {
    "upsample_rates": [4, 2],
    "upsample_kernel_sizes": [8, 4],
    "resblock_kernel_sizes": [3],
    "resblock_dilation_sizes": [[1, 3]],
    "num_mels": 5,
    "sampling_rate": 8_000,
    "n_fft": 1024,
    "win_size": 1024,
    "hop_size": 8,
    "fmin": 0,
    "fmax": 3_000,
}


def upstream_weights(settings: Mapping[str, Any], width: int = 16) -> dict[str, Tensor]:
    """Return random weights with the keys and shapes of jik876/hifi-gan, weight-normalised."""
    torch.manual_seed(0)
    shapes = {"conv_pre": (width, settings["num_mels"], 7), "conv_post": (1, width // 4, 7)}
    for level, kernel in enumerate(settings["upsample_kernel_sizes"]):
        channels = width // 2 ** (level + 1)
        shapes[f"ups.{level}"] = (2 * channels, channels, kernel)
        for side in ("convs1", "convs2"):
            for number in range(2):
                shapes[f"resblocks.{level}.{side}.{number}"] = (channels, channels, 3)
    weights = {}
    for name, shape in shapes.items():
        outputs = shape[1] if name.startswith("ups") else shape[0]
        weights[f"{name}.bias"] = 0.1 * torch.randn(outputs)
        weights[f"{name}.weight_v"] = torch.randn(shape)
        weights[f"{name}.weight_g"] = torch.rand(shape[0], 1, 1) + 0.5
    return weights


def write_release(folder: Path, **changes: Any) -> Path:
    """Write a checkpoint with its config, whose settings may differ from `SETTINGS`; return its path."""
    settings = {**SETTINGS, **changes}
    path = folder / "generator.pth.tar"
    torch.save({"generator": upstream_weights(settings)}, path)
    path.with_name("config.json").write_text(json.dumps(settings))
    return path
