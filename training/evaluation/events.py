"""Whether a clip of the sound world holds the events of its prompt, and in order, according to the tagger.

Source: ours. The judge, `services.models.mini.tagger`, took no part in any training, so no training
stage may import this module either.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from services.models.mini.tagger import Detection
from training.soundworld.captions import CaptionTruth

TIE_SECONDS = 0.1
"""Events whose centres lie closer than this count as neither in order nor reversed."""


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
