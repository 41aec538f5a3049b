"""Figures of one clip: does it hold its prompt's events in their order, is it silent, is it clipped.

The events are those of the tagger (`services.models.mini.tagger`), an independent judge: no training stage
consulted it, so none may import this module either. A silent clip would flatter FAD and KL.

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
"""Events whose centres lie closer than this count as neither in order nor reversed."""
SILENT_PEAK = 1e-2
"""A clip whose loudest sample is below this (-40 dB of full scale) counts as silent."""
FULL_SCALE = 0.9999
"""A clip with more than one sample at this level or above counts as clipped."""
FLOOR_DB = -100.0
"""Loudness of what is softer still."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What the tagger says of one clip."""

    truth: CaptionTruth
    heard: frozenset[str]
    """All classes heard."""
    present: bool
    """Every event of the prompt is heard."""
    in_order: bool | None
    """Their centres follow the prompt's order; None where the prompt has no order or an event is missing."""
    reversed: bool | None
    """Their centres follow the reverse order."""


def judge(truth: CaptionTruth, heard: Mapping[str, Detection]) -> Verdict:
    """Compare what was asked for with what was heard."""
    present = all(name in heard for name in truth.classes)
    in_order = reversed_ = None
    if present and truth.relation == "then":
        centres = np.array([heard[name].centre for name in truth.classes])
        in_order = bool((np.diff(centres) > TIE_SECONDS).all())
        reversed_ = bool((np.diff(centres) < -TIE_SECONDS).all())
    return Verdict(
        truth=truth, heard=frozenset(heard), present=present, in_order=in_order, reversed=reversed_
    )


def event_values(verdict: Verdict) -> dict[str, float]:
    """The figures of one clip, 0 or 1; NaN where it does not count. Their means are shares in [0, 1]."""
    is_sequence = verdict.truth.relation == "then"
    ordered = math.nan if verdict.in_order is None else float(verdict.in_order)
    return {
        "presence": float(verdict.present),
        "order_given_presence": ordered,
        "reversed_given_presence": math.nan if verdict.reversed is None else float(verdict.reversed),
        "present_and_in_order": float(verdict.present and verdict.in_order is not False),
        "sequences_present_and_in_order": float(bool(verdict.in_order)) if is_sequence else math.nan,
        "nothing_else_heard": float(verdict.heard <= set(verdict.truth.classes)),
    }


EVENT_FIGURES = (
    "presence",
    "order_given_presence",
    "reversed_given_presence",
    "present_and_in_order",
    "sequences_present_and_in_order",
    "nothing_else_heard",
)
"""Names of `event_values`."""


def is_silent(waveform_N: NDArray[np.float32]) -> bool:
    """Whether a clip in [-1, 1] is too soft to hear."""
    return bool(np.abs(waveform_N).max(initial=0.0) < SILENT_PEAK)


def is_clipped(waveform_N: NDArray[np.float32]) -> bool:
    """Whether a clip in [-1, 1] lies at full scale more than once."""
    return int((np.abs(waveform_N) >= FULL_SCALE).sum()) > 1


def loudness_db(waveform_N: NDArray[np.float32]) -> float:
    """Root mean square in dB below full scale, `FLOOR_DB` to 0."""
    power = float(np.square(waveform_N, dtype=np.float64).mean()) if waveform_N.size else 0.0
    return max(FLOOR_DB, 10.0 * float(np.log10(max(power, 1e-30))))
