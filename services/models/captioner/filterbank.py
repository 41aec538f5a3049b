"""Kaldi's log-mel filter bank, with the options that EAT was trained with.

Equal to ``torchaudio.compliance.kaldi.fbank(waveform, htk_compat=True, sample_frequency=16000,
use_energy=False, window_type="hanning", num_mel_bins=128, dither=0.0, frame_shift=10)``, without torchaudio.

Shapes: N samples, T frames, L samples of a frame, K spectrum bins, M mel bins.
"""

import math
from typing import Final

import torch
from torch import Tensor, nn

SAMPLING_RATE: Final = 16_000
"""Hertz."""
FRAME_LENGTH: Final = 400
FRAME_SHIFT: Final = 160
"""Samples of a frame, and between two frames: 25 ms and 10 ms."""
N_FFT: Final = 512
"""`FRAME_LENGTH`, rounded up to a power of two."""

_PRE_EMPHASIS: Final = 0.97
_LOW_HERTZ: Final = 20.0
_FLOOR: Final = torch.finfo(torch.float32).eps
"""Energies are clamped to this before the logarithm."""


class FilterBank(nn.Module):
    """Waveform [N] at 16 kHz to natural-log mel energies [T, M], T = 1 + (N - 400) // 160."""

    window: Tensor
    filters: Tensor

    def __init__(self, mel_bins: int = 128) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(FRAME_LENGTH, periodic=False), persistent=False)
        self.register_buffer("filters", mel_filters(mel_bins), persistent=False)

    def forward(self, waveform_N: Tensor) -> Tensor:
        """Return the log-mel energies [T, M] in float32."""
        frames_TL = waveform_N.float().unfold(0, FRAME_LENGTH, FRAME_SHIFT)
        frames_TL = frames_TL - frames_TL.mean(dim=1, keepdim=True)
        before_TL = torch.cat([frames_TL[:, :1], frames_TL[:, :-1]], dim=1)
        frames_TL = (frames_TL - _PRE_EMPHASIS * before_TL) * self.window
        power_TK = torch.fft.rfft(frames_TL, n=N_FFT).abs().square()
        mel_TM: Tensor = (power_TK @ self.filters).clamp(min=_FLOOR).log()
        return mel_TM


def mel_filters(
    mel_bins: int,
    *,
    sampling_rate: int = SAMPLING_RATE,
    n_fft: int = N_FFT,
    low_hertz: float = _LOW_HERTZ,
    high_hertz: float | None = None,
) -> Tensor:
    """Return Kaldi's triangular filters, float32 [K, M]: equally wide in mel, not normalised.

    They span `low_hertz` to `high_hertz`, by default half the sampling rate.
    """
    low = mel_scale(low_hertz)
    high = mel_scale(sampling_rate / 2 if high_hertz is None else high_hertz)
    step = (high - low) / (mel_bins + 1)
    # Differences of rounded float32 values, as upstream computes them.
    left_M, centre_M, right_M = (low + (torch.arange(mel_bins)[:, None] + edge) * step for edge in range(3))
    bins_K = 1127.0 * (1.0 + sampling_rate / n_fft * torch.arange(n_fft // 2) / 700.0).log()
    up_MK = (bins_K - left_M) / (centre_M - left_M)
    down_MK = (right_M - bins_K) / (right_M - centre_M)
    filters_MK = torch.minimum(up_MK, down_MK).clamp(min=0.0)
    # Kaldi does not use the bin at half the sampling rate.
    return nn.functional.pad(filters_MK, (0, 1)).T.contiguous()


def mel_scale(hertz: float) -> float:
    """Return a frequency on Kaldi's (and HTK's) mel scale."""
    return 1127.0 * math.log(1.0 + hertz / 700.0)
