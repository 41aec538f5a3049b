"""The calls of the Kubernetes API that a promotion makes, by the official client, as plain JSON.

Each docstring names the right that the Role must grant; no other call is made.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final

from services.errors import ServiceUnavailableError
from training.cluster.namespace import PATIENCE_SECONDS, RAW, ForbiddenError, Json, Namespace, connect
from training.promotion.target import Pin

PIN_ANNOTATION: Final = "milonga.dev/pin"
"""Annotation of the pod template, and so of its pods, that promotion owns."""
FIELD_MANAGER: Final = "milonga-promote"
"""Field manager of that annotation in server-side apply."""
NAME_LABEL: Final = "app.kubernetes.io/name"

_APPLY: Final = "application/apply-patch+yaml"
_MERGE: Final = "application/merge-patch+json"
_LEASE: Final[Mapping[str, Any]] = {**RAW, "_request_timeout": (3.0, 5.0)}


class Cluster(Namespace):
    """The calls of a promotion in one namespace."""

    RIGHTS: ClassVar[str] = "docs/promotion.md"

    left: Callable[[], float] | None = None
    """Seconds for which the lock is still valid, and that a change may take. Raises where there are none."""

    def deployment(self, name: str) -> Json:
        """Return a Deployment. Role: get of deployments."""
        return self._found(
            f"the Deployment {name}",
            lambda: self._apps.read_namespaced_deployment(name, self.namespace, **RAW),
        )

    def apply_pin(self, name: str, pin: Pin | None) -> Json:
        """Set or remove the pin of a Deployment's pods, by server-side apply; return the Deployment.

        No manifest contains the annotation, so applying the manifests again leaves it. Role: patch of
        deployments.
        """
        annotations = {PIN_ANNOTATION: pin} if pin else {}
        body = {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": name, "namespace": self.namespace},
            "spec": {"template": {"metadata": {"annotations": annotations}}},
        }
        return self._changed(
            f"the Deployment {name}",
            lambda raw: self._apps.patch_namespaced_deployment(
                name,
                self.namespace,
                body,
                field_manager=FIELD_MANAGER,
                force=True,
                _content_type=_APPLY,
                **raw,
            ),
        )

    def scale(self, name: str, replicas: int) -> Json:
        """Set a Deployment's replicas; return its scale. Role: patch of deployments/scale."""
        return self._changed(
            f"the Deployment {name}",
            lambda raw: self._apps.patch_namespaced_deployment_scale(
                *(name, self.namespace, {"spec": {"replicas": replicas}}),
                field_manager=FIELD_MANAGER,
                _content_type=_MERGE,
                **raw,
            ),
        )

    def pods(self, name: str) -> list[Json]:
        """Return the pods with the name as their label. Role: list of pods."""
        found = self._found(
            self.title,
            lambda: self._core.list_namespaced_pod(
                self.namespace, label_selector=f"{NAME_LABEL}={name}", **RAW
            ),
        )
        items: list[Json] = found["items"]
        return items

    def read_lease(self, name: str) -> Json | None:
        """Return a Lease; None if there is none. Role: get of leases."""
        return self._call(lambda: self._coordination.read_namespaced_lease(name, self.namespace, **RAW))

    def create_lease(self, name: str, spec: Json) -> Json:
        """Create a Lease that the manifests lack; return it. Role: create of leases."""
        body = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": name},
            "spec": spec,
        }
        return self._found(
            self.title,
            lambda: self._coordination.create_namespaced_lease(self.namespace, body, **_LEASE),
            patience=0,
        )

    def replace_lease(self, lease: Json) -> Json:
        """Replace a Lease, if it was not changed since it was read; return it. Role: update of leases.

        Not retried: the lock decides when to try again.
        """
        name = lease["metadata"]["name"]
        return self._found(
            f"the Lease {name}",
            lambda: self._coordination.replace_namespaced_lease(name, self.namespace, lease, **_LEASE),
            patience=0,
        )

    def forward(self, pod: str, port: int) -> Any:
        """Connect to a pod's port through the API server; return the socket.

        Role: get and create of pods/portforward.
        """
        from kubernetes.stream import portforward

        core = self._client.CoreV1Api(
            self._client.ApiClient(self.configuration)
        )  # the call patches its client
        try:
            return portforward(
                core.connect_get_namespaced_pod_portforward, pod, self.namespace, ports=str(port)
            ).socket(port)
        except Exception as error:
            failure = self._explained(error)
            if isinstance(failure, ForbiddenError):
                failure = ForbiddenError(f"pods/portforward of pod {pod}: {failure}")
            raise failure or ServiceUnavailableError(f"pod {pod} is gone") from error

    def _changed(self, what: str, call: Callable[[Mapping[str, Any]], Any]) -> Json:
        """Return the answer to a change, which is neither sent nor retried after the lock has expired."""
        left = self.left
        if left is None:
            return self._found(what, lambda: call(RAW))

        def within() -> Any:
            seconds = left()
            connecting = min(5.0, seconds / 4)
            timeout = (connecting, min(20.0, seconds - connecting))
            return call({**RAW, "_request_timeout": timeout})

        return self._found(what, within, patience=left())

    @property
    def _apps(self) -> Any:
        return self._client.AppsV1Api(self._api)

    @property
    def _coordination(self) -> Any:
        return self._client.CoordinationV1Api(self._api)


def connect_cluster(
    namespace: str, context: str | None = None, *, patience: float = PATIENCE_SECONDS
) -> Cluster:
    """Connect to the cluster of this pod, or to the one that kubeconfig names. Raises as `connect`."""
    return connect(Cluster, namespace, context, patience=patience, otherwise=", or --target local")
