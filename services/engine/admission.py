"""The bounded, fair queue in front of the device, and the only state that threads share."""

import itertools
import threading
from collections.abc import Callable
from typing import Final

from services.api.engine import EngineConfig
from services.engine.pace import Pace
from services.engine.states import RequestState
from services.errors import DeadlineExceededError, QueueFullError, ServiceUnavailableError
from services.fairness import Account, FairShares, Path, Rank, leaves_room, retry_after, work_ahead

_QUANTUM: Final = 1.25
"""Quantum of fair queueing in clips of the default settings: one of them is not interrupted."""

_FIRST_GUESS: Final = 1.0
"""`retry_after` before anything was measured."""


class Admission:
    """The requests that have not ended, and whose turn it is."""

    def __init__(self, config: EngineConfig, pace: Pace, default_clip: Callable[[], float]) -> None:
        """`default_clip` returns the work of a clip of the default settings, as far as known."""
        self._places = config.batch_shapes[-1]
        self._max_queue, self._max_wait = config.max_queue, config.max_queue_seconds
        self._pace, self._default_clip = pace, default_clip
        self._changed = threading.Condition()
        self._shares = FairShares()
        self._numbers = itertools.count()
        self._states: dict[int, RequestState] = {}
        self._closing = False
        self._aborting: str | None = None
        self._failure: str | None = None

    @property
    def depth(self) -> int:
        """Clips that wait for a place in a denoiser call."""
        with self._changed:
            return self._waiting()

    @property
    def aborting(self) -> str | None:
        """Why requests that have not ended are to be failed; None if they are not."""
        return self._aborting

    def check(self, account: Account) -> None:
        """Raise `QueueFullError` if there is no room for another clip of an account."""
        with self._changed:
            self._check_room(1, account, self._default_clip() * (self._pace.unit or 0.0))

    def reserve(
        self, make: Callable[[Path], RequestState], account: Account, deadline_in: float | None
    ) -> RequestState:
        """Add the request that `make` returns for its place in the tree; `enter` must follow.

        `deadline_in`: seconds to its deadline.

        Raises `QueueFullError` if there is no room or not the time, `DeadlineExceededError` if the device is
        busy and the request would take longer than that even alone.
        """
        with self._changed:
            self._refuse_if_closing()
            state = make(Path(account.priority, account.caller, next(self._numbers)))
            self._check_room(state.request.clip_count, account, self._pace.left(state))
            self._check_time(state, deadline_in)
            self._shares.enter(state.path)
            rank = self._shares.rank(state.path)
            state.position = sum(
                not other.clips_started and self._shares.rank(other.path) < rank
                for other in self._states.values()
            )
            self._states[state.path.number] = state
            return state

    def enter(self, state: RequestState) -> None:
        """Let the worker run a reserved request."""
        with self._changed:
            state.entered = True
            self._changed.notify_all()

    def order(self) -> list[tuple[Rank, RequestState]]:
        """Return the requests that have not ended, next first."""
        with self._changed:
            ranked = [(self._shares.rank(state.path), state) for state in self._entered()]
        return sorted(ranked, key=lambda pair: pair[0])

    def charge(self, state: RequestState, work: float) -> None:
        """Charge work to a request and its caller."""
        with self._changed:
            if state.path.number in self._states:
                self._shares.charge(state.path, work / (_QUANTUM * self._default_clip()))

    def states(self) -> list[RequestState]:
        """Return the requests that have not ended, in order of arrival."""
        with self._changed:
            return self._entered()

    def remove(self, state: RequestState) -> bool:
        """Remove a request that has ended; return whether it was there."""
        with self._changed:
            if self._states.pop(state.path.number, None) is None:
                return False
            self._shares.leave(state.path)
            self._changed.notify_all()
            return True

    def wake(self) -> None:
        """Wake the worker, so that it checks its requests."""
        with self._changed:
            self._changed.notify_all()

    def wait_for_work(self) -> bool:
        """Block until there is a request; return False if the queue is closed and there is none."""
        with self._changed:
            self._changed.wait_for(lambda: self._entered() or (self._closing and not self._states))
            return bool(self._states)

    def close(self, drain_seconds: float) -> None:
        """Refuse new requests; after `drain_seconds`, let the worker fail those that have not ended."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._states, drain_seconds)
        self.abort("the engine stopped before the request was done; try another instance")

    def abort(self, reason: str, *, failed: bool = False) -> None:
        """Refuse new requests, and let those that have not ended fail for `reason`.

        `failed`: it is the reason for which new ones are refused, too.
        """
        with self._changed:
            self._closing = True
            self._aborting = self._aborting or reason
            self._failure = reason if failed else self._failure
            self._changed.notify_all()

    # ------------------------------------------------------------------------------------------- who is taken

    def _check_room(self, count: int, account: Account, work: float) -> None:
        """Raise `QueueFullError` if there is no room for `count` clips, or none for their caller.

        `work` is how long they take, in seconds of the device.
        """
        held = sum(state.undecoded for state in self._states.values() if state.path.caller == account.caller)
        free = self._max_queue + self._places - self._clips()
        waiting = f"{self._waiting()} of {self._max_queue} clips wait"
        if count > free:
            message = f"the queue is full: {waiting}, no room for {count} more; try again later"
            raise self._full(account, work, message)
        # Callers without a name are one program, whose own requests can't take room from others.
        if account.caller and not leaves_room(held, count, free):
            message = (
                f"{waiting}; the caller has {held} clips here, and the free room is for others; "
                "try again later"
            )
            raise self._full(account, work, message)

    def _check_time(self, state: RequestState, deadline_in: float | None) -> None:
        """Raise an error if a request would wait too long, or could not be done before its deadline.

        An idle device takes any request: only requests that run can correct estimates that are wrong.
        """
        if not self._states:
            return
        wait = self._seconds_ahead(state.path.account, self._pace.left(state))
        if wait is None:
            return
        if wait > self._max_wait:
            message = f"requests wait {wait:.0f} s, more than {self._max_wait:g}; try again later"
            raise QueueFullError(message, retry_after=retry_after(wait), refusal="time")
        if deadline_in is None:
            return
        alone = self._pace.shortest(state)
        if alone > deadline_in:
            raise DeadlineExceededError(
                f"the request takes {alone:.1f} s, and its deadline is in {deadline_in:.1f} s; "
                "allow more time, take fewer steps or a shorter duration",
                refusal="time",
            )
        late = self._pace.finish(state, wait, deadline_in) - deadline_in
        if late > 0:
            message = (
                f"the request would end {late:.1f} s after its deadline, since {wait:.1f} s of work are "
                "before it; try again later"
            )
            raise QueueFullError(message, retry_after=retry_after(late), refusal="time")

    def _full(self, account: Account, work: float, message: str) -> QueueFullError:
        wait = self._seconds_ahead(account, work)
        return QueueFullError(message, retry_after=retry_after(_FIRST_GUESS if wait is None else wait))

    def _seconds_ahead(self, account: Account, work: float) -> float | None:
        """Estimate the seconds that the device works for others before a request ends; None if unknown.

        The request takes `work` seconds of the device.
        """
        if self._pace.unit is None:
            return None
        waiting = ((other.path.account, self._pace.left(other)) for other in self._states.values())
        return work_ahead(account, work, waiting)

    def _clips(self) -> int:
        return sum(state.undecoded for state in self._states.values())

    def _waiting(self) -> int:
        return max(0, self._clips() - self._places)

    def _entered(self) -> list[RequestState]:
        return [state for state in self._states.values() if state.entered]

    def _refuse_if_closing(self) -> None:
        if self._closing:
            raise ServiceUnavailableError(
                self._failure or "the engine is stopping and takes no new requests; try another instance"
            )
