"""Settings of services: names, defaults, bounds and help.

A setting is read from an option of `milonga serve`, otherwise from the environment (``MILONGA_*``). Options
and their help are derived from the fields and their docstrings (`services.cli.options`).
"""

import ipaddress
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict, SettingsError

from services.errors import FieldViolation, InvalidInputError

ENV_PREFIX = "MILONGA_"

ModelText = Annotated[str, "URI"]
"""A model URI. The help of options shows it as URI."""


class ProcessSettings(BaseSettings):
    """Settings of every process that listens: address, TLS, metrics, shutdown and logs."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, extra="forbid", frozen=True, use_attribute_docstrings=True
    )

    listen: str = "127.0.0.1:0"
    """Address of the service: HOST:PORT (port 0: any free one), or unix:/PATH."""
    tls_cert_file: Path | None = None
    """Certificate chain (PEM). With `tls_key_file`, the service uses TLS, otherwise plaintext. The files are
    read again when they change, and on SIGHUP."""
    tls_key_file: Path | None = None
    """Private key (PEM)."""
    anonymous: Literal["auto", "allowed", "refused"] = "auto"
    """Whether callers without a name are served. auto: only without `callers_file`, and on an address that
    no other machine reaches."""
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    """Port of Prometheus metrics (HTTP), on the host of `listen`; 0: any free port. Default: no metrics."""
    drain_delay_seconds: float = Field(default=0.0, ge=0, le=3600)
    """On SIGTERM: seconds to serve on after reporting NOT_SERVING, until load balancers have noticed (15 on
    Kubernetes)."""
    grace_seconds: float = Field(default=30.0, ge=0, le=3600)
    """Seconds that running calls may take to finish after that. New calls are refused."""
    log_format: Literal["auto", "json", "console"] = "auto"
    """Format of the log. auto: console on a terminal, JSON elsewhere."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Minimum severity of log messages."""

    @field_validator("listen")
    @classmethod
    def _check_listen(cls, listen: str) -> str:
        host, _, port = listen.rpartition(":")
        if listen.startswith(("unix:", "unix-abstract:")) or (
            host and port.isdecimal() and int(port) <= 65535
        ):
            return listen
        raise ValueError("must be host:port (0.0.0.0:50051 for every interface), or unix:/path")

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("tls_cert_file and tls_key_file need each other; give both or neither")
        return self

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches `listen`."""
        if self.listen.startswith(("unix:", "unix-abstract:")):
            return True
        host = self.host.strip("[]")
        try:
            return host == "localhost" or ipaddress.ip_address(host).is_loopback
        except ValueError:
            return False

    @property
    def host(self) -> str:
        """Host of `listen`; the loopback address for a Unix socket."""
        if self.listen.startswith(("unix:", "unix-abstract:")):
            return "127.0.0.1"
        return self.listen.rpartition(":")[0] or "127.0.0.1"


class ServerSettings(ProcessSettings):
    """Settings that every service has."""

    tls_client_ca_file: Path | None = None
    """CA certificates (PEM) to verify clients' certificates: mTLS."""
    callers_file: Path | None = None
    """File of callers (TOML): names, hashed tokens, certificate names, roles and quotas. Read again when it
    changes. Default: callers have no names, except those of client certificates (`tls_client_ca_file`)."""
    reflection: bool = True
    """Serve gRPC reflection, by which tools list the rpcs."""
    health_port: int | None = Field(default=None, ge=0, le=65535)
    """Port of a second server with only the health service, always in plaintext (the kubelet's probes have
    no TLS), on the host of `listen`; 0: any free port. Default: no such server."""
    max_request_bytes: int = Field(default=2**20, gt=0, lt=2**31)
    """Maximum size of a request message in bytes."""
    max_held_bytes: int | None = Field(default=None, gt=0, le=2**50)
    """Maximum bytes that all requests hold in memory: received messages, and the clips that they are decoded
    to. Beyond that, requests are refused at once (RESOURCE_EXHAUSTED) before they are parsed or decoded.
    Default: three times `max_request_bytes`, and 64 MiB at least."""
    max_connection_age_seconds: float | None = Field(default=None, gt=0, le=2_000_000)
    """Age in seconds at which a connection is closed gracefully: its calls finish, and the client reconnects,
    possibly to another replica. Should be less than `drain_delay_seconds`, so that clients leave a draining
    replica before it refuses calls. Default: no limit."""

    @model_validator(mode="after")
    def _check_client_ca(self) -> Self:
        if self.tls_client_ca_file is not None and self.tls_cert_file is None:
            raise ValueError("tls_client_ca_file needs tls_cert_file and tls_key_file")
        return self

    @property
    def held_bytes(self) -> int:
        """Maximum bytes that requests hold."""
        return self.max_held_bytes or max(64 * 2**20, 3 * self.max_request_bytes)


Settings = TypeVar("Settings", bound=ProcessSettings)


class BatchedSettings(ServerSettings):
    """Settings of a service whose models batch the clips of concurrent calls."""

    max_request_bytes: int = Field(default=256 * 2**20, gt=0, lt=2**31)
    """Maximum size of a request message in bytes. The default holds eleven minutes of stereo float32 at
    48 kHz."""
    device: str = "auto"
    """auto (cuda if there is one, otherwise cpu), cpu, cuda or cuda:N."""
    threads: int | None = Field(default=None, gt=0, le=4096)
    """CPU threads of each model. Default: PyTorch's choice."""
    max_batch_size: int = Field(default=64, gt=0, le=65_536)
    """Maximum number of clips, pairs or prompts in one call."""
    max_batch_seconds: float = Field(default=80.0, gt=0, le=86_400)
    """Maximum seconds of audio in one batch of a model, in whole windows. Bounds its memory."""
    max_batch_run_seconds: float = Field(default=600.0, ge=0, le=86_400)
    """Time after which a batch of a model counts as hung. The service then fails its calls and ends with exit
    code 1. 0: no limit."""
    max_wait_seconds: float = Field(default=0.005, ge=0, le=60)
    """Seconds that a clip or a prompt waits for others to share its batch."""
    max_queue_seconds: float = Field(default=3840.0, gt=0, le=10_000_000)
    """Maximum seconds of audio in the queue of each model. Beyond that, calls are refused at once
    (RESOURCE_EXHAUSTED)."""


def load_settings(
    kind: type[Settings], texts: Mapping[str, str] = MappingProxyType({}), /, **values: Any
) -> Settings:
    """Return settings of `kind` from `values` and `texts`, otherwise from the environment or the defaults.

    Args:
        kind: class of the settings.
        texts: values by setting, as text in the environment's format: lists and tables are JSON.
        values: values by setting; None means not given.

    Raises:
        InvalidInputError: a setting is invalid; lists every violation.
    """
    try:
        source = EnvSettingsSource(kind)
        source.env_vars = {f"{ENV_PREFIX}{name}".lower(): text for name, text in texts.items()}
        return kind(**{**source(), **{name: value for name, value in values.items() if value is not None}})
    except ValidationError as error:
        raise InvalidInputError(*(_violation(fault) for fault in error.errors())) from error
    except SettingsError as error:
        name = re.search(r'field "(\w+)"', str(error))
        description = 'is not JSON, but lists and tables must be: [1, 2, 4], {"a": "mini:clap-a"}'
        raise InvalidInputError(FieldViolation(name[1] if name else "settings", description)) from error


def _violation(fault: Any) -> FieldViolation:
    name = ".".join(str(part) for part in fault["loc"]) or "settings"
    if fault["type"] == "missing":
        flag, variable = f"--{name.replace('_', '-')}", f"{ENV_PREFIX}{name.upper()}"
        return FieldViolation(name, f"is missing; give {flag} or set {variable}")
    message = str(fault["msg"]).removeprefix("Value error, ")
    return FieldViolation(name, message if name == "settings" else f"is {fault['input']!r}: {message}")
