"""The interceptor of every service: map exceptions to statuses, count calls, log them."""

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any, cast

import grpc
import grpc.aio
import structlog

from services.errors import MilongaError, invalid
from services.runtime import status
from services.runtime.callers import Caller, Priority, calling, peer_host
from services.runtime.metrics import ServerMetrics

log = structlog.get_logger()

Context = grpc.aio.ServicerContext[Any, Any]

CODES: dict[str, Mapping[type[MilongaError], grpc.StatusCode]] = {
    "/milonga.": status.STATUS_CODES,
    "/inference.": status.INFERENCE_STATUS_CODES,
}
"""Status codes by prefix of the method. Health and reflection are not intercepted: probes fill the log."""

PROBES = ("ServerLive", "ServerReady", "ModelReady")
"""Methods that are not intercepted either, since they are probes."""

REQUEST_ID_KEY = "x-request-id"
PRIORITY_KEY = "x-milonga-priority"
"""Key of the metadata with the priority class of a call: ``interactive`` (the default) or ``batch``."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Assigns a request id to each call, maps its exceptions to statuses, counts it, and logs one line."""

    def __init__(self, metrics: ServerMetrics) -> None:
        self._metrics = metrics

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], "Awaitable[grpc.RpcMethodHandler[Any, Any] | None]"
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Return the wrapped handler of a call. gRPC calls this."""
        # Quoted annotations: RpcMethodHandler takes type parameters in its stubs only.
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(tuple(CODES)) or method.endswith(PROBES):
            return handler
        codec = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.request_streaming and handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(self._stream(method, handler.stream_stream), **codec)
        if handler.request_streaming:
            raise NotImplementedError(f"{method}: client-streaming rpcs are not supported")
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(self._stream(method, handler.unary_stream), **codec)
        return grpc.unary_unary_rpc_method_handler(self._unary(method, handler.unary_unary), **codec)

    def _unary(self, method: str, behaviour: Any) -> Any:
        async def call(request: Any, context: Context) -> Any:
            async with _observed(method, context, self._metrics):
                return await behaviour(request, context)

        return call

    def _stream(self, method: str, behaviour: Any) -> Any:
        # A coroutine with context.write, not a generator: when the caller disconnects, gRPC cancels a
        # coroutine at once, but leaves a generator to the garbage collector.
        async def call(request: Any, context: Context) -> None:
            async with (
                _observed(method, context, self._metrics),
                aclosing(behaviour(request, context)) as responses,
            ):
                async for response in responses:
                    await context.write(response)

        return call


@asynccontextmanager
async def _observed(method: str, context: Context, metrics: ServerMetrics) -> AsyncIterator[None]:
    """Count and log one call; abort it with the status of an exception that it raises."""
    rpc = method.rpartition("/")[2]
    codes = next(codes for prefix, codes in CODES.items() if method.startswith(prefix))
    request_id = _request_id(context)
    start = time.monotonic()
    code = grpc.StatusCode.OK
    error: BaseException | None = None
    metrics.in_flight.labels(rpc).inc()
    with structlog.contextvars.bound_contextvars(request_id=request_id, rpc=rpc):
        try:
            with calling(_caller(context)):
                yield
        except asyncio.CancelledError as cancelled:
            code, error = _cancellation_code(context), cancelled
            raise
        except Exception as raised:
            code, error = status.status_code(raised, codes), raised
            await _abort(context, raised, request_id, codes)
        finally:
            seconds = time.monotonic() - start
            metrics.in_flight.labels(rpc).dec()
            metrics.requests.labels(rpc, code.name).inc()
            metrics.latency.labels(rpc).observe(seconds)
            _write_line(code, error, seconds, context)


def _write_line(code: grpc.StatusCode, error: BaseException | None, seconds: float, context: Context) -> None:
    facts = {"code": code.name, "seconds": round(seconds, 4), "peer": context.peer()}
    if code is grpc.StatusCode.INTERNAL:
        log.error("call", **facts, exc_info=error)
    elif error is None or isinstance(error, asyncio.CancelledError):
        log.info("call", **facts)
    else:
        log.info("call", **facts, reason=str(error)[: status.MAX_TEXT_CHARACTERS])


async def _abort(
    context: Context,
    error: Exception,
    request_id: str,
    codes: Mapping[type[MilongaError], grpc.StatusCode],
) -> None:
    rich = status.to_status(error, request_id, codes)
    metadata: list[tuple[str, str | bytes]] = [(status.DETAILS_KEY, rich.SerializeToString())]
    await context.abort(status.status_code(error, codes), rich.message, tuple(metadata))


def _cancellation_code(context: Context) -> grpc.StatusCode:
    """Return DEADLINE_EXCEEDED if the deadline has passed, otherwise CANCELLED: by the caller or a stop."""
    left = cast("float | None", context.time_remaining())  # the type stubs omit None
    expired = left is not None and left <= 0
    return grpc.StatusCode.DEADLINE_EXCEEDED if expired else grpc.StatusCode.CANCELLED


def _caller(context: Context) -> Caller:
    return Caller(peer=peer_host(context.peer()), priority=_priority(context))


def _priority(context: Context) -> Priority:
    """Return the priority class in the caller's metadata. Raises `InvalidInputError` for any other word."""
    match dict(context.invocation_metadata() or ()).get(PRIORITY_KEY, "interactive"):
        case "interactive" | "batch" as priority:
            return priority
        case other:
            raise invalid(PRIORITY_KEY, f"is {other[:80]!r}, must be interactive or batch")


def _request_id(context: Context) -> str:
    """Return the request id of the caller's metadata if it is valid, otherwise a new one."""
    given = dict(context.invocation_metadata() or ()).get(REQUEST_ID_KEY)
    if isinstance(given, str) and _REQUEST_ID.fullmatch(given):
        return given
    return uuid.uuid4().hex[:16]
