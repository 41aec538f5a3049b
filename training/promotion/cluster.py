"""The few calls of the Kubernetes API that a promotion makes, by the official client, as plain JSON.

What its Role must allow stands with each; nothing else is called.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from services.errors import FieldViolation, InvalidInputError, MilongaError, ServiceUnavailableError
from training.promotion.locks import ConflictError, Json
from training.promotion.target import Pin

PIN_ANNOTATION: Final = "milonga.dev/pin"
"""Annotation of the pod template, and so of the pods, that promotion owns."""
FIELD_MANAGER: Final = "milonga-promote"
"""Owner of that field in server-side apply."""
NAME_LABEL: Final = "app.kubernetes.io/name"
TIMEOUT_SECONDS: Final = (5.0, 20.0)
"""To connect, and to wait for an answer."""
PATIENCE_SECONDS: Final = 30.0
"""How long an API server that does not answer is asked again, once it has answered."""

_APPLY: Final = "application/apply-patch+yaml"
_MERGE: Final = "application/merge-patch+json"
_SERVICE_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_AGAIN: Final = (429, 500, 502, 503, 504)


class Cluster:
    """A namespace of a cluster.

    Every call raises `ServiceUnavailableError` where the API server does not answer, or forbids it.
    """

    def __init__(
        self, namespace: str, *, configuration: Any, where: str, patience: float = PATIENCE_SECONDS
    ) -> None:
        """Nothing is called yet.

        Args:
            namespace: of everything that is asked for.
            configuration: of the client, as `connect_cluster` makes it.
            where: the cluster, for people.
            patience: see `PATIENCE_SECONDS`.
        """
        from kubernetes import client

        self.namespace, self.where = namespace, where
        self.configuration = configuration
        self._patience, self._answered = patience, False
        # Called by the thread that renews the lock as well, and a client is not for two.
        self._local = threading.local()
        self._client = client

    def deployment(self, name: str) -> Json:
        """A Deployment. Role: get of deployments."""
        return self._found(
            f"the Deployment {name}",
            lambda: self._apps.read_namespaced_deployment(name, self.namespace, **_RAW),
        )

    def apply_pin(self, name: str, pin: Pin | None) -> Json:
        """Set the pin of a Deployment's pods, or take it away, by server-side apply.

        As the field is ours and stands in no manifest, applying manifests again does not put it back. Role:
        patch of deployments.
        """
        annotations = {PIN_ANNOTATION: pin} if pin else {}
        body = {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": name, "namespace": self.namespace},
            "spec": {"template": {"metadata": {"annotations": annotations}}},
        }
        return self._found(
            f"the Deployment {name}",
            lambda: self._apps.patch_namespaced_deployment(
                name,
                self.namespace,
                body,
                field_manager=FIELD_MANAGER,
                force=True,
                _content_type=_APPLY,
                **_RAW,
            ),
        )

    def scale(self, name: str, replicas: int) -> Json:
        """Set a Deployment's replicas. Role: patch of deployments/scale."""
        return self._found(
            f"the Deployment {name}",
            lambda: self._apps.patch_namespaced_deployment_scale(
                *(name, self.namespace, {"spec": {"replicas": replicas}}),
                field_manager=FIELD_MANAGER,
                _content_type=_MERGE,
                **_RAW,
            ),
        )

    def pods(self, name: str) -> list[Json]:
        """The pods that carry the name. Role: list of pods."""
        found = self._found(
            f"the namespace {self.namespace}",
            lambda: self._core.list_namespaced_pod(
                self.namespace, label_selector=f"{NAME_LABEL}={name}", **_RAW
            ),
        )
        items: list[Json] = found["items"]
        return items

    def read_lease(self, name: str) -> Json | None:
        """A Lease. Role: get of leases."""
        return self._call(lambda: self._coordination.read_namespaced_lease(name, self.namespace, **_RAW))

    def create_lease(self, name: str, spec: Json) -> Json:
        """Make a Lease that the manifests should have made. Role: create of leases."""
        body = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": name},
            "spec": spec,
        }
        return self._found(
            f"the namespace {self.namespace}",
            lambda: self._coordination.create_namespaced_lease(self.namespace, body, **_RAW),
        )

    def replace_lease(self, lease: Json) -> Json:
        """Change a Lease, if it is still at the version that was read. Role: update of leases."""
        name = lease["metadata"]["name"]
        return self._found(
            f"the Lease {name}",
            lambda: self._coordination.replace_namespaced_lease(name, self.namespace, lease, **_RAW),
        )

    def forward(self, pod: str, port: int) -> Any:
        """A connection to a pod's port by way of the API server. Role: create of pods/portforward."""
        from kubernetes.stream import portforward

        core = self._client.CoreV1Api(self._client.ApiClient(self.configuration))  # it is bent while in use
        return portforward(
            core.connect_get_namespaced_pod_portforward, pod, self.namespace, ports=str(port)
        ).socket(port)

    @property
    def _apps(self) -> Any:
        return self._client.AppsV1Api(self._api)

    @property
    def _core(self) -> Any:
        return self._client.CoreV1Api(self._api)

    @property
    def _coordination(self) -> Any:
        return self._client.CoordinationV1Api(self._api)

    @property
    def _api(self) -> Any:
        if not hasattr(self._local, "api"):
            self._local.api = self._client.ApiClient(self.configuration)
        return self._local.api

    def _found(self, what: str, call: Callable[[], Any]) -> Json:
        """The answer, which must be there."""
        answer = self._call(call)
        if answer is None:
            raise InvalidInputError(
                FieldViolation(
                    what,
                    f"is not in the namespace {self.namespace} of {self.where}, or there is no such "
                    "namespace; give --namespace or --context, or apply the manifests",
                )
            )
        return answer

    def _call(self, call: Callable[[], Any]) -> Json | None:
        """The answer as JSON; None for 404. What may come right is asked again, for a while."""
        end = time.monotonic() + self._patience
        wait = 0.25
        while True:
            try:
                answer: Json = json.loads(call().data)
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
            return ServiceUnavailableError(
                f"{self.where} does not permit it: {reason}; see docs/promotion.md for the Role, or give "
                "another --context"
            )
        if status is not None and 400 <= status < 500 and status != 429:
            return MilongaError(f"{self.where} refused a request of ours ({status}): {reason}")
        return ServiceUnavailableError(
            f"{self.where} can't be reached: {reason}; start it, or give another --context"
        )


def connect_cluster(
    namespace: str, context: str | None = None, *, patience: float = PATIENCE_SECONDS
) -> Cluster:
    """The cluster that we run in, or the one that kubeconfig names.

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
                "KUBECONFIG, or give --context, or --target local",
            )
        ) from error
    configuration.retries = False  # ours know what may be asked again
    return Cluster(namespace, configuration=configuration, where=where, patience=patience)


def in_cluster() -> bool:
    """Whether we run in a pod, which reaches other pods and Services by itself."""
    return (_SERVICE_ACCOUNT / "token").exists()


def _status(error: Exception) -> int | None:
    """HTTP status; None where none came."""
    status = getattr(error, "status", None)
    return status if isinstance(status, int) and status else None


def _reason(error: Exception) -> str:
    """What the API server says, or why it says nothing."""
    try:
        body: Mapping[str, Any] = json.loads(getattr(error, "body", None) or "")
        return " ".join(str(body["message"]).split())[:300]
    except (ValueError, KeyError, TypeError):
        return " ".join(str(getattr(error, "reason", None) or error).split())[-300:]


_RAW: Final[Mapping[str, Any]] = {"_preload_content": False, "_request_timeout": TIMEOUT_SECONDS}
