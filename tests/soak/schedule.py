"""When which fault happens: a function of a seed."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Fault(StrEnum):
    """What is done to a service from outside, or asked of its model."""

    KILL = "kill"
    """SIGKILL, and a restart."""
    DRAIN = "drain"
    """SIGTERM under load, and a restart."""
    HANG = "model hangs"
    """A call of the model never returns: the service must end by itself."""
    BREAK = "model breaks"
    """The model fails at every call from now on: the service must end by itself."""
    STOP = "process stops"
    """SIGSTOP, and SIGCONT some seconds later."""
    VANISH = "client vanishes"
    """A client process with open calls is killed."""
    RESET = "connections reset"
    LATENCY = "latency"
    BANDWIDTH = "narrow bandwidth"
    PARTITION = "network partition"
    """Nothing passes for some seconds, and nothing is closed."""


RESTARTING: Final = (Fault.KILL, Fault.DRAIN, Fault.HANG, Fault.BREAK)
"""Faults that end the process."""
TOXIC: Final = (Fault.RESET, Fault.LATENCY, Fault.BANDWIDTH, Fault.PARTITION)
"""Faults of the network, which need toxiproxy."""
RESTARTS_UNTIL: Final = 0.5
"""Share of the run with faults that end processes. Afterwards each process lives on, so that its memory can
be followed."""
_FIRST_SECONDS: Final = 10.0
_PAUSE_SECONDS: Final = (4.0, 12.0)
_LENGTH_SECONDS: Final = (2.0, 7.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One fault."""

    at: float
    """Seconds from the start of the load."""
    fault: Fault
    service: str
    seconds: float
    """How long it lasts, if it has a length."""

    def __str__(self) -> str:
        length = f" for {self.seconds:.1f} s" if self.fault in (*TOXIC, Fault.STOP) else ""
        return f"{self.at:6.1f} s {self.service}: {self.fault}{length}"


def schedule(seed: int, seconds: float, services: Sequence[str], *, toxic: bool) -> list[Event]:
    """Return the faults of a run of `seconds`, in order; the network's only if `toxic`.

    Every fault comes once for every service before any comes again.
    """
    rng = random.Random(f"schedule {seed}")
    ending = [(fault, service) for fault in RESTARTING for service in services]
    others = [
        (fault, service)
        for fault in Fault
        if fault not in RESTARTING and (toxic or fault not in TOXIC)
        for service in services
    ]
    decks = {True: _Deck(rng, ending), False: _Deck(rng, others)}
    events: list[Event] = []
    at = _FIRST_SECONDS
    while at < seconds - _LENGTH_SECONDS[1]:
        restarts = at < RESTARTS_UNTIL * seconds and rng.random() < 0.5
        fault, service = decks[restarts].draw()
        events.append(Event(at=at, fault=fault, service=service, seconds=rng.uniform(*_LENGTH_SECONDS)))
        at += rng.uniform(*_PAUSE_SECONDS)
    return events


class _Deck:
    """Draws without repetition, and shuffles again when all are drawn."""

    def __init__(self, rng: random.Random, cards: Sequence[tuple[Fault, str]]) -> None:
        self._rng, self._cards = rng, cards
        self._left: list[tuple[Fault, str]] = []

    def draw(self) -> tuple[Fault, str]:
        if not self._left:
            self._left = self._rng.sample(self._cards, len(self._cards))
        return self._left.pop()
