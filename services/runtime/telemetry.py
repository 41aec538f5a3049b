"""Export of traces, set up by OpenTelemetry's own environment variables.

Traces are on if OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_EXPORTER_OTLP_TRACES_ENDPOINT or OTEL_TRACES_EXPORTER is
set, and OTEL_SDK_DISABLED is not true. They need ``milonga[tracing]``. The tracer provider is not the global
one, so that MLflow's traces stay apart.
"""

import atexit
import importlib.metadata
import logging
import os
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from services.errors import FieldViolation, InvalidInputError
from services.runtime import tracing

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

_log = logging.getLogger(__name__)

FLUSH_SECONDS: Final = 3.0
"""Maximum time at the end of the process to send its last spans."""

_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_EXPORTERS: Final = "OTEL_TRACES_EXPORTER"
_PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_BY_PROTOCOL: Final[Mapping[str, str]] = {"grpc": "otlp_proto_grpc", "http/protobuf": "otlp_proto_http"}

_started: "TracerProvider | None" = None


def exporter_names(environment: Mapping[str, str]) -> list[str]:
    """Return the exporters that the environment names, as entry points; empty if traces are off.

    Raises:
        InvalidInputError: the protocol of OTLP is unknown.
    """
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return []
    default = "otlp" if any(environment.get(name) for name in _ENDPOINTS) else "none"
    names = [name.strip() for name in (environment.get(_EXPORTERS) or default).split(",")]
    protocol = next((environment[name] for name in _PROTOCOLS if environment.get(name)), "grpc")
    if "otlp" in names and protocol not in _BY_PROTOCOL:
        raise _fault(_PROTOCOLS[1], f"is {protocol!r}, must be one of {', '.join(_BY_PROTOCOL)}")
    return [_BY_PROTOCOL[protocol] if name == "otlp" else name for name in names if name not in ("", "none")]


def start(name: str) -> None:
    """Export this process's traces if the environment says so; the first call counts.

    `name` is that of the service, unless the environment has one. Without the libraries, a warning is logged.

    Raises:
        InvalidInputError: an OTEL_ variable names an unknown exporter or protocol.
    """
    global _started
    names = exporter_names(os.environ)
    if not names or _started is not None:
        return
    try:
        exporters = [_exporter(one) for one in names]
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        _log.warning("traces are off: %s is missing; pip install 'milonga[tracing]'", error.name)
        return
    _started = TracerProvider(resource=_resource(name), shutdown_on_exit=False)
    for exporter in exporters:
        _started.add_span_processor(BatchSpanProcessor(exporter))
    tracing.use(_started.get_tracer(tracing.SCOPE, importlib.metadata.version("milonga")))
    atexit.register(stop)


def stop() -> None:
    """Send the last spans, within `FLUSH_SECONDS`, and record no more."""
    global _started
    if _started is None:
        return
    # On a thread: with a collector that does not answer, shutting down takes half a minute.
    thread = threading.Thread(target=_started.shutdown, name="last spans", daemon=True)
    thread.start()
    thread.join(FLUSH_SECONDS)
    if thread.is_alive():
        _log.warning("the last spans are lost: the collector does not answer")
    tracing.use(None)
    _started = None
    atexit.unregister(stop)


def _exporter(name: str) -> "SpanExporter":
    found = importlib.metadata.entry_points(group="opentelemetry_traces_exporter", name=name)
    if found:
        exporter: SpanExporter = next(iter(found)).load()()
        return exporter
    if name in _BY_PROTOCOL.values():
        package = f"opentelemetry-exporter-{name.replace('_', '-')}"
        raise ModuleNotFoundError(f"no {package}", name=package)
    known = sorted(
        {one.name for one in importlib.metadata.entry_points(group="opentelemetry_traces_exporter")}
    )
    raise _fault(_EXPORTERS, f"names {name!r}, must be otlp, none, or one of {', '.join(known)}")


def _resource(name: str) -> "Resource":
    from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource

    ours = Resource({SERVICE_NAME: name, SERVICE_VERSION: importlib.metadata.version("milonga")})
    theirs = Resource.create()
    if str(theirs.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
        return theirs.merge(ours)
    return ours.merge(theirs)


def _fault(name: str, description: str) -> InvalidInputError:
    return InvalidInputError(FieldViolation(name, description))
