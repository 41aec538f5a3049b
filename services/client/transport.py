"""The two transports of the client: blocking, and asyncio.

The rest of the client is written once, as coroutines over a `Transport`. Over `BlockingTransport` they never
suspend, so that `services.api.best.run` runs them without an event loop.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
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

# About three years: gRPC's clock overflows beyond some centuries, and the call fails at once.
_LONGEST_SECONDS = 1e8


@dataclass(frozen=True, kw_only=True, slots=True)
class Service(Generic[Stub]):
    """A service, for the client."""

    name: str
    """Name in `milonga serve`."""
    argument: str
    """The client's argument that holds its address."""
    stub: Callable[[Any], Stub]
    """Creates its stub from a channel of either kind."""
    remedy: str
    """Remedy for a passed deadline, other than a longer timeout."""
    absent: str | None = None
    """Message if the address does not serve it (UNIMPLEMENTED); None: another service is at the address."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unary(Generic[Stub, Request, Response, Answer]):
    """A unary rpc."""

    service: Service[Stub]
    method: "Callable[[Stub], grpc.UnaryUnaryMultiCallable[Request, Response]]"
    """The rpc of a stub."""
    read: Callable[[Response], Answer]
    """Returns the value of a response."""
    heavy: bool = False
    """Whether building its request reads files or copies audio, and must not run on an event loop."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream(Generic[Stub, Request, Response, Answer]):
    """A server-streaming rpc."""

    service: Service[Stub]
    method: "Callable[[Stub], grpc.UnaryStreamMultiCallable[Request, Response]]"
    """The rpc of a stub."""
    read: Callable[[Response], Answer]
    """Returns the value of a response."""
    last: type[Any]
    """Type of the last value of a stream that succeeds."""


class Messages(Protocol[Response_co]):
    """The responses of a running stream."""

    async def read(self) -> Response_co | None:
        """Return the next message; None at the end."""
        ...

    def cancel(self) -> None:
        """Cancel the call."""
        ...


class Transport(Protocol):
    """Sends calls, waits, and keeps the channels: one per address, opened at its first call.

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
        """Call once; return the response."""
        ...

    def stream(
        self,
        rpc: Stream[Stub, Request, Response, Any],
        address: str,
        request: Request,
        timeout: float,
        metadata: Metadata,
    ) -> Messages[Response]:
        """Call once; return the stream of responses."""
        ...

    async def pause(self, seconds: float) -> None:
        """Wait; return early when the transport is closed."""
        ...

    async def offload(self, work: Callable[[], T]) -> T:
        """Run blocking work without blocking other calls; return its result."""
        ...

    async def close(self) -> None:
        """Close the channels; running calls are cancelled."""
        ...


class BlockingTransport:
    """A transport that blocks the calling thread. Thread-safe."""

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
        self,
        rpc: Stream[Stub, Request, Response, Any],
        address: str,
        request: Request,
        timeout: float,
        metadata: Metadata,
    ) -> Messages[Response]:
        """See `Transport`."""
        call = rpc.method(self._stub(rpc.service, address))
        return _BlockingMessages(call(request, min(timeout, _LONGEST_SECONDS), metadata))

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
    """A transport on the event loop of its first call."""

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
        # The stub's type declares blocking rpcs, but with an asyncio channel they are asynchronous.
        call: Any = rpc.method(self._stub(rpc.service, address))
        with self._while_open():
            response: Response = await call(
                request, timeout=min(timeout, _LONGEST_SECONDS), metadata=metadata
            )
        return response

    def stream(
        self,
        rpc: Stream[Stub, Request, Response, Any],
        address: str,
        request: Request,
        timeout: float,
        metadata: Metadata,
    ) -> Messages[Response]:
        """See `Transport`."""
        call: Any = rpc.method(self._stub(rpc.service, address))
        return _AsyncioMessages(
            call(request, timeout=min(timeout, _LONGEST_SECONDS), metadata=metadata),
            self._while_open,
        )

    async def pause(self, seconds: float) -> None:
        """See `Transport`. Does not return early, since a waiting task can be cancelled."""
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
        # A call that `close` ends raises CancelledError, which a task group would take for its own.
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


class _Paths:
    """A channel whose stubs hold the paths of their rpcs."""

    def unary_unary(self, path: str, **_: object) -> str:
        return path

    unary_stream = unary_unary


@lru_cache
def path_of(rpc: "Unary[Any, Any, Any, Any] | Stream[Any, Any, Any, Any]") -> str:
    """Return the path of an rpc: ``/PACKAGE.SERVICE/METHOD``."""
    path: Any = rpc.method(rpc.service.stub(_Paths()))
    return str(path)


def whole(message: T) -> T:
    """Return the message itself, for rpcs whose value is the response."""
    return message


def iterate(values: AsyncGenerator[T, None]) -> Iterator[T]:
    """Yield the values of an asynchronous generator that never suspends. Leaving the loop closes it."""
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
