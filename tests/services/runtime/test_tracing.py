"""Traces by OpenTelemetry's variables: what turns them on, what is exported, and what is done otherwise."""

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb

from examples.print_traces import Collector, Received, lines, read, start
from services.errors import InvalidInputError
from services.processes import ServicePlan, free_port, running
from services.runtime import call_spans, telemetry, tracing
from services.runtime.telemetry import exporter_names
from tests.programs import environment

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
UNARY = "milonga.v1.GenerationService/GenerateAudio"
PROMPT = "a secret prompt"


@pytest.mark.parametrize(
    ("variables", "names"),
    [
        ({}, []),
        ({"OTEL_SERVICE_NAME": "studio", "OTEL_TRACES_SAMPLER": "always_on"}, []),
        ({ENDPOINT: "http://localhost:4317"}, ["otlp_proto_grpc"]),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://localhost:4317"}, ["otlp_proto_grpc"]),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, ["otlp_proto_grpc"]),
        ({"OTEL_TRACES_EXPORTER": "console, otlp"}, ["console", "otlp_proto_grpc"]),
        ({ENDPOINT: "http://x", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, ["otlp_proto_http"]),
        ({ENDPOINT: "http://x", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc"}, ["otlp_proto_grpc"]),
        ({ENDPOINT: "http://x", "OTEL_TRACES_EXPORTER": "none"}, []),
        ({ENDPOINT: "http://x", "OTEL_SDK_DISABLED": "True"}, []),
        ({ENDPOINT: ""}, []),
    ],
)
def test_the_standard_variables_choose_the_exporters(variables: dict[str, str], names: list[str]) -> None:
    assert exporter_names(variables) == names


@pytest.mark.parametrize(
    "variables",
    [{"OTEL_EXPORTER_OTLP_PROTOCOL": "carrier-pigeon", ENDPOINT: "x"}, {"OTEL_TRACES_EXPORTER": "nowhere"}],
)
def test_an_unknown_exporter_is_refused_by_the_variables_name(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InvalidInputError, match=next(iter(variables))):
        telemetry.start("milonga-test")
    assert tracing.tracer() is None


def test_without_variables_nothing_is_imported_or_made() -> None:
    program = (
        "import sys; import services.client; from services.runtime import call_spans, telemetry, tracing;"
        "telemetry.start('milonga-test'); tracing.annotate(steps=1); tracing.record('queue', 0, 1, None);"
        "assert tracing.current() is None and tracing.span('a') is tracing.span('b');"
        "assert call_spans.client_span('/a/b') is call_spans.server_span('/a/b', ());"
        "sys.exit('opentelemetry' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], env=environment()).returncode == 0


def test_a_process_with_the_api_only_records_nothing() -> None:
    from opentelemetry import trace  # as MLflow's client imports it

    assert isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)
    assert tracing.tracer() is None
    assert call_spans.client_span("/a/b") is call_spans.client_span("/c/d")


def test_without_the_extra_a_warning_names_it() -> None:
    program = (
        "import sys; sys.modules['opentelemetry.sdk.trace'] = None;"
        "sys.modules['opentelemetry.exporter.otlp.proto.grpc.trace_exporter'] = None;"
        "from services.runtime import telemetry, tracing; telemetry.start('milonga-test');"
        "sys.exit(tracing.tracer() is not None)"
    )
    settings = environment(**{ENDPOINT: "http://localhost:4317"})
    found = subprocess.run([sys.executable, "-c", program], env=settings, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "traces are off" in found.stderr
    assert "milonga[tracing]" in found.stderr


def test_our_provider_is_not_the_global_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from opentelemetry import trace

    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
    telemetry.start("milonga-test")
    try:
        assert tracing.tracer() is not None
        assert isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)
    finally:
        telemetry.stop()
    assert tracing.tracer() is None


@pytest.fixture
def collector() -> Iterator[tuple[Collector, str]]:
    collector, address = Collector(), f"127.0.0.1:{free_port()}"
    server = start(collector, address)
    try:
        yield collector, address
    finally:
        server.stop(0)


def test_a_command_and_a_service_export_one_trace(
    collector: tuple[Collector, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    received, address = collector
    variables = {ENDPOINT: f"http://{address}", "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment=test"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    served = f"127.0.0.1:{free_port()}"
    plan = ServicePlan(name="generation", arguments=("--model", "mini"), address=served)
    with running([plan], logs=tmp_path) as (generation,):
        generation.wait_until_serving()
        clip = tmp_path / "clip.wav"
        words = ["generate", PROMPT, "--server", served, "--steps", "2", "--duration", "1", "-o", str(clip)]
        subprocess.run([sys.executable, "-m", "services.cli", *words], env=environment(), check=True)
    # Both processes have sent what they had when they ended.
    traces = received.take(0)
    (trace,) = (trace for trace in traces if any("GenerateAudio" in span.name for span in trace))
    assert {(span.service, span.parent_id == b"") for span in trace} >= {("milonga", True)}
    by_name = {span.name: span for span in trace if span.service == "milonga-generation"}
    assert {"queue", "encode_text", "denoise", "decode", "encode_audio"} < by_name.keys()
    assert by_name["denoise"].attributes["milonga.steps"] == 2
    assert PROMPT not in str(traces)
    printed = list(lines(trace))
    assert len(printed) == len(trace)
    log = next(tmp_path.glob("*.log")).read_text()
    calls = [json.loads(line) for line in log.splitlines() if '"trace_id"' in line]
    assert trace[0].trace_id.hex() in {call["trace_id"] for call in calls}


def test_spans_are_sent_over_http_too() -> None:
    received: list[Received] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            assert self.path == "/v1/traces"
            received.extend(read(pb.ExportTraceServiceRequest.FromString(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    program = (
        "from services.runtime import telemetry, tracing; telemetry.start('milonga-test')\n"
        "with tracing.span('a', steps=3): pass"
    )
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        settings = environment(
            **{ENDPOINT: endpoint, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf", "OTEL_SERVICE_NAME": "s"}
        )
        subprocess.run([sys.executable, "-c", program], env=settings, check=True, timeout=60)
        server.shutdown()
    (span,) = received
    assert (span.name, span.service, span.attributes) == ("a", "s", {"milonga.steps": 3})


def test_a_silent_collector_holds_up_neither_calls_nor_the_end() -> None:
    program = (
        "from services.runtime import telemetry, tracing; telemetry.start('milonga-test')\n"
        "with tracing.span('a'): pass\n"
        "telemetry.stop(); assert tracing.tracer() is None"
    )
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        settings = environment(**{ENDPOINT: endpoint})
        found = subprocess.run(
            [sys.executable, "-c", program], env=settings, capture_output=True, text=True, timeout=60
        )
    assert found.returncode == 0, found.stderr
    assert "the last spans are lost" in found.stderr
