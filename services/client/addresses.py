"""Addresses of services: check them, and find out why a connection to one fails.

gRPC takes a URL for a host name, and reports TLS on one side only as a closed socket.
"""

import contextlib
import ipaddress
import re
import socket
import ssl
from typing import Final

PORTS: Final = (1, 65_535)
_FREE: Final = ("unix:", "unix-abstract:", "vsock:", "xds:", "google-c2p:")
"""Schemes of gRPC names without a port."""
_NAME: Final = re.compile(r"(dns:(?://[^/]*/)?|ipv4:|ipv6:)(.*)")
"""gRPC names with ports, with their scheme."""
_URL: Final = re.compile(
    r"(?:(?P<scheme>[A-Za-z][\w+.-]*)://|(?P<typo>https?|grpcs?|tcp):/?(?!\d+$)|//)(?P<rest>.*)", re.DOTALL
)
"""A URL, also with too few slashes or without its scheme."""
_HOST: Final = r"[\w-]+(?:\.[\w-]+)*\.?"
_NO_ENDPOINT: Final = "which is not HOST:PORT; the host may have letters, digits, dots and dashes"
_SECURE: Final = ("https", "grpcs")
_PROBE_SECONDS: Final = 2.0
_PEER: Final = re.compile(r"ipv[46]:(?:%5B|\[)?([0-9A-Fa-f.:]+?)(?:%5D|\])?:(\d+): ")
"""The peer's host and port in gRPC's description of a failed connection."""

_NO_TLS, _UNTRUSTED, _OTHER_NAME = (
    "WRONG_VERSION_NUMBER",
    "CERTIFICATE_VERIFY_FAILED",
    "Hostname Verification",
)
_NO_HTTP2: Final = ("Failed parsing HTTP/2", "http1.x server", "ALPN")
_CLOSED: Final = ("Socket closed", "Connection reset")


def address_fault(address: str) -> str | None:
    """Return what is wrong with a gRPC name and the remedy; None if it is valid."""
    if not address.strip():
        return "is empty; give HOST:PORT"
    if address != address.strip():
        bare = address.strip()[:120]
        return f"is {_quoted(address)}, which is not HOST:PORT, for the white space around it; give {bare}"
    if address in _FREE:
        return f"is {address!r}, which names nothing; give HOST:PORT, or unix:PATH"
    if address.startswith(_FREE):
        return None
    if address.startswith(("/", "./", "../", "~/")) and not address.startswith("//"):
        return f"is {_quoted(address)}, a path; give unix:{address[:120]} for a socket, else HOST:PORT"
    if named := _NAME.fullmatch(address):
        scheme, rest = named.groups()
        parts = [rest] if scheme.startswith("dns:") else rest.split(",")
        faults = (_endpoint_fault(part, address, scheme) for part in parts)
        return next(filter(None, faults), None)
    if url := _URL.fullmatch(address):
        return f"is {_quoted(address)}, a URL; give {_without_scheme(url)}"
    return _endpoint_fault(address, address, "")


def _without_scheme(url: re.Match[str]) -> str:
    scheme, rest = url["scheme"] or url["typo"] or "", url["rest"]
    endpoint = re.split(r"[/?#]", rest)[0].rpartition("@")[2] or "HOST"
    with_port = endpoint if re.search(r":\d+$", endpoint) else f"{endpoint}:PORT"
    return f"{with_port[:80]}, with tls (--tls)" if scheme.lower() in _SECURE else with_port[:80]


def _endpoint_fault(endpoint: str, address: str, scheme: str) -> str | None:
    """Return what is wrong with HOST:PORT, a part of `address` after its `scheme`."""
    about = f"is {_quoted(address)}"
    if endpoint.isascii() and endpoint.isdecimal():
        return f"{about}, which has no host; give HOST:PORT, for example {scheme}localhost:{endpoint[:8]}"
    host, colon, port = endpoint.rpartition(":")
    if _is_ipv6(endpoint):
        return f"{about}, an IPv6 address; give it in brackets and with a port: {scheme}[{endpoint}]:PORT"
    if _is_ipv6(host) and "[" not in host:
        return f"{about}, an IPv6 address; give it in brackets: {scheme}[{host}]:{port[:8]}"
    if not re.search(r"[:/]", endpoint) and not re.fullmatch(_HOST, endpoint):
        return f"{about}, {_NO_ENDPOINT}"
    if not colon or not port or endpoint.endswith("]"):
        example = f"{scheme}{endpoint.rstrip(':')[:80]}:50051"
        return f"{about}, which has no port; give HOST:PORT, for example {example}"
    if not host:
        return f"{about}, which has no host; give HOST:PORT, for example localhost{endpoint[:8]}"
    if "/" in port and port.partition("/")[0].isdecimal():
        return f"{about}, which has a path; give HOST:PORT only: {scheme}{endpoint.partition('/')[0][:80]}"
    if not (port.isascii() and port.isdecimal() and PORTS[0] <= int(port[:6]) <= PORTS[1]):
        return f"{about}, with the port {port[:20]!r}; give a number from {PORTS[0]} to {PORTS[1]}"
    if host.startswith("[") and host.endswith("]"):
        return None if _is_ipv6(host[1:-1]) else f"{about}, which has no IPv6 address in brackets"
    if not re.fullmatch(_HOST, host):
        return f"{about}, {_NO_ENDPOINT}"
    if re.fullmatch(r"[\d.]+", host) and not _is_ipv4(host):
        return f"{about}, whose host is no IPv4 address; give four numbers up to 255, or a name"
    return None


def _is_ipv4(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).version == 4
    except ValueError:
        return False


def _is_ipv6(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).version == 6
    except ValueError:
        return False


def _quoted(address: str) -> str:
    """Return an address for a message, without the password of a URL."""
    return repr(re.sub(r"//[^/@]*@", "//…@", address)[:120])


def connection_fault(text: str, address: str, *, tls: bool, identity: bool) -> str | None:
    """Return why the options of a connection can't work, and the remedy; None if nothing is known.

    May connect to the peer, for at most some seconds.

    Args:
        text: gRPC's description of the failure.
        address: the service's address.
        tls: whether the client used TLS.
        identity: whether it has a certificate of its own.
    """
    if _NO_TLS in text:
        return f"{address} does not speak TLS; leave tls (--tls, --tls-ca, …) out"
    if _UNTRUSTED in text:
        found = re.search(rf"{_UNTRUSTED}: ([^:;]+)", text)
        reason = f" ({found[1]})" if found else ""
        return (
            f"the certificate of {address} can't be verified{reason}; give the certificate of the authority "
            "that signed it as tls.ca_file (--tls-ca)"
        )
    if _OTHER_NAME in text:
        return (
            f"the certificate of {address} is for another name; give the address by that name, or that name "
            "as tls.server_name (--tls-server-name)"
        )
    if any(sign in text for sign in _NO_HTTP2):
        return (
            f"{address} is no gRPC port: a server of another protocol answers, such as a web server or a "
            "service's metrics; give the port of the service"
        )
    peer = _PEER.search(text)
    if peer is None or not any(sign in text for sign in _CLOSED):
        return None
    speaks = _probe(peer[1], int(peer[2]))
    if speaks and not tls:
        return f"{address} speaks TLS only; give tls (--tls, and --tls-ca for a private authority)"
    if speaks == "mutual tls" and identity:
        return f"{address} does not accept the client's certificate; give one that its authority has signed"
    if speaks == "mutual tls":
        return (
            f"{address} asks for a client's certificate; give tls.cert_file and tls.key_file (--tls-cert, "
            "--tls-key)"
        )
    return None


def _probe(host: str, port: int) -> str:
    """Return what a peer speaks: ``tls``, ``mutual tls``, or an empty string if it is something else."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host, port), timeout=_PROBE_SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=host) as secure,
        ):
            # A gRPC server sends its settings at once. One that misses a certificate closes the connection,
            # in TLS 1.3 only after the handshake.
            with contextlib.suppress(TimeoutError):
                return "tls" if secure.recv(1) else "mutual tls"
            return "tls"
    except OSError as error:
        return "mutual tls" if "CERTIFICATE_REQUIRED" in str(error) else ""
