"""A namespace of a Kubernetes cluster: how it is reached by the official client, and what its errors mean.

What is called there stands in the modules that call it, each with what a Role must allow.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Final, TypeVar

from services.errors import FieldViolation, InvalidInputError, MilongaError, ServiceUnavailableError
from training import exits

Json = dict[str, Any]
"""An object of the API."""

TIMEOUT_SECONDS: Final = (5.0, 20.0)
"""To connect, and to wait for an answer."""
PATIENCE_SECONDS: Final = 30.0
"""How long an API server that does not answer is asked again, once it has answered."""

RAW: Final[Mapping[str, Any]] = {"_preload_content": False, "_request_timeout": TIMEOUT_SECONDS}
"""Arguments of every call: its answer as it came."""

_SERVICE_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_AGAIN: Final = (429, 500, 502, 503, 504)


class ForbiddenError(ServiceUnavailableError):
    """Whoever we are to the cluster may not do this."""


class ConflictError(MilongaError):
    """The object was changed since it was read, or is there already. Caught where it can come about."""


class RequestRefusedError(MilongaError):
    """The API server does not take what was sent. `reason` is its own."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


EXIT_CODES: Final[exits.ExitCodes] = MappingProxyType(
    {**exits.EXIT_CODES, RequestRefusedError: 6, ConflictError: 6}
)
"""Those that every command that changes a cluster shares."""


class Namespace:
    """A namespace of a cluster: what calls it derives from this.

    Every call raises `ServiceUnavailableError` where the API server does not answer, or forbids it.
    """

    RIGHTS: ClassVar[str]
    """The page that says which rights are needed."""

    def __init__(
        self, namespace: str, *, configuration: Any, where: str, patience: float = PATIENCE_SECONDS
    ) -> None:
        """Nothing is called yet.

        Args:
            namespace: of everything that is asked for.
            configuration: of the client, as `connect` makes it.
            where: the cluster, for people.
            patience: see `PATIENCE_SECONDS`.
        """
        from kubernetes import client

        self.namespace, self.where = namespace, where
        self.configuration = configuration
        self._patience, self._answered = patience, False
        # Called by other threads as well, and a client is not for two.
        self._local = threading.local()
        self._client = client

    @property
    def title(self) -> str:
        """The namespace, for people."""
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
        """The answer, which must be there."""
        answer = self._call(call, patience)
        if answer is None:
            place = self.where
            if what != self.title:
                place = f"{self.title} of {place}, or there is no such namespace"
            raise InvalidInputError(
                FieldViolation(
                    what, f"is not in {place}; give --namespace or --context, or apply the manifests"
                )
            )
        return answer

    def _call(self, call: Callable[[], Any], patience: float | None = None) -> Json | None:
        """The answer as JSON; None for 404. What may come right is asked again, for a while.

        `patience` is how long that is at most. What `call` itself raises of ours is passed on.
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
        """The error as ours; None where something is not there."""
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
                f"{self.where} refused a request of ours ({status}): {reason}", reason=reason
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
    """A namespace of the cluster that we run in, or of the one that kubeconfig names.

    `otherwise` ends the sentence that says what to do where there is none.

    Raises `InvalidInputError` where there is neither, or no such context.
    """
    from kubernetes import client, config

    configuration = client.Configuration()
    try:
        if context is None and in_cluster():
            config.load_incluster_config(client_configuration=configuration)
            where = "the cluster"
        else:
            # The client reads KUBECONFIG too, but when it is imported.
            files = os.environ.get("KUBECONFIG", config.KUBE_CONFIG_DEFAULT_LOCATION)
            config.load_kube_config(files, context, configuration)
            where = f"the cluster {configuration.host}"
    except Exception as error:  # ConfigException, and whatever broken YAML raises
        reason = " ".join(str(error).split())[:200]
        raise InvalidInputError(
            FieldViolation(
                "--context",
                f"{'is ' + context + ': ' if context else ''}no cluster can be chosen: {reason}; set "
                f"KUBECONFIG, or give --context{otherwise}",
            )
        ) from error
    configuration.retries = False  # ours know what may be asked again
    return kind(namespace, configuration=configuration, where=where, patience=patience)


def in_cluster() -> bool:
    """Whether we run in a pod, which reaches other pods and Services by itself."""
    return (_SERVICE_ACCOUNT / "token").exists()


def _status(error: Exception) -> int | None:
    """HTTP status; None where none came. The client hides that of a websocket's handshake."""
    status = getattr(error, "status", None) or getattr(error.__context__, "status_code", None)
    return status if isinstance(status, int) and status else None


def _reason(error: Exception) -> str:
    """What the API server says, or why it says nothing."""
    try:
        text = getattr(error, "body", None) or getattr(error.__context__, "resp_body", None)
        body: Mapping[str, Any] = json.loads(text or "")
        return " ".join(str(body["message"]).split())[:300]
    except (ValueError, KeyError, TypeError):
        return " ".join(str(getattr(error, "reason", None) or error).split())[-300:]
