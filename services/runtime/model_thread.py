"""Call a model on one thread: an item's fault fails that item only, and a dead or hung thread is noticed."""

import asyncio
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, Generic, TypeVar

import structlog

from services.errors import ServiceUnavailableError

log = structlog.get_logger()

MAX_FAILURES: Final = 3
"""Batches in a row without any result, after which the model must prove that it works."""

CLOSE_SECONDS: Final = 3.0
"""Time that `ModelThread.close` waits for the running call."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class ModelThread(Generic[Item, Result]):
    """Calls a model on a separate daemon thread. Belongs to one event loop."""

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Sequence[Result]],
        *,
        cost: Callable[[Item], float],
        max_seconds: float,
        initialize: Callable[[], None] | None,
    ) -> None:
        """Start the thread.

        Args:
            run: the model; returns one result per item, in order. Runs on the thread.
            cost: returns the cost of an item.
            max_seconds: time after which a call of the model counts as hung; 0: no limit.
            initialize: runs on the thread before the first call.
        """
        self._run, self._cost, self._initialize = run, cost, initialize
        self._max_seconds = max_seconds or None
        self._failures = 0
        self._proof: Item | None = None
        """The cheapest item that had a result: the model works as long as it has one for it."""
        self._loop = asyncio.get_running_loop()
        self._ended = self._loop.create_future()
        self._calls: queue.SimpleQueue[
            tuple[Sequence[Item], asyncio.Future[Sequence[Result] | Exception]] | None
        ] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    async def __call__(self, items: Sequence[Item]) -> list[Result | Exception]:
        """Return the result of each item, or its own exception.

        A call of the model that fails is tried again with each half of its items. So one item does not fail
        the others, and each half needs less memory.

        Raises:
            ServiceUnavailableError: the thread has ended or hangs, or the model works no longer.
        """
        outcomes = await self._halving(items)
        done = [item for item, one in zip(items, outcomes, strict=True) if not isinstance(one, Exception)]
        if done:
            self._failures = 0
            self._proof = min(done if self._proof is None else [self._proof, *done], key=self._cost)
            return outcomes
        self._failures += 1
        if self._failures >= MAX_FAILURES:
            await self._prove()
        return outcomes

    async def close(self) -> None:
        """Stop the thread; wait up to `CLOSE_SECONDS` for its running call."""
        self._calls.put(None)
        await asyncio.wait([self._ended], timeout=CLOSE_SECONDS)
        if self._thread.is_alive():
            log.error("the model's thread does not end", stack=self._stack())

    async def _halving(self, items: Sequence[Item]) -> list[Result | Exception]:
        outcome = await self._attempt(items)
        if not isinstance(outcome, Exception):
            return list(outcome)
        if len(items) == 1:
            return [outcome]
        log.warning("a batch failed, its halves are tried", items=len(items), error=type(outcome).__name__)
        del outcome  # its frames hold what the model had allocated
        half = len(items) // 2
        return [*await self._halving(items[:half]), *await self._halving(items[half:])]

    async def _attempt(self, items: Sequence[Item]) -> Sequence[Result] | Exception:
        """Return the results of one call of the model, or its exception."""
        answer: asyncio.Future[Sequence[Result] | Exception] = self._loop.create_future()
        self._calls.put((items, answer))
        await asyncio.wait(
            [answer, self._ended], timeout=self._max_seconds, return_when=asyncio.FIRST_COMPLETED
        )
        if answer.done():
            return answer.result()
        if self._ended.done():
            raise ServiceUnavailableError("the model's thread has ended")
        log.critical("a call of the model hangs", items=len(items), stack=self._stack())
        raise ServiceUnavailableError(f"a call of the model has not ended within {self._max_seconds:g} s")

    async def _prove(self) -> None:
        """Raise `ServiceUnavailableError` unless the model still has a result for an item that had one."""
        outcome = None if self._proof is None else await self._attempt([self._proof])
        if outcome is None or isinstance(outcome, Exception):
            raise ServiceUnavailableError(f"the last {self._failures} batches of the model have all failed")
        self._failures = 0

    def _work(self) -> None:
        try:
            while (call := self._calls.get()) is not None:
                items, answer = call
                outcome = self._call_model(items)
                self._loop.call_soon_threadsafe(_set, answer, outcome)
                del call, items, answer, outcome
        except BaseException as error:
            log.critical("the model's thread has ended", exc_info=error)
        finally:
            # The loop may be closed already.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(_set, self._ended, None)

    def _call_model(self, items: Sequence[Item]) -> Sequence[Result] | Exception:
        try:
            if self._initialize is not None:
                self._initialize()
                self._initialize = None
            results = self._run(items)
            if len(results) != len(items):
                raise RuntimeError(f"the model returned {len(results)} results for {len(items)} items")
        except StopIteration:
            return RuntimeError("the model raised StopIteration, which no future can hold")
        except Exception as error:
            return error
        return results

    def _stack(self) -> str:
        """Return what the thread is doing, without values."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        return "".join(traceback.format_stack(frame)) if frame is not None else ""


def _set(future: "asyncio.Future[Result]", value: Result) -> None:
    if not future.done():
        future.set_result(value)
