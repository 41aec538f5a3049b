"""Counts of the engine's work."""

from dataclasses import dataclass, fields, replace

from services.api.generation import Failed, Finished
from services.api.measurements import Observer, ignore
from services.errors import DeadlineExceededError, RequestCancelledError


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """A snapshot of the counts. All but the first two only grow."""

    queue_depth: int = 0
    """Clips in the queue."""
    running: int = 0
    """Requests that have not ended, waiting ones included."""
    calls: int = 0
    """Denoiser calls."""
    clip_steps: int = 0
    """Denoising steps, summed over clips."""
    rows: int = 0
    """Rows computed in denoiser calls, padding included."""
    padding_rows: int = 0
    """Padding rows in denoiser calls."""
    clips: int = 0
    """Clips made."""
    audio_seconds: float = 0.0
    """Seconds of audio in these clips."""
    finished: int = 0
    """Requests that got all their clips."""
    cancelled: int = 0
    """Requests cancelled by their caller."""
    expired: int = 0
    """Requests whose deadline passed."""
    failed: int = 0
    """Requests that failed otherwise."""

    def __add__(self, other: "EngineStats") -> "EngineStats":
        """Return the sum of two engines' counts."""
        names = (field.name for field in fields(self))
        return EngineStats(**{name: getattr(self, name) + getattr(other, name) for name in names})


class Meter:
    """Counts on the worker thread; other threads read whole snapshots."""

    def __init__(self) -> None:
        self.totals = EngineStats()
        self.observe: Observer = ignore
        """Receives single measurements. Replaced by `Engine.observe`."""

    def count_step(self, *, clips: int, used: int, rows: int, seconds: float) -> None:
        """Count one denoising step of `clips` clips in `used` of `rows` rows."""
        totals = self.totals
        self.totals = replace(
            totals,
            calls=totals.calls + 1,
            clip_steps=totals.clip_steps + clips,
            rows=totals.rows + rows,
            padding_rows=totals.padding_rows + rows - used,
        )
        self.observe("step", seconds, str(rows))
        self.observe("fill", used / rows)

    def count_clip(self, *, audio_seconds: float, seconds: float) -> None:
        """Count one decoded clip."""
        totals = self.totals
        seconds_made = totals.audio_seconds + audio_seconds
        self.totals = replace(totals, clips=totals.clips + 1, audio_seconds=seconds_made)
        self.observe("decode", seconds)

    def count_end(self, event: Finished | Failed) -> None:
        """Count one ended request by its last event."""
        name = _outcome(event)
        self.totals = replace(self.totals, **{name: getattr(self.totals, name) + 1})


def _outcome(event: Finished | Failed) -> str:
    if isinstance(event, Finished):
        return "finished"
    if isinstance(event.error, RequestCancelledError):
        return "cancelled"
    return "expired" if isinstance(event.error, DeadlineExceededError) else "failed"
