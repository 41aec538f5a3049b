"""Settings that every service shares: a flag, else the environment (``MILONGA_*``), else the default."""

from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from services.errors import FieldViolation, InvalidInputError

ENV_PREFIX = "MILONGA_"


class ServerSettings(BaseSettings):
    """How a service listens, watches itself and stops."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, extra="forbid", frozen=True, use_attribute_docstrings=True
    )

    listen: str = "127.0.0.1:50051"
    """Address of the service: host:port (port 0: any free one), or unix:/path."""
    tls_cert_file: Path | None = None
    """Certificate chain in PEM. With `tls_key_file`: speak TLS. Read at start."""
    tls_key_file: Path | None = None
    """Private key in PEM."""
    tls_client_ca_file: Path | None = None
    """Authorities in PEM that clients' certificates must come from: mTLS."""
    health_port: int | None = Field(default=None, ge=0, le=65535)
    """Port of a second server with the health service only, always in plaintext (kubelet probes speak no
    TLS), on the host of `listen`. 0: any free one. None: off."""
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    """Port of Prometheus metrics over HTTP, on the host of `listen`. 0: any free one. None: off."""
    max_request_bytes: int = Field(default=2**20, gt=0)
    """Largest message that is taken in."""
    max_connection_age_seconds: float | None = Field(default=None, gt=0)
    """Age at which a connection is closed gracefully, its calls finished, so that clients spread over
    replicas, and leave one that drains before it refuses: so less than `drain_delay_seconds`.
    None: never."""
    drain_delay_seconds: float = Field(default=0.0, ge=0, le=3600)
    """On SIGTERM: how long to go on serving after readiness is off, until routers know (5 on Kubernetes)."""
    grace_seconds: float = Field(default=30.0, ge=0, le=3600)
    """After that: how long calls under way may take to finish. New ones are refused."""
    log_format: Literal["auto", "json", "console"] = "auto"
    """auto: console on a terminal, JSON elsewhere."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe messages to write."""

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
            raise ValueError("tls_cert_file and tls_key_file go together; give both or neither")
        if self.tls_client_ca_file is not None and self.tls_cert_file is None:
            raise ValueError("tls_client_ca_file needs tls_cert_file and tls_key_file")
        return self

    @property
    def host(self) -> str:
        """Host of `listen`; the loopback for a Unix socket."""
        if self.listen.startswith(("unix:", "unix-abstract:")):
            return "127.0.0.1"
        return self.listen.rpartition(":")[0] or "127.0.0.1"


Settings = TypeVar("Settings", bound=ServerSettings)


def load_settings(kind: type[Settings], **flags: Any) -> Settings:
    """Build settings; a flag that is None falls back to the environment.

    Raises:
        InvalidInputError: with every wrong setting at once.
    """
    try:
        return kind(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        raise InvalidInputError(*(_violation(fault) for fault in error.errors())) from error
    except SettingsError as error:
        # A list or table in the environment that is no JSON; the message names the field.
        remedy = 'lists and tables are JSON: [1, 2, 4], {"a": "mini:clap-a"}'
        raise InvalidInputError(FieldViolation("settings", f"{error}; {remedy}")) from error


def _violation(fault: Any) -> FieldViolation:
    name = ".".join(str(part) for part in fault["loc"]) or "settings"
    if fault["type"] == "missing":
        flag, variable = f"--{name.replace('_', '-')}", f"{ENV_PREFIX}{name.upper()}"
        return FieldViolation(name, f"is missing; give {flag} or set {variable}")
    message = str(fault["msg"]).removeprefix("Value error, ")
    return FieldViolation(name, message if name == "settings" else f"is {fault['input']!r}: {message}")
