"""Griffin-Lim as a vocoder module, for models without a neural vocoder.

Shapes: B batch, T mel frames, M mel bins, K spectrum bins (n_fft // 2 + 1), N samples.
"""

from os import PathLike
from typing import Any, Self, cast

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from services.models.mel import mel_filterbank

_TINY = 1e-8
_PHASE_SEED = 20_240_415
"""Seed of the initial phases: fixed, so that a spectrogram always gives the same waveform."""


class GriffinLimVocoder(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Log-mel spectrogram to waveform without learnt weights; called like transformers' `SpeechT5HifiGan`.

    Mel magnitudes are first inverted to a non-negative spectrum (least squares, multiplicative updates:
    Lee and Seung 2001), then phases are found by fast Griffin-Lim (Perraudin, Balazs, Sondergaard 2013) from
    fixed initial phases. No randomness; a clip does not depend on the others of its batch.
    """

    config_name = "config.json"

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        sampling_rate: int = 16_000,
        n_fft: int = 1024,
        hop_length: int = 160,
        model_in_dim: int = 64,
        iterations: int = 32,
        momentum: float = 0.99,
        inversion_iterations: int = 48,
    ) -> None:
        """Rates and sizes as in `LogMel`; `model_in_dim` is M, named as in `SpeechT5HifiGanConfig`."""
        super().__init__()
        filters_KM = mel_filterbank(
            sampling_rate=sampling_rate,
            n_fft=n_fft,
            mel_bins=model_in_dim,
            maximum_hertz=sampling_rate / 2,
        )
        # Both follow from the config: not saved, and float32 whatever the dtype of loading.
        self.register_buffer("filters_KM", filters_KM, persistent=False)
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)

    filters_KM: Tensor
    window: Tensor

    @classmethod
    def from_pretrained(cls, folder: str | PathLike[str], **options: Any) -> Self:
        """Return the vocoder for the `config.json` in `folder`. There are no weights to load or to cast."""
        where = {key: options[key] for key in ("subfolder", "local_files_only") if key in options}
        return cast(Self, cls.from_config(cls.load_config(folder, **where)))

    @torch.no_grad()
    def forward(self, spectrogram: Tensor) -> Tensor:
        """Return waveforms [B, T * hop_length], float32, not clipped, from log-mel magnitudes [B, T, M]."""
        mel_BTM = spectrogram.float().exp()
        # N samples have N // hop + 1 centred frames: repeat the last one, so that the end is determined.
        mel_BTM = torch.cat([mel_BTM, mel_BTM[:, -1:]], dim=1)
        magnitude_BTK = self._invert_mel(mel_BTM)
        return self._griffin_lim(magnitude_BTK.transpose(1, 2))

    def _invert_mel(self, mel_BTM: Tensor) -> Tensor:
        """Return the non-negative spectrum [B, T, K] whose mel magnitudes are `mel_BTM`."""
        filters_KM = self.filters_KM.float()
        target_BTK = mel_BTM @ filters_KM.T
        # Start from the flattest spectrum: every band's magnitude spread evenly over its bins.
        norm_KM = filters_KM / filters_KM.square().sum(0).clamp(min=_TINY)
        magnitude_BTK = (mel_BTM @ norm_KM.T).clamp(min=_TINY)
        for _ in range(self.config.inversion_iterations):
            estimate_BTK = (magnitude_BTK @ filters_KM) @ filters_KM.T
            magnitude_BTK = magnitude_BTK * target_BTK / estimate_BTK.clamp(min=_TINY)
        return magnitude_BTK

    def _griffin_lim(self, magnitude_BKT: Tensor) -> Tensor:
        """Return waveforms [B, (T - 1) * hop_length] whose spectra have these magnitudes."""
        frames = magnitude_BKT.shape[-1]
        samples = (frames - 1) * self.config.hop_length
        phase_TK = torch.rand(
            (frames, magnitude_BKT.shape[1]), generator=torch.Generator().manual_seed(_PHASE_SEED)
        )
        phase_KT = (2 * torch.pi * phase_TK.T).to(magnitude_BKT.device)
        angles_BKT = torch.polar(torch.ones_like(phase_KT), phase_KT).expand_as(magnitude_BKT)
        momentum = self.config.momentum / (1 + self.config.momentum)
        previous_BKT: Tensor | None = None
        for _ in range(self.config.iterations):
            rebuilt_BKT = self._stft(self._istft(magnitude_BKT * angles_BKT, samples))
            ahead_BKT = rebuilt_BKT if previous_BKT is None else rebuilt_BKT - momentum * previous_BKT
            angles_BKT = ahead_BKT / ahead_BKT.abs().clamp(min=_TINY)
            previous_BKT = rebuilt_BKT
        return self._istft(magnitude_BKT * angles_BKT, samples)

    def _stft(self, waveform_BN: Tensor) -> Tensor:
        return torch.stft(
            waveform_BN,
            self.config.n_fft,
            self.config.hop_length,
            window=self.window.float(),
            center=True,
            # Zeros, since a reflection would need more than half a window of samples.
            pad_mode="constant",
            return_complex=True,
        )

    def _istft(self, spectrum_BKT: Tensor, samples: int) -> Tensor:
        return torch.istft(
            spectrum_BKT,
            self.config.n_fft,
            self.config.hop_length,
            window=self.window.float(),
            center=True,
            length=samples,
        )
