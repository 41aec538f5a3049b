"""Metrics of a single clip: events of the prompt, their order or simultaneity, silence, levels.

Events are detected by the tagger (`services.models.mini.tagger`), an independent judge: no training stage
uses it, so none may import this module. Silence is a metric because silent clips have a good FAD and KL.

Shape legend: N samples.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from services.models.mini.tagger import Detection
from training.soundworld.captions import CaptionTruth, Relation

TIE_SECONDS = 0.1
"""Events whose centres are closer than this count as neither in order nor reversed."""
LENGTHS: Final[Mapping[Relation, float]] = {"single": 1.05, "then": 0.82, "while": 1.44}
"""Mean length of an event in scenes of 2.56 s of one or two events, in seconds, by their relation. The tagger
detects events of every class for their whole length: the median is 0.98 to 1.01 of it, over 1,025 events."""
PRESENT_SHARE = 0.5
"""An event is present if it is detected for this share of its usual length."""
SIMULTANEOUS_SHARE = 0.5
"""Events are simultaneous if they overlap for this share of the shorter one's span."""
FULL_SCALE = 0.9999
"""A clip with more than one sample at this level or above counts as clipped, with one as overshooting."""
FLOOR_DB = -100.0
"""Minimum of the loudness."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EventComparison:
    """The events of a prompt, compared with those that the tagger detects in a clip."""

    truth: CaptionTruth
    detected: frozenset[str]
    """All detected classes."""
    present: bool
    """Whether all events of the prompt are detected, each for `PRESENT_SHARE` of its usual length."""
    in_order: bool | None
    """Whether their centres follow the prompt's order; None if it has no order or an event is missing."""
    reversed: bool | None
    """Whether their centres follow the reverse order; None as above."""
    simultaneous: bool | None = None
    """Whether they overlap, if the prompt has them at the same time; None: it has not, or one is missing."""


def usual_seconds(truth: CaptionTruth, duration: float) -> float:
    """Return the mean length of an event of `truth` in scenes of `duration` seconds."""
    shared = 2 / len(truth.classes) if truth.relation == "then" else 1.0
    return LENGTHS[truth.relation] * shared * duration / 2.56


def overlap_share(first: Detection, second: Detection) -> float:
    """Return how long two spans overlap, as a share of the shorter one."""
    together = min(first.offset, second.offset) - max(first.onset, second.onset)
    shorter = min(first.offset - first.onset, second.offset - second.onset)
    return max(0.0, together) / max(shorter, 1e-6)


def compare_events(
    truth: CaptionTruth, detected: Mapping[str, Detection], duration: float = 2.56
) -> EventComparison:
    """Compare the events of a prompt with those detected in a clip of `duration` seconds."""
    least = PRESENT_SHARE * usual_seconds(truth, duration)
    present = all(name in detected and detected[name].seconds >= least for name in truth.classes)
    in_order = reversed_ = simultaneous = None
    if present and truth.relation == "while":
        pairs = itertools.combinations([detected[name] for name in truth.classes], 2)
        simultaneous = all(overlap_share(one, other) >= SIMULTANEOUS_SHARE for one, other in pairs)
    if present and truth.relation == "then":
        centres = np.array([detected[name].centre for name in truth.classes])
        in_order = bool((np.diff(centres) > TIE_SECONDS).all())
        reversed_ = bool((np.diff(centres) < -TIE_SECONDS).all())
    return EventComparison(
        truth=truth,
        detected=frozenset(detected),
        present=present,
        in_order=in_order,
        reversed=reversed_,
        simultaneous=simultaneous,
    )


def event_metrics(clip: EventComparison) -> dict[str, float]:
    """Return the metrics of a clip, `EVENT_METRICS`: 1 or 0, or NaN if undefined. Their means are shares."""
    is_sequence = clip.truth.relation == "then"
    several = len(clip.truth.classes) > 1
    as_described = float(clip.present and clip.in_order is not False and clip.simultaneous is not False)
    return {
        "presence": float(clip.present),
        "order_given_presence": math.nan if clip.in_order is None else float(clip.in_order),
        "reversed_given_presence": math.nan if clip.reversed is None else float(clip.reversed),
        "present_and_in_order": float(clip.present and clip.in_order is not False),
        "sequences_present_and_in_order": float(bool(clip.in_order)) if is_sequence else math.nan,
        "nothing_else_heard": float(clip.detected <= set(clip.truth.classes)),
        "simultaneous_given_presence": math.nan if clip.simultaneous is None else float(clip.simultaneous),
        "several_present": float(clip.present) if several else math.nan,
        "several_as_described": as_described if several else math.nan,
        "as_described": as_described,
    }


EVENT_METRICS = (
    "presence",
    "order_given_presence",
    "reversed_given_presence",
    "present_and_in_order",
    "sequences_present_and_in_order",
    "nothing_else_heard",
    "simultaneous_given_presence",
    "several_present",
    "several_as_described",
    "as_described",
)
"""Names of the metrics of `event_metrics`."""


def overshoots(waveform_N: NDArray[np.float32]) -> bool:
    """Return whether a clip in [-1, 1] reaches full scale.

    A decoder turns a clip that overshoots down to exactly that peak, so that `is_clipped` can't see it.
    """
    return bool(np.abs(waveform_N).max(initial=0.0) >= FULL_SCALE)


def is_clipped(waveform_N: NDArray[np.float32]) -> bool:
    """Return whether a clip in [-1, 1] has more than one sample at full scale."""
    return int((np.abs(waveform_N) >= FULL_SCALE).sum()) > 1


def loudness_db(waveform_N: NDArray[np.float32]) -> float:
    """Return the root mean square in dB of full scale, from `FLOOR_DB` to 0."""
    power = float(np.square(waveform_N, dtype=np.float64).mean()) if waveform_N.size else 0.0
    return max(FLOOR_DB, 10.0 * float(np.log10(max(power, 1e-30))))
