"""A small codec: residual vector quantisation of a spectrogram autoencoder's latents.

It has the interface of transformers' `EncodecModel`, as far as `AudioGenPipeline` uses it: `encode`,
`decode`, and the sizes in its config. Latent frames are projected to their principal components, and those
are quantised one codebook after another, each on what the earlier ones left over (arXiv 2107.03312, section
III-C).

Shapes: B clips, C latent channels, T latent frames, F latent mel bins, D = C F, P principal components,
K codebooks, V codes of a codebook, N samples.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn.functional import pad

from services.models.mel import LogMel, mel_frames
from services.models.vocoder import GriffinLimVocoder


class QuantisedAutoencoder(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Waveforms to codes [B, K, T], and back by Griffin-Lim."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        autoencoder: Mapping[str, Any] | None = None,
        codebook_size: int = 256,
        num_quantizers: int = 4,
        components: int = 48,
        latent_bins: int = 8,
        sampling_rate: int = 16_000,
        hop_length: int = 1_280,
        audio_channels: int = 1,
    ) -> None:
        """`autoencoder` is the config of an `AutoencoderKL`; `hop_length` is a latent frame in samples."""
        super().__init__()
        self.vae = AutoencoderKL.from_config(dict(autoencoder or {}))
        width = self.vae.config.latent_channels * latent_bins
        self.mean = nn.Parameter(torch.zeros(width))
        self.directions = nn.Parameter(torch.zeros(components, width))
        self.codebooks = nn.Parameter(torch.zeros(num_quantizers, codebook_size, components))
        self.log_mel = LogMel(sampling_rate=sampling_rate, mel_bins=64)
        self.vocoder = GriffinLimVocoder(sampling_rate=sampling_rate)

    @torch.no_grad()
    def encode(self, input_values: Tensor) -> SimpleNamespace:
        """Return ``audio_codes`` [1, B, K, T] and ``audio_scales`` of waveforms [B, 1, N]."""
        missing = -input_values.shape[-1] % self.config.hop_length
        mel_B1TM = mel_frames(pad(input_values[:, 0].float(), (0, missing)), self.log_mel)
        latents_BCTF = self.vae.encode(mel_B1TM.to(self.mean.dtype)).latent_dist.mean
        return SimpleNamespace(audio_codes=self.quantise(latents_BCTF)[None], audio_scales=[None])

    @torch.no_grad()
    def decode(self, audio_codes: Tensor, audio_scales: Any = None) -> SimpleNamespace:
        """Return ``audio_values`` [B, 1, N] of ``audio_codes`` [1, B, K, T]."""
        mel_B1TM = self.vae.decode(self.dequantise(audio_codes[0])).sample
        return SimpleNamespace(audio_values=self.vocoder(mel_B1TM[:, 0])[:, None])

    def quantise(self, latents_BCTF: Tensor) -> Tensor:
        """Return the codes [B, K, T] of latents."""
        rest_BTP = (latents_BCTF.permute(0, 2, 1, 3).flatten(2) - self.mean) @ self.directions.T
        codes = []
        for book_VP in self.codebooks:
            distance_BTV = book_VP.square().sum(1) - 2 * rest_BTP @ book_VP.T
            codes.append(distance_BTV.argmin(-1))
            rest_BTP = rest_BTP - book_VP[codes[-1]]
        return torch.stack(codes, dim=1)

    def dequantise(self, codes_BKT: Tensor) -> Tensor:
        """Return the latents [B, C, T, F] of codes."""
        sum_BTP = sum(book_VP[codes_BKT[:, k]] for k, book_VP in enumerate(self.codebooks))
        latents_BTD = sum_BTP @ self.directions + self.mean
        clips, frames = latents_BTD.shape[:2]
        latents_BTCF: Tensor = latents_BTD.reshape(clips, frames, -1, self.config.latent_bins)
        return latents_BTCF.permute(0, 2, 1, 3)
