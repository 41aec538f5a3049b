"""Back-off for wrong tokens: a host that guesses waits longer and longer."""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from services.errors import QuotaExceededError

Key = TypeVar("Key")
Value = TypeVar("Value")

FREE: Final = 5
"""Wrong tokens of a host before it has to wait."""
FIRST_WAIT_SECONDS: Final = 1.0
"""Wait after the next one; it doubles with each."""
LONGEST_WAIT_SECONDS: Final = 300.0
FORGET_SECONDS: Final = 3600.0
"""A host without a wrong token for so long starts again."""
MAX_HOSTS: Final = 4096
"""Hosts that are remembered; beyond it, the one whose last wrong token is the oldest is forgotten."""


@dataclass(slots=True)
class _Host:
    wrong: int = 0
    last: float = 0.0
    until: float = 0.0


class Guesses:
    """Counts wrong tokens by host. Belongs to one event loop.

    While a host waits, its tokens are not even compared, except those that were right from that host before:
    a neighbour behind the same address is not locked out.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._hosts: OrderedDict[str, _Host] = OrderedDict()
        self._right: OrderedDict[tuple[str, str], None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._hosts) + len(self._right)

    def check(self, host: str, digest: str) -> None:
        """Raise `QuotaExceededError` if a token with this digest may not be tried from `host` now."""
        found = self._hosts.get(host)
        wait = 0.0 if found is None else found.until - self._clock()
        if wait > 0 and (host, digest) not in self._right:
            raise QuotaExceededError(
                f"too many wrong tokens came from this host; try again in {wait:.0f} s", retry_after=wait
            )

    def note_right(self, host: str, digest: str) -> None:
        """Remember a token that was right."""
        _put(self._right, (host, digest), None)

    def note_wrong(self, host: str) -> None:
        """Count a token that was wrong."""
        now = self._clock()
        found = self._hosts.get(host)
        if found is None or now - found.last > FORGET_SECONDS:
            found = _Host()
        found.wrong, found.last = found.wrong + 1, now
        if found.wrong >= FREE:
            doublings = min(found.wrong - FREE, 32)
            found.until = now + min(FIRST_WAIT_SECONDS * 2**doublings, LONGEST_WAIT_SECONDS)
        _put(self._hosts, host, found)


def _put(table: OrderedDict[Key, Value], key: Key, value: Value) -> None:
    table[key] = value
    table.move_to_end(key)
    if len(table) > MAX_HOSTS:
        table.popitem(last=False)
