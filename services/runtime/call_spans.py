"""The spans of calls on both sides, which W3C's context (`traceparent`) joins across processes.

Names and attributes are those of OpenTelemetry's semantic conventions for RPC.
"""

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Final

import grpc

from services.runtime import tracing

if TYPE_CHECKING:
    from opentelemetry.trace import Span, SpanKind, Tracer

Metadata = tuple[tuple[str, str], ...]

_SERVER_FAULTS: Final = frozenset(
    {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
)
"""Codes that are errors of a service's span: the others are the caller's fault, or its choice."""


class CallSpan:
    """The span of one call. Does nothing without a span."""

    def __init__(self, span: "Span | None" = None, errors: frozenset[str] | None = None) -> None:
        """`errors` are the codes that make the span an error; None: all but OK."""
        self._span, self._errors, self._ended = span, errors, False

    @property
    def metadata(self) -> Metadata:
        """The metadata that make the service's span a child of this one."""
        if self._span is None:
            return ()
        from opentelemetry.trace import set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier, set_span_in_context(self._span))
        return tuple(carrier.items())

    @property
    def trace_id(self) -> str:
        """The trace's id in hexadecimal; empty if the span is not recorded."""
        if self._span is None or not self._span.is_recording():
            return ""
        return f"{self._span.get_span_context().trace_id:032x}"

    def annotate(self, **attributes: tracing.Value) -> None:
        """Set attributes."""
        if self._span is not None:
            self._span.set_attributes(tracing.named(attributes))

    def retry(self, seconds: float) -> None:
        """Record that the call is repeated after a wait of `seconds`."""
        if self._span is not None:
            self._span.add_event("retry", tracing.named({"wait_seconds": seconds}))

    def end(self, code: str) -> None:
        """End the span with a status of the call. Only the first end counts."""
        if self._span is None or self._ended:
            return
        from opentelemetry.trace import StatusCode

        self._ended = True
        self._span.set_attribute("rpc.response.status_code", code)
        if code != grpc.StatusCode.OK.name:
            self._span.set_attribute("error.type", code)
            if self._errors is None or code in self._errors:
                self._span.set_status(StatusCode.ERROR)
        self._span.end()


_NOTHING: Final[AbstractContextManager[CallSpan]] = nullcontext(CallSpan())


def client_span(method: str) -> AbstractContextManager[CallSpan]:
    """Return the context of a call by its client. It ends with the status of the exception that leaves it."""
    tracer = tracing.tracer()
    return _NOTHING if tracer is None else _client_span(tracer, method)


@contextmanager
def _client_span(tracer: "Tracer", method: str) -> Iterator[CallSpan]:
    from opentelemetry.trace import SpanKind

    call = CallSpan(_start(tracer, method, SpanKind.CLIENT))
    # Not made the current span: a stream's context would stay with the caller between two values.
    try:
        yield call
    except BaseException as error:
        call.end(_code(error))
        raise
    call.end(grpc.StatusCode.OK.name)


def server_span(method: str, metadata: Iterable[tuple[str, Any]] | None) -> AbstractContextManager[CallSpan]:
    """Return the context of a call in its service: the current span, a child of the client's if sent."""
    tracer = tracing.tracer()
    return _NOTHING if tracer is None else _server_span(tracer, method, metadata or ())


@contextmanager
def _server_span(tracer: "Tracer", method: str, metadata: Iterable[tuple[str, Any]]) -> Iterator[CallSpan]:
    from opentelemetry import context, trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    texts = {key: value for key, value in metadata if isinstance(value, str)}
    parent = TraceContextTextMapPropagator().extract(texts, context.Context())
    span = _start(tracer, method, trace.SpanKind.SERVER, parent)
    call = CallSpan(span, _SERVER_FAULTS)
    token = context.attach(trace.set_span_in_context(span))
    try:
        yield call
    finally:
        context.detach(token)
        call.end(grpc.StatusCode.UNKNOWN.name)  # unless its status is known


def _start(tracer: "Tracer", method: str, kind: "SpanKind", parent: Any = None) -> "Span":
    name = method.removeprefix("/")
    return tracer.start_span(name, parent, kind, attributes={"rpc.system.name": "grpc", "rpc.method": name})


def _code(error: BaseException) -> str:
    """Return the name of the status with which a call ended that raised `error`, otherwise its type."""
    call = error.__cause__
    if isinstance(call, grpc.Call | grpc.aio.AioRpcError):
        return str(call.code().name)
    if isinstance(error, asyncio.CancelledError | GeneratorExit | KeyboardInterrupt):
        return grpc.StatusCode.CANCELLED.name
    return type(error).__name__
