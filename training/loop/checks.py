"""Ranges of numbers, as a part of their types: a config checks its own in `__post_init__`.

    steps: Count
    duration: Seconds | None = None
    betas: tuple[Annotated[float, Range(0, 1, below=True)], ...] = (0.9, 0.98)

Every range is bounded on both sides, so that NaN, infinity and slips of some zeros are refused.
"""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, get_args, get_type_hints

LARGE: Final = 10**9
"""Upper bound of numbers without a natural one."""


@dataclass(frozen=True, slots=True)
class Range:
    """The values that a number may have."""

    least: float
    most: float = LARGE
    above: bool = False
    """Whether `least` itself is excluded."""
    below: bool = False
    """Whether `most` itself is excluded."""

    def fault(self, value: float) -> str | None:
        """Return which values are valid if `value` is none of them."""
        if (value > self.least if self.above else value >= self.least) and (
            value < self.most if self.below else value <= self.most
        ):
            return None
        if self.most < LARGE:
            opening, closing = "(" if self.above else "[", ")" if self.below else "]"
            return f"must lie in {opening}{self.least:g}, {self.most:g}{closing}"
        if value > self.least:
            return f"must be {self.most:g} or less"
        return f"must be above {self.least:g}" if self.above else f"must be {self.least:g} or more"


Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
Parallel = Annotated[int, Range(1, 4096)]
"""Threads, processes, or requests at a time."""
Seed = Annotated[int, Range(0, 2**32 - 1)]
Factor = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, above=True)]
Seconds = Positive
ClipSeconds = Annotated[float, Range(0, 3600, above=True)]
Share = Annotated[float, Range(0, 1)]
ErrorRate = Annotated[float, Range(0, 0.5, below=True)]
"""Of labels with two values."""


def check_ranges(config: object) -> None:
    """Raise ValueError if a number of `config`, or one of a tuple, is out of the range of its type."""
    kind: Any = type(config)  # mypy takes a class for unhashable
    for name, allowed in _ranges(kind).items():
        _check(config, allowed, (name,))


def _check(config: object, allowed: Range, names: Iterable[str]) -> None:
    for name in names:
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and (fault := allowed.fault(number)):
                raise ValueError(f"{name} is {number}, {fault}")


@functools.cache
def _ranges(kind: type) -> Mapping[str, Range]:
    hints = get_type_hints(kind, include_extras=True)
    return {name: found for name, hint in hints.items() if (found := _range_in(hint))}


def _range_in(hint: Any) -> Range | None:
    """Return the range in an annotation: of the number, of one that may be None, or of those of a tuple."""
    for part in get_args(hint):
        if found := part if isinstance(part, Range) else _range_in(part):
            return found
    return None
