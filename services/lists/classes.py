"""Captions of clips that have a class and no caption: of ``dog_bark``, "the sound of a dog bark".

No verb is invented: what the class is called is all that is known of it.
"""

import re
from typing import Final

TEMPLATES: Final = ("{}", "the sound of {}", "you hear {}", "{} can be heard")
"""Templates of a single event; all their words are in the grammar of the sound world."""

_NUMBERED = re.compile(r"^\d+[\s._-]+(?=\D)")
_HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])")
_DETERMINED = re.compile(r"^(an?|the|some|several|two|many|someone|somebody|people)\b")
_VOWEL = re.compile(r"^(?!(?:uni|eu|one|use))[aeiou]|^hour")
_UNCOUNTED: Final = frozenset(
    (
        "air", "applause", "birdsong", "chatter", "cutlery", "fire", "gas", "glass", "gunfire", "hail", "ice",
        "jazz", "laughter", "lightning", "metal", "music", "noise", "paper", "people", "rain", "sand",
        "silence", "snow", "speech", "static", "steam", "surf", "thunder", "traffic", "water", "weather",
        "wildlife", "wind", "wood",
    )
)  # fmt: skip
"""Nouns that take no article."""


def class_phrase(name: str) -> str:
    """Return a class's name as words, with an article if it seems to need one.

    ``dog_bark``, ``DogBark`` and ``001 - Dog bark`` are "a dog bark". Plurals (``sea_waves``), forms in -ing
    (``fire_crackling``) and nouns like *rain* take none.
    """
    words = _HUMP.sub(" ", _NUMBERED.sub("", name.strip()))
    words = " ".join(re.split(r"[\s_-]+", words)).strip().lower()
    last = re.split(r"\W+", words)[-1] if words.isascii() else ""
    is_plural = last.endswith("s") and not last.endswith(("ss", "us", "is"))
    if not last or is_plural or last.endswith("ing") or last in _UNCOUNTED or _DETERMINED.match(words):
        return words
    return f"{'an' if _VOWEL.match(words) else 'a'} {words}"


def class_captions(name: str) -> tuple[str, ...]:
    """Return the captions of a clip of a class, by every template."""
    return tuple(template.format(class_phrase(name)) for template in TEMPLATES)
