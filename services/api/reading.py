"""Read captions: which events a sentence names, and in which order of time. Compare two readings.

A captioner's folder may have the file `EVENTS`, which says how its captions word events, and how they put
them in order::

    {"format": 1,
     "events": {"dog": ["a dog barks", "a dog barking", …], …},
     "templates": [{"links": ["", "then", ""], "steps": [[0], [1]]},
                   {"links": ["", "after", ""], "steps": [[1], [0]]},
                   {"links": ["", "while", ""], "steps": [[0, 1]]}, …]}

`links` are the words before the first event of the text, between events, and after the last. `steps` are the
events in order of time, by their place in the text; those of one step sound at the same time. Capitals,
punctuation and articles don't matter.
"""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from services.errors import ModelFormatError

EVENTS: Final = "events.json"
"""File of a captioner's folder."""

_ARTICLES: Final = frozenset({"a", "an", "the"})
_MOST_EVENTS: Final = 64

Steps = tuple[frozenset[str], ...]
"""Events in order of time; those of one step sound at the same time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What a caption says."""

    events: tuple[str, ...]
    """Events by name, each once, in order of the text."""
    steps: Steps | None
    """The same in order of time; None if the caption does not say, or in words that are not known."""
    unread: str = ""
    """Words that are neither an event nor a known link, without articles and punctuation."""

    @property
    def is_sequence(self) -> bool:
        """Return whether the events have an order of time."""
        return self.steps is not None and len(self.steps) > 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A reading of a caption, compared with what the clip should have."""

    wanted: Reading
    found: Reading
    missing: tuple[str, ...]
    """Events that the clip should have and the caption does not name."""
    added: tuple[str, ...]
    """Events that the caption names and the clip should not have."""
    in_order: bool | None
    """Whether the wanted events stand in the wanted order; None if events are missing, or none is wanted."""

    def in_words(self) -> tuple[str, ...]:
        """Return a sentence on each difference, without a full stop; none if there is no difference."""
        lines = [f"missing: {', '.join(self.missing)}"] if self.missing else []
        lines += [f"added: {', '.join(self.added)}"] if self.added else []
        if self.in_order is False:
            lines.append(f"other order: {_written(self.found)}, not {_written(self.wanted)}")
        return tuple(lines)


@dataclass(frozen=True, kw_only=True)
class EventReader:
    """Reads captions whose wordings are known."""

    phrases: Mapping[str, str]
    """Events by wording, normalised by `normalised`."""
    templates: Mapping[tuple[str, ...], tuple[tuple[int, ...], ...]]
    """Steps of places in the text, by normalised links."""

    @classmethod
    def of(
        cls,
        events: Mapping[str, Sequence[str]],
        templates: Sequence[tuple[Sequence[str], Sequence[Sequence[int]]]],
    ) -> "EventReader":
        """Build a reader of wordings by event, and of links with their steps.

        Raises ValueError if there is no event, a wording belongs to two events, links have two meanings, or
        steps don't name each event of the links once.
        """
        phrases: dict[str, str] = {}
        for event, wordings in events.items():
            for wording in wordings:
                if not normalised(wording):
                    raise ValueError(f"the event {event!r} has an empty wording")
                if phrases.setdefault(normalised(wording), event) != event:
                    other = phrases[normalised(wording)]
                    raise ValueError(f"{wording!r} is a wording of two events, {other!r} and {event!r}")
        if not phrases:
            raise ValueError("it has no events")
        meanings: dict[tuple[str, ...], tuple[tuple[int, ...], ...]] = {}
        for links, steps in templates:
            key, value = tuple(map(normalised, links)), tuple(tuple(sorted(step)) for step in steps)
            if sorted(itertools.chain(*value)) != list(range(len(key) - 1)):
                raise ValueError(f"the steps {value} of the links {key} must name each event once")
            if meanings.setdefault(key, value) != value:
                raise ValueError(f"the links {key} have two meanings")
        return cls(phrases=phrases, templates=meanings)

    @property
    def events(self) -> tuple[str, ...]:
        """Return the names of all events."""
        return tuple(dict.fromkeys(self.phrases.values()))

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.phrases, key=lambda phrase: (-len(phrase), phrase))
        return re.compile(rf"(?<!\S)(?:{'|'.join(map(re.escape, longest_first))})(?!\S)")

    def read(self, caption: str) -> Reading:
        """Read a caption. Any text has a reading."""
        text = normalised(caption)
        found = list(itertools.islice(self._pattern.finditer(text), _MOST_EVENTS))
        names = [self.phrases[match[0]] for match in found]
        edges = [0, *itertools.chain(*(match.span() for match in found)), len(text)]
        links = tuple(text[start:end].strip() for start, end in zip(edges[::2], edges[1::2], strict=True))
        events = tuple(dict.fromkeys(names))
        # An event that is named twice has no one place.
        places = self._places(links) if len(events) == len(names) else None
        known = {link for template in self.templates for link in template}
        return Reading(
            events=events,
            steps=None if places is None else tuple(frozenset(names[i] for i in step) for step in places),
            unread=" ".join(link for link in links if link and (link not in known or not found)),
        )

    def _places(self, links: tuple[str, ...]) -> list[list[int]] | None:
        """Return the steps of the events between `links`, by their places in the text."""
        if (template := self.templates.get(links)) is not None:
            return [list(step) for step in template]
        if len(links) == 2:
            return [[0]]
        # No template has these links. Links between two events can be chained if all run forwards.
        places = [[0]]
        for number, link in enumerate(links[1:-1], start=1):
            match self.templates.get(("", link, "")):
                case ((0,), (1,)):
                    places.append([number])
                case ((0, 1),):
                    places[-1].append(number)
                case _:
                    return None
        return places if links[0] == links[-1] == "" and len(links) > 2 else None


def normalised(text: str) -> str:
    """Return `text` in small letters, without punctuation and articles, with single spaces."""
    words = re.sub(r"[^\w\s'’-]", " ", text.lower()).split()
    return " ".join(word for word in words if word not in _ARTICLES)


def compare(wanted: Reading, found: Reading) -> Comparison:
    """Compare the reading of a caption with that of a prompt."""
    missing = tuple(event for event in wanted.events if event not in found.events)
    in_order = None
    if not missing and wanted.steps is not None and len(wanted.events) > 1:
        steps = (step & set(wanted.events) for step in found.steps or ())
        in_order = tuple(filter(None, steps)) == wanted.steps
    return Comparison(
        wanted=wanted,
        found=found,
        missing=missing,
        added=tuple(event for event in found.events if event not in wanted.events),
        in_order=in_order,
    )


def read_events(folder: Path) -> EventReader | None:
    """Return the reader of a captioner's folder; None if it has no `EVENTS`.

    Raises `ModelFormatError` if the file is malformed.
    """
    path = folder / EVENTS
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return EventReader.of(
            content["events"], [(one["links"], one["steps"]) for one in content["templates"]]
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFormatError(f"{path} is no list of events ({error}); fetch the model again") from error


def events_json(
    events: Mapping[str, Sequence[str]],
    templates: Sequence[tuple[Sequence[str], Sequence[Sequence[int]]]],
) -> str:
    """Return the content of the file `EVENTS`. Raises ValueError as `EventReader.of`."""
    EventReader.of(events, templates)
    content = {
        "format": 1,
        "events": {event: list(wordings) for event, wordings in events.items()},
        "templates": [{"links": list(links), "steps": list(map(list, steps))} for links, steps in templates],
    }
    return json.dumps(content, indent=1) + "\n"


def _written(reading: Reading) -> str:
    if reading.steps is None:
        return f"{', '.join(reading.events)} in an order that the caption does not state"
    return " then ".join(" while ".join(sorted(step)) for step in reading.steps)
