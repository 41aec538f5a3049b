"""A tiny checkpoint in upstream's released format, its weights made from their names."""

import gzip
import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from services.models.mel import mel_filterbank

FIXTURES = Path(__file__).parents[3] / "fixtures" / "tango"
"""References, configs and key lists; its README says where they come from."""


def keys_and_shapes(name: str) -> dict[str, dict[str, list[int]]]:
    """Shape of every tensor by ``.bin`` file and key: ``tiny_keys`` or ``fullsize_keys``."""
    packed = (FIXTURES / f"{name}.json.gz").read_bytes()
    data: dict[str, dict[str, list[int]]] = json.loads(gzip.decompress(packed))
    return data


def named_tensor(name: str, shape: list[int]) -> Tensor:
    """The values of a tensor called `name`, in every environment; scaled so that signals keep their size."""
    draw = np.random.Generator(np.random.PCG64([zlib.crc32(name.encode()), 0]))
    values = draw.standard_normal(tuple(shape), dtype=np.float32)
    if len(shape) == 1:
        is_norm = "norm" in name.lower() and name.endswith("weight")
        values = np.float32(is_norm) + np.float32(0.1) * values
    elif "relative_attention_bias" in name:
        values *= np.float32(0.5)
    elif "shared" not in name:
        fan = shape[0] * 2 if ".ups." in name else int(np.prod(shape[1:]))
        values *= np.float32(1 / np.sqrt(fan))
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def released_weights(shapes: dict[str, dict[str, list[int]]]) -> dict[str, dict[str, Tensor]]:
    """The three state dictionaries of the tiny checkpoint by file name."""
    main = {
        key: named_tensor(key.replace("encoder.embed_tokens", "shared"), shape)
        for key, shape in shapes["pytorch_model_main.bin"].items()
    }
    vae = {key: named_tensor(f"vae.{key}", shape) for key, shape in shapes["pytorch_model_vae.bin"].items()}
    # The Fourier bases only have to be there: nothing reads them.
    stft = {key: torch.zeros(shape) for key, shape in shapes["pytorch_model_stft.bin"].items()}
    stft["mel_basis"] = mel_filterbank().T.contiguous()
    return {"pytorch_model_main.bin": main, "pytorch_model_vae.bin": vae, "pytorch_model_stft.bin": stft}


def write_released(folder: Path) -> Path:
    """Write the tiny checkpoint to `folder`, as upstream publishes its own."""
    shutil.copytree(FIXTURES / "checkpoint", folder)
    for name, weights in released_weights(keys_and_shapes("tiny_keys")).items():
        torch.save(weights, folder / name)
    return folder


def references() -> dict[str, Any]:
    """Every array of `references.npz`; floats and bools as tensors, int16 as numpy arrays."""
    with np.load(FIXTURES / "references.npz") as arrays:
        return {
            key: array if array.dtype == np.int16 else torch.from_numpy(array)
            for key, array in arrays.items()
        }
