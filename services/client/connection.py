"""Connections to services: addresses, TLS, token, channels."""

import copy
import ipaddress
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypedDict

import grpc
import grpc.aio

from services.client.addresses import address_fault, connection_fault
from services.errors import FieldViolation, InvalidInputError, invalid
from services.runtime.callers import PRIORITY_KEY, Priority
from services.runtime.tls import read_authorities, read_identity
from services.runtime.tokens import read_token

DEFAULT_TIMEOUT_SECONDS = 600.0
MAX_RESPONSE_BYTES = 256 * 2**20
"""Default maximum size of a response: twenty minutes of float32 audio at 48 kHz."""
MAX_RETRIES = 4
TOKEN_FILE_VARIABLE = "MILONGA_TOKEN_FILE"
"""Environment variable with the file of the default token."""
ALLOW_INSECURE_TOKEN_VARIABLE = "MILONGA_ALLOW_INSECURE_TOKEN"
"""Environment variable with the default of `allow_insecure_token`."""

_KEEPALIVE_MILLISECONDS = 60_000
# A failed channel refuses calls until it reconnects: with gRPC's own 1 s, growing to 2 minutes, a call would
# use up its retries before.
_RECONNECT_MILLISECONDS = (100, 5_000)
# The addresses of a name change within seconds, as pods do; gRPC's own 30 s would be longer than a rollout.
_RESOLVE_MILLISECONDS = 2_000
# gRPC's default is one connection: without round robin, all calls would go to one replica. No retry policy:
# `services.client.calls` retries, because gRPC's own mechanism ignores google.rpc.RetryInfo.
_SERVICE_CONFIG: dict[str, Any] = {"loadBalancingConfig": [{"round_robin": {}}]}
# The empty name means the whole server.
_HEALTH_CHECK: dict[str, Any] = {"healthCheckConfig": {"serviceName": ""}}

# Schemes of gRPC names: `dns:///`, `ipv4:`. Not `dns://AUTHORITY/`, which is resolved by another DNS server.
_SCHEME = re.compile(r"^(?:dns:(?:///)?|ipv4:|ipv6:)")

Metadata = tuple[tuple[str, str], ...]
"""Metadata of a call."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TLS:
    """Files of a TLS connection, in PEM. All None: the system's CA certificates, no client certificate."""

    ca_file: Path | None = None
    """CA certificates to verify the server's certificate."""
    cert_file: Path | None = None
    """The client's certificate chain, for mTLS; together with `key_file`."""
    key_file: Path | None = None
    """The client's private key."""
    server_name: str | None = None
    """Expected name in the server's certificate, if it is not the target's."""

    def __post_init__(self) -> None:
        if (self.cert_file is None) != (self.key_file is None):
            raise invalid("tls", "has only one of cert_file and key_file; give both for mTLS, or neither")


class ConnectionOptions(TypedDict, total=False):
    """How to reach the services; every field has a default."""

    tls: TLS | None
    """Use TLS. None: plaintext."""
    token: str | None
    """The caller's token, sent as ``authorization: Bearer TOKEN``. Default: the one in the file that
    MILONGA_TOKEN_FILE names, if it is set; empty: none. Needs `tls`, unless all addresses are of this
    machine."""
    allow_insecure_token: bool | None
    """Send the token in plaintext to other machines too, where anyone who intercepts it can use it. Default:
    whether MILONGA_ALLOW_INSECURE_TOKEN is 1 or true."""
    priority: Priority
    """``batch`` for work that may wait while others' interactive calls are served. Default interactive."""
    timeout: float
    """Default of the seconds that a call may take, including retries and the waits between them. Default
    600."""
    retries: int
    """Maximum number of retries, 0 to 4, after UNAVAILABLE, or RESOURCE_EXHAUSTED with a retry delay. Waits
    grow exponentially, with jitter, and are at least the retry delay. Default 3."""
    max_response_bytes: int
    """Maximum size of a response. Default 256 MiB."""
    health_check: bool
    """Watch the health of each address of a name, and send no calls to one that is NOT_SERVING, so that a
    draining replica gets none. For names with one address per replica (a headless Service); with a single
    address, calls fail until it is SERVING. Default False."""
    channel_options: Sequence[tuple[str, Any]]
    """gRPC channel arguments; they override the client's own."""


class Connection:
    """Addresses and options of the services. Opens channels, but does not keep them."""

    def __init__(
        self,
        addresses: Mapping[str, str | None],
        *,
        tls: TLS | None = None,
        token: str | None = None,
        allow_insecure_token: bool | None = None,
        priority: Priority = "interactive",
        timeout: float = DEFAULT_TIMEOUT_SECONDS,
        retries: int = 3,
        max_response_bytes: int = MAX_RESPONSE_BYTES,
        health_check: bool = False,
        channel_options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        """Check and keep the arguments.

        Args:
            addresses: addresses by argument of the client; ``target`` replaces those that are None.
            tls, token, allow_insecure_token, priority, timeout, retries, max_response_bytes, health_check,
                channel_options: see `ConnectionOptions`.

        Raises:
            InvalidInputError: an address is a URL or has no port, the token would leave this machine in
                plaintext, `retries` is out of range, or a file of TLS or of the token can't be read.
        """
        if not 0 <= retries <= MAX_RETRIES:
            raise invalid("retries", f"is {retries}, must be between 0 and {MAX_RETRIES}")
        faults = {name: address_fault(given) for name, given in addresses.items() if given is not None}
        violations = [FieldViolation(name, fault) for name, fault in faults.items() if fault]
        if violations:
            raise InvalidInputError(*violations)
        self._addresses = dict(addresses)
        if allow_insecure_token is None:
            allow_insecure_token = os.environ.get(ALLOW_INSECURE_TOKEN_VARIABLE, "") in ("1", "true")
        self._may_leave = tls is not None or allow_insecure_token
        self.timeout = timeout
        self.retries = retries
        self._priority = _priority(priority)
        token = _token_of_environment() if token is None else token
        for address in filter(None, addresses.values() if token else ()):
            self._check_plaintext(address)
        self.metadata: Metadata = self._priority + (_authorization(token) if token else ())
        config = _SERVICE_CONFIG | _HEALTH_CHECK if health_check else _SERVICE_CONFIG
        self._options = _channel_options(max_response_bytes, config, tls, channel_options)
        self._credentials = None if tls is None else _credentials(tls)
        self._tls = tls

    def address(self, argument: str, service: str) -> str:
        """Return the address of the `service` that the client's `argument` names.

        Raises:
            InvalidInputError: neither that argument nor ``target`` was given.
        """
        if not self.has_address(argument):
            raise invalid(argument, f"was not given: the {service} service has no address; give HOST:PORT")
        return self._addresses.get(argument) or self._addresses["target"] or ""

    def has_address(self, argument: str) -> bool:
        """Return whether the client's `argument`, or ``target`` in its place, was given."""
        return bool(self._addresses.get(argument) or self._addresses.get("target"))

    def fault(self, text: str, address: str) -> str | None:
        """Return why these options can't work if gRPC describes the failure by `text`: `connection_fault`."""
        identity = self._tls is not None and self._tls.cert_file is not None
        return connection_fault(text, address, tls=self._tls is not None, identity=identity)

    def metadata_for(self, address: str, token: str | None) -> Metadata:
        """Return the metadata of a call to `address`: with `token`, or those of every call.

        Raises:
            InvalidInputError: the token would leave this machine in plaintext.
        """
        if token is None:
            return self.metadata
        self._check_plaintext(address)
        return self._priority + _authorization(token)

    def acting_for(self, token: str | None, priority: Priority) -> Self:
        """Return the same connection with the metadata of another caller; None: of an anonymous one.

        Raises:
            InvalidInputError: the token would leave this machine in plaintext.
        """
        other = copy.copy(self)
        for address in filter(None, self._addresses.values() if token else ()):
            self._check_plaintext(address)
        other._priority = _priority(priority)
        other.metadata = other._priority + (_authorization(token) if token else ())
        return other

    def _check_plaintext(self, address: str) -> None:
        """Raise `InvalidInputError` if a token would travel to `address` in plaintext."""
        if not self._may_leave and not _stays_here(address):
            raise invalid(
                "token",
                f"would travel to {address} in plaintext; give tls (--tls) as well, or allow_insecure_token "
                "(--allow-insecure-token) where nobody can read along",
            )

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
        # A proxy from the environment could not reach an address of this machine.
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
        # gRPC's default, made explicit: `RequestWriter` checks the size of requests, by field.
        "grpc.max_send_message_length": -1,
        "grpc.keepalive_time_ms": _KEEPALIVE_MILLISECONDS,
        "grpc.initial_reconnect_backoff_ms": first,
        "grpc.max_reconnect_backoff_ms": longest,
        "grpc.service_config": json.dumps(service_config),
        "grpc.dns_min_time_between_resolutions_ms": _RESOLVE_MILLISECONDS,
        # Without a policy, only transparent retries: of calls that never reached a service.
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


def _token_of_environment() -> str | None:
    path = os.environ.get(TOKEN_FILE_VARIABLE)
    return read_token(TOKEN_FILE_VARIABLE, Path(path)) if path else None


def _authorization(token: str) -> Metadata:
    if not (token.isascii() and token.isprintable()):
        raise invalid("token", "holds characters that no header may hold")
    return (("authorization", f"Bearer {token}"),)


def _priority(priority: Priority) -> Metadata:
    return () if priority == "interactive" else ((PRIORITY_KEY, priority),)


def _stays_here(address: str) -> bool:
    """Return whether a gRPC name is an address of this machine."""
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
