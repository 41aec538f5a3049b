"""The round trip: a generated clip is described by a captioner, and the caption is compared with the prompt.

A judge of another kind than the tagger: it hears no more than it can say. Which events of the prompt are
missing in the caption, which were added, and are they in another order?

The captioner judges, so no training of a generator may import it or this module.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from services.api.captioning import ClipCaptioner
from services.api.reading import EVENTS, Comparison, EventReader, Reading, compare, read_events
from services.catalogue import captioner_uri
from services.errors import InvalidInputError, invalid
from services.weights.uri import resolve

Waveform = tuple[NDArray[np.float32], int]
"""Samples [N] in [-1, 1], and their rate in hertz."""

ROUND_TRIP_METRICS: Final = (
    "round_trip_presence",
    "round_trip_order_given_presence",
    "round_trip_present_and_in_order",
    "round_trip_nothing_else",
)
"""Names of the metrics of `round_trip_metrics`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundTrip:
    """A captioner whose captions can be read."""

    captioner: ClipCaptioner
    reader: EventReader
    digest: str
    """Digest of the captioner's weights."""

    def wanted(self, prompt: str) -> Reading | None:
        """Return what a clip of `prompt` should have; None if the captioner has no words for it."""
        reading = self.reader.read(prompt)
        return reading if reading.events and not reading.unread else None

    def captions(self, clips: Sequence[Waveform]) -> list[str]:
        """Return the captions of clips, empty for those without sound."""
        from services.local_captioner import describe

        return describe(self.captioner, clips)


def round_trip_metrics(comparison: Comparison) -> dict[str, float]:
    """Return the metrics of a clip, `ROUND_TRIP_METRICS`: 1 or 0, or NaN if undefined.

    Order includes simultaneity: a prompt with *while* is in order if the caption says *while* as well.
    """
    present, in_order = not comparison.missing, comparison.in_order
    return {
        "round_trip_presence": float(present),
        "round_trip_order_given_presence": math.nan if in_order is None else float(in_order),
        "round_trip_present_and_in_order": float(present and in_order is not False),
        "round_trip_nothing_else": float(not comparison.added),
    }


def round_trip(
    trip: RoundTrip, prompts: Sequence[str], clips: Sequence[Waveform]
) -> list[Mapping[str, float]]:
    """Return the metrics of each clip for its prompt; NaN where the captioner has no words for the prompt."""
    wanted = [trip.wanted(prompt) for prompt in prompts]
    known = [clip for clip, reading in zip(clips, wanted, strict=True) if reading is not None]
    heard = iter(map(trip.reader.read, trip.captions(known)))
    return [
        dict.fromkeys(ROUND_TRIP_METRICS, math.nan)
        if reading is None
        else round_trip_metrics(compare(reading, next(heard)))
        for reading in wanted
    ]


def open_round_trip(uri: str, device: str = "auto") -> RoundTrip:
    """Load a captioner whose captions can be read.

    Raises:
        ModelError: it can't be loaded.
        InvalidInputError: it is no URI, or the model has no list of events.
    """
    from services.local_captioner import open_captioner

    try:
        model = resolve(captioner_uri(uri))
    except InvalidInputError as error:
        raise invalid("captioner", error.violations[0].description) from error
    reader = read_events(model.folder)
    if reader is None:
        raise invalid("captioner", f"is {uri}, which has no {EVENTS}; give a captioner that has one, or none")
    return RoundTrip(captioner=open_captioner(model, device=device), reader=reader, digest=model.digest)
