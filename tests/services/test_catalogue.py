"""What every service of the catalogue has in common: its modules, its program, its weights."""

import importlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from services.catalogue import CATALOGUE, ServiceEntry
from services.cli.serve import service_of
from services.inference import SERVICE_NAME
from tests.programs import environment

each = pytest.mark.parametrize("entry", CATALOGUE.values(), ids=CATALOGUE)


def test_nothing_is_given_twice() -> None:
    entries = CATALOGUE.values()
    weights = [one for entry in entries for one in entry.weights]
    for values in (
        [entry.port for entry in entries],
        [entry.rpc for entry in entries],
        [entry.model for entry in entries],
        [one.option for one in weights],
        [one.export_option or one.option for one in weights],
    ):
        assert len({*values}) == len(values)
    ports = [entry.port for entry in entries]
    assert ports == list(range(ports[0], ports[0] + len(ports)))


@each
def test_the_folder_has_what_its_row_says(entry: ServiceEntry) -> None:
    servicer, triton = (
        importlib.import_module(f"services.{entry.name}.{module}") for module in ("servicer", "triton")
    )
    assert entry.rpc == servicer.SERVICE_NAME
    assert triton.SERVABLE.entry is entry
    assert triton.open_model == triton.SERVABLE.open
    settings = service_of(entry.name).settings
    assert triton.SERVABLE.settings is settings
    assert {one.setting for one in entry.weights} <= settings.model_fields.keys()
    values: dict[str, Any] = {one.setting: one.embedded for one in entry.weights}
    uris = triton.SERVABLE.uris(settings(**values))
    parts = [
        part
        for one in entry.weights
        for part in ([entry.part(one)] if isinstance(one.embedded, str) else one.embedded)
    ]
    assert list(uris) == parts
    assert {uri.scheme for uri in uris.values()} == {"embedded"}
    assert service_of(entry.name).check(settings(**values)) is False


# The program


@contextmanager
def program(entry: ServiceEntry, **settings: str) -> Iterator["subprocess.Popen[str]"]:
    """Run `python -m services.NAME`; nothing of it is left after the test."""
    command = [sys.executable, "-m", f"services.{entry.name}"]
    with subprocess.Popen(
        command, env=environment(MILONGA_LISTEN="127.0.0.1:0", **settings), stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@each
def test_the_program_serves_its_embedded_weights_until_sigterm(entry: ServiceEntry) -> None:
    settings = {
        f"MILONGA_{one.setting.upper()}": one.embedded
        if isinstance(one.embedded, str)
        else json.dumps(dict(one.embedded))
        for one in entry.weights
    }
    with program(entry, MILONGA_METRICS_PORT="0", **settings) as process:
        assert process.stderr is not None
        log = (json.loads(line) for line in process.stderr)
        ready = next(line for line in log if line["event"] == "ready")
        assert "sha256:" in json.dumps(ready)
        with grpc.insecure_channel(f"127.0.0.1:{ready['port']}") as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)  # its stubs know no rpc
            for name in ("", entry.rpc, SERVICE_NAME):
                answer = health.Check(health_pb2.HealthCheckRequest(service=name))
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            assert {entry.rpc, SERVICE_NAME, "grpc.health.v1.Health"} <= {*listed(channel)}
        process.send_signal(signal.SIGTERM)
        assert [line["event"] for line in log] == ["draining", "stopped"]
        assert process.wait(20) == 0


def listed(channel: grpc.Channel) -> list[str]:
    """Names of the services that reflection lists."""
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)  # its stubs know no rpc
    requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    (answer,) = stub.ServerReflectionInfo(requests)
    return [service.name for service in answer.list_services_response.service]


@each
def test_without_weights_the_program_does_not_start(entry: ServiceEntry) -> None:
    with program(entry) as process:
        _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    (line,) = (line for line in said.splitlines() if not line.startswith('{"'))
    assert line.startswith("error: ")
    assert f"MILONGA_{entry.weights[0].setting.upper()}" in line
