"""The two ways to wait: by blocking the thread, and on the event loop.

Everything above is written once, as coroutines over a `Transport`. Over `BlockingTransport` they never
suspend, so that `services.api.best.run` runs one to its end without an event loop.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import grpc
import grpc.aio

from services.api.best import run
from services.client.connection import Connection, Metadata
from services.errors import RequestCancelledError

Stub = TypeVar("Stub")
Request = TypeVar("Request")
Response = TypeVar("Response")
Response_co = TypeVar("Response_co", covariant=True)
Answer = TypeVar("Answer")
T = TypeVar("T")

# Beyond some centuries gRPC's clock overflows, and the call fails at once. Three years, then.
_LONGEST_SECONDS = 1e8


@dataclass(frozen=True, kw_only=True, slots=True)
class Service(Generic[Stub]):
    """One of the services."""

    name: str
    """As `milonga serve` calls it."""
    argument: str
    """The client's argument that holds its address."""
    stub: Callable[[Any], Stub]
    """Makes its stub from a channel of either kind."""
    remedy: str
    """What helps, beside a longer timeout, where a deadline passes."""
    absent: str | None = None
    """What it means, and what to do, where it is not served; None: that another service answers there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unary(Generic[Stub, Request, Response, Answer]):
    """One rpc that answers with one message."""

    service: Service[Stub]
    method: "Callable[[Stub], grpc.UnaryUnaryMultiCallable[Request, Response]]"
    """The rpc of a stub."""
    read: Callable[[Response], Answer]
    """The answer in the message."""
    heavy: bool = False
    """Whether to make its request reads files or copies sound: not to be done on an event loop."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream(Generic[Stub, Request, Response, Answer]):
    """One rpc that answers with a stream of messages."""

    service: Service[Stub]
    method: "Callable[[Stub], grpc.UnaryStreamMultiCallable[Request, Response]]"
    """The rpc of a stub."""
    read: Callable[[Response], Answer]
    """The answer in one message."""


class Messages(Protocol[Response_co]):
    """A stream under way."""

    async def read(self) -> Response_co | None:
        """The next message; None at the end."""
        ...

    def cancel(self) -> None:
        """Give up the rest."""
        ...


class Transport(Protocol):
    """Sends, waits, and holds the channels: one for each address, opened at its first call.

    `unary`, and `Messages.read`, raise gRPC's errors; after `close`, `RequestCancelledError`.
    """

    async def unary(
        self,
        rpc: Unary[Stub, Request, Response, Any],
        address: str,
        request: Request,
        timeout: float,
        metadata: Metadata,
    ) -> Response:
        """Call once, and wait for the answer."""
        ...

    def stream(
        self, rpc: Stream[Stub, Request, Response, Any], address: str, request: Request, timeout: float
    ) -> Messages[Response]:
        """Call once."""
        ...

    async def pause(self, seconds: float) -> None:
        """Wait. Ends early when the transport is closed."""
        ...

    async def offload(self, work: Callable[[], T]) -> T:
        """Do what takes long without waiting for others."""
        ...

    async def close(self) -> None:
        """Close the channels; calls under way are cancelled."""
        ...


class BlockingTransport:
    """Blocks the calling thread. Thread-safe."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._channels: dict[str, grpc.Channel] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def _stub(self, service: Service[Stub], address: str) -> Stub:
        with self._lock:
            if self._closed.is_set():
                raise _closed()
            if address not in self._channels:
                self._channels[address] = self._connection.open_channel(address)
            return service.stub(self._channels[address])

    async def unary(
        self,
        rpc: Unary[Stub, Request, Response, Any],
        address: str,
        request: Request,
        timeout: float,
        metadata: Metadata,
    ) -> Response:
        """See `Transport`."""
        call = rpc.method(self._stub(rpc.service, address))
        return call(request, min(timeout, _LONGEST_SECONDS), metadata)

    def stream(
        self, rpc: Stream[Stub, Request, Response, Any], address: str, request: Request, timeout: float
    ) -> Messages[Response]:
        """See `Transport`."""
        call = rpc.method(self._stub(rpc.service, address))
        return _BlockingMessages(call(request, min(timeout, _LONGEST_SECONDS), self._connection.metadata))

    async def pause(self, seconds: float) -> None:
        """See `Transport`."""
        self._closed.wait(seconds)

    async def offload(self, work: Callable[[], T]) -> T:
        """See `Transport`."""
        return work()

    async def close(self) -> None:
        """See `Transport`."""
        with self._lock:
            self._closed.set()
            for channel in self._channels.values():
                channel.close()


class _BlockingMessages(Generic[Response]):
    def __init__(self, call: "grpc._CallIterator[Response]") -> None:
        self._call = call

    async def read(self) -> Response | None:
        return next(self._call, None)

    def cancel(self) -> None:
        self._call.cancel()


class AsyncioTransport:
    """Waits on the event loop of its first call, and belongs to it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._closed = False

    def _stub(self, service: Service[Stub], address: str) -> Stub:
        if self._closed:
            raise _closed()
        if address not in self._channels:
            self._channels[address] = self._connection.open_async_channel(address)
        return service.stub(self._channels[address])

    async def unary(
        self,
        rpc: Unary[Stub, Request, Response, Any],
        address: str,
        request: Request,
        timeout: float,
        metadata: Metadata,
    ) -> Response:
        """See `Transport`."""
        # On an asynchronous channel the stub's rpcs are other ones than the stub's type says.
        call: Any = rpc.method(self._stub(rpc.service, address))
        with self._while_open():
            response: Response = await call(
                request, timeout=min(timeout, _LONGEST_SECONDS), metadata=metadata
            )
        return response

    def stream(
        self, rpc: Stream[Stub, Request, Response, Any], address: str, request: Request, timeout: float
    ) -> Messages[Response]:
        """See `Transport`."""
        call: Any = rpc.method(self._stub(rpc.service, address))
        return _AsyncioMessages(
            call(request, timeout=min(timeout, _LONGEST_SECONDS), metadata=self._connection.metadata),
            self._while_open,
        )

    async def pause(self, seconds: float) -> None:
        """See `Transport`. A task that waits is cancelled by itself, so it is not ended early."""
        await asyncio.sleep(seconds)

    async def offload(self, work: Callable[[], T]) -> T:
        """See `Transport`."""
        return await asyncio.to_thread(work)

    async def close(self) -> None:
        """See `Transport`."""
        self._closed = True
        for channel in self._channels.values():
            await channel.close()

    @contextlib.contextmanager
    def _while_open(self) -> Iterator[None]:
        # A call that `close` ended says that its task was cancelled, which a task group, say, would believe.
        try:
            yield
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if self._closed and task is not None and not task.cancelling():
                raise _closed() from error
            raise


class _AsyncioMessages(Generic[Response]):
    def __init__(
        self,
        call: "grpc.aio.UnaryStreamCall[Any, Response]",
        while_open: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        self._call = call
        self._while_open = while_open

    async def read(self) -> Response | None:
        with self._while_open():
            message: Any = await self._call.read()
        return None if message is grpc.aio.EOF else message

    def cancel(self) -> None:
        self._call.cancel()


def whole(message: T) -> T:
    """The answer of an rpc whose message is one."""
    return message


def iterate(values: AsyncGenerator[T, None]) -> Iterator[T]:
    """Yield the values of an asynchronous generator that never waits. Leaving the loop closes it."""
    try:
        while True:
            try:
                value = run(values.__anext__())
            except StopAsyncIteration:
                return
            yield value
    finally:
        run(values.aclose())


def _closed() -> RequestCancelledError:
    return RequestCancelledError("the client was closed; make a new one")
