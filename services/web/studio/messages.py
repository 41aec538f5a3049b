"""What the page says of errors: by the names of its own fields, and what to do."""

import html
import math
from collections.abc import Iterable, Mapping
from typing import Final

import structlog

from services.errors import (
    InvalidInputError,
    MilongaError,
    QueueFullError,
    QuotaExceededError,
    ServiceUnavailableError,
    UnauthenticatedError,
)

log = structlog.get_logger()

LABELS: Final[Mapping[str, str]] = {
    "prompt": "Prompt",
    "negative_prompt": "Negative prompt",
    "duration": "Length",
    "clip_count": "Clips",
    "seed": "Seed",
    "num_inference_steps": "Steps",
    "guidance_scale": "Guidance",
    "encoding": "Format",
    "sample_rate_hertz": "Format",
    "method": "Method",
    "without": "Words to leave out",
    "token": "Your token",
    "authorization": "Your token",
}
"""The page's names of the services' fields."""


def sentences(error: Exception) -> list[str]:
    """Return what the page says of an exception; a bug is also logged."""
    match error:
        case InvalidInputError():
            return [f"{LABELS.get(one.field, one.field)} {one.description}." for one in error.violations]
        case QuotaExceededError():
            return [f"Your quota is used up: {error}. Try again {_soon(error.retry_after)}."]
        case QueueFullError():
            return [f"The queue is full: {error}. Try again {_soon(error.retry_after)}."]
        case UnauthenticatedError():
            return ["The services ask for a token, and yours is missing or wrong: open “Your token”."]
        case ServiceUnavailableError():
            return [f"The service is away: {error}."]
        case MilongaError():
            return [f"{error}."]
    log.error("request failed", exc_info=error)
    return ["Internal error; the web door's log has its cause."]


def _soon(seconds: float) -> str:
    return f"in {math.ceil(seconds)} s" if seconds > 0 else "in a moment"


def problem(lines: Iterable[str]) -> str:
    """Return an alert as HTML; empty without lines."""
    return _box("problem", "alert", lines)


def warning(lines: Iterable[str]) -> str:
    """Return warnings as HTML; empty without lines."""
    return _box("warning", "status", lines)


def note(text: str) -> str:
    """Return a line that explains something as HTML."""
    return f'<p class="note">{html.escape(text)}</p>'


def progress(text: str, fraction: float) -> str:
    """Return a bar and what is being done as HTML."""
    return (
        f'<div class="progress"><progress max="1" value="{fraction:.3f}" aria-label="Progress"></progress>'
        f"<span>{html.escape(_capital(text))}</span></div>"
    )


def _box(kind: str, role: str, lines: Iterable[str]) -> str:
    paragraphs = "".join(f"<p>{html.escape(_capital(line))}</p>" for line in lines)
    return f'<div class="{kind}" role="{role}">{paragraphs}</div>' if paragraphs else ""


def _capital(line: str) -> str:
    return line[:1].upper() + line[1:]
