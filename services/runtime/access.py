"""Who may make a call, by tokens, certificates, roles and quotas. `CallInterceptor` asks it first."""

import hmac
import time
from collections.abc import Mapping
from typing import Any, Final, cast

import grpc.aio
import structlog

from services.errors import (
    InvalidInputError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnsupportedError,
    invalid,
)
from services.runtime.callers import PRIORITY_KEY, Caller, Priority, Role, peer_host
from services.runtime.callers_file import CallerTable, Known, read_callers
from services.runtime.guesses import Guesses
from services.runtime.quotas import Quota, Usage
from services.runtime.roles import OPERATION, ROLES
from services.runtime.settings import ServerSettings
from services.runtime.tokens import token_digest

log = structlog.get_logger()

Context = grpc.aio.ServicerContext[Any, Any]

POLL_SECONDS: Final = 1.0
"""How often calls look whether the file of callers has changed."""
OPERATOR: Final = "operator"
"""Name of the caller with the operator's token."""


class Access:
    """Decides who makes a call, and whether they may. Belongs to one event loop."""

    def __init__(self, settings: ServerSettings) -> None:
        """Read the file of callers.

        Raises:
            InvalidInputError: the file is invalid, or nobody could be told apart on an address that others
                reach, and no setting allows that.
        """
        self._path = settings.callers_file
        self._mutual = settings.tls_client_ca_file is not None
        self.anonymous = allows_anonymous(settings)
        """Whether callers without a name are served."""
        self._operator: Known | None = None
        self._operator_digest = ""
        self._guesses = Guesses()
        self._table = CallerTable({})
        self._state: tuple[int, ...] | None = None
        self._looked = time.monotonic()
        if self._path is not None:
            self._state = self._file_state()
            self._table = read_callers(self._path)

    def allow_operator(self, token: str) -> None:
        """Let the bearer of `token` call the operator's methods."""
        roles: frozenset[Role] = frozenset({"operator", "caller"} if self.anonymous else {"operator"})
        self._operator = Known(roles=roles, usage=Usage(OPERATOR, Quota()))
        self._operator_digest = token_digest(token)

    @property
    def has_operators(self) -> bool:
        """Whether anybody can have the role `operator`."""
        return self._operator is not None or self._path is not None

    def admit(self, method: str, context: Context) -> Caller:
        """Return the caller of a call.

        Raises:
            UnauthenticatedError: the token is wrong, or there is neither token nor certificate.
            PermissionDeniedError: no role of the caller may call `method`.
            QuotaExceededError: its calls are used up, or its host sent too many wrong tokens.
            InvalidInputError: the priority is none.
            UnsupportedError: `method` is the operator's, and nobody can be the operator.
        """
        found = self.authorise(method, context)
        found.usage.count_call()
        return Caller(
            name=found.usage.name,
            peer=peer_host(context.peer()),
            roles=found.roles,
            priority=_priority(_metadata(context), found.roles),
            deadline=_deadline(context),
            charge=found.usage.charge,
        )

    def authorise(self, method: str, context: Context) -> Known:
        """Return who makes a call, without charging it: also for each further message of a stream.

        Raises:
            UnauthenticatedError, PermissionDeniedError, UnsupportedError: as `admit`.
            QuotaExceededError: the host sent too many wrong tokens.
        """
        allowed = ROLES.get(method, frozenset())
        if allowed == OPERATION and not self.has_operators:
            raise UnsupportedError(
                "loading and unloading models is disabled: it needs a generation service with an operator's "
                "token, or a caller with the role operator"
            )
        found = self._identify(context, for_operator=allowed == OPERATION)
        if not allowed & found.roles:
            raise _denied(method, found)
        return found

    def reload(self) -> None:
        """Read the file of callers again. If it is invalid, the callers stay, and the log has the reason."""
        if self._path is None:
            return
        self._state = self._file_state()
        try:
            self._table = read_callers(self._path, self._table)
        except InvalidInputError as error:
            log.error("callers not reloaded", reason=str(error), callers=len(self._table))
            return
        log.info("callers reloaded", callers=len(self._table))

    def _identify(self, context: Context, *, for_operator: bool) -> Known:
        self._reload_if_changed()
        peer, token = peer_host(context.peer()), _bearer_token(_metadata(context))
        if token is not None and self.has_operators:
            found = self._by_token(peer, token_digest(token))
            if found is not None:
                return found
            if self._path is not None or for_operator:
                self._guesses.note_wrong(peer)
                raise UnauthenticatedError(_WRONG_OPERATOR if for_operator else _WRONG)
            # Without a file of callers the token may be meant for a gateway.
        identities = _identities(context) if self._mutual else ()
        found = self._table.by_identities(identities)
        if found is not None:
            return found
        if for_operator:
            raise UnauthenticatedError(_WRONG_OPERATOR)
        if identities and self._path is None:
            return Known(roles=_ANONYMOUS.roles, usage=Usage(identities[0], Quota()))
        if not self.anonymous:
            named = f"; the certificate's name {identities[0][:80]!r} is not known" if identities else ""
            raise UnauthenticatedError(f"{_MISSING}{named}")
        return _ANONYMOUS

    def _by_token(self, peer: str, digest: str) -> Known | None:
        self._guesses.check(peer, digest)
        found = self._table.by_token(digest)
        if self._operator is not None and hmac.compare_digest(self._operator_digest, digest):
            both = () if found is None else found.roles
            found = Known(roles=self._operator.roles.union(both), usage=(found or self._operator).usage)
        if found is not None:
            self._guesses.note_right(peer, digest)
        return found

    def _reload_if_changed(self) -> None:
        now = time.monotonic()
        if self._path is not None and now - self._looked >= POLL_SECONDS:
            self._looked = now
            if self._file_state() != self._state:
                self.reload()

    def _file_state(self) -> tuple[int, ...] | None:
        """Return what changes with the file, whether it is written in place or replaced."""
        assert self._path is not None
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino


_ANONYMOUS: Final = Known(roles=frozenset({"caller"}), usage=Usage("", Quota()))

_MISSING: Final = (
    "this service takes calls only from callers that it knows; send authorization: Bearer TOKEN (token= of "
    "AudioClient, --token-file), or a client certificate"
)
_WRONG: Final = "the token is not known to this service; it may have been replaced or withdrawn"
_WRONG_OPERATOR: Final = (
    "the operator's token is missing or wrong; send the service's as authorization: Bearer TOKEN"
)


def allows_anonymous(settings: ServerSettings) -> bool:
    """Return whether callers without a name are served.

    Raises:
        InvalidInputError: others reach the address, there are no names, and no setting allows that.
    """
    if settings.tls_client_ca_file is not None and settings.callers_file is None:
        return False  # every connection has a verified certificate
    if settings.anonymous != "auto":
        return settings.anonymous == "allowed"
    if settings.callers_file is not None:
        return False
    if not settings.is_local:
        raise invalid(
            "listen",
            f"is {settings.listen}, which other machines reach, and any of them could call; give "
            "--callers-file or --tls-client-ca-file, or --anonymous allowed (MILONGA_ANONYMOUS)",
        )
    return True


def _metadata(context: Context) -> Mapping[str, Any]:
    return dict(context.invocation_metadata() or ())


def _bearer_token(metadata: Mapping[str, Any]) -> str | None:
    """Return the token of a call; None without one, and empty for another kind of authorization."""
    given = metadata.get("authorization", "")
    text = given.decode("latin-1") if isinstance(given, bytes) else str(given)
    scheme, _, token = text.strip().partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    return "" if text else None


def _identities(context: Context) -> tuple[str, ...]:
    """Return the names in the client's certificate, which gRPC has verified."""
    found = context.auth_context()
    names = found.get("x509_subject_alternative_name") or found.get("x509_common_name") or ()
    return tuple(name.decode("utf-8", "replace") for name in names)


def _priority(metadata: Mapping[str, Any], roles: frozenset[Role]) -> Priority:
    """Return the priority class that the metadata ask for; `batch` for callers of batches only.

    Raises:
        InvalidInputError: it is another word.
    """
    asked = metadata.get(PRIORITY_KEY, "interactive")
    if asked not in ("interactive", "batch"):
        raise invalid(PRIORITY_KEY, f"is {asked[:80]!r}, must be interactive or batch")
    only_batches = "batch" in roles and "caller" not in roles
    return "batch" if only_batches or asked == "batch" else "interactive"


def _deadline(context: Context) -> float | None:
    left = cast("float | None", context.time_remaining())  # the type stubs omit None
    return None if left is None else time.monotonic() + left


def _denied(method: str, found: Known) -> PermissionDeniedError:
    who = f"caller {found.usage.name!r}" if found.usage.name else "an anonymous caller"
    roles = ROLES.get(method)
    needed = f"it needs the role {' or '.join(sorted(roles))}" if roles else "no role may call it"
    return PermissionDeniedError(
        f"{who} with the role {', '.join(sorted(found.roles))} may not call {method[1:]}: {needed}"
    )
