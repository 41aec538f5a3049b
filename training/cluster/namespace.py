"""Connection to a namespace of a Kubernetes cluster by the official client, its retries and its errors.

The calls themselves are in subclasses of `Namespace`, each with the right that a Role must grant.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Final, TypeVar

from services.errors import MilongaError, ServiceUnavailableError, invalid
from training import exits

Json = dict[str, Any]
"""An object of the API."""

TIMEOUT_SECONDS: Final = (5.0, 20.0)
"""Timeouts of connecting and of reading."""
PATIENCE_SECONDS: Final = 30.0
"""Time for which a failed call is tried again, if the API server has answered before."""

RAW: Final[Mapping[str, Any]] = {"_preload_content": False, "_request_timeout": TIMEOUT_SECONDS}
"""Arguments of every call: the answer unparsed."""

_SERVICE_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_AGAIN: Final = (429, 500, 502, 503, 504)


class ForbiddenError(ServiceUnavailableError):
    """The account lacks the right to do this."""


class ConflictError(MilongaError):
    """The object was changed since it was read, or exists already. Caught by the callers."""


class RequestRefusedError(MilongaError):
    """The API server refuses the request as invalid. `reason` is the server's message."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


EXIT_CODES: Final[exits.ExitCodes] = MappingProxyType(
    {**exits.EXIT_CODES, RequestRefusedError: 6, ConflictError: 6}
)
"""Exit codes that all commands on a cluster share."""


class Namespace:
    """A namespace of a cluster. Subclasses add the calls.

    Every call raises `ServiceUnavailableError` where the API server does not answer, or forbids it.
    """

    RIGHTS: ClassVar[str]
    """Page of the documentation that lists the rights needed."""

    def __init__(
        self, namespace: str, *, configuration: Any, where: str, patience: float = PATIENCE_SECONDS
    ) -> None:
        """Nothing is called yet.

        Args:
            namespace: name of the namespace.
            configuration: the client's configuration, as `connect` makes it.
            where: name of the cluster in messages.
            patience: see `PATIENCE_SECONDS`.
        """
        from kubernetes import client

        self.namespace, self.where = namespace, where
        self.configuration = configuration
        self._patience, self._answered = patience, False
        # Other threads call as well, and a client is not thread-safe.
        self._local = threading.local()
        self._client = client

    @property
    def title(self) -> str:
        """The namespace as messages name it."""
        return f"the namespace {self.namespace}"

    @property
    def _core(self) -> Any:
        return self._client.CoreV1Api(self._api)

    @property
    def _api(self) -> Any:
        if not hasattr(self._local, "api"):
            self._local.api = self._client.ApiClient(self.configuration)
        return self._local.api

    def _found(self, what: str, call: Callable[[], Any], patience: float | None = None) -> Json:
        """Return the answer; raise `InvalidInputError` where the object does not exist."""
        answer = self._call(call, patience)
        if answer is None:
            place = self.where
            if what != self.title:
                place = f"{self.title} of {place}, or there is no such namespace"
            raise invalid(what, f"is not in {place}; give --namespace or --context, or apply the manifests")
        return answer

    def _call(self, call: Callable[[], Any], patience: float | None = None) -> Json | None:
        """Return the answer as JSON; None for 404. Try again, for up to `patience` s, what may be transient.

        A `MilongaError` that `call` raises is passed on.
        """
        end = time.monotonic() + min(self._patience, self._patience if patience is None else patience)
        wait = 0.25
        while True:
            try:
                answer: Json = json.loads(call().data)
            except MilongaError:
                raise
            except Exception as error:
                failure = self._explained(error)
                if failure is None:
                    return None
                again = _status(error) in (None, *_AGAIN) and self._answered
                if not again or time.monotonic() + wait > end:
                    raise failure from error
                time.sleep(wait)
                wait = min(4.0, 2 * wait)
            else:
                self._answered = True
                return answer

    def _explained(self, error: Exception) -> MilongaError | None:
        """Convert the client's error to a `MilongaError`; None for 404."""
        status = _status(error)
        reason = _reason(error)
        if status == 404:
            return None
        if status == 409:
            return ConflictError(reason)
        if status in (401, 403):
            return ForbiddenError(
                f"{self.where} does not permit it: {reason}; see {self.RIGHTS} for the Role, or give "
                "another --context"
            )
        if status is not None and 400 <= status < 500 and status != 429:
            return RequestRefusedError(
                f"{self.where} refused a request as invalid ({status}): {reason}", reason=reason
            )
        return ServiceUnavailableError(
            f"{self.where} can't be reached: {reason}; start it, or give another --context"
        )


Kind = TypeVar("Kind", bound=Namespace)


def connect(
    kind: type[Kind],
    namespace: str,
    context: str | None = None,
    *,
    patience: float = PATIENCE_SECONDS,
    otherwise: str = "",
) -> Kind:
    """Connect to a namespace of the cluster of this pod, or of the one that kubeconfig names.

    `otherwise` is appended to the remedy in the error's message.

    Raises `InvalidInputError` if there is neither, or no such context.
    """
    from kubernetes import client, config

    configuration = client.Configuration()
    try:
        if context is None and in_cluster():
            config.load_incluster_config(client_configuration=configuration)
            where = "the cluster"
        else:
            # The client reads KUBECONFIG only once, on import.
            files = os.environ.get("KUBECONFIG", config.KUBE_CONFIG_DEFAULT_LOCATION)
            config.load_kube_config(files, context, configuration)
            where = f"the cluster {configuration.host}"
    except Exception as error:  # ConfigException, and whatever broken YAML raises
        reason = " ".join(str(error).split())[:200]
        raise invalid(
            "--context",
            f"{'is ' + context + ': ' if context else ''}no cluster can be chosen: {reason}; set "
            f"KUBECONFIG, or give --context{otherwise}",
        ) from error
    configuration.retries = False  # `Namespace._call` knows which calls may be tried again
    return kind(namespace, configuration=configuration, where=where, patience=patience)


def in_cluster() -> bool:
    """Return whether this process runs in a pod, which can connect to other pods and to Services directly."""
    return (_SERVICE_ACCOUNT / "token").exists()


def _status(error: Exception) -> int | None:
    """Return the HTTP status; None without an answer. The client hides that of a websocket's handshake."""
    status = getattr(error, "status", None) or getattr(error.__context__, "status_code", None)
    return status if isinstance(status, int) and status else None


def _reason(error: Exception) -> str:
    """Return the API server's message, or the reason why there is none."""
    try:
        text = getattr(error, "body", None) or getattr(error.__context__, "resp_body", None)
        body: Mapping[str, Any] = json.loads(text or "")
        return " ".join(str(body["message"]).split())[:300]
    except (ValueError, KeyError, TypeError):
        return " ".join(str(getattr(error, "reason", None) or error).split())[-300:]
