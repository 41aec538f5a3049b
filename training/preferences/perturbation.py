"""Types of the perturbers, which make captions wrong on purpose."""

from dataclasses import dataclass
from typing import Final, Literal, Protocol, get_args

Strategy = Literal["2", "3"]
"""Strategies that need perturbed captions."""

Kind = Literal["swap", "add", "remove", "replace", "reword"]
"""What is wrong with a perturbed caption: the order of events, an event more, fewer or another, or words that
keep its concepts."""
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)


@dataclass(frozen=True, kw_only=True, slots=True)
class Perturbation:
    """A caption that is wrong on purpose."""

    text: str
    kind: Kind


class Perturber(Protocol):
    """Makes captions wrong on purpose. Thread-safe."""

    def perturb(self, caption: str, strategy: Strategy, count: int) -> list[Perturbation]:
        """Return up to `count` different wrong captions.

        Raises `BadAnswerError` if there are none because of useless answers.
        """


class BadAnswerError(Exception):
    """The answers of a perturber's model are useless, after all retries."""
