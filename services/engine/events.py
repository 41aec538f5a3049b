"""What the engine tells the caller of a request, in this order::

    Queued+  (Progress | Preview | ClipReady)*  (Finished | Failed)

Exactly one `Finished` or `Failed` ends a request; nothing follows it.
Shapes: N samples, T mel frames, M mel bins.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, slots=True)
class Queued:
    """The request waits. Sent once at submission, and again whenever the position changes."""

    position: int
    """Clips of other requests that start before this request's first: 0 is next."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """One denoising step of the request is done. Sent once per denoiser call that held any of its clips."""

    clip_index: int
    """The first of the request's clips that took part in the call."""
    step: int
    """Steps that this clip has behind it, 1 to `num_inference_steps`."""
    num_inference_steps: int
    """Steps that each clip of the request takes."""
    fraction: float
    """Exact share of the request's denoising steps that are done, over all its clips: 1.0 before decoding."""
    seconds_left: float | None
    """Estimate until the last clip is ready, decoding included; None until there is something to go by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preview:
    """The first clip as the denoiser sees it now: its current estimate of the clean log-mel spectrogram."""

    clip_index: int
    """Always the request's first clip, 0."""
    step: int
    """Steps that the clip has behind it."""
    mel_TM: NDArray[np.float32]
    """Natural-log mel spectrogram, [T, M]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipReady:
    """One clip is done."""

    clip_index: int
    """0 to `clip_count` - 1; clips arrive in the order in which they are done."""
    waveform: NDArray[np.float32]
    """Samples, [N], finite, within [-1, 1]."""
    sampling_rate: int
    """Samples a second."""
    seed: int
    """The request's seed, which with `clip_index` makes this clip again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timings:
    """Where the request's time went, in seconds of the wall clock."""

    queued: float
    """From submission until its first clip got a place."""
    encode: float
    """Text encoder, for prompt and negative prompt; near 0 when both were known."""
    denoise: float
    """From the start of its first denoiser call to the end of its last, other lengths' turns included."""
    decode: float
    """Autoencoder and vocoder, summed over its clips."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """All clips were sent."""

    timings: Timings
    """Where the time went."""
    warnings: tuple[str, ...]
    """What the caller should know about the clips, one sentence each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """The request ended without (all of) its clips."""

    error: Exception
    """A `MilongaError` if the cause is known; anything else is a fault of ours."""


Event = Queued | Progress | Preview | ClipReady | Finished | Failed
