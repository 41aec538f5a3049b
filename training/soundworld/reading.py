"""A reader of the grammar's captions, derived from its tables.

Several captions are right for one clip, so captions are compared by what they say, not word by word.
"""

import functools
import itertools
from string import Formatter

from services.api.reading import EventReader, Reading, events_json
from training.soundworld.captions import (
    HELD_OUT_TEMPLATES,
    TEMPLATES,
    VOCABULARY,
    CaptionTruth,
    Relation,
    event_clauses,
    event_phrases,
)

Template = tuple[list[str], list[list[int]]]
"""Links, and steps of places in the text."""


def wordings() -> dict[str, list[str]]:
    """Return all wordings of each event."""
    found: dict[str, list[str]] = {event: [] for event in VOCABULARY}
    for wording, event in itertools.chain(event_clauses().items(), event_phrases().items()):
        found[event].append(wording)
    return found


def templates() -> list[Template]:
    """Return the links of each template and its steps, without repetitions."""
    found: dict[tuple[str, ...], Template] = {}
    for (relation, _), texts in itertools.chain(TEMPLATES.items(), HELD_OUT_TEMPLATES.items()):
        for text in texts:
            links, events = [], []
            for link, field, _, _ in Formatter().parse(text):
                links.append(link)
                events += ["abc".index(field.lower())] if field else []
            links += [""] * (len(events) + 1 - len(links))
            order = sorted(range(len(events)), key=events.__getitem__)
            steps = [order] if relation == "while" else [[place] for place in order]
            found.setdefault(tuple(links), (links, steps))
    return list(found.values())


@functools.cache
def grammar_reader() -> EventReader:
    """Return the reader of the grammar."""
    return EventReader.of(wordings(), templates())


def grammar_events() -> str:
    """Return the grammar as the file `events.json` of a captioner."""
    return events_json(wordings(), templates())


def truth_of(reading: Reading) -> CaptionTruth | None:
    """Return the truth that a caption of the grammar states; None if it is no whole caption of it."""
    if reading.unread or not reading.steps:
        return None
    if len(reading.steps) == 1:
        relation: Relation = "single" if len(reading.events) == 1 else "while"
        return CaptionTruth(classes=reading.events, relation=relation)
    if any(len(step) > 1 for step in reading.steps):
        return None
    return CaptionTruth(classes=tuple(next(iter(step)) for step in reading.steps), relation="then")


def truth_reading(truth: CaptionTruth) -> Reading:
    """Return what every caption of `truth` says."""
    steps = (
        (frozenset(truth.classes),)
        if truth.relation == "while"
        else tuple(frozenset({event}) for event in truth.classes)
    )
    return Reading(events=truth.classes, steps=steps)
