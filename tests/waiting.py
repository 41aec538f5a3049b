"""Waiting for an event. Tests never assert how long that takes: the limit only ends one that hangs."""

import time
from collections.abc import Callable

LIMIT = 120.0
"""Seconds; far more than any event takes on a busy machine."""


def until(condition: Callable[[], bool]) -> None:
    """Return when `condition` holds. Raises `TimeoutError` where it never does."""
    end = time.monotonic() + LIMIT
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("what was waited for did not happen")
        time.sleep(0.005)
