"""Perturb captions offline, by rules on their text: the replacement for the language model.

A caption is cut at its connectives into events ("a dog barks", "a siren wails") and the links between them.
It is for English captions like those of AudioCaps, and for the sound world's grammar, whose perturbed
captions are sentences of the grammar too. Added events come from other captions of the set.

It knows no grammar beyond that: a clause without a subject of its own ("and laughs") is never moved, and
parts without a verb ("a man" in "a man and a woman speak") are no events.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np

from training.data.store import digest_of_value
from training.preferences.perturbation import Kind, Perturbation, Strategy
from training.soundworld.captions import cut_caption, event_clauses, event_phrases

Form = Literal["finite", "gerund", "phrase"]
"""What an event's words are: "a dog barks", "a dog barking", "loud music"."""

_LINK = re.compile(
    r"(\s*,\s*(?:(?:followed by|and then|then|before|after|while|as well as|as|with|and)\s+)?"
    r"|\s+(?:followed by|and then|then|before|(?<!one )after|while|as well as|(?<!such )as|with|and)\s+)",
    re.IGNORECASE,
)
_LEAD = re.compile(r"(before|after|while|as)\s+", re.IGNORECASE)
_FORWARD: Final = ("followed by", "then", "before", "afterwards", "after that", "finally")
_WEAK: Final = frozenset({"and", "with", "as well as", ""})
"""Links that also occur inside an event."""
_FUNCTION_WORDS = frozenset(
    (
        *("a", "an", "the", "of", "in", "on", "at", "by", "to", "from", "into", "over", "off", "out", "up"),
        *("is", "are", "was", "were", "be", "being", "and", "or", "while", "as", "then", "down", "back"),
        *("its", "his", "her", "their", "some", "several", "very"),
    )
)
_VERB = re.compile(r"[a-z]+[^s\W]s")
_POOL = 400
"""Events that are tried before no one is found fitting."""

_NEAR: Final[tuple[tuple[str, ...], ...]] = (
    ("man", "woman", "child", "boy", "girl"),
    ("men", "women", "children", "boys", "girls"),
    ("people", "animals", "machines"),
    ("crowd", "choir", "family"),
    ("dog", "cat", "goat", "wolf", "cow"),
    ("dogs", "cats", "goats", "wolves", "cows"),
    ("bird", "duck", "rooster", "frog", "pigeon"),
    ("birds", "ducks", "chickens", "frogs", "pigeons"),
    ("car", "truck", "motorcycle", "train", "helicopter"),
    ("cars", "trucks", "motorcycles", "trains", "helicopters"),
    ("rain", "hail", "wind", "thunder"),
    ("siren", "horn", "whistle", "bell"),
    ("engine", "drill", "pump", "chainsaw"),
    ("door", "drawer", "window", "gate"),
    ("music", "singing", "drumming"),
    ("guitar", "piano", "violin", "drum"),
    ("speaks", "sings", "shouts", "whispers", "laughs"),
    ("speak", "sing", "shout", "whisper", "laugh"),
    ("speaking", "singing", "shouting", "whispering", "laughing"),
    ("talks", "sings", "yells", "whispers", "coughs"),
    ("talk", "sing", "yell", "whisper", "cough"),
    ("talking", "singing", "yelling", "whispering", "coughing"),
    ("cheers", "boos", "claps", "chants"),
    ("cheering", "booing", "clapping", "chanting"),
    ("barks", "growls", "howls", "whimpers"),
    ("barking", "growling", "howling", "whimpering"),
    ("chirping", "quacking", "croaking", "squawking"),
    ("loudly", "quietly", "faintly"),
    ("loud", "quiet", "faint"),
    ("nearby", "far away"),
)
"""Words of sounds that lie near each other: exchanged, a caption is somewhat wrong and keeps its concepts."""

_NEIGHBOURS = {word: [other for other in group if other != word] for group in _NEAR for word in group}


@dataclass(frozen=True, kw_only=True, slots=True)
class Parsed:
    """A caption in parts: ``lead`` event link event link event ``end``."""

    lead: str
    """``after``, ``before``, ``while``, ``as``, or nothing; in the sound world also ``first`` and more."""
    events: tuple[str, ...]
    """Events, in the order of the text."""
    links: tuple[str, ...]
    """Links with their commas and spaces, one fewer than events."""
    end: str
    """Full stop and the like; in the sound world also ``at the same time``."""

    def text(self) -> str:
        """Return the sentence."""
        parts = [f"{self.lead} " if self.lead else "", self.events[0]]
        for link, event in zip(self.links, self.events[1:], strict=True):
            parts += [link, event]
        sentence = "".join(parts)
        return sentence[0].upper() + sentence[1:] + self.end


def parse(caption: str) -> Parsed:
    """Cut a caption into events and links."""
    found = re.fullmatch(r"(.*?)([.!?\s]*)", caption.strip(), re.DOTALL)
    assert found is not None
    body, end = found[1], found[2].strip()
    if world := cut_caption(body):
        return Parsed(
            lead=world.links[0].strip().lower(),
            events=world.events,
            links=world.links[1:-1],
            end=world.links[-1] + end,
        )
    lead = ""
    if led := _LEAD.match(body):
        rest = body[led.end() :]
        # Only what is followed by a second clause leads: "After A, B".
        if "," in rest:
            lead, body = led[1].lower(), rest
    pieces = _LINK.split(body)
    events, links = [pieces[0].strip()], []
    for link, event in zip(pieces[1::2], pieces[2::2], strict=True):
        links.append(link)
        events.append(event.strip())
    events, links = _joined(events, links, led=bool(lead))
    if lead and not links:
        lead, events = "", [f"{lead} {events[0]}"]
    events[0] = _lowered(events[0])
    return Parsed(lead=lead, events=tuple(events), links=tuple(links), end=end)


def form_of(event: str) -> Form:
    """Return the grammatical form of an event, by its words' endings."""
    if world_class(event):
        return "finite" if event.lower() in event_clauses() else "gerund"
    words = event.lower().split()
    if any(word in ("is", "are", "was", "were") for word in words):
        return "finite"
    form: Form = "phrase"
    # The last one decides: "a sewing machine turns on", "race cars racing by".
    for before, word in itertools.pairwise(words):
        if word.endswith("ing") and len(word) > 4:
            form = "gerund"
        elif _VERB.fullmatch(word) and before not in _FUNCTION_WORDS:
            form = "finite"
    return form


def world_class(event: str) -> str | None:
    """Return the sound world's class of an event, where it is one of its phrases."""
    return event_clauses().get(event.lower()) or event_phrases().get(event.lower())


class RulePerturber:
    """Perturbs captions by rules. The result depends on the seed, the caption and the pool alone."""

    def __init__(
        self,
        captions: Iterable[str],
        *,
        seed: int = 0,
        kinds: dict[Strategy, tuple[Kind, ...]] | None = None,
    ) -> None:
        """Args:
        captions: the set, whose events are put into others.
        seed: of the order in which variants are taken.
        kinds: of each strategy, in turn.
        """
        self._seed = seed
        self._kinds = kinds or {"2": ("reword", "replace", "add"), "3": ("swap", "add", "remove", "replace")}
        pool: dict[Form, set[str]] = {"finite": set(), "gerund": set(), "phrase": set()}
        for caption in captions:
            parsed = parse(caption)
            for index, event in enumerate(parsed.events):
                if not _is_bare(parsed, index):
                    pool[form_of(event)].add(event)
        self._pool = {form: sorted(events) for form, events in pool.items()}
        # Long captions without links hold several events: as one event they would fit nowhere.
        self._pool["phrase"] = []

    def perturb(self, caption: str, strategy: Strategy, count: int) -> list[Perturbation]:
        """Return up to `count` different wrong captions, the strategy's kinds in turn.

        They are fewer if the rules find no more.
        """
        parsed = parse(caption)
        rng = np.random.default_rng(int(digest_of_value([self._seed, caption, strategy])[:15], 16))
        makers: dict[Kind, Callable[[], Iterator[str]]] = {
            "swap": lambda: _swaps(parsed),
            "remove": lambda: _shuffled(_removals(parsed), rng),
            "add": lambda: self._additions(parsed, rng, in_time=strategy == "3"),
            "replace": lambda: self._replacements(parsed, rng),
            "reword": lambda: _shuffled(_rewordings(caption, parsed), rng),
        }
        running = {kind: makers[kind]() for kind in self._kinds[strategy]}
        found: dict[str, Perturbation] = {}
        while running and len(found) < count:
            for kind in list(running):
                text = next((t for t in running[kind] if t != caption and t not in found), None)
                if text is None:
                    del running[kind]
                elif len(found) < count:
                    found[text] = Perturbation(text=text, kind=kind)
        return list(found.values())

    def _additions(self, parsed: Parsed, rng: np.random.Generator, *, in_time: bool) -> Iterator[str]:
        form = form_of(parsed.events[-1])
        follow = f"{',' if parsed.links else ''} followed by "
        link = (follow if form == "gerund" else " then ") if in_time else " and "
        for event in self._strangers(parsed, form, rng):
            yield replace(parsed, events=(*parsed.events, event), links=(*parsed.links, link)).text()

    def _replacements(self, parsed: Parsed, rng: np.random.Generator) -> Iterator[str]:
        # Of a single event nothing would be left.
        if len(parsed.events) < 2:
            return
        places = [i for i in range(len(parsed.events)) if not _is_bare(parsed, i + 1)]
        turns = [
            zip(itertools.repeat(i), self._strangers(parsed, form_of(parsed.events[i]), rng))
            for i in rng.permutation(places).tolist()
        ]
        for turn in itertools.zip_longest(*turns):
            for found in turn:
                if found is not None:
                    index, event = found
                    events = (*parsed.events[:index], event, *parsed.events[index + 1 :])
                    yield replace(parsed, events=events).text()

    def _strangers(self, parsed: Parsed, form: Form, rng: np.random.Generator) -> Iterator[str]:
        """Events of the pool that have nothing in common with the caption's."""
        pool = self._pool[form] or self._pool["finite"] or self._pool["gerund"]
        words = {word for event in parsed.events for word in _content(event)}
        classes = {name for event in parsed.events if (name := world_class(event))}
        for index in rng.permutation(len(pool))[:_POOL].tolist():
            event = pool[index]
            if not words & _content(event) and world_class(event) not in classes:
                yield event


def _swaps(parsed: Parsed) -> Iterator[str]:
    """The order of two neighbours in time turned round: the events change places, or before and after do."""
    whole = not any(_is_bare(parsed, index) for index in range(len(parsed.events)))
    for index in range(len(parsed.links)):
        if _order(parsed, index) and whole:
            events = list(parsed.events)
            events[index], events[index + 1] = events[index + 1], events[index]
            yield replace(parsed, events=tuple(events)).text()
    opposite = {"before": "after", "after": "before"}
    if parsed.lead in opposite:
        yield replace(parsed, lead=opposite[parsed.lead]).text()
    for index, link in enumerate(parsed.links):
        core = _core(link)
        finite = form_of(parsed.events[index]) == form_of(parsed.events[index + 1]) == "finite"
        turned = opposite.get(core) or ("after" if "then" in core and finite else None)
        if turned and (index or not parsed.lead) and whole:
            yield replace(
                parsed, links=(*parsed.links[:index], f" {turned} ", *parsed.links[index + 1 :])
            ).text()


def _removals(parsed: Parsed) -> Iterator[str]:
    """One event of several left out, with its link."""
    if len(parsed.events) < 2:
        return
    for index in range(len(parsed.events)):
        if _is_bare(parsed, index + 1):
            continue
        events = (*parsed.events[:index], *parsed.events[index + 1 :])
        # What a leading word holds together is gone with either of its two clauses.
        led = bool(parsed.lead) and index < 2
        gone = 0 if led or index == 0 else index - 1
        links = (*parsed.links[:gone], *parsed.links[gone + 1 :])
        end = parsed.end if not re.search(r"\w", parsed.end) else ""
        yield replace(parsed, lead="" if led else parsed.lead, events=events, links=links, end=end).text()


def _rewordings(caption: str, parsed: Parsed) -> Iterator[str]:
    """One word exchanged for a near one. Not in the sound world's phrases, whose nouns are synonyms."""
    if any(world_class(event) for event in parsed.events):
        return
    there = set(re.findall("[a-z]+", caption.lower()))
    for match in re.finditer(r"[A-Za-z]+", caption):
        for other in _NEIGHBOURS.get(match[0].lower(), ()):
            if other in there:
                continue
            word = other.capitalize() if match[0][0].isupper() else other
            yield _with_articles(caption[: match.start()] + word + caption[match.end() :])


def _joined(events: list[str], links: list[str], *, led: bool) -> tuple[list[str], list[str]]:
    """Return events and links; a clause that is no event by itself is joined to its neighbour."""
    whole, kept = [events[0]], []
    for number, (link, event) in enumerate(zip(links, events[1:], strict=True)):
        weak = _core(link) in _WEAK and not (led and number == 0)
        part = form_of(whole[-1]) == "phrase" or form_of(event) == "phrase" or _is_verb(event)
        if not whole[-1] or not event or (weak and part):
            whole[-1] += link + event
        else:
            kept.append(link)
            whole.append(event)
    return whole, kept


def _is_bare(parsed: Parsed, index: int) -> bool:
    """Return whether an event has no subject, but the one before it has."""
    if not 0 < index < len(parsed.events) or world_class(parsed.events[index]):
        return False
    return _is_verb(parsed.events[index])


def _is_verb(event: str) -> bool:
    words = event.lower().split()
    if len(words) == 1:
        return bool(re.fullmatch(r"[a-z]+(ing|[^s\W]s)", words[0]))
    first = words[0]
    return (first.endswith("ing") and len(first) > 4) or (
        bool(_VERB.fullmatch(first)) and form_of(event) == "phrase"
    )


def _order(parsed: Parsed, index: int) -> bool:
    """Return whether the events on both sides of a link follow each other in time."""
    if index == 0 and parsed.lead in ("while", "as", "during", "before", "after"):
        return parsed.lead in ("before", "after")
    return _core(parsed.links[index]).endswith((*_FORWARD, "after"))


def _core(link: str) -> str:
    """Return the words of a link, without commas and spaces."""
    return link.replace(",", " ").strip().lower()


def _content(event: str) -> set[str]:
    """Return the words of an event that mean something, endings cut off."""
    words = re.findall(r"[a-z]+", event.lower())
    return {re.sub(r"(ing|es|s|ed)$", "", word) for word in words if word not in _FUNCTION_WORDS}


def _lowered(event: str) -> str:
    """Return the text with a small first letter; abbreviations and names of one letter stay."""
    if len(event) > 1 and event[0].isupper() and (event[1].islower() or event[1] == " "):
        return event if event.startswith("I ") else event[0].lower() + event[1:]
    return event


def _with_articles(text: str) -> str:
    """Return `text` with "a" or "an" by the next word's first letter."""
    text = re.sub(r"\b([Aa])n (?=[^aeiouAEIOU\W])", r"\1 ", text)
    return re.sub(r"\b([Aa]) (?=[aeioAEIO])", r"\1n ", text)


def _shuffled(texts: Iterable[str], rng: np.random.Generator) -> Iterator[str]:
    found: Sequence[str] = list(texts)
    yield from (found[index] for index in rng.permutation(len(found)).tolist())
