"""Log-mel spectrograms of Tango's autoencoder and vocoder.

Shapes: B batch, N samples, T mel frames, M mel bins.
"""

import torch
from torch import Tensor, nn
from transformers.audio_utils import mel_filter_bank

LOG_FLOOR = 1e-5
"""Magnitudes are clamped to this before the logarithm (upstream's `dynamic_range_compression`)."""


def mel_filterbank(
    *,
    sampling_rate: int = 16_000,
    n_fft: int = 1024,
    mel_bins: int = 64,
    minimum_hertz: float = 0.0,
    maximum_hertz: float = 8_000.0,
) -> Tensor:
    """Return Slaney-scaled, area-normalised triangular filters: float32 [n_fft // 2 + 1, mel_bins]."""
    filters = mel_filter_bank(
        num_frequency_bins=n_fft // 2 + 1,
        num_mel_filters=mel_bins,
        min_frequency=minimum_hertz,
        max_frequency=maximum_hertz,
        sampling_rate=sampling_rate,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.from_numpy(filters).float()


class LogMel(nn.Module):
    """Waveform [B, N] in [-1, 1] to natural-log mel magnitudes [B, T, M], T = N // hop_length + 1.

    Hann window, reflected edges, magnitude (not power), no normalisation: the STFT of AudioLDM's autoencoder,
    which Tango uses (upstream `audioldm/audio/stft.py`).
    """

    window: Tensor
    filters: Tensor

    def __init__(
        self,
        *,
        sampling_rate: int = 16_000,
        n_fft: int = 1024,
        hop_length: int = 160,
        mel_bins: int = 64,
        maximum_hertz: float | None = None,
    ) -> None:
        """`maximum_hertz`: upper edge of the highest filter; None: half the sampling rate."""
        super().__init__()
        self.n_fft, self.hop_length = n_fft, hop_length
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
        self.register_buffer(
            "filters",
            mel_filterbank(
                sampling_rate=sampling_rate,
                n_fft=n_fft,
                mel_bins=mel_bins,
                maximum_hertz=maximum_hertz or sampling_rate / 2,
            ),
            persistent=False,
        )

    def forward(self, waveform_BN: Tensor) -> Tensor:
        """Return the log-mel spectrogram [B, T, M]; N must exceed n_fft // 2, for the reflection."""
        spectrum = torch.stft(
            waveform_BN,
            self.n_fft,
            hop_length=self.hop_length,
            window=self.window,
            center=True,
            pad_mode="reflect",
            return_complex=True,
        )
        mel_BTM = spectrum.abs().transpose(1, 2) @ self.filters
        return mel_BTM.clamp(min=LOG_FLOOR).log()


def mel_frames(waveform_BN: Tensor, log_mel: LogMel) -> Tensor:
    """Return log-mel [B, 1, T, M] without the last frame, so that T = N // hop_length, as upstream does."""
    mel_BTM: Tensor = log_mel(waveform_BN)
    return mel_BTM[:, None, : waveform_BN.shape[1] // log_mel.hop_length]
