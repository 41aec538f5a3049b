import asyncio
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from milonga.v1 import generation_pb2, generation_pb2_grpc
from services.client import TLS, AudioClient
from services.engine import Engine
from services.errors import InvalidInputError, ServiceUnavailableError
from services.generation.servicer import SERVICE_NAME
from tests.services.generation.serving import serving, tiny_engine
from tests.services.runtime.certificates import Identity, make_authority, make_identity
from tests.waiting import until

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with tiny_engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Identity]:
    folder = tmp_path_factory.mktemp("tls")
    ours, theirs = make_authority(folder, "authority"), make_authority(folder, "stranger")
    return {
        "authority": ours,
        "server": make_identity(folder, "server", ours),
        "client": make_identity(folder, "client", ours),
        "intruder": make_identity(folder, "intruder", theirs),
        "stranger": theirs,
    }


def _health(channel: grpc.Channel, name: str) -> Any:
    stub: Any = health_pb2_grpc.HealthStub(channel)  # its stubs know no rpc
    return stub.Check(health_pb2.HealthCheckRequest(service=name)).status


def _tls_flags(identities: dict[str, Identity], *, mutual: bool) -> dict[str, Any]:
    server = identities["server"]
    flags = {"tls_cert_file": server.cert_file, "tls_key_file": server.key_file}
    return flags | ({"tls_client_ca_file": identities["authority"].cert_file} if mutual else {})


def test_health_knows_the_service_by_name(engine: Engine) -> None:
    with serving(engine) as served, grpc.insecure_channel(served.target) as channel:
        assert _health(channel, "") == SERVING
        assert _health(channel, "milonga.v1.GenerationService") == SERVING
        with pytest.raises(grpc.RpcError) as caught:
            _health(channel, "milonga.v1.Unknown")
        assert isinstance(caught.value, grpc.Call)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


PROBES = (
    "grpc.health.v1.Health/Check", "grpc.health.v1.Health/Watch",
    *(f"inference.GRPCInferenceService/{name}" for name in ("ServerLive", "ServerReady", "ModelReady")),
    "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
)  # fmt: skip


@pytest.mark.parametrize("probe", PROBES)
def test_a_malformed_message_of_a_probe_is_the_callers_fault(engine: Engine, probe: str) -> None:
    with serving(engine, health_port=0) as served:
        ports = [served.server.port, *([served.server.health_port] if "Health" in probe else [])]
        for port in ports:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                call: Any = channel.unary_unary(f"/{probe}")
                with pytest.raises(grpc.RpcError) as caught:
                    call(b"\xff", timeout=60)
            assert isinstance(caught.value, grpc.Call)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_reflection_lists_the_service_and_gives_its_file(engine: Engine) -> None:
    with serving(engine) as served, grpc.insecure_channel(served.target) as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)  # its stubs know no rpc
        requests = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE_NAME),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=f"{SERVICE_NAME}.GenerateAudio"),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=f"{SERVICE_NAME}.Absent"),
        ]
        listed, file, by_method, absent = list(stub.ServerReflectionInfo(iter(requests)))
        names = {service.name for service in listed.list_services_response.service}
        assert {"milonga.v1.GenerationService", "grpc.health.v1.Health"} <= names
        files = [
            FileDescriptorProto.FromString(f) for f in file.file_descriptor_response.file_descriptor_proto
        ]
        assert "milonga/v1/generation.proto" in {f.name for f in files}
        assert by_method.file_descriptor_response == file.file_descriptor_response
        assert absent.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


def test_metrics_are_scraped(engine: Engine) -> None:
    with serving(engine, metrics_port=0) as served, AudioClient(served.target, retries=0) as client:
        client.generate("a dog barks")
        with pytest.raises(InvalidInputError):
            client.generate("")
        url = f"http://127.0.0.1:{served.server.metrics_port}/metrics"
        refused = 'milonga_requests_total{code="INVALID_ARGUMENT",rpc="GenerateAudio"} 1.0'

        def scraped() -> list[str]:
            with urllib.request.urlopen(url, timeout=60) as response:
                text: str = response.read().decode()
            return text.splitlines()

        until(lambda: refused in scraped())  # a call is counted when its status is on its way
        lines = scraped()
    assert 'milonga_requests_total{code="OK",rpc="GenerateAudio"} 1.0' in lines
    assert 'milonga_requests_in_flight{rpc="GenerateAudio"} 0.0' in lines
    assert "milonga_queue_depth 0.0" in lines
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(values["milonga_denoising_steps_total"]) >= 4
    assert float(values["milonga_audio_seconds_total"]) >= 0.64
    assert any(name.startswith('milonga_model_info{digest="sha256:') for name in values)
    assert 'milonga_request_seconds_bucket{code="OK",le="+Inf",rpc="GenerateAudio"}' in values
    assert "process_resident_memory_bytes" in values


def test_tls_is_spoken_and_health_stays_plain(engine: Engine, identities: dict[str, Identity]) -> None:
    tls = TLS(ca_file=identities["authority"].cert_file)
    with serving(engine, health_port=0, **_tls_flags(identities, mutual=False)) as served:
        with AudioClient(served.target, tls=tls, token="secret", retries=0) as client:
            assert client.get_model().model.name == "tiny"
        with AudioClient(served.target, retries=0) as plain, pytest.raises(ServiceUnavailableError):
            plain.get_model(timeout=5)
        wrong = TLS(ca_file=identities["stranger"].cert_file)
        with (
            AudioClient(served.target, tls=wrong, retries=0) as fooled,
            pytest.raises(ServiceUnavailableError),
        ):
            fooled.get_model(timeout=5)
        with grpc.insecure_channel(f"127.0.0.1:{served.server.health_port}") as channel:
            assert _health(channel, SERVICE_NAME) == SERVING


def test_mutual_tls_wants_a_certificate_of_its_authority(
    engine: Engine, identities: dict[str, Identity]
) -> None:
    authority = identities["authority"].cert_file
    with serving(engine, **_tls_flags(identities, mutual=True)) as served:
        for name, welcome in (("client", True), ("intruder", False), (None, False)):
            identity = identities[name] if name else None
            tls = TLS(
                ca_file=authority,
                cert_file=identity.cert_file if identity else None,
                key_file=identity.key_file if identity else None,
            )
            with AudioClient(served.target, tls=tls, retries=0) as client:
                if welcome:
                    assert client.get_model(timeout=5).model.name == "tiny"
                else:
                    with pytest.raises(ServiceUnavailableError):
                        client.get_model(timeout=5)


@pytest.mark.parametrize("field", ["listen", "health_port", "metrics_port"])
def test_a_taken_port_is_refused_by_name(engine: Engine, field: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        flags: dict[str, Any] = {field: f"127.0.0.1:{port}" if field == "listen" else port}
        with pytest.raises(InvalidInputError, match=str(port)) as caught, serving(engine, **flags):
            pass
    assert [violation.field for violation in caught.value.violations] == [field]
    assert "\n" not in str(caught.value)


def test_a_second_server_never_shares_a_port(engine: Engine) -> None:
    with (
        serving(engine) as served,
        pytest.raises(InvalidInputError, match="listen"),
        serving(engine, listen=served.target),
    ):
        pass


NO_CERTIFICATE = b"-----BEGIN CERTIFICATE-----\nzzz\n-----END CERTIFICATE-----\n"


@pytest.mark.parametrize("content", [None, b"not pem", NO_CERTIFICATE])
def test_bad_tls_files_are_named(
    engine: Engine, identities: dict[str, Identity], tmp_path: Path, content: bytes | None
) -> None:
    bad = tmp_path / "bad.key"
    if content is not None:
        bad.write_bytes(content)
    flags = _tls_flags(identities, mutual=False) | {"tls_key_file": bad}
    with pytest.raises(InvalidInputError, match=r"tls_key_file.*bad\.key"), serving(engine, **flags):
        pass
    flags = _tls_flags(identities, mutual=True) | {"tls_client_ca_file": bad}
    with pytest.raises(InvalidInputError, match=r"tls_client_ca_file.*bad\.key"), serving(engine, **flags):
        pass
    with pytest.raises(InvalidInputError, match=r"tls\.ca_file.*bad\.key"):
        AudioClient("localhost:1", tls=TLS(ca_file=bad))


def test_a_key_of_another_certificate_is_refused(engine: Engine, identities: dict[str, Identity]) -> None:
    chain, key = identities["client"].cert_file, identities["intruder"].key_file
    flags: dict[str, Any] = {"tls_cert_file": chain, "tls_key_file": key}
    with pytest.raises(InvalidInputError, match="not the private key"), serving(engine, **flags):
        pass
    with pytest.raises(InvalidInputError, match="not the private key"):
        AudioClient("localhost:1", tls=TLS(cert_file=chain, key_file=key))


def test_a_draining_server_is_not_ready_but_serves_on(engine: Engine) -> None:
    with (
        serving(engine, drain_delay_seconds=3600) as served,
        grpc.insecure_channel(served.target) as channel,
        AudioClient(served.target, retries=0) as client,
    ):
        assert _health(channel, SERVICE_NAME) == SERVING
        drain = asyncio.run_coroutine_threadsafe(served.server.drain(), served.loop)
        until(lambda: _health(channel, SERVICE_NAME) == NOT_SERVING)
        assert _health(channel, "") == NOT_SERVING
        assert client.generate("a dog barks").clips
        drain.cancel()
        served.run(served.server.stop(5))
        with pytest.raises(ServiceUnavailableError):
            client.generate("a dog barks")


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_compressed_requests_are_refused_before_they_are_inflated(
    engine: Engine, compression: grpc.Compression
) -> None:
    with serving(engine) as served, grpc.insecure_channel(served.target) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        request = generation_pb2.GenerateAudioRequest(prompt="a dog barks" * 1_000_000)
        with pytest.raises(grpc.RpcError, match="is disabled") as caught:
            stub.GenerateAudio(request, compression=compression)
        assert isinstance(caught.value, grpc.Call)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert stub.GetModel(generation_pb2.GetModelRequest()).model.name == "tiny"


def test_requests_over_the_size_limit_are_refused(engine: Engine) -> None:
    with serving(engine, max_request_bytes=1000) as served, AudioClient(served.target, retries=0) as client:
        with pytest.raises(Exception, match="larger than max"):
            client.generate("x" * 2000)
        assert client.generate("a dog barks").clips
