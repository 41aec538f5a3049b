"""The interceptor of every service: admit calls, read messages, map errors to statuses, count, log, trace."""

import asyncio
import re
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any, cast

import grpc
import grpc.aio
import structlog
from google.protobuf.message import DecodeError

from services.errors import MilongaError, QueueFullError, RequestCancelledError, TooLargeError, invalid
from services.runtime import status
from services.runtime.access import Access
from services.runtime.batch_queue import arriving
from services.runtime.budget import Budget, current_hold
from services.runtime.call_spans import CallSpan, server_span
from services.runtime.callers import Caller, calling
from services.runtime.gate import Gate
from services.runtime.metrics import ServerMetrics
from services.runtime.roles import OPEN

log = structlog.get_logger()

Context = grpc.aio.ServicerContext[Any, Any]

CODES: dict[str, Mapping[type[MilongaError], grpc.StatusCode]] = {
    "/milonga.": status.STATUS_CODES,
    "/inference.": status.INFERENCE_STATUS_CODES,
}
"""Status codes by prefix of the method. Health, reflection and probes (`OPEN`) are not intercepted."""

REQUEST_ID_KEY = "x-request-id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

_SLACK_SECONDS, _SLACK = 0.25, 0.02
"""How long before the deadline a cancelled call counts as expired: seconds, or this share of its timeout."""

_LENGTH_SECONDS = 1.0
"""Within this time from the headers of a call, the length of its message has arrived."""

_REFUSALS = (
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
)
_REFUSALS_A_SECOND = 10


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Admits each call, assigns a request id, maps its exceptions to statuses, counts it, and logs one line.

    Messages are read and parsed here: a call is refused before its message is received, and a message that
    is too large or can't be parsed is a call like any other, with a status, a count and a line.
    """

    def __init__(self, metrics: ServerMetrics, access: Access, gate: Gate, budget: Budget) -> None:
        self._metrics, self._access, self._gate, self._budget = metrics, access, gate, budget
        self._lines = _Lines()

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
        if handler is None or not method.startswith(tuple(CODES)) or method in OPEN:
            return handler
        # As streams, which read their messages themselves; on the wire a unary rpc is no different.
        write = handler.response_serializer
        if handler.request_streaming and handler.response_streaming:
            call = self._stream(method, handler.stream_stream, partial(self._messages, method, handler))
            return grpc.stream_stream_rpc_method_handler(call, response_serializer=write)
        if handler.request_streaming:
            raise NotImplementedError(f"{method}: client-streaming rpcs are not supported")
        if handler.response_streaming:
            call = self._stream(method, handler.unary_stream, partial(_message, handler, self._budget))
            return grpc.stream_stream_rpc_method_handler(call, response_serializer=write)
        call = self._unary(method, handler.unary_unary, partial(_message, handler, self._budget))
        return grpc.stream_unary_rpc_method_handler(call, response_serializer=write)

    def _unary(self, method: str, behaviour: Any, read: Any) -> Any:
        async def call(requests: object, context: Context) -> Any:
            async with self._observed(method, context):
                with arriving():
                    # The message has no name here, so that the behaviour can let go of it.
                    with self._gate.receiving(method):
                        answer = behaviour(await read(context), context)
                    return await answer

        return call

    def _stream(self, method: str, behaviour: Any, read: Any) -> Any:
        # A coroutine with context.write, not a generator: when the caller disconnects, gRPC cancels a
        # coroutine at once, but leaves a generator to the garbage collector.
        async def call(requests: object, context: Context) -> None:
            async with self._observed(method, context):
                with self._gate.receiving(method):
                    answers = behaviour(await read(context), context)
                async with aclosing(answers) as responses:
                    async for response in responses:
                        await context.write(response)

        return call

    async def _messages(self, method: str, handler: Any, context: Context) -> AsyncIterator[Any]:
        """Return an iterator that parses the messages of a stream as they arrive.

        Each is authorised: a stream may last longer than its caller's token. Each has a hold of its own. An
        idle stream waits for its next message, so it can't wait for its turn to read it; one that has arrived
        waits until there is room for it, and its caller meanwhile. gRPC does not say why no other message
        follows, so one that is too large looks as if the caller had cancelled.
        """
        holds = current_hold()

        async def parsed() -> AsyncIterator[Any]:
            while (raw := await context.read()) is not grpc.aio.EOF:
                self._access.authorise(method, context)
                try:
                    part = holds.part()
                    await self._budget.room(part, len(raw))
                    part.resize(len(raw))
                    message = _parse(handler, raw)
                finally:
                    del raw
                yield message
                del message

        return parsed()

    @asynccontextmanager
    async def _observed(self, method: str, context: Context) -> AsyncIterator[None]:
        """Admit, count and log one call; abort it with the status of an exception that it raises."""
        rpc = method.rpartition("/")[2]
        codes = next(codes for prefix, codes in CODES.items() if method.startswith(prefix))
        request_id = _request_id(context)
        clock = _Clock(context)
        code = grpc.StatusCode.OK
        error: BaseException | None = None
        caller: Caller | None = None
        with (
            server_span(method, context.invocation_metadata()) as span,
            structlog.contextvars.bound_contextvars(**_names(request_id, rpc, span)),
        ):
            self._metrics.in_flight.labels(rpc).inc()
            try:
                caller = self._access.admit(method, context)
                span.annotate(request_id=request_id, priority=caller.priority)
                try:
                    with calling(caller), self._budget.holding():
                        yield
                except QueueFullError as refusal:
                    _clear_frames(refusal)
                    await asyncio.sleep(self._gate.delay(caller, refusal))
                    raise
            except asyncio.CancelledError as cancelled:
                code, error = grpc.StatusCode.CANCELLED, cancelled
                raise
            except Exception as raised:
                code, error = status.status_code(raised, codes), raised
                await _abort(context, raised, request_id, codes)
            finally:
                code, seconds = clock.seen_by_the_caller(code), clock.seconds
                self._metrics.in_flight.labels(rpc).dec()
                self._metrics.requests.labels(rpc, code.name).inc()
                self._metrics.latency.labels(rpc, code.name).observe(seconds)
                if (slack := clock.slack) is not None:
                    self._metrics.slack.labels(rpc, code.name).observe(slack)
                self._metrics.count_refusal(rpc, error)
                self._lines.write(code, error, seconds, context.peer(), caller)
                span.end(code.name)
                _clear_frames(error)
                error = None


async def _message(handler: Any, budget: Budget, context: Context) -> Any:
    """Read and parse the message of a unary call, when its turn has come and if there is memory for it.

    gRPC refuses a message over the limit as soon as it has read its length, and does not say so here. A
    caller that gives up while it sends a message looks the same, except that it takes longer.

    Raises:
        InvalidInputError: it can't be parsed.
        TooLargeError: gRPC did not accept it.
        QueueFullError: requests hold too much memory.
        RequestCancelledError: the caller gave up before all of it had arrived.
    """
    async with budget.reading() as charge:
        start = time.monotonic()
        raw = await context.read()
        if raw is not grpc.aio.EOF:
            charge(len(raw))
            try:
                current_hold().resize(len(raw))
                return _parse(handler, raw)
            finally:
                del raw  # errors keep this frame
    if time.monotonic() - start > _LENGTH_SECONDS:
        raise RequestCancelledError("the caller gave up before its message had arrived")
    raise TooLargeError("the call has no message, or one over the size limit of this service")


def _parse(handler: Any, raw: Any) -> Any:
    try:
        return handler.request_deserializer(raw) if handler.request_deserializer else raw
    except DecodeError as error:
        raise invalid("request", f"can't be parsed as a protobuf message of this rpc: {error}") from error


class _Clock:
    """The time of one call, from its arrival."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._start = time.monotonic()
        self._given = cast("float | None", context.time_remaining())  # the type stubs omit None

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return time.monotonic() - self._start

    @property
    def slack(self) -> float | None:
        """Seconds to the caller's deadline, 0 if it has passed; None without one."""
        return None if self._given is None else max(0.0, self._given - self.seconds)

    def seen_by_the_caller(self, code: grpc.StatusCode) -> grpc.StatusCode:
        """Return DEADLINE_EXCEEDED for a call whose caller's deadline has passed, otherwise `code`.

        The caller's clock ends before ours: the message took time, and its timeout was rounded up on its way.
        So a call that is cancelled shortly before the deadline was not cancelled by anybody.
        """
        if self._given is None:
            return code
        slack = max(_SLACK_SECONDS, _SLACK * self._given) if code is grpc.StatusCode.CANCELLED else 0.0
        return grpc.StatusCode.DEADLINE_EXCEEDED if self.seconds >= self._given - slack else code


class _Lines:
    """Writes the lines of calls to the log; of refusals at most `_REFUSALS_A_SECOND`, and how many others."""

    def __init__(self) -> None:
        self._second, self._written, self._left_out = 0, 0, 0

    def write(
        self,
        code: grpc.StatusCode,
        error: BaseException | None,
        seconds: float,
        peer: str,
        caller: Caller | None,
    ) -> None:
        """Write the line of one call."""
        facts: dict[str, Any] = {"code": code.name, "seconds": round(seconds, 4), "peer": peer}
        if caller is not None and caller.name:
            facts["caller"] = caller.name
        if caller is not None and caller.priority != "interactive":
            facts["priority"] = caller.priority
        if code in _REFUSALS and not self._may_write(facts):
            return
        if code is grpc.StatusCode.INTERNAL:
            log.error("call", **facts, exc_info=error)
        elif error is None or isinstance(error, asyncio.CancelledError):
            log.info("call", **facts)
        else:
            log.info("call", **facts, reason=str(error)[: status.MAX_TEXT_CHARACTERS])

    def _may_write(self, facts: dict[str, Any]) -> bool:
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._written = second, 0
        if self._written >= _REFUSALS_A_SECOND:
            self._left_out += 1
            return False
        self._written += 1
        if self._left_out:
            facts["refusals_not_logged"], self._left_out = self._left_out, 0
        return True


async def _abort(
    context: Context,
    error: Exception,
    request_id: str,
    codes: Mapping[type[MilongaError], grpc.StatusCode],
) -> None:
    rich = status.to_status(error, request_id, codes)
    metadata: list[tuple[str, str | bytes]] = [(status.DETAILS_KEY, rich.SerializeToString())]
    await context.abort(status.status_code(error, codes), rich.message, tuple(metadata))


def _names(request_id: str, rpc: str, span: CallSpan) -> dict[str, str]:
    """Return the fields of all lines of a call in the log."""
    names = {"request_id": request_id, "rpc": rpc}
    return {**names, "trace_id": span.trace_id} if span.trace_id else names


def _clear_frames(error: BaseException | None) -> None:
    """Let go of the local variables of frames that have ended, messages among them.

    gRPC keeps the exception of an aborted call in a cycle, until the garbage collector finds it.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _request_id(context: Context) -> str:
    """Return the request id of the caller's metadata if it is valid, otherwise a new one."""
    given = dict(context.invocation_metadata() or ()).get(REQUEST_ID_KEY)
    if isinstance(given, str) and _REQUEST_ID.fullmatch(given):
        return given
    return uuid.uuid4().hex[:16]
