"""The words of a prompt, and where they are in it."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

_INSIDE_WORDS: Final = "'’-"


@dataclass(frozen=True, kw_only=True, slots=True)
class Word:
    """A word of a prompt, without punctuation around it."""

    text: str
    start: int
    """Index of its first character in the prompt."""
    end: int
    """Index after its last character."""


def find_words(prompt: str) -> list[Word]:
    """Return the words of `prompt`, emoji included, in order."""
    found: list[Word] = []
    start = 0
    while start < len(prompt):
        end = start
        while end < len(prompt) and not _separates(prompt[end]):
            end += 1
        part = prompt[start:end]
        text = part.strip(_INSIDE_WORDS)
        if text:
            first = start + len(part) - len(part.lstrip(_INSIDE_WORDS))
            found.append(Word(text=text, start=first, end=first + len(text)))
        start = end + 1
    return found


def find_phrase(words: Sequence[str], phrase: str) -> list[int]:
    """Return the indices of the words of `phrase` in `words`, at each place where they stand in this order.

    Places do not overlap. Upper and lower case are the same. Empty if the phrase has no words, or is absent.
    """
    wanted = [word.text.casefold() for word in find_words(phrase)]
    folded = [word.casefold() for word in words]
    found: list[int] = []
    place = 0
    while wanted and place <= len(folded) - len(wanted):
        if folded[place : place + len(wanted)] == wanted:
            found += range(place, place + len(wanted))
            place += len(wanted)
        else:
            place += 1
    return found


def _separates(character: str) -> bool:
    if character in _INSIDE_WORDS:
        return False
    return character.isspace() or unicodedata.category(character)[0] in "PZ"
