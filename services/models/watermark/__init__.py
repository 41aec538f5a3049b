"""Imperceptible watermarks of generated sound: embedded in the samples, detected by a model.

`Watermark` and `WatermarkDetector` are the interface, `audioseal` its first implementation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

Waveform = NDArray[np.float32]

BITS: Final = 16
"""Length of a message."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Detection:
    """What a detector finds in a clip."""

    share: float
    """Share of the clip's samples that it takes for marked, 0 to 1."""
    message: int
    """The message of `BITS` bits; of no meaning in a clip that is not marked."""

    @property
    def marked(self) -> bool:
        """Whether most of the clip is marked."""
        return self.share > 0.5


class Watermark(Protocol):
    """Marks clips."""

    def embed(self, waveform_N: Waveform, sampling_rate: int, message: int) -> Waveform:
        """Return the clip, mono [N] in [-1, 1], with a message of `BITS` bits."""
        ...


class WatermarkDetector(Protocol):
    """Finds what a `Watermark` has embedded."""

    def detect(self, waveform_N: Waveform, sampling_rate: int) -> Detection:
        """Return what is found in a clip, mono [N] in [-1, 1]."""
        ...


def message_of(digest: str) -> int:
    """Return the message of clips of a model: the first bits of its digest (``sha256:…``)."""
    return int(digest.removeprefix("sha256:")[: BITS // 4] or "0", 16)


def marker(
    checkpoint: Path | None, digest: str, sampling_rate: int, device: str
) -> Callable[[Waveform], Waveform] | None:
    """Return what marks clips of the model with a digest by ``generator_base.pth``; None without a file.

    Raises as `services.models.watermark.audioseal.AudioSealWatermark`.
    """
    if checkpoint is None:
        return None
    from services.models.watermark.audioseal import AudioSealWatermark

    watermark = AudioSealWatermark(checkpoint, device)
    return partial(watermark.embed, sampling_rate=sampling_rate, message=message_of(digest))
