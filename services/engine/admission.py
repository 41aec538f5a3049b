"""The bounded, fair queue in front of the device, and the only state that threads share."""

import bisect
import itertools
import threading
from collections.abc import Callable
from typing import NamedTuple

from services.engine.batching import queue_tag
from services.engine.states import RequestState
from services.errors import QueueFullError, ServiceUnavailableError


class Ticket(NamedTuple):
    """One clip in the queue. Tickets sort by tag, then by arrival; requests are never compared."""

    tag: float
    number: int
    clip_index: int
    state: RequestState


class Admission:
    """The queue of waiting clips, and the requests that have not ended."""

    def __init__(self, max_clips: int) -> None:
        self._max_clips = max_clips
        self._changed = threading.Condition()
        self._tickets: list[Ticket] = []
        self._reserved = 0
        self._now = 0.0
        self._numbers = itertools.count()
        self._states: dict[int, RequestState] = {}
        self._closing = False
        self._aborting = False

    @property
    def depth(self) -> int:
        """Number of clips in the queue."""
        with self._changed:
            return len(self._tickets) + self._reserved

    @property
    def aborting(self) -> bool:
        """Whether running requests are to be failed."""
        return self._aborting

    def reserve(self, clip_count: int, retry_after: Callable[[int], float]) -> tuple[int, int]:
        """Reserve room for `clip_count` clips; return the request's number and its position in the queue.

        `enter` must follow. Raises `QueueFullError` without room; `retry_after` maps the number of waiting
        clips to seconds.
        """
        with self._changed:
            self._refuse_if_closing()
            waiting = len(self._tickets) + self._reserved
            if waiting + clip_count > self._max_clips:
                raise QueueFullError(
                    f"the queue is full: {waiting} of {self._max_clips} clips wait, "
                    f"no room for {clip_count} more; try again later",
                    retry_after=retry_after(waiting),
                )
            self._reserved += clip_count
            number = next(self._numbers)
            position = sum(ticket.tag <= self._now for ticket in self._tickets)
            return number, position

    def enter(self, state: RequestState) -> None:
        """Queue the clips of a request after `reserve`."""
        with self._changed:
            self._reserved -= state.request.clip_count
            self._refuse_if_closing()
            self._states[state.number] = state
            for index in range(state.request.clip_count):
                bisect.insort(self._tickets, Ticket(queue_tag(self._now, index), state.number, index, state))
            self._changed.notify_all()

    def tickets(self) -> list[Ticket]:
        """Return the waiting clips, next first."""
        with self._changed:
            return list(self._tickets)

    def take(self, ticket: Ticket) -> None:
        """Remove the ticket of a clip that starts."""
        with self._changed:
            self._tickets.remove(ticket)
            self._now = max(self._now, ticket.tag)

    def states(self) -> list[RequestState]:
        """Return the requests that have not ended, in order of arrival."""
        with self._changed:
            return list(self._states.values())

    def remove(self, state: RequestState) -> None:
        """Remove a request that has ended, and its queued clips."""
        with self._changed:
            del self._states[state.number]
            self._tickets = [ticket for ticket in self._tickets if ticket.state is not state]
            self._changed.notify_all()

    def wake(self) -> None:
        """Wake the worker, so that it checks its requests."""
        with self._changed:
            self._changed.notify_all()

    def wait_for_work(self) -> bool:
        """Block until there is a request; return False if the queue is closed and there is none."""
        with self._changed:
            self._changed.wait_for(lambda: self._states or self._closing)
            return bool(self._states)

    def close(self, drain_seconds: float) -> None:
        """Refuse new requests; after `drain_seconds`, let the worker fail those that have not ended."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._states, drain_seconds)
            self._aborting = True

    def _refuse_if_closing(self) -> None:
        if self._closing:
            raise ServiceUnavailableError(
                "the engine is stopping and takes no new requests; try another instance"
            )
