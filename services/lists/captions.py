"""What may be a caption in a list."""

import re
from typing import Final

from services.audio.prompt import MAX_PROMPT_CHARACTERS, prompt_fault

_MISSING: Final = ("nan", "none", "null", "n/a", "<na>", "undefined")
"""Texts of a missing value, in lower case."""
_NUMBER: Final = re.compile(r"-?\d+(\.\d*)?")


def caption_fault(caption: object, *, checked: bool = True) -> tuple[str, str | None]:
    """Return a caption, white space as single spaces, and why it is unusable; None if it is usable.

    Without `checked`, only a missing one is unusable.
    """
    if caption is None:
        return "", "has no prompt"
    if not isinstance(caption, str):
        return "", f"prompt is {str(caption)[:40]}, must be str"
    prompt = " ".join(caption.split())
    if prompt.lower() in _MISSING:
        return "", f"has no prompt: {prompt!r} is what programs write for a missing value"
    fault = prompt_fault(prompt, MAX_PROMPT_CHARACTERS) if checked else None
    return prompt, None if fault is None else f"prompt {fault}"


def is_filled(value: object) -> bool:
    """Return whether a cell may be a caption or a class: missing values and numbers are none."""
    if isinstance(value, list):
        return any(map(is_filled, value))
    text = " ".join(value.split()).lower() if isinstance(value, str) else ""
    return bool(text) and text not in _MISSING and not _NUMBER.fullmatch(text)
