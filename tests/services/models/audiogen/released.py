"""A tiny AudioGen in the released formats: ``state_dict.bin``, ``compression_state_dict.bin``, a T5."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml  # type: ignore[import-untyped]
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from tests.tiny import tiny_text_encoder, tiny_tokenizer

FIXTURES = Path(__file__).parents[3] / "fixtures" / "audiogen"
"""References and weights; its README says where they come from."""

CODEBOOKS, CODES = 4, 16

LM_SETTINGS: dict[str, Any] = {
    "transformer_lm": {
        "dim": 32,
        "num_heads": 4,
        "num_layers": 2,
        "hidden_scale": 4,
        "n_q": CODEBOOKS,
        "card": CODES,
        "norm_first": True,
        "activation": "gelu",
        "positional_embedding": "sin",
        "norm": "layer_norm",
        "causal": True,
        "kv_repeat": 1,
        "layer_scale": None,
    },
    "codebooks_pattern": {"modeling": "delay", "delay": {"delays": [0, 1, 2, 3], "flatten_first": 0}},
    "classifier_free_guidance": {"inference_coef": 3.0},
}
CODEC_SETTINGS: dict[str, Any] = {
    "compression_model": "encodec",
    "sample_rate": 16_000,
    "channels": 1,
    "encodec": {"autoencoder": "seanet", "quantizer": "rvq", "renormalize": False},
    "seanet": {
        "dimension": 8,
        "n_filters": 4,
        "n_residual_layers": 1,
        "ratios": [8, 5, 4, 2],
        "lstm": 2,
        "kernel_size": 7,
        "residual_kernel_size": 3,
        "last_kernel_size": 7,
        "dilation_base": 2,
        "compress": 2,
        "activation": "ELU",
        "norm": "weight_norm",
        "pad_mode": "constant",
        "true_skip": True,
        "causal": False,
        "decoder": {"trim_right_ratio": 1.0},
    },
    "rvq": {"n_q": CODEBOOKS, "bins": CODES},
}


def oracle(name: str = "oracle") -> dict[str, NDArray[Any]]:
    """Every array of one of the references."""
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return dict(arrays)


def lm_weights() -> dict[str, Tensor]:
    return load_file(FIXTURES / "lm_state.safetensors")


def codec_weights(*, old_names: bool = True) -> dict[str, Tensor]:
    """The codec by upstream's keys, with random codebooks; `old_names`: torch's former weight norm."""
    generator = torch.Generator().manual_seed(3)
    weights = load_file(FIXTURES / "seanet_state.safetensors")
    for number in range(CODEBOOKS):
        embed = torch.randn(CODES, 8, generator=generator)
        book = {
            "inited": torch.ones(1),
            "cluster_size": torch.ones(CODES),
            "embed": embed,
            "embed_avg": embed,
        }
        weights |= {f"quantizer.vq.layers.{number}._codebook.{key}": value for key, value in book.items()}
    if not old_names:
        return weights
    names = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    return {_renamed(key, names): value for key, value in weights.items()}


def write_released(folder: Path) -> Path:
    """Write the two files, and the folder ``t5`` with a T5 as wide as the oracle's text."""
    folder.mkdir(parents=True)
    files = {"state_dict.bin": (LM_SETTINGS, lm_weights())}
    files["compression_state_dict.bin"] = (CODEC_SETTINGS, codec_weights())
    for name, (settings, weights) in files.items():
        torch.save({"xp.cfg": yaml.safe_dump(settings), "best_state": weights, "version": "1"}, folder / name)
    tokenizer = tiny_tokenizer(length=64)
    tokenizer.save_pretrained(folder / "t5")
    torch.manual_seed(5)
    tiny_text_encoder(len(tokenizer), width=24).save_pretrained(folder / "t5")
    return folder


def _renamed(key: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        key = key.replace(old, new)
    return key
