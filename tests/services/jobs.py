"""Calls of the simulations in virtual time."""

from dataclasses import dataclass


@dataclass(kw_only=True, eq=False)
class Job:
    """One call, and how it ended."""

    caller: str
    start: float
    work: int
    """Clips; in generation, times steps."""
    end: float | None = None
    error: Exception | None = None

    @property
    def seconds(self) -> float:
        assert self.end is not None
        return self.end - self.start

    @property
    def good(self) -> bool:
        return self.end is not None and self.error is None
