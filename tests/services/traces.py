"""Spans in memory, for the tests of traces."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanContext

from services.runtime import tracing
from tests.waiting import until


class Traces:
    """The spans that have ended so far."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()

    @property
    def spans(self) -> Sequence[ReadableSpan]:
        return self.exporter.get_finished_spans()

    def all(self, name: str) -> list[ReadableSpan]:
        """Return the spans of a name, in the order of their starts."""
        return sorted(
            (span for span in self.spans if span.name == name), key=lambda span: span.start_time or 0
        )

    def one(self, name: str, kind: str = "") -> ReadableSpan:
        """Return the only span of a name, and of a kind if one is given. Waits for it."""

        def found() -> list[ReadableSpan]:
            return [span for span in self.all(name) if kind in ("", span.kind.name)]

        until(lambda: bool(found()))
        (span,) = found()
        return span

    def children(self, parent: ReadableSpan) -> list[str]:
        """Return the names of the children of a span, in the order of their starts."""
        found = [
            span
            for span in self.spans
            if span.parent is not None and span.parent.span_id == context(parent).span_id
        ]
        assert all(context(span).trace_id == context(parent).trace_id for span in found)
        return [span.name for span in sorted(found, key=lambda span: span.start_time or 0)]

    def check(self) -> None:
        """Check what holds for all spans: they took time, and hold numbers and names only."""
        for span in self.spans:
            assert seconds(span) > 0, span.name
            assert not [event for event in span.events if event.name == "exception"]
            assert span.status.description is None
        allowed = {
            "rpc.system.name", "rpc.method", "rpc.response.status_code", "error.type", "milonga.request_id",
            "milonga.priority", "milonga.steps", "milonga.clips", "milonga.prompts", "milonga.batch",
            "milonga.model_digest",
        }  # fmt: skip
        assert {name for span in self.spans for name in span.attributes or {}} <= allowed


def context(span: ReadableSpan) -> SpanContext:
    assert span.context is not None
    return span.context


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


def attributes(span: ReadableSpan) -> dict[str, object]:
    return dict(span.attributes or {})


@contextmanager
def recording() -> Iterator[Traces]:
    """Record the spans of this process until the end of the context."""
    traces = Traces()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(traces.exporter))
    tracing.use(provider.get_tracer(tracing.SCOPE))
    try:
        yield traces
    finally:
        tracing.use(None)
        provider.shutdown()
