"""Deadlines, retries and errors of calls, for blocking and asyncio transports."""

import contextlib
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import grpc
import grpc.aio

from services.client.connection import Connection
from services.client.transport import (
    Answer,
    Messages,
    Request,
    Response,
    Service,
    Stream,
    Stub,
    Transport,
    Unary,
    path_of,
)
from services.errors import (
    ConnectionOptionsError,
    DeadlineExceededError,
    FieldViolation,
    InvalidInputError,
    MilongaError,
    QueueFullError,
    ServiceUnavailableError,
)
from services.runtime import status
from services.runtime.call_spans import CallSpan, client_span
from services.runtime.callers import Priority

T = TypeVar("T")

_FIRST_WAIT_SECONDS, _GROWTH, _LONGEST_WAIT_SECONDS = 0.2, 3.0, 5.0
# gRPC's text for a call that the server reset without a status, while it stopped. Calls that the client
# cancelled or closed have other texts.
_RESET = "CANCELLED"
# Jitter keeps callers that were refused together from retrying together.
_JITTER = 0.2


class Deadline:
    """Deadline of one call, or of several calls together."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds until the deadline; negative after it."""
        return self._end - time.monotonic()


class Calls:
    """Makes calls over a transport. Raises the exceptions of `services.errors`."""

    def __init__(self, connection: Connection, transport: Transport) -> None:
        self._connection = connection
        self._transport = transport

    def acting_for(self, token: str | None, priority: Priority) -> "Calls":
        """Return calls over the same channels with the metadata of another caller; None: anonymous."""
        return Calls(self._connection.acting_for(token, priority), self._transport)

    def deadline(self, timeout: float | None) -> Deadline:
        """Return the deadline of a call that begins now; None: the connection's timeout."""
        return Deadline(self._connection.timeout if timeout is None else timeout)

    def address(self, service: Service[Any]) -> str:
        """Return the address of a service.

        Raises:
            InvalidInputError: the service has no address; names the missing argument.
        """
        return self._connection.address(service.argument, service.name)

    def has_address(self, service: Service[Any]) -> bool:
        """Return whether a service has an address."""
        return self._connection.has_address(service.argument)

    async def unary(
        self,
        rpc: Unary[Stub, Request, Response, Answer],
        build: Callable[[], Request],
        timeout: float | None,
        *,
        token: str | None = None,
    ) -> Answer:
        """Build the request, call, and read the response. `token` replaces the connection's token."""
        deadline, address = self.deadline(timeout), self.address(rpc.service)
        metadata = self._connection.metadata_for(address, token)
        request = await self._transport.offload(build) if rpc.heavy else build()
        with client_span(path_of(rpc)) as span:
            traced = metadata + span.metadata
            response = await self._with_retries(
                rpc.service,
                address,
                deadline,
                span,
                lambda seconds: self._transport.unary(rpc, address, request, seconds, traced),
            )
        return rpc.read(response)

    async def stream(
        self, rpc: Stream[Stub, Request, Response, Answer], request: Request, timeout: float | None
    ) -> AsyncGenerator[Answer, None]:
        """Call, and yield the responses. Retries only before the first response."""
        deadline, address = self.deadline(timeout), self.address(rpc.service)
        with client_span(path_of(rpc)) as span:
            metadata = self._connection.metadata + span.metadata

            async def begin(seconds: float) -> tuple[Messages[Response], Response | None]:
                messages = self._transport.stream(rpc, address, request, seconds, metadata)
                try:
                    return messages, await messages.read()
                except BaseException:
                    messages.cancel()
                    raise

            messages, message = await self._with_retries(rpc.service, address, deadline, span, begin)
            try:
                while message is not None:
                    answer = rpc.read(message)
                    if isinstance(answer, rpc.last):
                        # First the status: a caller who stops at the last value would cancel the call.
                        with contextlib.suppress(grpc.RpcError):
                            await messages.read()
                        span.end(grpc.StatusCode.OK.name)
                        yield answer
                        return
                    yield answer
                    message = await messages.read()
            except grpc.RpcError as error:
                raise _read_failure(error, rpc.service, address).error from error
            finally:
                messages.cancel()

    async def close(self) -> None:
        """Close the channels."""
        await self._transport.close()

    async def _with_retries(
        self,
        service: Service[Any],
        address: str,
        deadline: Deadline,
        span: CallSpan,
        attempt: Callable[[float], Awaitable[T]],
    ) -> T:
        """Return the result of `attempt`, which takes the seconds left; retry while that can help."""
        tries = 0
        while True:
            tries += 1
            try:
                return await attempt(deadline.left)
            except grpc.RpcError as error:
                failure = _read_failure(error, service, address)
                await self._check_connection(failure, address)
                wait = failure.wait(tries)
                # If the wait exceeds the deadline, the refusal says more than a passed deadline would.
                if wait is None or tries > self._connection.retries or wait >= deadline.left:
                    raise failure.error from error
            span.retry(wait)
            await self._transport.pause(wait)

    async def _check_connection(self, failure: "_Failure", address: str) -> None:
        """Raise `ConnectionOptionsError` if the call never reached a service, and never will."""
        if isinstance(failure.error, ServiceUnavailableError) and not failure.answered:
            look = partial(self._connection.fault, failure.text, address)
            if fault := await self._transport.offload(look):
                raise ConnectionOptionsError(fault) from failure.error


@dataclass(frozen=True, kw_only=True, slots=True)
class _Failure:
    """The error of a failed attempt, and the service's retry delay."""

    error: MilongaError
    text: str
    """gRPC's description."""
    answered: bool
    """Whether the error comes from a service of this product."""
    retry_after: float | None
    """Retry delay from the service in seconds; None without one."""

    def wait(self, tries: int) -> float | None:
        """Return the seconds to wait after `tries` attempts; None if a retry does not help."""
        full = isinstance(self.error, QueueFullError) and self.retry_after is not None
        if not full and not isinstance(self.error, ServiceUnavailableError):
            return None
        backoff = min(_FIRST_WAIT_SECONDS * _GROWTH ** (tries - 1), _LONGEST_WAIT_SECONDS)
        jittered = backoff * random.uniform(1 - _JITTER, 1 + _JITTER)
        return max(jittered, (self.retry_after or 0.0) * random.uniform(1, 1 + _JITTER))


def _read_failure(error: grpc.RpcError, service: Service[Any], address: str) -> _Failure:
    # gRPC's errors are calls too, which the type stubs don't declare.
    call = error
    assert isinstance(call, grpc.Call | grpc.aio.AioRpcError)
    found = dict(call.trailing_metadata() or ()).get(status.DETAILS_KEY)
    details = found if isinstance(found, bytes) else None
    code, text = call.code(), call.details() or ""
    if code is grpc.StatusCode.CANCELLED and text == _RESET and details is None:
        code, text = grpc.StatusCode.UNAVAILABLE, "the service stopped, and reset the call"
    return _Failure(
        error=_explain(status.from_status(code, text, details), code, service, address),
        text=text,
        answered=details is not None,
        retry_after=status.retry_delay(details),
    )


def _explain(error: MilongaError, code: grpc.StatusCode, service: Service[Any], address: str) -> MilongaError:
    """Add the service and the remedy, which only the client knows."""
    if isinstance(error, InvalidInputError):
        # The same field names for every rpc.
        return InvalidInputError(
            *(FieldViolation(v.field.removeprefix("request."), v.description) for v in error.violations)
        )
    if isinstance(error, DeadlineExceededError):
        # The text is usually gRPC's own, without cause or remedy.
        return DeadlineExceededError(
            f"{address}: the deadline passed ({error}); give a longer timeout or {service.remedy}"
        )
    if isinstance(error, ServiceUnavailableError):
        return ServiceUnavailableError(
            f"{address}: {error}; is it running? start one with: milonga serve {service.name}"
        )
    if code is grpc.StatusCode.UNIMPLEMENTED and service.absent is not None:
        return MilongaError(f"{address}: {service.absent}")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return MilongaError(
            f"{address}: no {service.name} service answers there ({error}); give the address of one as "
            f"{service.argument}"
        )
    return error
