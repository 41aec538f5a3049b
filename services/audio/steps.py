"""Work that is done in steps, between which it can be interrupted."""

from collections.abc import Generator
from typing import TypeVar

Result = TypeVar("Result")

Steps = Generator[None, None, Result]
"""Work that yields after each step of milliseconds, and returns its result. Closing it ends it early."""


def finish(steps: Steps[Result]) -> Result:
    """Do all steps; return the result."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: Result = end.value
            return result
