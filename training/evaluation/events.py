"""Metrics of a single clip: events of the prompt, their order, silence, clipping, loudness.

Events are detected by the tagger (`services.models.mini.tagger`), an independent judge: no training stage
uses it, so none may import this module. Silence is a metric because silent clips have a good FAD and KL.

Shape legend: N samples.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.models.mini.tagger import Detection
from training.soundworld.captions import CaptionTruth

TIE_SECONDS = 0.1
"""Events whose centres are closer than this count as neither in order nor reversed."""
SILENT_PEAK = 1e-2
"""A clip whose peak is below this (-40 dB of full scale) counts as silent."""
FULL_SCALE = 0.9999
"""A clip with more than one sample at this level or above counts as clipped."""
FLOOR_DB = -100.0
"""Minimum of the loudness."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EventComparison:
    """The events of a prompt, compared with those that the tagger detects in a clip."""

    truth: CaptionTruth
    detected: frozenset[str]
    """All detected classes."""
    present: bool
    """Whether all events of the prompt are detected."""
    in_order: bool | None
    """Whether their centres follow the prompt's order; None if it has no order or an event is missing."""
    reversed: bool | None
    """Whether their centres follow the reverse order; None as above."""


def compare_events(truth: CaptionTruth, detected: Mapping[str, Detection]) -> EventComparison:
    """Compare the events of a prompt with the detected ones."""
    present = all(name in detected for name in truth.classes)
    in_order = reversed_ = None
    if present and truth.relation == "then":
        centres = np.array([detected[name].centre for name in truth.classes])
        in_order = bool((np.diff(centres) > TIE_SECONDS).all())
        reversed_ = bool((np.diff(centres) < -TIE_SECONDS).all())
    return EventComparison(
        truth=truth, detected=frozenset(detected), present=present, in_order=in_order, reversed=reversed_
    )


def event_metrics(clip: EventComparison) -> dict[str, float]:
    """Return the metrics of a clip, `EVENT_METRICS`: 1 or 0, or NaN if undefined. Their means are shares."""
    is_sequence = clip.truth.relation == "then"
    return {
        "presence": float(clip.present),
        "order_given_presence": math.nan if clip.in_order is None else float(clip.in_order),
        "reversed_given_presence": math.nan if clip.reversed is None else float(clip.reversed),
        "present_and_in_order": float(clip.present and clip.in_order is not False),
        "sequences_present_and_in_order": float(bool(clip.in_order)) if is_sequence else math.nan,
        "nothing_else_heard": float(clip.detected <= set(clip.truth.classes)),
    }


EVENT_METRICS = (
    "presence",
    "order_given_presence",
    "reversed_given_presence",
    "present_and_in_order",
    "sequences_present_and_in_order",
    "nothing_else_heard",
)
"""Names of the metrics of `event_metrics`."""


def is_silent(waveform_N: NDArray[np.float32]) -> bool:
    """Return whether the peak of a clip in [-1, 1] is below `SILENT_PEAK`."""
    return bool(np.abs(waveform_N).max(initial=0.0) < SILENT_PEAK)


def is_clipped(waveform_N: NDArray[np.float32]) -> bool:
    """Return whether a clip in [-1, 1] has more than one sample at full scale."""
    return int((np.abs(waveform_N) >= FULL_SCALE).sum()) > 1


def loudness_db(waveform_N: NDArray[np.float32]) -> float:
    """Return the root mean square in dB of full scale, from `FLOOR_DB` to 0."""
    power = float(np.square(waveform_N, dtype=np.float64).mean()) if waveform_N.size else 0.0
    return max(FLOOR_DB, 10.0 * float(np.log10(max(power, 1e-30))))
