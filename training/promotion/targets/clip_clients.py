"""Asking a challenger for clips, here by the native API. That of a Triton is in `triton_client`."""

import math
from dataclasses import dataclass
from typing import Protocol

from services.client import TLS, AudioClient
from services.errors import MilongaError
from training.evaluation.config import Sampling


@dataclass(frozen=True, kw_only=True, slots=True)
class MadeClip:
    """A clip, and what is known of it."""

    wav: bytes
    """The file: 16-bit samples."""
    digest: str
    """Of the weights that made it."""
    seconds: float
    """It took, from request to clip."""


class ClipClient(Protocol):
    """Asks one challenger, also from several threads. All raise `MilongaError`."""

    def generate(self, prompt: str, seed: int | None, sampling: Sampling) -> MadeClip:
        """The clip of a prompt. Raises `InvalidInputError` where prompt or settings are refused."""

    def close(self) -> None:
        """End what is under way, and the connection."""


class ServiceClips:
    """A generation service, by its native API. See `ClipClient`. Seconds are the service's own count."""

    def __init__(self, address: str, *, tls: TLS | None, timeout: float) -> None:
        """Nothing is called yet; `timeout` in seconds a clip."""
        self._client = AudioClient(address, tls=tls, timeout=timeout, retries=4)

    def generate(self, prompt: str, seed: int | None, sampling: Sampling) -> MadeClip:
        """See `ClipClient`."""
        made = self._client.generate(
            prompt,
            seed=seed,
            clip_count=1,
            encoding="wav",
            duration=sampling.duration,
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            scheduler=sampling.scheduler,
        )
        if not math.isfinite(made.timings.total):
            raise MilongaError("the service says no time that a clip took")
        return MadeClip(wav=made.clips[0].audio, digest=made.model.digest, seconds=made.timings.total)

    def close(self) -> None:
        """See `ClipClient`."""
        self._client.close()
