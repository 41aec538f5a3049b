"""Refuse calls before their messages are read, and those of callers who don't wait a little later.

A refusal costs half a millisecond of the interpreter or more (docs/reliability.md), a good part of it in
gRPC. So the queue is asked before anything else is done for a call, its answer holds for the caller's next
calls for a moment, and a caller who comes back before the time in RetryInfo has its refusal delayed: as a
connection has `MAX_CALLS` calls at most, its other calls stay with the caller meanwhile.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Final, TypeVar

from services.errors import QueueFullError
from services.fairness import Account
from services.runtime.callers import Caller, current_caller

Key = TypeVar("Key")
Value = TypeVar("Value")

Expect = Callable[[], AbstractContextManager[None]]

MAX_CALLS: Final = 128
"""Most calls of one connection at a time; gRPC's clients keep others back."""
_DELAY_SECONDS: Final = 1.0
"""Longest delay of a refusal."""
_DELAY: Final = 0.5
"""Longest delay as a share of the time to the caller's deadline."""
_VALID_SECONDS: Final = 0.02
"""How long a refusal holds."""
_MAX_CALLERS: Final = 4_096
"""Callers that are remembered."""


class Gate:
    """Remembers who was refused, and why. Belongs to one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._expect: dict[str, Expect] = {}
        self._full: dict[tuple[str, Account], tuple[float, QueueFullError]] = {}
        """By rpc and account: the last refusal, and until when it holds."""
        self._until: dict[Account, float] = {}
        """The time at which a refused caller is to come back."""

    def add(self, rpcs: Iterable[str], expect: Expect) -> None:
        """Have messages of `rpcs` (full names of methods) received in the context that `expect` returns.

        On entering, it raises `QueueFullError` if the least that the current caller could ask for has no
        room, or not the time. It may count the call as waiting.
        """
        self._expect.update(dict.fromkeys(rpcs, expect))

    @contextmanager
    def receiving(self, rpc: str) -> Iterator[None]:
        """Receive a message of the rpc. Raises `QueueFullError` if any call would be refused."""
        expect, caller = self._expect.get(rpc), current_caller()
        with ExitStack() as stack:
            if expect is not None:
                self._refuse_again(key := (rpc, Account(caller.key, caller.priority)), caller)
                try:
                    stack.enter_context(expect())
                except QueueFullError as error:
                    # Other reasons depend on the call.
                    if error.needed is not None or error.refusal == QueueFullError.refusal:
                        _remember(self._full, key, (self._clock() + _VALID_SECONDS, error))
                    raise
            yield

    def _refuse_again(self, key: tuple[str, Account], caller: Caller) -> None:
        """Refuse a call as the last one was a moment ago, if it has no more time."""
        until, known = self._full.get(key, (0.0, None))
        now = self._clock()
        if known is None or now >= until:
            return
        if known.needed is None or (caller.deadline is not None and caller.deadline - now < known.needed):
            raise QueueFullError(
                str(known), retry_after=known.retry_after, refusal=known.refusal, needed=known.needed
            )

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
