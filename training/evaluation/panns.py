"""PANNs' CNN14 (arXiv 1912.10211), from its public checkpoints: AudioSet's 527 classes, 2,048 dimensions.

::

    model = load_panns(Path("Cnn14_16k_mAP=0.438.pth"))
    model(waveform_BN)                                  # TaggerOutput(embeddings_BD, logits_BK)

Reimplements ``audioset_tagging_cnn/pytorch/models.py`` (MIT) with the same weight names. Fourier bases and
mel filters are read from the checkpoint (torchlibrosa's format). Verified against panns_inference with random
weights in the format of the released files, see benchmarks/metrics.md; the released weights were not
available.

Shape legend: B clips, N samples, T frames, F frequency bins, M mel bins, C channels, D embedding, K classes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.audio_utils import mel_filter_bank

from services.errors import ModelFormatError, ModelNotFoundError
from services.models.folders import pick_device, read_pickle
from services.models.state_dicts import assign_weights, check_weights, on_meta

CLASSES: Final = 527
DIMENSION: Final = 2_048
MEL_BINS: Final = 64
MEL_FLOOR: Final = 1e-10
"""Mel powers are clamped to this before the logarithm."""
CHANNELS: Final = (64, 128, 256, 512, 1_024, 2_048)
MINIMUM_FRAMES: Final = 2 ** (len(CHANNELS) - 1)
"""Frames that pooling reduces to one; shorter clips are padded with silence."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """Settings of the spectrogram for one of PANNs' three sampling rates."""

    sampling_rate: int
    n_fft: int
    hop_length: int
    maximum_hertz: float
    minimum_hertz: float = 50.0


VARIANTS: Final = {
    257: Variant(sampling_rate=16_000, n_fft=512, hop_length=160, maximum_hertz=8_000.0),
    513: Variant(sampling_rate=32_000, n_fft=1_024, hop_length=320, maximum_hertz=14_000.0),
    129: Variant(sampling_rate=8_000, n_fft=256, hop_length=80, maximum_hertz=4_000.0),
}
"""Variants by the number of frequency bins of the checkpoint's mel filters: ``Cnn14_16k_mAP=0.438.pth`` (used
by audioldm_eval), ``Cnn14_mAP=0.431.pth`` and ``Cnn14_8k_mAP=0.416.pth``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaggerOutput:
    """Embeddings and logits of clips, by a model that knows AudioSet's classes."""

    embeddings_BD: Tensor
    """Activations of the last hidden layer."""
    logits_BK: Tensor
    """Logits whose sigmoid is the probability of each class."""


class _Stft(nn.Module):
    """A short-time Fourier transform as two convolutions."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        sizes: dict[str, Any] = {"kernel_size": variant.n_fft, "stride": variant.hop_length, "bias": False}
        self.conv_real = nn.Conv1d(1, variant.n_fft // 2 + 1, **sizes)
        self.conv_imag = nn.Conv1d(1, variant.n_fft // 2 + 1, **sizes)


class _Spectrogram(nn.Module):
    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.stft = _Stft(variant)
        self.padding = variant.n_fft // 2

    def forward(self, waveform_BN: Tensor) -> Tensor:
        """Return the power spectrogram [B, F, T]."""
        padded = functional.pad(waveform_BN[:, None], (self.padding, self.padding), mode="reflect")
        power: Tensor = self.stft.conv_real(padded).square() + self.stft.conv_imag(padded).square()
        return power


class _LogMel(nn.Module):
    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.melW = nn.Parameter(torch.empty(variant.n_fft // 2 + 1, MEL_BINS))  # the checkpoints' name

    def forward(self, power_BFT: Tensor) -> Tensor:
        """Return the mel spectrogram in dB, [B, 1, T, M]."""
        mel_BTM = power_BFT.transpose(1, 2) @ self.melW
        return 10.0 * mel_BTM.clamp(min=MEL_FLOOR).log10()[:, None]


class _ConvBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)

    def forward(self, features_BCTM: Tensor) -> Tensor:
        hidden = self.bn1(self.conv1(features_BCTM)).relu()
        output: Tensor = self.bn2(self.conv2(hidden)).relu()
        return output


class Cnn14(nn.Module):
    """CNN14, from waveforms to embeddings and logits. For inference only."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.variant = variant
        self.spectrogram_extractor = _Spectrogram(variant)
        self.logmel_extractor = _LogMel(variant)
        self.bn0 = nn.BatchNorm2d(MEL_BINS)
        for number, (inputs, outputs) in enumerate(zip((1, *CHANNELS), CHANNELS, strict=False), start=1):
            self.add_module(f"conv_block{number}", _ConvBlock(inputs, outputs))
        self.fc1 = nn.Linear(CHANNELS[-1], DIMENSION)
        self.fc_audioset = nn.Linear(DIMENSION, CLASSES)

    @property
    def sampling_rate(self) -> int:
        """Hertz of the waveforms."""
        return self.variant.sampling_rate

    def forward(self, waveform_BN: Tensor) -> TaggerOutput:
        """Return the output for clips [B, N] in [-1, 1], at the variant's sampling rate."""
        shortest = MINIMUM_FRAMES * self.variant.hop_length
        waveform_BN = functional.pad(waveform_BN, (0, max(0, shortest - waveform_BN.shape[1])))
        mel_B1TM = self.logmel_extractor(self.spectrogram_extractor(waveform_BN))
        hidden = self.bn0(mel_B1TM.transpose(1, 3)).transpose(1, 3)
        for number in range(1, len(CHANNELS) + 1):
            hidden = self.get_submodule(f"conv_block{number}")(hidden)
            if number < len(CHANNELS):
                hidden = functional.avg_pool2d(hidden, 2)
        hidden_BCT = hidden.mean(dim=3)
        pooled_BC = hidden_BCT.amax(dim=2) + hidden_BCT.mean(dim=2)
        embeddings_BD = self.fc1(pooled_BC).relu()
        return TaggerOutput(embeddings_BD=embeddings_BD, logits_BK=self.fc_audioset(embeddings_BD))


def load_panns(path: Path, device: str = "cpu") -> Cnn14:
    """Load CNN14 from a released checkpoint, in float32 on `device`, for inference.

    No code in the file is executed. Raises `ModelNotFoundError` if there is no file, `ModelFormatError` if it
    has other keys, other shapes, or mel filters of another spectrogram.
    """
    target = pick_device(device)
    if not path.is_file():
        raise ModelNotFoundError(f"{path} is not a file; give the path of a PANNs checkpoint (.pth)")
    data = read_pickle(path)
    state = data.get("model") if isinstance(data, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelFormatError(f"{path} is no PANNs checkpoint: it has no tensors under `model`")
    filters = state.get("logmel_extractor.melW")
    variant = VARIANTS.get(len(filters)) if filters is not None and filters.ndim == 2 else None
    if filters is None or variant is None:
        known = ", ".join(map(str, VARIANTS))
        raise ModelFormatError(f"{path}: it has no mel filters (logmel_extractor.melW) of {known} bins")
    model = on_meta(lambda: Cnn14(variant))
    check_weights(path.name, model, state)
    _check_filters(path, variant, filters)
    assign_weights(path.name, model, state)
    return model.to(target).float().eval().requires_grad_(False)


def mel_filters(variant: Variant) -> Tensor:
    """Return the mel filters [F, M] of a checkpoint of this variant, which are librosa's."""
    filters = mel_filter_bank(
        num_frequency_bins=variant.n_fft // 2 + 1,
        num_mel_filters=MEL_BINS,
        min_frequency=variant.minimum_hertz,
        max_frequency=variant.maximum_hertz,
        sampling_rate=variant.sampling_rate,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.from_numpy(np.asarray(filters)).float()


def _check_filters(path: Path, variant: Variant, filters: Tensor) -> None:
    if not torch.allclose(filters.float(), mel_filters(variant), atol=1e-5):
        raise ModelFormatError(
            f"{path}: its mel filters are not those of {variant.sampling_rate} Hz, {variant.minimum_hertz:g} "
            f"to {variant.maximum_hertz:g} Hz, so its spectrogram settings are unknown"
        )
