"""Addresses that are none, and connections whose two ends don't fit: real sockets and certificates."""

import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from services.client import TLS, AsyncAudioClient, AudioClient, address_fault
from services.errors import ConnectionOptionsError, InvalidInputError, ServiceUnavailableError
from services.processes import free_port
from tests.services.client.serving import Told, ask, serving
from tests.services.runtime.certificates import Identity, make_authority, make_identity


@pytest.mark.parametrize(
    "address",
    [
        "localhost:50051",
        "my-host.example:443",
        "10.0.0.1:1",
        "[::1]:65535",
        "dns:///generation:50051",
        "dns:generation:50051",
        "dns://8.8.8.8/generation:50051",
        "ipv4:10.0.0.1:5,10.0.0.2:5",
        "ipv6:[::1]:5",
        "unix:/run/milonga.sock",
        "unix:///run/milonga.sock",
        "unix-abstract:milonga",
    ],
)
def test_names_of_grpc_with_a_port_are_addresses(address: str) -> None:
    assert address_fault(address) is None


@pytest.mark.parametrize(
    ("address", "fault"),
    [
        ("", "is empty; give HOST:PORT"),
        ("http://host:50051", "is 'http://host:50051', a URL; give host:50051"),
        ("HTTP://host:50051/v1?x=1", "is 'HTTP://host:50051/v1?x=1', a URL; give host:50051"),
        ("https://host", "is 'https://host', a URL; give host:PORT, with tls (--tls)"),
        ("grpcs://[::1]:5", "is 'grpcs://[::1]:5', a URL; give [::1]:5, with tls (--tls)"),
        ("grpc://me:secret@host:5", "is 'grpc://…@host:5', a URL; give host:5"),
        ("host", "is 'host', which has no port; give HOST:PORT, for example host:50051"),
        ("host:", "is 'host:', which has no port; give HOST:PORT, for example host:50051"),
        ("dns:///host", "is 'dns:///host', which has no port; give HOST:PORT, for example dns:///host:50051"),
        ("ipv4:1.2.3.4:5,1.2.3.5", "is 'ipv4:1.2.3.4:5,1.2.3.5', which has no port"),
        ("[::1]", "is '[::1]', which has no port; give HOST:PORT, for example [::1]:50051"),
        ("::1", "is '::1', an IPv6 address; give it in brackets and with a port: [::1]:PORT"),
        ("::1:50051", "is '::1:50051', an IPv6 address; give it in brackets: [::1]:50051"),
        (":50051", "is ':50051', which has no host; give HOST:PORT, for example localhost:50051"),
        ("host:5005l", "is 'host:5005l', with the port '5005l'; give a number from 1 to 65535"),
        ("host:0", "is 'host:0', with the port '0'; give a number from 1 to 65535"),
        ("host:65536", "is 'host:65536', with the port '65536'; give a number from 1 to 65535"),
        ("host:50051/v1", "is 'host:50051/v1', which has a path; give HOST:PORT only: host:50051"),
        (" host:50051", "is ' host:50051', which is not HOST:PORT"),
        (
            "host:50051\n",
            "is 'host:50051\\n', which is not HOST:PORT, for the white space around it; give host:50",
        ),
        ("50051", "is '50051', which has no host; give HOST:PORT, for example localhost:50051"),
        ("host;50051", "is 'host;50051', which is not HOST:PORT"),
        ("http:/host:5", "is 'http:/host:5', a URL; give host:5"),
        ("grpc:host:5", "is 'grpc:host:5', a URL; give host:5"),
        ("//host:5", "is '//host:5', a URL; give host:5"),
        ("/run/s.sock", "is '/run/s.sock', a path; give unix:/run/s.sock for a socket, else HOST:PORT"),
        ("unix:", "is 'unix:', which names nothing; give HOST:PORT, or unix:PATH"),
        ("256.1.1.1:5", "is '256.1.1.1:5', whose host is no IPv4 address"),
        ("a..b:5", "is 'a..b:5', which is not HOST:PORT"),
        ("a:1,b:1", "is 'a:1,b:1', which is not HOST:PORT"),
        ("[host]:1", "is '[host]:1', which has no IPv6 address in brackets"),
    ],
)
def test_what_is_no_address_is_named_with_the_remedy(address: str, fault: str) -> None:
    assert (address_fault(address) or "").startswith(fault)


@pytest.mark.parametrize("kind", [AudioClient, AsyncAudioClient])
def test_a_client_names_each_argument_that_is_no_address(kind: Any) -> None:
    with pytest.raises(InvalidInputError) as caught:
        kind("http://host:1", scoring="host", reward="host:1")
    assert [violation.field for violation in caught.value.violations] == ["target", "scoring"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificates:
    authority: Identity
    server: Identity
    other: Identity
    """Signed by the authority, for another name."""


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    folder = tmp_path_factory.mktemp("certificates")
    authority = make_authority(folder, "authority")
    return Certificates(
        authority=authority,
        server=make_identity(folder, "server", authority),
        other=make_identity(folder, "other", authority, "subjectAltName=DNS:elsewhere"),
    )


@pytest.fixture
def ours(certificates: Certificates) -> TLS:
    return TLS(ca_file=certificates.authority.cert_file)


def credentials(identity: Identity, clients: Path | None = None) -> grpc.ServerCredentials:
    pair = (identity.key_file.read_bytes(), identity.cert_file.read_bytes())
    roots = None if clients is None else clients.read_bytes()
    return grpc.ssl_server_credentials([pair], roots, require_client_auth=clients is not None)


def fault(face: str, target: str, **options: Any) -> str:
    """Return the message of a call that can't be made."""
    with pytest.raises(ConnectionOptionsError) as caught:
        ask(face, lambda client: client.get_model(), target, **options)
    text = str(caught.value)
    assert target in text
    return text.replace(target, "ADDRESS")


def test_tls_to_a_plaintext_port(face: str, told: Told, target: str, waits: list[float], ours: TLS) -> None:
    assert fault(face, target, tls=ours) == ("ADDRESS does not speak TLS; leave tls (--tls, --tls-ca, …) out")
    assert (waits, told.requests) == ([], [])


def test_plaintext_to_a_tls_port(
    face: str, told: Told, certificates: Certificates, waits: list[float], ours: TLS
) -> None:
    with serving(told, listen="127.0.0.1:0", credentials=credentials(certificates.server)) as target:
        assert fault(face, target).startswith("ADDRESS speaks TLS only; give tls (--tls")
        assert ask(face, lambda client: client.get_model(), target, tls=ours).model.name == "told"
    assert (waits, len(told.requests)) == ([], 1)


def test_certificates_that_do_not_fit(
    face: str, told: Told, certificates: Certificates, ours: TLS, tmp_path: Path
) -> None:
    stranger = TLS(ca_file=make_authority(tmp_path, "stranger").cert_file)
    with serving(told, credentials=credentials(certificates.server)) as target:
        assert fault(face, target, tls=stranger).startswith("the certificate of ADDRESS can't be verified (")
    with serving(told, credentials=credentials(certificates.other)) as target:
        assert fault(face, target, tls=ours).startswith("the certificate of ADDRESS is for another name; ")
    assert told.requests == []


def test_a_port_that_asks_for_a_client_certificate(
    face: str, told: Told, certificates: Certificates, ours: TLS, tmp_path: Path
) -> None:
    mutual = credentials(certificates.server, certificates.authority.cert_file)
    foreign = make_identity(tmp_path, "foreign", make_authority(tmp_path, "stranger"))
    with serving(told, credentials=mutual) as target:
        assert fault(face, target).startswith("ADDRESS speaks TLS only; give tls (--tls")
        assert fault(face, target, tls=ours).startswith("ADDRESS asks for a client's certificate; give tls.")
        for identity, accepted in ((certificates.other, True), (foreign, False)):
            tls = TLS(ca_file=ours.ca_file, cert_file=identity.cert_file, key_file=identity.key_file)
            if accepted:
                assert ask(face, lambda client: client.get_model(), target, tls=tls).model.name == "told"
            else:
                text = fault(face, target, tls=tls)
                assert text.startswith("ADDRESS does not accept the client's certificate")


@pytest.fixture
def web_server() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_port_of_a_web_server(face: str, web_server: str, waits: list[float], ours: TLS) -> None:
    assert fault(face, web_server).startswith("ADDRESS is no gRPC port: ")
    assert fault(face, web_server, tls=ours).startswith("ADDRESS does not speak TLS; ")
    assert waits == []


def test_a_port_where_nobody_listens_is_still_an_absent_service(face: str, waits: list[float]) -> None:
    with pytest.raises(ServiceUnavailableError, match="is it running") as caught:
        ask(face, lambda client: client.get_model(), f"127.0.0.1:{free_port()}")
    assert type(caught.value) is ServiceUnavailableError
    assert len(waits) == 3


def test_a_command_writes_one_line_about_a_failed_handshake(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GRPC_")}
    words = ["generate", "rain", "--tls", "-q", "-o", str(tmp_path / "a.wav")]
    with serving(Told()) as target:
        done = subprocess.run(
            [sys.executable, "-m", "services.cli", *words, "--server", target],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 3
    assert done.stderr == f"error: {target} does not speak TLS; leave tls (--tls, --tls-ca, …) out\n"
