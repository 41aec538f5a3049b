"""Where the services are and how to speak to them: addresses, TLS, token, channels."""

import ipaddress
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import grpc
import grpc.aio

from services.errors import FieldViolation, InvalidInputError
from services.runtime.tls import read_authorities, read_identity

DEFAULT_TIMEOUT_SECONDS = 600.0
MAX_RESPONSE_BYTES = 256 * 2**20
"""Largest answer that the client takes: twenty minutes of float32 sound at 48 kHz."""
MAX_RETRIES = 4

_KEEPALIVE_MILLISECONDS = 60_000
# A channel that failed refuses calls until it tries again: with gRPC's own 1 s, growing to 2 minutes, the
# retries of a call would be spent before it does.
_RECONNECT_MILLISECONDS = (100, 5_000)
# Pods come and go within seconds, and with them the addresses of a name; gRPC's own 30 s outlast a rollout.
_RESOLVE_MILLISECONDS = 2_000
# gRPC holds on to one connection: without round robin, all calls would go to one replica. No retry policy:
# `services.client.calls` retries, because gRPC's own mechanism knows no google.rpc.RetryInfo.
_SERVICE_CONFIG: dict[str, Any] = {"loadBalancingConfig": [{"round_robin": {}}]}
# The empty name stands for the server as a whole.
_HEALTH_CHECK: dict[str, Any] = {"healthCheckConfig": {"serviceName": ""}}

# Of a gRPC name: `dns:///`, `ipv4:`. In `dns://AUTHORITY/` somebody else says where a name is.
_SCHEME = re.compile(r"^(?:dns:(?:///)?|ipv4:|ipv6:)")

Metadata = tuple[tuple[str, str], ...]
"""What travels with a call beside its message."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TLS:
    """Files of a TLS connection, in PEM. All None: the system's authorities, no client certificate."""

    ca_file: Path | None = None
    """Authorities that the server's certificate is checked against."""
    cert_file: Path | None = None
    """The client's certificate chain, for mTLS; together with `key_file`."""
    key_file: Path | None = None
    """The client's private key."""
    server_name: str | None = None
    """Name that the server's certificate must carry, where it is not the target's."""

    def __post_init__(self) -> None:
        if (self.cert_file is None) != (self.key_file is None):
            raise InvalidInputError(
                FieldViolation(
                    "tls", "has only one of cert_file and key_file; give both for mTLS, or neither"
                )
            )


class ConnectionOptions(TypedDict, total=False):
    """How to reach the services; every field has a default."""

    tls: TLS | None
    """Speak TLS. None: plaintext."""
    token: str | None
    """Sent as ``authorization: Bearer TOKEN``, for a gateway that asks for one. Needs `tls`."""
    timeout: float
    """Seconds that a call may take, retries and the waits between them included, where the call says nothing
    else. Default 600."""
    retries: int
    """How often a call is tried again that met UNAVAILABLE, or RESOURCE_EXHAUSTED with a time to come back: 0
    to 4. Waits grow exponentially, with jitter, and are never shorter than the service asks. Default 3."""
    max_response_bytes: int
    """Largest answer to take. Default 256 MiB."""
    health_check: bool
    """Watch the health of each of a name's addresses, and send no call to one that is NOT_SERVING: a replica
    that drains is left before it refuses. For names with an address for each replica (a headless Service);
    behind a single address there is no other to go to, and calls fail until it is SERVING. Default False."""
    channel_options: Sequence[tuple[str, Any]]
    """gRPC channel arguments, which go before the client's own."""


class Connection:
    """What is known of the services before the first call. Opens channels, holds none."""

    def __init__(
        self,
        addresses: Mapping[str, str | None],
        *,
        tls: TLS | None = None,
        token: str | None = None,
        timeout: float = DEFAULT_TIMEOUT_SECONDS,
        retries: int = 3,
        max_response_bytes: int = MAX_RESPONSE_BYTES,
        health_check: bool = False,
        channel_options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        """`addresses`: by argument of the client, of which ``target`` stands in for those that are None.

        Raises:
            InvalidInputError: an empty address, a token without TLS, retries out of range, a TLS file that
                can't be read.
        """
        if token is not None and tls is None:
            raise InvalidInputError(FieldViolation("token", "would travel in plaintext; give tls as well"))
        if not 0 <= retries <= MAX_RETRIES:
            raise InvalidInputError(
                FieldViolation("retries", f"is {retries}, must be between 0 and {MAX_RETRIES}")
            )
        empty = [name for name, address in addresses.items() if address == ""]
        if empty:
            raise InvalidInputError(*(FieldViolation(name, "is empty; give HOST:PORT") for name in empty))
        self._addresses = dict(addresses)
        self.timeout = timeout
        self.retries = retries
        self.metadata: Metadata = () if token is None else _authorization(token)
        config = _SERVICE_CONFIG | _HEALTH_CHECK if health_check else _SERVICE_CONFIG
        self._options = _channel_options(max_response_bytes, config, tls, channel_options)
        self._credentials = None if tls is None else _credentials(tls)

    def address(self, argument: str, service: str) -> str:
        """Return the address of the `service` that the client's `argument` names.

        Raises:
            InvalidInputError: neither that argument nor ``target`` was given.
        """
        if not self.has_address(argument):
            raise InvalidInputError(
                FieldViolation(
                    argument, f"was not given: the {service} service has no address; give HOST:PORT"
                )
            )
        return self._addresses.get(argument) or self._addresses["target"] or ""

    def has_address(self, argument: str) -> bool:
        """Return whether the client's `argument`, or ``target`` in its place, was given."""
        return bool(self._addresses.get(argument) or self._addresses.get("target"))

    def metadata_for(self, address: str, token: str | None) -> Metadata:
        """Return what a call to `address` carries: with a `token` of its own, else what every call does.

        Raises:
            InvalidInputError: the token would leave this machine in plaintext.
        """
        if token is None:
            return self.metadata
        if self._credentials is None and not _stays_here(address):
            raise InvalidInputError(
                FieldViolation("token", f"would travel to {address} in plaintext; give tls as well")
            )
        return _authorization(token)

    def open_channel(self, address: str) -> grpc.Channel:
        """Return a channel for blocking calls. It connects at its first call."""
        options = self._options_for(address)
        if self._credentials is None:
            return grpc.insecure_channel(address, options=options)
        return grpc.secure_channel(address, self._credentials, options=options)

    def open_async_channel(self, address: str) -> grpc.aio.Channel:
        """Return a channel for the running event loop. It connects at its first call."""
        options = self._options_for(address)
        if self._credentials is None:
            return grpc.aio.insecure_channel(address, options=options)
        return grpc.aio.secure_channel(address, self._credentials, options=options)

    def _options_for(self, address: str) -> list[tuple[str, Any]]:
        # A proxy of the environment would get what is meant for this machine, and could not deliver it.
        proxy = [("grpc.enable_http_proxy", 0)] if _stays_here(address) else []
        return [*proxy, *self._options]


def _channel_options(
    max_response_bytes: int,
    service_config: Mapping[str, Any],
    tls: TLS | None,
    extra: Sequence[tuple[str, Any]],
) -> list[tuple[str, Any]]:
    first, longest = _RECONNECT_MILLISECONDS
    options: dict[str, Any] = {
        "grpc.max_receive_message_length": max_response_bytes,
        # gRPC's default, said here: what a request may hold is checked where it is made, by field.
        "grpc.max_send_message_length": -1,
        "grpc.keepalive_time_ms": _KEEPALIVE_MILLISECONDS,
        "grpc.initial_reconnect_backoff_ms": first,
        "grpc.max_reconnect_backoff_ms": longest,
        "grpc.service_config": json.dumps(service_config),
        "grpc.dns_min_time_between_resolutions_ms": _RESOLVE_MILLISECONDS,
        # Without a policy these are the transparent ones alone: of calls that never reached a service.
        "grpc.enable_retries": 1,
    }
    if tls is not None and tls.server_name is not None:
        options["grpc.ssl_target_name_override"] = tls.server_name
    return list({**options, **dict(extra)}.items())


def _credentials(tls: TLS) -> grpc.ChannelCredentials:
    authorities = None if tls.ca_file is None else read_authorities("tls.ca_file", tls.ca_file)
    chain, key = None, None
    if tls.cert_file is not None and tls.key_file is not None:
        chain, key = read_identity("tls.cert_file", tls.cert_file, "tls.key_file", tls.key_file)
    return grpc.ssl_channel_credentials(authorities, key, chain)


def _authorization(token: str) -> Metadata:
    if not (token.isascii() and token.isprintable()):
        raise InvalidInputError(FieldViolation("token", "holds characters that no header may hold"))
    return (("authorization", f"Bearer {token}"),)


def _stays_here(address: str) -> bool:
    """Whether what is sent to a gRPC name never leaves this machine."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    return all(_is_loopback(one) for one in _SCHEME.sub("", address).split(","))


def _is_loopback(address: str) -> bool:
    host, colon, port = address.rpartition(":")
    host = (host if colon and port.isdecimal() else address).removeprefix("[").removesuffix("]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
