"""The grammar of captions: from events and their relation to a sentence, in many wordings.

Also the deliberate mistakes (`corrupt`): what a caption found on the web may say of a clip.
"""

import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Final, Literal

import numpy as np

Relation = Literal["single", "then", "while"]
"""`then`: one event after another, in the order of the tuple. `while`: at the same time."""


@dataclass(frozen=True, slots=True)
class Noun:
    """What makes a sound: forms with their articles."""

    singular: tuple[str, ...]
    """``a dog``, ``the dog``; the first one is the usual one."""
    plural: tuple[str, ...] = ()
    """``dogs``, ``the dogs``, ``two dogs``; the first one is the usual one."""
    bare: tuple[str, str] | None = None
    """Singular and plural without article, for ``a barking dog``; None: it takes no adjective."""


@dataclass(frozen=True, slots=True)
class Verb:
    """What the noun does."""

    plural: str
    singular: str
    gerund: str


@dataclass(frozen=True, slots=True)
class Words:
    """Nouns and verbs that go together, and phrases that name the sound without a verb."""

    nouns: tuple[Noun, ...]
    verbs: tuple[Verb, ...]
    phrases: tuple[str, ...] = ()


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _count(singular: str, plural: str) -> Noun:
    counted = (plural, f"the {plural}", f"two {plural}", f"several {plural}", f"some {plural}")
    return Noun((_with_article(singular), f"the {singular}"), counted, (singular, plural))


def _mass(word: str) -> Noun:
    return Noun((word, f"the {word}"), (), (word, ""))


def _verbs(*forms: str) -> tuple[Verb, ...]:
    """Return verbs of ``plural/singular/gerund``."""
    return tuple(Verb(*form.split("/")) for form in forms)


VOCABULARY: dict[str, tuple[Words, ...]] = {
    "dog": (
        Words(
            (_count("dog", "dogs"), _count("puppy", "puppies"), _count("hound", "hounds")),
            _verbs("bark/barks/barking", "woof/woofs/woofing", "yap/yaps/yapping"),
            ("barking",),
        ),
    ),
    "siren": (
        Words(
            (
                _count("siren", "sirens"),
                _count("ambulance", "ambulances"),
                _count("police car", "police cars"),
            ),
            _verbs("wail/wails/wailing", "blare/blares/blaring"),
            ("a siren", "sirens", "a police siren", "an ambulance siren"),
        ),
    ),
    "bell": (
        Words(
            (_count("bell", "bells"), _count("church bell", "church bells"), _count("gong", "gongs")),
            _verbs("ring/rings/ringing", "toll/tolls/tolling", "chime/chimes/chiming"),
            ("a bell", "bells", "church bells", "a church bell", "a gong"),
        ),
    ),
    "bird": (
        Words(
            (_count("bird", "birds"), _count("sparrow", "sparrows"), _count("finch", "finches")),
            _verbs("chirp/chirps/chirping", "sing/sings/singing", "tweet/tweets/tweeting"),
            ("birds", "birdsong", "chirping"),
        ),
    ),
    "knock": (
        Words(
            (Noun(("someone",)), _count("visitor", "visitors"), _count("hand", "hands")),
            _verbs(
                "knock/knocks/knocking",
                "rap/raps/rapping",
                "knock on a door/knocks on a door/knocking on a door",
            ),
            ("a knock", "knocking", "a knock on the door"),
        ),
    ),
    "beep": (
        Words(
            (_count("machine", "machines"), _count("monitor", "monitors"), _count("alarm", "alarms")),
            _verbs("beep/beeps/beeping", "bleep/bleeps/bleeping"),
            ("beeping", "a beep"),
        ),
    ),
    "thunder": (
        Words(
            (_mass("thunder"), _count("storm", "storms")),
            _verbs("rumble/rumbles/rumbling", "roll/rolls/rolling", "boom/booms/booming"),
            ("thunder",),
        ),
    ),
    "rain": (
        Words(
            (_mass("rain"), _count("shower", "showers"), _count("downpour", "downpours")),
            _verbs("fall/falls/falling", "pour/pours/pouring", "patter/patters/pattering"),
            ("rain", "a downpour"),
        ),
    ),
    "engine": (
        Words(
            (_count("engine", "engines"), _count("motor", "motors"), _count("truck", "trucks")),
            _verbs("idle/idles/idling", "run/runs/running", "rev/revs/revving"),
            ("an engine", "engines", "a motor"),
        ),
    ),
    "glass": (
        Words(
            (_mass("glass"), _count("window", "windows"), _count("bottle", "bottles")),
            _verbs("break/breaks/breaking", "shatter/shatters/shattering"),
        ),
    ),
    "footsteps": (
        Words(
            (_count("man", "men"), _count("woman", "women"), _count("person", "people")),
            _verbs("walk/walks/walking", "step/steps/stepping", "stride/strides/striding"),
        ),
        Words(
            (Noun((), ("footsteps", "the footsteps", "some footsteps"), ("", "footsteps")),),
            _verbs("approach/approaches/approaching", "crunch/crunches/crunching"),
            ("footsteps",),
        ),
    ),
    "cat": (
        Words(
            (_count("cat", "cats"), _count("kitten", "kittens")),
            _verbs("meow/meows/meowing", "mew/mews/mewing", "cry/cries/crying"),
            ("meowing",),
        ),
    ),
    "horn": (
        Words(
            (
                _count("horn", "horns"),
                _count("car", "cars"),
                _count("taxi", "taxis"),
                _count("car horn", "car horns"),
            ),
            _verbs("honk/honks/honking", "toot/toots/tooting"),
            ("a horn", "a car horn", "honking"),
        ),
    ),
    "clock": (
        Words(
            (_count("clock", "clocks"), _count("watch", "watches")),
            _verbs("tick/ticks/ticking", "click/clicks/clicking"),
            ("a clock", "ticking"),
        ),
    ),
}
"""The words of each class."""

Templates = Mapping[tuple[Relation, int], tuple[str, ...]]
"""Templates by relation and number of events. {a} {b} {c}: finite clauses ("a dog barks"); {A} {B} {C}:
phrases ("a dog barking", "dogs", "a barking dog"). Time runs a, b, c."""

TEMPLATES: Final[Templates] = {
    ("single", 1): ("{a}", "{A}", "the sound of {A}", "you hear {A}", "{A} can be heard"),
    ("then", 2): (
        "{a} then {b}",
        "{a}, then {b}",
        "{a} and then {b}",
        "{a}, and then {b}",
        "{A}, then {B}",
        "{A} and then {B}",
        "{A} followed by {B}",
        "{A}, followed by {B}",
        "{a}, followed by {B}",
        "{b} after {a}",
        "{b}, after {a}",
        "after {a}, {b}",
        "after {a} {b}",
        "{B} after {A}",
        "{B}, after {A}",
        "after {A}, {B}",
        "{b} right after {a}",
        "{a} before {b}",
        "{a}, before {b}",
        "before {b}, {a}",
        "before {b} {a}",
        "{A} before {B}",
        "before {B}, {A}",
        "{a} right before {b}",
        "{b} shortly after {a}",
        "first {a}, then {b}",
        "first {a} then {b}",
        "first {A}, then {B}",
        "first {a} and then {b}",
        "{a} first, then {b}",
        "{a}, and after that {b}",
        "{a}, after that {b}",
        "{a} and afterwards {b}",
        "{A}, afterwards {B}",
    ),
    ("while", 2): (
        "{a} while {b}",
        "{a}, while {b}",
        "{A} while {b}",
        "while {a}, {b}",
        "while {a} {b}",
        "{a} and {b}",
        "{A} and {B}",
        "{a} as {b}",
        "as {a}, {b}",
        "{A} as {b}",
        "{A} with {B}",
        "{A} with {B} in the background",
        "{a} with {B} in the background",
        "{a} during {B}",
        "during {A}, {b}",
        "{a} and {b} at the same time",
        "at the same time, {a} and {b}",
        "{A} together with {B}",
        "both {A} and {B}",
    ),
    ("then", 3): (
        "{a} then {b} then {c}",
        "{a}, then {b}, then {c}",
        "{A} followed by {B}, then {C}",
        "{A}, followed by {B}, followed by {C}",
        "{a}, {b}, then {c}",
        "{a}, then {b} and then {c}",
        "first {a}, then {b}, then {c}",
        "first {a}, then {b} and finally {c}",
        "{A}, {B}, then {C}",
        "{b} after {a} and before {c}",
    ),
}
"""Templates of every training."""

HELD_OUT_TEMPLATES: Final[Templates] = {
    ("single", 1): ("you hear the sound of {A}", "the sound of {A} can be heard"),
    ("then", 2): (
        "{A} then {B}",
        "{B} right after {A}",
        "{b}, shortly after {a}",
        "shortly after {a}, {b}",
        "{A}, before {B}",
        "right before {b}, {a}",
        "{a} shortly before {b}",
        "first {A} and then {B}",
        "first {A}, followed by {B}",
        "first {a}, and after that {b}",
        "{A} first, and then {B}",
        "{A}, and afterwards {B}",
        "you hear {A}, then {B}",
    ),
    ("while", 2): (
        "as {a} {b}",
        "{A}, while {b}",
        "while {b}, you hear {A}",
        "{A} during {B}",
        "{A} and {B} at the same time",
        "{a}, with {B} in the background",
        "{A} and {B} together",
    ),
    ("then", 3): (
        "{A}, then {B}, then {C}",
        "{A} then {B} followed by {C}",
        "first {A}, then {B} and finally {C}",
        "{a}, then {b}, and finally {c}",
    ),
}
"""Templates of no training, for evaluations. All their words occur in `TEMPLATES`."""

MAX_EVENTS = max(count for _, count in TEMPLATES)

UNREAD_WORDS: Final = ("loud", "distant", "old", "nearby", "quietly", "suddenly")
"""Words that are not of the grammar. Every one is the same unknown token to a tokenizer of `words`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionTruth:
    """What a caption says: the events in order of time and how they relate."""

    classes: tuple[str, ...]
    relation: Relation


def _clauses(noun: str, verb: str, gerund: str, *, plural: bool) -> tuple[str, ...]:
    return f"{noun} {verb}", f"{noun} {'are' if plural else 'is'} {gerund}"


def _described(noun: Noun, gerund: str, *, plural: bool) -> tuple[str, ...]:
    """Return ``a barking dog`` or ``barking dogs``; nothing for a verb of several words."""
    bare = noun.bare[plural] if noun.bare else ""
    if not bare or " " in gerund:
        return ()
    counted = not plural and bool(noun.plural)
    return (_with_article(f"{gerund} {bare}") if counted else f"{gerund} {bare}",)


def _draw(options: Sequence[str], rng: np.random.Generator, first: float = 0.0) -> str:
    """Return one of `options`; the first one with probability `first`, if there is another."""
    if len(options) > 1 and rng.uniform() < first:
        return options[0]
    return options[int(rng.integers(len(options)))]


def _phrase(event_class: str, rng: np.random.Generator) -> tuple[str, str]:
    """Return a finite clause and a phrase of one event, of one noun and one verb."""
    groups = VOCABULARY[event_class]
    words = groups[0] if len(groups) == 1 or rng.uniform() < 0.7 else groups[1]
    noun = words.nouns[int(rng.integers(len(words.nouns)))]
    verb = words.verbs[int(rng.integers(len(words.verbs)))]
    plural = not noun.singular or bool(noun.plural and rng.uniform() < 0.35)
    subject = _draw(noun.plural if plural else noun.singular, rng, 0.5)
    finite = _draw(
        _clauses(subject, verb.plural if plural else verb.singular, verb.gerund, plural=plural), rng, 0.5
    )
    kind = rng.uniform()
    if words.phrases and kind < 0.2:
        return finite, _draw(words.phrases, rng)
    described = _described(noun, verb.gerund, plural=plural)
    return finite, described[0] if described and kind > 0.85 else f"{subject} {verb.gerund}"


@functools.cache
def event_clauses() -> Mapping[str, str]:
    """Return the class of each finite clause that the grammar can write: ``a dog barks``."""
    return {
        clause: name
        for name, noun, verb, plural in _combinations()
        for subject in (noun.plural if plural else noun.singular)
        for clause in _clauses(subject, verb.plural if plural else verb.singular, verb.gerund, plural=plural)
    }


@functools.cache
def event_phrases() -> Mapping[str, str]:
    """Return the class of each phrase that the grammar can write: ``a dog barking``, ``barking dogs``."""
    found = {
        phrase: name for name, groups in VOCABULARY.items() for words in groups for phrase in words.phrases
    }
    for name, noun, verb, plural in _combinations():
        phrases = [f"{subject} {verb.gerund}" for subject in (noun.plural if plural else noun.singular)]
        found |= dict.fromkeys([*phrases, *_described(noun, verb.gerund, plural=plural)], name)
    return found


def _combinations() -> Iterator[tuple[str, Noun, Verb, bool]]:
    """Yield class, noun, verb and whether the noun is a plural, for all combinations."""
    for name, groups in VOCABULARY.items():
        for words in groups:
            for noun, verb, plural in itertools.product(words.nouns, words.verbs, (False, True)):
                yield name, noun, verb, plural


@functools.cache
def word_classes() -> Mapping[str, str]:
    """Return the class of each word that occurs in the phrases of one class only."""
    found: dict[str, set[str]] = {}
    for phrase, name in itertools.chain(event_clauses().items(), event_phrases().items()):
        for word in phrase.split():
            found.setdefault(word, set()).add(name)
    return {word: next(iter(names)) for word, names in found.items() if len(names) == 1}


def caption_parts(
    truth: CaptionTruth, rng: np.random.Generator, *, held_out: bool = False, unread: float = 0.0
) -> list[tuple[str, int | None]]:
    """Return a wording of `truth`, in parts: (text, index of the event it names, or None for a link).

    Args:
        truth: what the caption says.
        rng: draws template and words.
        held_out: draw from `HELD_OUT_TEMPLATES` instead of `TEMPLATES`.
        unread: probability that one event has a word more that is not of the grammar. Trained with these, a
            model reads a caption in spite of a word that it does not know.
    """
    templates = (HELD_OUT_TEMPLATES if held_out else TEMPLATES)[truth.relation, len(truth.classes)]
    phrases = [_phrase(event_class, rng) for event_class in truth.classes]
    if rng.uniform() < unread:
        event = int(rng.integers(len(phrases)))
        place, word = rng.uniform(), UNREAD_WORDS[int(rng.integers(len(UNREAD_WORDS)))]
        phrases[event] = (_insert(phrases[event][0], word, place), _insert(phrases[event][1], word, place))
    parts: list[tuple[str, int | None]] = []
    for link, field, _, _ in Formatter().parse(templates[int(rng.integers(len(templates)))]):
        if link:
            parts.append((link, None))
        if field:
            event = "abc".index(field.lower())
            parts.append((phrases[event][field.isupper()], event))
    return parts


def _insert(phrase: str, word: str, place: float) -> str:
    """Return `phrase` with `word` at `place`: 0 is before the first word, 1 after the last."""
    words = phrase.split()
    index = int(place * (len(words) + 1))
    return " ".join([*words[:index], word, *words[index:]])


def plain_caption(truth: CaptionTruth) -> str:
    """Return the one caption that the mini captioner learns: events in order of time, or of `VOCABULARY`."""
    order = list(VOCABULARY)
    names = truth.classes if truth.relation == "then" else sorted(truth.classes, key=order.index)
    groups = [VOCABULARY[name][0] for name in names]
    clauses = [f"{one.nouns[0].singular[0]} {one.verbs[0].singular}" for one in groups]
    return f" {'while' if truth.relation == 'while' else 'then'} ".join(clauses)


def write_caption(
    truth: CaptionTruth, rng: np.random.Generator, *, held_out: bool = False, unread: float = 0.0
) -> str:
    """Return a wording of `truth`, with a capital at the start. Arguments are those of `caption_parts`."""
    text = "".join(part for part, _ in caption_parts(truth, rng, held_out=held_out, unread=unread))
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


def link_words() -> frozenset[str]:
    """Return the words and marks of the templates."""
    templates = [t for kind in (TEMPLATES, HELD_OUT_TEMPLATES) for texts in kind.values() for t in texts]
    return frozenset(w for t in templates for w in t.replace(",", " , ").split() if not w.startswith("{"))


def words() -> tuple[str, ...]:
    """Return every word and mark the grammar can write, lower case, sorted: the mini family's vocabulary."""
    events = (w for phrase in (*event_clauses(), *event_phrases()) for w in phrase.split())
    return tuple(sorted({*link_words(), *events}))


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionCut:
    """A caption cut at its events."""

    events: tuple[str, ...]
    """Clauses and phrases of events, lower case, in the order of the text."""
    classes: tuple[str, ...]
    """Their classes."""
    links: tuple[str, ...]
    """What stands before the first event, between two, and after the last: one more than events."""


def cut_caption(text: str) -> CaptionCut | None:
    """Return the events of a caption of the grammar; None if it has other words. Punctuation is free."""
    found = list(_event_pattern().finditer(text))
    if not found:
        return None
    places = [0, *(place for match in found for place in match.span()), len(text)]
    links = tuple(text[start:stop] for start, stop in zip(places[::2], places[1::2], strict=True))
    if not {word for link in links for word in _plain(link)} <= link_words():
        return None
    events = tuple(match[0].lower() for match in found)
    classes = tuple(event_clauses().get(event) or event_phrases()[event] for event in events)
    return CaptionCut(events=events, classes=classes, links=links)


def _plain(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


@functools.cache
def _event_pattern() -> re.Pattern[str]:
    """Return the pattern of any event's words; of two that begin at one place, the longer one."""
    events = sorted({*event_clauses(), *event_phrases()}, key=len, reverse=True)
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, events))})\b", re.IGNORECASE)
