"""Probes of a generation service: which weights it serves, and whether TLS is why it does not answer."""

import re
import socket
import ssl
import time
from collections.abc import Callable
from typing import Final

from services.client import TLS, ModelVersion, ServiceOptions
from services.errors import InvalidInputError, MilongaError, invalid
from training.cluster.namespace import ForbiddenError, RequestRefusedError
from training.promotion.errors import RolloutError

CALLS = 8
"""Probes in a row, each on its own connection, that must all be answered by the new weights."""
VERIFY_SECONDS = 60.0
"""Time for all answers to be of the new weights: routers learn late which pods are gone."""
CALL_SECONDS = 5.0
_POLL_SECONDS = 0.5

CALLER_ERRORS: Final = (InvalidInputError, ForbiddenError, RequestRefusedError)
"""Errors of the caller, not of the service: waiting does not help."""

_LOOPBACK: Final = re.compile(
    r"(?:dns:/*|ipv[46]:)?(?:localhost|127(?:\.\d+){3}|\[::1\])(?::(\d+))?", re.IGNORECASE
)
"""Loopback addresses, which mean another service on each machine."""

# Otherwise channels to one address share a connection, and so meet the same pod.
_OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0))


def place_of(kind: str, address: str) -> str:
    """Return `Target.place` of an address. A loopback address is replaced by the name of this machine."""
    if found := _LOOPBACK.fullmatch(address):
        return f"{kind}/{socket.gethostname()}:{found[1] or ''}"
    if address.startswith("unix"):
        return f"{kind}/{socket.gethostname()}/{address}"
    return f"{kind}/{address}"


def served_model(
    address: str, connection: ServiceOptions | None = None, *, timeout: float = CALL_SECONDS
) -> ModelVersion:
    """Return the weights served at `address`, by a new connection. Raises what `AudioClient` raises."""
    options = connection or ServiceOptions()
    with options.open(address, timeout=timeout, retries=0, channel_options=_OWN_CONNECTION) as client:
        return client.get_model().model


def probe(query: Callable[[], ModelVersion], digest: str, service: str) -> str:
    """Query once; return what is wrong with the answer, or an empty text. Raises `CALLER_ERRORS`."""
    try:
        found = query()
    except CALLER_ERRORS:
        raise
    except MilongaError as error:
        return f"{service} does not answer: {error}"
    if found.digest == digest:
        return ""
    return f"{service} serves {found.digest} ({found.name} {found.version}), expected {digest}"


def poll_until(fault: Callable[[], str], *, calls: int = 1, seconds: float = VERIFY_SECONDS) -> None:
    """Call `fault` until it returns an empty text `calls` times in a row.

    Raises `RolloutError` with the last fault if there is still one after `seconds`.
    """
    end = time.monotonic() + seconds
    passed = 0
    while passed < calls:
        found = fault()
        if not found:
            passed += 1
            continue
        if time.monotonic() > end:
            raise RolloutError(found)
        passed = 0
        time.sleep(_POLL_SECONDS)


def check_tls(address: str, tls: TLS | None, service: str) -> None:
    """Raise `InvalidInputError` if TLS is missing, not supported by the service, or does not match.

    gRPC reports a server that requires TLS with the same error as one that is broken.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not port.isdecimal():
        return
    if tls is None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    else:
        context = ssl.create_default_context(cafile=tls.ca_file)
        if tls.cert_file is not None:
            context.load_cert_chain(tls.cert_file, tls.key_file)
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host, int(port)), CALL_SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=(tls and tls.server_name) or host) as secured,
        ):
            if tls is not None:
                secured.recv(1)  # the server checks the client's certificate only now
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
        return
    except ssl.SSLError as error:
        if tls is not None:
            reason = error.reason or str(error)
            raise invalid(
                "--tls",
                f"the handshake with {service} failed: {getattr(error, 'verify_message', '') or reason}; "
                "correct --tls-ca, --tls-cert and --tls-server-name, or omit them for plaintext",
            ) from error
    except OSError:
        return
    else:
        if tls is None:
            raise invalid("--tls", f"is missing, and {service} uses TLS; give --tls-ca")
