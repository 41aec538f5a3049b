"""How to reach services, as commands and configs give it: their options are the fields of one type."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Final, Unpack

from services.client.clients import AudioClient
from services.client.connection import TLS, ConnectionOptions
from services.errors import FieldViolation, InvalidInputError
from services.runtime.tokens import read_token

_LONGEST_SECONDS: Final = 1e9
_FLAGS: Final = {
    "tls": "--tls-cert, --tls-key",
    "tls.ca_file": "--tls-ca",
    "tls.cert_file": "--tls-cert",
    "tls.key_file": "--tls-key",
    "token": "--token-file",
}
"""Options by the client's arguments."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceOptions:
    """TLS, token and timeout of calls to services.

    The text of a field is the help of its option; a config that extends this type has them as settings.
    """

    tls: Annotated[bool, "Use TLS to reach the services."] = False
    tls_ca: Annotated[Path | None, "CA certificates (PEM) to verify the servers' certificates."] = None
    tls_cert: Annotated[Path | None, "Client certificate (PEM), for mTLS."] = None
    tls_key: Annotated[Path | None, "Its private key (PEM)."] = None
    tls_server_name: Annotated[
        str | None, "Name in the servers' certificates, if it is not that of the address."
    ] = None
    token_file: Annotated[
        Path | None,
        "File with the token that the services know this caller by. Default: MILONGA_TOKEN_FILE.",
    ] = None
    allow_insecure_token: Annotated[bool, "Send the token to other machines in plaintext, without --tls."] = (
        False
    )
    timeout: Annotated[
        float | None, "Seconds that a call to a service may take, queueing included. Default: 600."
    ] = None

    def __post_init__(self) -> None:
        if self.timeout is not None and not 0 < self.timeout <= _LONGEST_SECONDS:
            limits = f"above 0, and at most {_LONGEST_SECONDS:g}"
            raise ValueError(f"timeout is {self.timeout:g}, must be a number of seconds {limits}")

    @property
    def given(self) -> dict[str, Any]:
        """The options that differ from the defaults, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(ServiceOptions)}
        return {name: value for name, value in found.items() if value is not None and value is not False}

    @property
    def files(self) -> TLS | None:
        """Settings of TLS; None for plaintext. Raises `InvalidInputError`, which names options."""
        try:
            tls = TLS(
                ca_file=self.tls_ca,
                cert_file=self.tls_cert,
                key_file=self.tls_key,
                server_name=self.tls_server_name,
            )
        except InvalidInputError as error:
            raise _by_options(error) from error
        return tls if self.tls or tls != TLS() else None

    def open(
        self,
        target: str | None = None,
        *,
        scoring: str | None = None,
        reward: str | None = None,
        captioning: str | None = None,
        explanation: str | None = None,
        **others: Unpack[ConnectionOptions],
    ) -> AudioClient:
        """Return a client of services. `others` take the place of these options.

        Raises `InvalidInputError`, which names options.
        """
        options: ConnectionOptions = {}
        if self.allow_insecure_token:
            options["allow_insecure_token"] = True
        if (tls := self.files) is not None:
            options["tls"] = tls
        if self.token_file is not None:
            options["token"] = read_token("--token-file", self.token_file)
        if self.timeout is not None:
            options["timeout"] = self.timeout
        options.update(others)
        try:
            return AudioClient(
                target,
                scoring=scoring,
                reward=reward,
                captioning=captioning,
                explanation=explanation,
                **options,
            )
        except InvalidInputError as error:
            raise _by_options(error) from error


OPTION_NAMES: Final = tuple(field.name for field in fields(ServiceOptions))
"""Names of the options. None of them changes what a service answers."""


def _by_options(error: InvalidInputError) -> InvalidInputError:
    return InvalidInputError(
        *(FieldViolation(_FLAGS.get(v.field, v.field), v.description) for v in error.violations)
    )
