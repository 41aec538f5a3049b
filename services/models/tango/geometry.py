"""Convert between seconds, samples, mel frames and latent frames of a Tango model.

Shapes: C channels, T latent frames (time), F latent mel bins.
"""

import math
from dataclasses import dataclass

from services.errors import ModelFormatError

_ROUNDING_SLACK = 1e-6
"""Latent frames by which a duration may exceed the grid without costing one more (floating-point noise)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """The sizes of one model. The defaults are Tango's (arXiv 2404.09956, section 4; upstream configs)."""

    sampling_rate: int = 16_000
    """Sampling rate of the model's waveforms, in hertz."""
    hop_length: int = 160
    """Samples between two mel frames."""
    mel_bins: int = 64
    """Mel bins of a frame."""
    latent_channels: int = 8
    """Channels of the autoencoder's latents."""
    latent_downsampling: int = 4
    """Mel frames per latent frame, and mel bins per latent bin."""
    frame_multiple: int = 8
    """Divisor of the number of latent frames: the denoiser halves them at every level but the last."""
    default_duration: float = 10.24
    """Default duration of a clip in seconds."""
    max_duration: float = 10.24
    """Longest clip in seconds."""

    def __post_init__(self) -> None:
        for name in ("sampling_rate", "hop_length", "mel_bins", "latent_channels", "latent_downsampling",
                     "frame_multiple"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ModelFormatError(f"geometry.{name} is {getattr(self, name)}; it must be 1 or more")
        if self.mel_bins % self.latent_downsampling:
            raise ModelFormatError(
                f"geometry.mel_bins ({self.mel_bins}) must be a multiple of "
                f"latent_downsampling ({self.latent_downsampling})"
            )
        if not 0 < self.default_duration <= self.max_duration < math.inf:
            raise ModelFormatError(
                f"geometry.default_duration ({self.default_duration} s) must be above 0 "
                f"and at most max_duration ({self.max_duration} s)"
            )

    @property
    def grid(self) -> float:
        """Seconds that one latent frame spans (Tango: 0.04)."""
        return self.hop_length * self.latent_downsampling / self.sampling_rate

    @property
    def min_duration(self) -> float:
        """Shortest clip in seconds: one latent frame."""
        return self.grid

    def latent_frames(self, duration: float) -> int:
        """Return the latent frames of `duration` seconds, rounded up to a multiple of `frame_multiple`.

        Raises `ValueError` unless `duration` is positive and finite; callers check their limits first.
        """
        if not 0 < duration < math.inf:
            raise ValueError(f"duration is {duration}; it must be a positive finite number of seconds")
        blocks = duration / (self.grid * self.frame_multiple) - _ROUNDING_SLACK / self.frame_multiple
        return self.frame_multiple * max(1, math.ceil(blocks))

    def samples(self, duration: float) -> int:
        """Return the samples of a clip of `duration` seconds; the decoder's output is cut to them."""
        return round(duration * self.sampling_rate)

    def latent_shape(self, duration: float) -> tuple[int, int, int]:
        """Return the shape (C, T, F) of the latents of a clip of `duration` seconds."""
        return self.latent_channels, self.latent_frames(duration), self.mel_bins // self.latent_downsampling
