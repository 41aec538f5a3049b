"""The certificate, the key and the client CA of a service, which are read again when the files change.

Kubernetes and cert-manager replace the files of a mounted secret in place, and programs like certbot send
SIGHUP. Connections that are open keep the certificate with which they began.
"""

import asyncio
import math
import time
from dataclasses import dataclass
from typing import Final

import grpc
import structlog
from cryptography import x509
from prometheus_client import Gauge

from services.errors import InvalidInputError
from services.runtime.metrics import ServerMetrics
from services.runtime.settings import ServerSettings
from services.runtime.tls import read_authorities, read_identity

log = structlog.get_logger()

POLL_SECONDS: Final = 60.0
"""Time between looks at the files."""

WARNING_SECONDS: Final = 7 * 86_400.0
"""Remaining validity below which a warning is logged, once a day."""

_WARNING_INTERVAL_SECONDS: Final = 86_400.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Files:
    """Contents of the files, checked."""

    chain: bytes
    key: bytes
    authorities: bytes | None

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration(
            [(self.key, self.chain)], root_certificates=self.authorities
        )


class Certificates:
    """What the service proves its identity with, as of the last valid state of its files.

    `reload` and `watch` belong to one event loop; gRPC calls `_fetch` on threads of its own.
    """

    def __init__(self, settings: ServerSettings, metrics: ServerMetrics) -> None:
        """Read the files that `settings` names. Raises `InvalidInputError` that names the file."""
        self._settings = settings
        self._files = _read(settings)
        self._configuration = self._fetched = self._files.configuration()
        self._expiry = _expiry(self._files.chain)
        self._refusal = ""
        self._warned = -math.inf
        gauge = Gauge(
            "milonga_tls_certificate_expiry_timestamp_seconds",
            "Time at which the first certificate of the service's chain expires.",
            registry=metrics.registry,
        )
        gauge.set_function(lambda: self._expiry)
        self._warn()

    def credentials(self) -> grpc.ServerCredentials:
        """Return credentials that follow `reload`: each new connection has the newest certificate."""
        return grpc.dynamic_ssl_server_credentials(
            self._configuration,
            self._fetch,  # type: ignore[arg-type]  # its type stub omits None
            require_client_authentication=self._files.authorities is not None,
        )

    def reload(self) -> None:
        """Read the files again. If they are invalid, log an error and keep what was valid before."""
        self._refusal = ""
        self._refresh()
        log.info("certificates read", expires_in_days=self._days_left())

    async def watch(self) -> None:
        """Look for changed files, and for a certificate that expires soon, until cancelled."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            self._refresh()
            self._warn()

    def _refresh(self) -> None:
        try:
            files = _read(self._settings)
        except InvalidInputError as error:
            # Once for each fault: while files are being replaced, they may not fit together yet.
            if str(error) != self._refusal:
                self._refusal = str(error)
                log.error("certificates refused, the former ones stay", reason=self._refusal)
            return
        self._refusal = ""
        if files != self._files:
            self._files, self._expiry = files, _expiry(files.chain)
            self._configuration = files.configuration()
            self._warned = -math.inf
            log.info("certificates changed", expires_in_days=self._days_left())
            self._warn()

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """Return the configuration if it has changed since the last call. gRPC calls it per connection."""
        newest = self._configuration
        if newest is self._fetched:
            return None
        self._fetched = newest
        return newest

    def _warn(self) -> None:
        left, now = self._expiry - time.time(), time.monotonic()
        if left < WARNING_SECONDS and now - self._warned >= _WARNING_INTERVAL_SECONDS:
            self._warned = now
            log.warning(
                "the certificate has expired" if left <= 0 else "the certificate expires soon",
                file=str(self._settings.tls_cert_file),
                expires_in_days=self._days_left(),
            )

    def _days_left(self) -> float:
        return round((self._expiry - time.time()) / 86_400, 2)


def _read(settings: ServerSettings) -> _Files:
    """Read and check the files, none of them while they are being replaced."""
    while (files := _read_once(settings)) != _read_once(settings):
        pass
    return files


def _read_once(settings: ServerSettings) -> _Files:
    assert settings.tls_cert_file is not None
    assert settings.tls_key_file is not None
    chain, key = read_identity("tls_cert_file", settings.tls_cert_file, "tls_key_file", settings.tls_key_file)
    authorities = (
        None
        if settings.tls_client_ca_file is None
        else read_authorities("tls_client_ca_file", settings.tls_client_ca_file)
    )
    return _Files(chain=chain, key=key, authorities=authorities)


def _expiry(chain: bytes) -> float:
    """Return the Unix time at which the first certificate of a chain expires; NaN if it can't be parsed."""
    try:
        certificates = x509.load_pem_x509_certificates(chain)
        return min(one.not_valid_after_utc for one in certificates).timestamp()
    except ValueError as error:
        # OpenSSL, which has accepted it, is less strict.
        log.warning("the time at which the certificate expires is unknown", reason=str(error))
        return math.nan
