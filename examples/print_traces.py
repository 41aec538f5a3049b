"""Receive traces over OTLP (gRPC), and print each as a tree: a collector for one's own machine.

    pip install '.[serving,tracing]'
    python examples/print_traces.py localhost:4317 &
    export OTEL_EXPORTER_OTLP_ENDPOINT=http://localhost:4317
    milonga serve generation --model mini &
    milonga generate "A dog barks then a siren wails" --server localhost:50051 -o clip.wav

A trace is printed when none of its spans has arrived for a few seconds.
"""

import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as rpc

QUIET_SECONDS = 7.0
"""Services send their spans every 5 seconds (OTEL_BSP_SCHEDULE_DELAY)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Received:
    """One span."""

    service: str
    """Name of the process's service: OTEL_SERVICE_NAME."""
    trace_id: bytes
    span_id: bytes
    parent_id: bytes
    """Empty for the first span of a trace."""
    name: str
    start: int
    """In nanoseconds since 1970."""
    end: int
    failed: bool
    attributes: dict[str, Any]


class Collector(rpc.TraceServiceServicer):
    """Keeps what it receives."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._traces: dict[bytes, list[Received]] = {}
        self._changed: dict[bytes, float] = {}

    def Export(self, request: pb.ExportTraceServiceRequest, context: Any) -> pb.ExportTraceServiceResponse:
        """Take spans of a process."""
        with self._lock:
            for span in read(request):
                self._traces.setdefault(span.trace_id, []).append(span)
                self._changed[span.trace_id] = time.monotonic()
        return pb.ExportTraceServiceResponse()

    def take(self, quiet_seconds: float) -> list[list[Received]]:
        """Return the traces that have not changed for `quiet_seconds`, and forget them."""
        with self._lock:
            until = time.monotonic() - quiet_seconds
            quiet = [one for one, changed in self._changed.items() if changed <= until]
            for one in quiet:
                del self._changed[one]
            return [self._traces.pop(one) for one in quiet]


def read(request: pb.ExportTraceServiceRequest) -> Iterator[Received]:
    """Yield the spans of a message."""
    for resource in request.resource_spans:
        process = attributes_of(resource.resource)
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield Received(
                    service=str(process.get("service.name", "")),
                    trace_id=span.trace_id,
                    span_id=span.span_id,
                    parent_id=span.parent_span_id,
                    name=span.name,
                    start=span.start_time_unix_nano,
                    end=span.end_time_unix_nano,
                    failed=span.status.code == 2,
                    attributes=attributes_of(span),
                )


def attributes_of(message: Any) -> dict[str, Any]:
    """Return the attributes of a span or a resource."""
    return {
        one.key: getattr(one.value, one.value.WhichOneof("value"))
        for one in message.attributes
        if one.value.WhichOneof("value") is not None
    }


def lines(trace: Sequence[Received]) -> Iterator[str]:
    """Yield the lines of a trace: a span a line, below its parent, with its begin and length."""
    known = {span.span_id for span in trace}
    zero = min(span.start for span in trace)

    def below(parent: Received | None, depth: int) -> Iterator[str]:
        for span in sorted(trace, key=lambda one: one.start):
            if span.parent_id == parent.span_id if parent else span.parent_id not in known:
                begin, length = (span.start - zero) / 1e9, (span.end - span.start) / 1e9
                name = "  " * depth + span.name
                code = span.attributes.get("rpc.response.status_code", "ERROR" if span.failed else "")
                yield f"{begin:8.3f} {length:8.3f} s  {name:<56} {span.service:<19} {code}".rstrip()
                yield from below(span, depth + 1)

    yield from below(None, 0)


def start(collector: Collector, address: str) -> grpc.Server:
    """Start to receive. Raises RuntimeError if the address is in use."""
    server = grpc.server(futures.ThreadPoolExecutor(4))
    register: Any = rpc.add_TraceServiceServicer_to_server  # not typed
    register(collector, server)
    server.add_insecure_port(address)
    server.start()
    return server


def main(address: str = "localhost:4317") -> None:
    """Print traces until interrupted."""
    collector = Collector()
    server = start(collector, address)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    quiet = QUIET_SECONDS
    while quiet:
        quiet = 0.0 if ended.wait(0.5) else QUIET_SECONDS
        for trace in collector.take(quiet):
            print(f"trace {trace[0].trace_id.hex()}", *lines(trace), sep="\n", flush=True)
    server.stop(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
