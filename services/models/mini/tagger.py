"""The mini event tagger: detect which events of the sound world are in a clip, and when.

The independent judge of the mini family. Evaluation and promotion gates may import it; training stages may
not (import-linter enforces it), since training could otherwise optimise against its own judge.

Shapes: B batch, N samples, T mel frames, S segments (4 mel frames, 40 ms), M mel bins, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from services.models.mel import LogMel

TIME_STRIDE = 4
"""Mel frames per segment."""


def _block(inputs: int, outputs: int, pool: tuple[int, int]) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.MaxPool2d(pool),
    )


class EventTagger(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Sound event detection: waveform [B, N] at 16 kHz to logits [B, S, K], one segment per 40 ms.

    A small convolutional recurrent network, trained with binary cross-entropy on the sound world's ground
    truth.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        classes: Sequence[str] = (),
        sampling_rate: int = 16_000,
        hop_length: int = 160,
        mel_bins: int = 64,
        width: int = 32,
        hidden: int = 64,
    ) -> None:
        super().__init__()
        self.log_mel = LogMel(sampling_rate=sampling_rate, hop_length=hop_length, mel_bins=mel_bins)
        self.trunk = nn.Sequential(
            _block(1, width // 2, (1, 2)),
            _block(width // 2, width, (2, 2)),
            _block(width, 2 * width, (2, 2)),
            _block(2 * width, 2 * width, (1, 2)),
        )
        self.recurrent = nn.GRU(2 * width * mel_bins // 16, hidden, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * hidden, len(classes))

    @property
    def segment_seconds(self) -> float:
        """Length of a segment in seconds."""
        return float(TIME_STRIDE * self.config.hop_length / self.config.sampling_rate)

    def forward(self, waveform_BN: Tensor) -> Tensor:
        """Return logits [B, S, K] for `waveform_BN` (float32 in [-1, 1])."""
        # Normalised by the mean and standard deviation of the sound world's log-mel magnitudes.
        mel_B1TM = (self.log_mel(waveform_BN)[:, None] + 7.0) / 3.0
        features = self.trunk(mel_B1TM)  # [B, C, S, M / 16]
        sequence = features.permute(0, 2, 1, 3).flatten(2)
        logits_BSK: Tensor = self.head(self.recurrent(sequence)[0])
        return logits_BSK

    @torch.no_grad()
    def detect(self, waveform_BN: Tensor) -> list[dict[str, "Detection"]]:
        """Return the detected classes of each clip, with onset, offset and centre."""
        probabilities_BSK = self(waveform_BN).sigmoid()
        return [detections(p, self.config.classes, self.segment_seconds) for p in probabilities_BSK]


@dataclass(frozen=True, kw_only=True, slots=True)
class Detection:
    """One class detected in a clip; times in seconds from its start."""

    onset: float
    offset: float
    centre: float
    """Mean time, weighted by probability: robust to one stray segment, unlike the onset."""
    seconds: float
    """Total length of the segments above the threshold."""


def detections(
    probabilities_SK: Tensor,
    classes: Sequence[str],
    segment_seconds: float,
    *,
    threshold: float = 0.5,
    minimum_seconds: float = 0.2,
) -> dict[str, Detection]:
    """Return the classes whose probability exceeds `threshold` for at least `minimum_seconds` in all."""
    found = {}
    times = (torch.arange(probabilities_SK.shape[0], dtype=torch.float32) + 0.5) * segment_seconds
    for k, name in enumerate(classes):
        track = probabilities_SK[:, k].float().cpu()
        active = track > threshold
        seconds = float(active.sum()) * segment_seconds
        if seconds < minimum_seconds:
            continue
        mass = torch.where(active, track, torch.zeros_like(track))
        found[name] = Detection(
            onset=float(times[active][0]) - segment_seconds / 2,
            offset=float(times[active][-1]) + segment_seconds / 2,
            centre=float((mass * times).sum() / mass.sum()),
            seconds=seconds,
        )
    return found
