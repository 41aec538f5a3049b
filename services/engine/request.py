"""What one caller asks of the engine, and every reason to refuse it.

The field names are those of the wire, so that a violation found here can be reported as it is.
"""

import math
from dataclasses import dataclass

from services.audio.prompt import MAX_PROMPT_CHARACTERS, prompt_fault
from services.errors import FieldViolation, InvalidInputError


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """One prompt, and how to turn it into clips. Complete: the engine fills in no default."""

    prompt: str
    """What the clip should sound like."""
    negative_prompt: str = ""
    """What guidance leads away from; the empty string is the plain unconditional embedding."""
    duration: float
    """Length of each clip in seconds."""
    clip_count: int = 1
    """Clips to make, each from noise of its own: (seed, 0), (seed, 1), ..."""
    seed: int
    """Same seed, settings and batch shape: same clip, bit for bit."""
    num_inference_steps: int
    """Denoising steps of each clip."""
    guidance_scale: float
    """Classifier-free guidance; up to 1 means none."""
    scheduler: str
    """Name of a scheduler in `services.models.tango.schedulers`."""
    preview_interval_steps: int = 0
    """Send a `Preview` of the first clip every so many steps; 0 sends none. Changes no bit of the clips."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The ranges that a request must lie in. All bounds are inclusive."""

    max_prompt_characters: int = MAX_PROMPT_CHARACTERS
    """Longest prompt and negative prompt, in characters."""
    min_duration: float
    """Shortest clip in seconds: one latent frame."""
    max_duration: float
    """Longest clip in seconds, of the model's geometry."""
    max_clip_count: int = 8
    """Most clips in one request."""
    max_steps: int = 1000
    """Most denoising steps: those the model was trained with."""
    max_guidance_scale: float = 20.0
    """Beyond this, guidance only saturates."""
    max_seed: int = 2**64 - 1
    """Seeds are unsigned 64-bit numbers on the wire."""
    schedulers: tuple[str, ...]
    """Names that `scheduler` may take."""


def violations(request: GenerationRequest, limits: Limits) -> tuple[FieldViolation, ...]:
    """Return every violated field of `request`, in the order of the fields; empty if there is none."""
    found = (
        ("prompt", prompt_fault(request.prompt, limits.max_prompt_characters)),
        (
            "negative_prompt",
            prompt_fault(request.negative_prompt, limits.max_prompt_characters, may_be_blank=True),
        ),
        ("duration", _number_fault(request.duration, limits.min_duration, limits.max_duration, " s")),
        ("clip_count", _number_fault(request.clip_count, 1, limits.max_clip_count)),
        ("seed", _number_fault(request.seed, 0, limits.max_seed)),
        ("num_inference_steps", _number_fault(request.num_inference_steps, 1, limits.max_steps)),
        ("guidance_scale", _number_fault(request.guidance_scale, 0, limits.max_guidance_scale)),
        ("scheduler", _choice_fault(request.scheduler, limits.schedulers)),
        ("preview_interval_steps", _number_fault(request.preview_interval_steps, 0, limits.max_steps)),
    )
    return tuple(FieldViolation(field, fault) for field, fault in found if fault is not None)


def validate(request: GenerationRequest, limits: Limits) -> None:
    """Raise `InvalidInputError` with every violation at once, if there is any."""
    found = violations(request, limits)
    if found:
        raise InvalidInputError(*found)


def _number_fault(value: float, low: float, high: float, unit: str = "") -> str | None:
    # Comparisons with NaN are false, so it needs the finite check to be refused.
    if math.isfinite(value) and low <= value <= high:
        return None
    # A duration arrives in binary floating point: show the bounds as a person would write them.
    return f"is {_plain(value)}{unit}, must be between {_plain(low)} and {_plain(high)}{unit}"


def _choice_fault(value: str, choices: tuple[str, ...]) -> str | None:
    if value in choices:
        return None
    return f"is {value[:40]!r}, must be one of {', '.join(choices)}"


def _plain(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"
