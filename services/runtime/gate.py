"""Refuse calls before their messages are read, and those of callers who don't wait a little later.

A refusal costs half a millisecond of the interpreter or more (docs/reliability.md), a good part of it in
gRPC. So the queue is asked before anything else is done for a call, its answer holds for the caller's next
calls for a moment, and a caller who comes back before the time in RetryInfo has its refusal delayed: as a
connection has `MAX_CALLS` calls at most, its other calls stay with the caller meanwhile.
"""

import time
from collections.abc import Callable, Iterable
from typing import Final, TypeVar

from services.errors import QueueFullError
from services.fairness import Account
from services.runtime.callers import Caller

Key = TypeVar("Key")
Value = TypeVar("Value")

MAX_CALLS: Final = 128
"""Most calls of one connection at a time; gRPC's clients keep others back."""
_DELAY_SECONDS: Final = 1.0
"""Longest delay of a refusal."""
_DELAY: Final = 0.5
"""Longest delay as a share of the time to the caller's deadline."""
_VALID_SECONDS: Final = 0.02
"""How long the answer that a queue is full holds."""
_MAX_CALLERS: Final = 4_096
"""Callers that are remembered."""


class Gate:
    """Remembers which queues are full for whom. Belongs to one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._checks: dict[str, Callable[[Caller], None]] = {}
        self._full: dict[tuple[str, Account], tuple[float, QueueFullError]] = {}
        """By rpc and account: the last answer of a full queue, and until when it holds."""
        self._until: dict[Account, float] = {}
        """The time at which a refused caller is to come back."""

    def add(self, rpcs: Iterable[str], check: Callable[[Caller], None]) -> None:
        """Have `check` called before a message of `rpcs` (full names of methods) is read.

        It raises `QueueFullError` if the queue has no room for the least that the caller could ask for.
        """
        self._checks.update(dict.fromkeys(rpcs, check))

    def check(self, rpc: str, caller: Caller) -> None:
        """Raise `QueueFullError` if any call of the rpc by the caller would be refused."""
        check = self._checks.get(rpc)
        if check is None:
            return
        key = rpc, Account(caller.key, caller.priority)
        until, known = self._full.get(key, (0.0, None))
        if known is not None and self._clock() < until:
            raise QueueFullError(str(known), retry_after=known.retry_after, refusal=known.refusal)
        try:
            check(caller)
        except QueueFullError as error:
            if error.refusal == QueueFullError.refusal:  # other reasons depend on the call
                _remember(self._full, key, (self._clock() + _VALID_SECONDS, error))
            raise

    def delay(self, caller: Caller, error: QueueFullError) -> float:
        """Return the seconds by which to delay a refusal: 0 unless the caller was told to come back later.

        The time of `error` to come back is less by them.
        """
        now, account = self._clock(), Account(caller.key, caller.priority)
        told = self._until.get(account, 0.0)
        _remember(self._until, account, max(told, now + error.retry_after))
        if now >= told:
            return 0.0
        left = float("inf") if caller.deadline is None else caller.deadline - now
        seconds = max(0.0, min(_DELAY_SECONDS, _DELAY * left, error.retry_after))
        error.retry_after -= seconds
        return seconds


def _remember(known: dict[Key, Value], key: Key, value: Value) -> None:
    """Set a value; forget the oldest key beyond `_MAX_CALLERS`."""
    known.pop(key, None)
    known[key] = value
    if len(known) > _MAX_CALLERS:
        del known[next(iter(known))]
