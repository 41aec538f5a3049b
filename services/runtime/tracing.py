"""Spans of the parts of a call, for OpenTelemetry. While traces are off, the functions do nothing.

::

    with tracing.span("decode", clips=4):               # a child of the current span
        …
    parent = tracing.current()
    tracing.record("queue", arrived, started, parent)   # afterwards; None as `parent` does nothing

The tracer is that of `services.runtime.telemetry.start`, otherwise that of the global tracer provider, if the
program has set one. Attributes are numbers and names: never prompts, sounds or tokens, nor messages of
errors, which may quote them.
"""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Tracer, TracerProvider

SCOPE: Final = "milonga"
"""Name of the instrumentation scope, and prefix of its attributes."""

Value = str | int | float

_NOTHING: Final = nullcontext()
_tracer: "Tracer | None" = None


def use(tracer: "Tracer | None") -> None:
    """Make `tracer` that of this process; None: the global tracer provider's, if there is one."""
    global _tracer
    _tracer = tracer


def tracer() -> "Tracer | None":
    """Return the tracer; None if traces are off."""
    if _tracer is not None or "opentelemetry.trace" not in sys.modules:
        return _tracer
    from opentelemetry import trace

    provider = trace.get_tracer_provider()
    # MLflow's own provider is not the global one, unless the user asked for that.
    return None if isinstance(provider, trace.ProxyTracerProvider) else _tracer_of(provider)


@lru_cache(maxsize=1)
def _tracer_of(provider: "TracerProvider") -> "Tracer":
    return provider.get_tracer(SCOPE)


def span(name: str, **attributes: Value) -> AbstractContextManager[None]:
    """Return a context that is recorded as a child of the current span; an exception ends it as an error."""
    found = tracer()
    return _NOTHING if found is None else _span(found, name, attributes)


@contextmanager
def _span(tracer: "Tracer", name: str, attributes: Mapping[str, Value]) -> Iterator[None]:
    from opentelemetry.trace import StatusCode

    with tracer.start_as_current_span(
        name, attributes=named(attributes), record_exception=False, set_status_on_exception=False
    ) as span:
        try:
            yield
        except BaseException as error:
            span.set_attribute("error.type", type(error).__name__)
            span.set_status(StatusCode.ERROR)
            raise


def annotate(**attributes: Value) -> None:
    """Set attributes of the current span."""
    if tracer() is not None:
        from opentelemetry import trace

        trace.get_current_span().set_attributes(named(attributes))


def current() -> "Context | None":
    """Return the context that later spans may have as their parent; None if traces are off."""
    if tracer() is None:
        return None
    from opentelemetry import context

    return context.get_current()


def record(name: str, start: float, end: float, parent: "Context | None", **attributes: Value) -> None:
    """Record a span that has ended, from `start` to `end` on the clock of `time.monotonic`."""
    found = tracer()
    if found is None or parent is None:
        return
    zero = time.time() - time.monotonic()
    begun = found.start_span(
        name, parent, attributes=named(attributes), start_time=round((zero + start) * 1e9)
    )
    begun.end(round((zero + end) * 1e9))


def named(attributes: Mapping[str, Value]) -> dict[str, Value]:
    """Return attributes by their full names."""
    return {f"{SCOPE}.{name}": value for name, value in attributes.items()}
