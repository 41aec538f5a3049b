"""Check prompts: one rule for all services."""

import unicodedata
from typing import Final

MAX_PROMPT_CHARACTERS: Final = 1000
"""Longest prompt, unless a service says otherwise."""

# Control, surrogate, line separator, paragraph separator.
_REFUSED_CATEGORIES = frozenset({"Cc", "Cs", "Zl", "Zp"})


_BLANK_LETTERS: Final = "\u115f\u1160\u2800\u3164\uffa0"
"""Letters and symbols that are drawn as nothing: Hangul fillers, blank Braille."""


def _is_invisible(character: str) -> bool:
    """Return whether nothing is drawn: white space, zero width, marks of direction."""
    return (
        character.isspace() or character in _BLANK_LETTERS or unicodedata.category(character) in ("Cf", "Cn")
    )


def prompt_fault(prompt: str, max_characters: int, *, may_be_blank: bool = False) -> str | None:
    """Return what is wrong with `prompt` and the remedy; None if it is valid."""
    if len(prompt) > max_characters:
        return f"has {len(prompt)} characters, the limit is {max_characters}; shorten it"
    for position, character in enumerate(prompt):
        if unicodedata.category(character) in _REFUSED_CATEGORIES:
            return f"has the control character U+{ord(character):04X} at position {position}; remove it"
    if not may_be_blank and all(map(_is_invisible, prompt)):
        return "is empty; describe the sound, for example 'A dog barks then a siren wails'"
    return None
