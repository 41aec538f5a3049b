"""Rate limits of callers: token buckets of calls and of work units."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from services.errors import QuotaExceededError

_MINUTE = 60.0


class Bucket:
    """A token bucket that holds one minute's units and refills evenly. Thread-safe.

    A charge above the whole minute's units is admitted by a full bucket, which then owes the rest: large
    requests are possible, and the rate holds over time.
    """

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute, self._clock = per_minute, clock
        self._level, self._filled = per_minute, clock()
        self._lock = threading.Lock()

    def take(self, units: float) -> float:
        """Take `units` and return 0.0; without enough of them, take none and return the seconds to wait."""
        with self._lock:
            now = self._clock()
            refill = (now - self._filled) * self.per_minute / _MINUTE
            self._level, self._filled = min(self.per_minute, self._level + refill), now
            missing = min(units, self.per_minute) - self._level
            if missing > 0:
                return missing * _MINUTE / self.per_minute
            self._level -= units
            return 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Quota:
    """What a caller may use in a minute; None: no limit."""

    calls_per_minute: float | None = None
    """Calls."""
    work_per_minute: float | None = None
    """Work units: see `services.runtime.callers.Caller.charge`."""


class Usage:
    """What is left of a caller's quota. Thread-safe."""

    def __init__(self, name: str, quota: Quota) -> None:
        self.name, self.quota = name, quota
        self._calls = None if quota.calls_per_minute is None else Bucket(quota.calls_per_minute)
        self._work = None if quota.work_per_minute is None else Bucket(quota.work_per_minute)

    def count_call(self) -> None:
        """Charge one call. Raises `QuotaExceededError`."""
        if self._calls is not None:
            self._take(self._calls, 1.0, "calls")

    def charge(self, units: float) -> None:
        """Charge work units. Raises `QuotaExceededError`."""
        if self._work is not None:
            self._take(self._work, units, "work units")

    def _take(self, bucket: Bucket, units: float, what: str) -> None:
        wait = bucket.take(units)
        if wait:
            raise QuotaExceededError(
                f"caller {self.name!r} has used up its quota of {bucket.per_minute:g} {what} a minute; "
                f"try again in {wait:.1f} s, or ask the operator for more",
                retry_after=wait,
            )
