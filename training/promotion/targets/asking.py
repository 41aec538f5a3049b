"""Asking a generation service which weights it serves."""

import re
import socket
import ssl
import time
from collections.abc import Callable
from typing import Any, Final

from services.client import TLS, AudioClient, ModelVersion
from services.errors import FieldViolation, InvalidInputError, MilongaError
from training.cluster.namespace import ForbiddenError, RequestRefusedError
from training.promotion.errors import RolloutError

CALLS = 8
"""Calls, each on a connection of its own, that must all meet the new weights at a Service's address."""
VERIFY_SECONDS = 60.0
"""How long one may take to show nothing but the new weights: routers learn late which pods have gone."""
CALL_SECONDS = 5.0
_POLL_SECONDS = 0.5

OURS: Final = (InvalidInputError, ForbiddenError, RequestRefusedError)
"""Why whoever asks can't: nothing that waiting would mend, and no fault of who is asked."""

_LOOPBACK: Final = re.compile(
    r"(?:dns:/*|ipv[46]:)?(?:localhost|127(?:\.\d+){3}|\[::1\])(?::(\d+))?", re.IGNORECASE
)
"""Addresses that mean another service on each machine."""

# Whoever asks wants to meet a pod, and not the one that an earlier channel is connected to.
_OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0))


def place_of(kind: str, address: str) -> str:
    """The place (`Target`) of what has an address; what only this machine reaches, under its name."""
    if found := _LOOPBACK.fullmatch(address):
        return f"{kind}/{socket.gethostname()}:{found[1] or ''}"
    if address.startswith("unix"):
        return f"{kind}/{socket.gethostname()}/{address}"
    return f"{kind}/{address}"


def served_model(address: str, tls: TLS | None = None, *, timeout: float = CALL_SECONDS) -> ModelVersion:
    """Which weights answer at `address`, by a connection of its own. Raises what `AudioClient` raises."""
    options: Any = {"timeout": timeout, "retries": 0, "channel_options": _OWN_CONNECTION}
    with AudioClient(address, tls=tls, **options) as client:
        model = client.get_model().model
    return ModelVersion(name=model.name, version=model.version, digest=model.digest, license=model.license)


def wrong_answer(ask: Callable[[], ModelVersion], digest: str, who: str) -> str:
    """Ask once: what is wrong with the answer, or nothing. Raises those of `OURS`."""
    try:
        found = ask()
    except OURS:
        raise
    except MilongaError as error:
        return f"{who} does not answer: {error}"
    if found.digest == digest:
        return ""
    return f"{who} serves {found.digest} ({found.name} {found.version}), expected {digest}"


def settle(fault: Callable[[], str], *, calls: int = 1, seconds: float = VERIFY_SECONDS) -> None:
    """Look until the last `calls` looks found no fault.

    Raises `RolloutError` where that does not come to be within `seconds`.
    """
    end = time.monotonic() + seconds
    right = 0
    while right < calls:
        found = fault()
        if not found:
            right += 1
            continue
        if time.monotonic() > end:
            raise RolloutError(found)
        right = 0
        time.sleep(_POLL_SECONDS)


def check_tls(address: str, tls: TLS | None, who: str) -> None:
    """Raise `InvalidInputError` where a call fails for TLS that is missing, not wanted, or does not match.

    gRPC's own words for a server that wants TLS are those for one that is broken.
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
            context.wrap_socket(plain, server_hostname=(tls and tls.server_name) or host) as speaking,
        ):
            if tls is not None:
                speaking.recv(1)  # whether our certificate is taken is told only now
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
        return
    except ssl.SSLError as error:
        if tls is not None:
            reason = error.reason or str(error)
            raise InvalidInputError(
                FieldViolation(
                    "--tls",
                    f"{who} can't be spoken to: {getattr(error, 'verify_message', '') or reason}; correct "
                    "--tls-ca, --tls-cert and --tls-server-name, or leave them out where it speaks plaintext",
                )
            ) from error
    except OSError:
        return
    else:
        if tls is None:
            raise InvalidInputError(
                FieldViolation("--tls", f"is missing, and {who} speaks TLS; give --tls-ca")
            )
