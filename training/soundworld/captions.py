"""The grammar of captions: from events and their relation to a sentence, in many wordings.

Also the deliberate mistakes (`corrupt`): what a caption found on the web may say of a clip.
"""

from dataclasses import dataclass
from string import Formatter
from typing import Literal

import numpy as np

Relation = Literal["single", "then", "while"]
"""`then`: one event after another, in the order of the tuple. `while`: at the same time."""

VOCABULARY: dict[str, tuple[tuple[str, ...], tuple[tuple[str, str], ...]]] = {
    # class: (nouns, (finite verb, gerund))
    "dog": (
        ("a dog", "a puppy", "a hound"),
        (("barks", "barking"), ("woofs", "woofing"), ("yaps", "yapping")),
    ),
    "siren": (("a siren", "an ambulance", "a police car"), (("wails", "wailing"), ("blares", "blaring"))),
    "bell": (
        ("a bell", "a church bell", "a gong"),
        (("rings", "ringing"), ("tolls", "tolling"), ("chimes", "chiming")),
    ),
    "bird": (
        ("a bird", "a sparrow", "a finch"),
        (("chirps", "chirping"), ("sings", "singing"), ("tweets", "tweeting")),
    ),
    "knock": (("someone", "a visitor", "a hand"), (("knocks", "knocking"), ("raps", "rapping"))),
    "beep": (("a machine", "a monitor", "an alarm"), (("beeps", "beeping"), ("bleeps", "bleeping"))),
    "thunder": (
        ("thunder", "a storm"),
        (("rumbles", "rumbling"), ("rolls", "rolling"), ("booms", "booming")),
    ),
    "rain": (
        ("rain", "a shower", "a downpour"),
        (("falls", "falling"), ("pours", "pouring"), ("patters", "pattering")),
    ),
    "engine": (
        ("an engine", "a motor", "a truck"),
        (("idles", "idling"), ("runs", "running"), ("revs", "revving")),
    ),
    "glass": (("glass", "a window", "a bottle"), (("breaks", "breaking"), ("shatters", "shattering"))),
    "footsteps": (
        ("a man", "a woman", "a person"),
        (("walks", "walking"), ("steps", "stepping"), ("strides", "striding")),
    ),
    "cat": (("a cat", "a kitten"), (("meows", "meowing"), ("mews", "mewing"), ("cries", "crying"))),
    "horn": (("a horn", "a car", "a taxi"), (("honks", "honking"), ("toots", "tooting"))),
    "clock": (("a clock", "a watch"), (("ticks", "ticking"), ("clicks", "clicking"))),
}

TEMPLATES: dict[tuple[Relation, int], tuple[str, ...]] = {
    # {a} {b} {c}: finite clauses ("a dog barks"); {A} {B} {C}: gerunds ("a dog barking"). Time runs a, b, c.
    ("single", 1): ("{a}", "{A}"),
    ("then", 2): (
        "{a} then {b}",
        "{a}, then {b}",
        "{a} and then {b}",
        "{A} followed by {B}",
        "{A}, followed by {B}",
        "{b} after {a}",
        "after {a}, {b}",
        "{a} before {b}",
        "before {b}, {a}",
    ),
    ("while", 2): ("{a} while {b}", "{a} and {b}", "{A} and {B}", "{a} as {b}", "while {a}, {b}"),
    ("then", 3): (
        "{a} then {b} then {c}",
        "{a}, then {b}, then {c}",
        "{A} followed by {B}, then {C}",
        "{A}, followed by {B}, followed by {C}",
    ),
}

MAX_EVENTS = max(count for _, count in TEMPLATES)


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionTruth:
    """What a caption says: the events in order of time and how they relate."""

    classes: tuple[str, ...]
    relation: Relation


def _phrase(event_class: str, rng: np.random.Generator) -> tuple[str, str]:
    """Finite clause and gerund of one event, of one noun and one verb."""
    nouns, verbs = VOCABULARY[event_class]
    noun = nouns[int(rng.integers(len(nouns)))]
    finite, gerund = verbs[int(rng.integers(len(verbs)))]
    return f"{noun} {finite}", f"{noun} {gerund}"


def caption_parts(truth: CaptionTruth, rng: np.random.Generator) -> list[tuple[str, int | None]]:
    """Return a wording of `truth`, in parts: (text, index of the event it names, or None for a link)."""
    templates = TEMPLATES[truth.relation, len(truth.classes)]
    phrases = [_phrase(event_class, rng) for event_class in truth.classes]
    parts: list[tuple[str, int | None]] = []
    for link, field, _, _ in Formatter().parse(templates[int(rng.integers(len(templates)))]):
        if link:
            parts.append((link, None))
        if field:
            event = "abc".index(field.lower())
            parts.append((phrases[event][field.isupper()], event))
    return parts


def write_caption(truth: CaptionTruth, rng: np.random.Generator) -> str:
    """Return a wording of `truth`, with a capital at the start."""
    text = "".join(part for part, _ in caption_parts(truth, rng))
    return text[0].upper() + text[1:]


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionNoise:
    """Probabilities of deliberate mistakes. At most one mistake per caption."""

    swapped: float = 0.0
    """Probability that two neighbours in a sequence are named in the wrong order."""
    missing: float = 0.0
    """Probability that one of several events is not named."""
    replaced: float = 0.0
    """Probability that one event is named as another class."""

    def __post_init__(self) -> None:
        total = self.swapped + self.missing + self.replaced
        if min(self.swapped, self.missing, self.replaced) < 0 or total > 1:
            raise ValueError(f"caption noise rates must be >= 0 and add up to at most 1, got {self}")


TRUE_CAPTIONS = CaptionNoise()
WEB_CAPTIONS = CaptionNoise(swapped=0.2, missing=0.1, replaced=0.1)
"""The rates that `mini-base` is taught with."""


def corrupt(truth: CaptionTruth, noise: CaptionNoise, rng: np.random.Generator) -> CaptionTruth:
    """Return `truth`, with one mistake by the probabilities of `noise`, if that mistake is possible."""
    draw = rng.uniform()
    several = len(truth.classes) > 1
    if draw < noise.swapped:
        return swap(truth, rng) if truth.relation == "then" else truth
    if draw < noise.swapped + noise.missing:
        return drop(truth, rng) if several else truth
    if draw < noise.swapped + noise.missing + noise.replaced:
        return replace_event(truth, rng)
    return truth


def swap(truth: CaptionTruth, rng: np.random.Generator) -> CaptionTruth:
    """Two neighbouring events of a sequence change places."""
    classes = list(truth.classes)
    i = int(rng.integers(len(classes) - 1))
    classes[i], classes[i + 1] = classes[i + 1], classes[i]
    return CaptionTruth(classes=tuple(classes), relation=truth.relation)


def drop(truth: CaptionTruth, rng: np.random.Generator) -> CaptionTruth:
    """One event is left out."""
    classes = list(truth.classes)
    del classes[int(rng.integers(len(classes)))]
    return CaptionTruth(classes=tuple(classes), relation=truth.relation if len(classes) > 1 else "single")


def replace_event(truth: CaptionTruth, rng: np.random.Generator) -> CaptionTruth:
    """One event becomes a class that the clip does not hold."""
    classes = list(truth.classes)
    others = [name for name in VOCABULARY if name not in classes]
    classes[int(rng.integers(len(classes)))] = others[int(rng.integers(len(others)))]
    return CaptionTruth(classes=tuple(classes), relation=truth.relation)


def words() -> tuple[str, ...]:
    """Return every word and mark the grammar can write, lower case, sorted: the mini family's vocabulary."""
    text = [t for templates in TEMPLATES.values() for t in templates]
    found = {w for t in text for w in t.replace(",", " , ").split() if not w.startswith("{")}
    for nouns, verbs in VOCABULARY.values():
        found.update(w for noun in nouns for w in noun.split())
        found.update(w for pair in verbs for w in pair)
    return tuple(sorted(found))
