"""Promotion on Kubernetes: the pin is an annotation of the pod template, which the Deployment rolls out."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from services.client import AudioClient, ModelVersion, ServiceOptions
from services.errors import MilongaError, ServiceUnavailableError, invalid
from training.cluster.namespace import Json
from training.promotion.errors import RolloutError
from training.promotion.target import Pin, Report, pinned_digest
from training.promotion.targets.cluster import Cluster
from training.promotion.targets.forwarding import Forwarding
from training.promotion.targets.locks import LEASE_SECONDS, LeaseLock, lease_lock
from training.promotion.targets.probing import (
    CALLER_ERRORS,
    CALLS,
    VERIFY_SECONDS,
    check_tls,
    poll_until,
    probe,
    served_model,
)
from training.promotion.targets.rollouts import (
    first_difference,
    is_complete,
    permanent_fault,
    pin_of,
    progress_summary,
    ready_pods,
)

GENERATION: Final = "generation"
"""Name of the Deployment that serves, and of its Service."""
CHALLENGER: Final = "challenger"
"""Name of the Deployment without traffic."""
GRPC_PORT: Final = "grpc"
"""Name of the containers' gRPC port."""
POLL_SECONDS: Final = 0.5


class KubernetesTarget:
    """The Deployments `generation` and `challenger` of a namespace. Implements `Target`."""

    def __init__(
        self,
        cluster: Cluster,
        *,
        report: Report,
        inside: bool,
        connection: ServiceOptions | None = None,
        generation_address: str | None = None,
        challenger_address: str | None = None,
        poll_seconds: float = POLL_SECONDS,
        verify_seconds: float = VERIFY_SECONDS,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        """Make no call yet.

        Args:
            cluster: the namespace.
            report: prints what is waited for.
            inside: whether this process can connect to pods and to the Service directly. Otherwise pods are
                reached through the API server.
            connection: how pods and Service are reached.
            generation_address: address of the Service from here. None: inside its name; outside the Service
                is not verified, only each pod.
            challenger_address: address of the challenger from here. None: its pod.
            poll_seconds: time between two reads of the Deployment and its pods.
            verify_seconds: see `VERIFY_SECONDS`.
            lease_seconds: see `LEASE_SECONDS`.
        """
        self._cluster, self._report, self._inside = cluster, report, inside
        self._connection = connection or ServiceOptions()
        self._generation_address, self._challenger_address = generation_address, challenger_address
        self._poll, self._verify, self._lease_seconds = poll_seconds, verify_seconds, lease_seconds
        self._forwarding: Forwarding | None = None

    @property
    def place(self) -> str:
        """See `Target`. Contains the Deployment's uid, since a cluster has no name of its own."""
        uid = self._cluster.deployment(GENERATION)["metadata"]["uid"]
        return f"kubernetes/{self._cluster.namespace}/{uid}"

    @property
    def serving(self) -> str:
        """See `Target`: a digest of the challenger's pod template without the pin."""
        template: Json = self._cluster.deployment(CHALLENGER)["spec"]["template"]["spec"]
        return f"kubernetes {hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:16]}"

    @contextmanager
    def lock(self) -> Iterator[LeaseLock]:
        """See `Target`. Changes are made only while the Lease is valid."""
        with lease_lock(self._cluster, self._report, seconds=self._lease_seconds) as lock:
            self._cluster.left = lock.left
            try:
                yield lock
            finally:
                self._cluster.left = None

    @property
    def idle(self) -> bool:
        """See `Target`."""
        return not self._cluster.deployment(GENERATION)["spec"].get("replicas", 1)

    def check_setup(self, *, challenger: bool) -> None:
        """See `Target`."""
        if self.idle:
            raise invalid(f"the Deployment {GENERATION}", "is scaled to 0; scale it to 1 or more")
        if not challenger:
            return
        found = first_difference(self._cluster.deployment(GENERATION), self._cluster.deployment(CHALLENGER))
        if found:
            raise invalid(
                f"the Deployment {CHALLENGER}",
                f"would not run what {GENERATION} does: {found}; apply the manifests, which define both",
            )

    def check_reach(self) -> None:
        """See `Target`: whether a ready pod answers, and then whether the Service does."""
        pods = ready_pods(self._cluster.pods(GENERATION))
        if not any(self._answers(pod) for pod in pods):
            return  # no pod is ready, or they are broken
        address = self._service(pods[0])
        if address is None:
            return
        try:
            poll_until(lambda: self._query_error(address), seconds=self._verify)
        except RolloutError as error:
            check_tls(address, self._connection.files, f"the Service at {address}")
            raise ServiceUnavailableError(
                f"the Service at {address} does not answer, and its pods do: {error}; correct "
                "--generation-address"
            ) from error

    def current_pin(self) -> Pin | None:
        """See `Target`."""
        return pin_of(self._cluster.deployment(GENERATION)["spec"]["template"])

    def start_challenger(self, pin: Pin, seconds: float) -> str:
        """See `Target`."""
        end = time.monotonic() + seconds
        self._stop_forwarding()
        # The manifest's strategy is Recreate: there may be no device for two challengers.
        self._cluster.apply_pin(CHALLENGER, pin)
        self._cluster.scale(CHALLENGER, 1)
        self._watch(CHALLENGER, pin, end, seconds)
        address = self._challenger_address or self._reach(ready_pods(self._cluster.pods(CHALLENGER)))
        query, digest = (lambda: self._query(address, self._forwarding)), pinned_digest(pin)
        poll_until(lambda: probe(query, digest, "the challenger"), seconds=self._verify)
        return address

    def clip_client(self, address: str, timeout: float) -> AudioClient:
        """See `Target`."""
        return self._connection.open(address, timeout=timeout, retries=4)

    def stop_challenger(self) -> None:
        """See `Target`."""
        self._stop_forwarding()
        self._cluster.scale(CHALLENGER, 0)

    def set_pin(self, pin: Pin | None, seconds: float) -> None:
        """See `Target`."""
        self._cluster.apply_pin(GENERATION, pin)

    def wait(self, pin: Pin, seconds: float) -> None:
        """See `Target`."""
        self._watch(GENERATION, pin, time.monotonic() + seconds, seconds)

    def verify(self, digest: str) -> None:
        """See `Target`. Each round probes the pods that exist then."""
        poll_until(lambda: self._pods_fault(digest), seconds=self._verify)
        pods = ready_pods(self._cluster.pods(GENERATION))
        address = self._generation_address if not pods else self._service(pods[0])
        if address is not None:
            poll_until(
                lambda: probe(lambda: self._query(address), digest, f"the Service at {address}"),
                calls=CALLS,
                seconds=self._verify,
            )

    def _pods_fault(self, digest: str) -> str:
        pods = ready_pods(self._cluster.pods(GENERATION))
        if not pods:
            return f"no pod of the Deployment {GENERATION} is ready"
        for pod in pods:
            with self._reached(pod) as (_, query):
                if fault := probe(query, digest, _name(pod)):
                    return fault
        return ""

    def _answers(self, pod: Json) -> bool:
        """Return whether a pod answers. Raises if the caller is at fault."""
        with self._reached(pod) as (address, query):
            try:
                query()
            except CALLER_ERRORS:
                raise
            except MilongaError:
                check_tls(address, self._connection.files, _name(pod))
                return False
        return True

    def _query_error(self, address: str) -> str:
        try:
            self._query(address)
        except CALLER_ERRORS:
            raise
        except MilongaError as error:
            return str(error)
        return ""

    @contextmanager
    def _reached(self, pod: Json) -> Iterator[tuple[str, Callable[[], ModelVersion]]]:
        """Yield an address of a pod, and a function that queries it."""
        if self._inside:
            address = _pod_address(pod)
            yield address, lambda: self._query(address)
        else:
            with self._forward(pod) as forwarding:
                yield forwarding.address, lambda: self._query(forwarding.address, forwarding)

    def _query(self, address: str, forwarding: Forwarding | None = None) -> ModelVersion:
        """Return what is served. Raises the cluster's error where the forwarding failed."""
        try:
            return served_model(address, self._connection)
        except MilongaError as error:
            if forwarding is not None and isinstance(forwarding.error, CALLER_ERRORS):
                raise forwarding.error from error
            raise

    def _service(self, pod: Json) -> str | None:
        """Return the Service's address; None if it can't be reached from here."""
        if self._generation_address is None and self._inside:
            return f"{GENERATION}.{self._cluster.namespace}:{_port(pod)}"
        return self._generation_address

    def _watch(self, name: str, pin: Pin, end: float, seconds: float) -> None:
        """Return when all pods of a Deployment have `pin` and are available. Raises `RolloutError`."""
        while True:
            deployment, pods = self._cluster.deployment(name), self._cluster.pods(name)
            if pin_of(deployment["spec"]["template"]) != pin:
                raise RolloutError(f"somebody else changed the pin of the Deployment {name}")
            if not deployment["spec"].get("replicas", 1):
                raise RolloutError(f"the Deployment {name} is scaled to 0; scale it to 1 or more")
            fault = permanent_fault(pods, pin)
            if fault is not None:
                raise RolloutError(f"the Deployment {name} failed: {fault}")
            if is_complete(deployment):
                return
            if time.monotonic() > end:
                raise RolloutError(
                    f"the Deployment {name} is not ready after {seconds:.0f} s: "
                    f"{progress_summary(deployment, pods, pin)}; "
                    "give a longer --deadline if that is all it needs"
                )
            time.sleep(self._poll)

    def _reach(self, pods: Sequence[Json]) -> str:
        """Return an address of the challenger's pod."""
        if not pods:
            raise RolloutError("the challenger's pod was deleted as soon as it was ready")
        if self._inside:
            return _pod_address(pods[0])
        self._forwarding = self._forward(pods[0])
        return self._forwarding.address

    def _forward(self, pod: Json) -> Forwarding:
        name, port = pod["metadata"]["name"], _port(pod)
        return Forwarding(lambda: self._cluster.forward(name, port))

    def _stop_forwarding(self) -> None:
        if self._forwarding is not None:
            self._forwarding.close()
            self._forwarding = None


def _name(pod: Json) -> str:
    return f"pod {pod['metadata']['name']}"


def _pod_address(pod: Json) -> str:
    ip = pod["status"]["podIP"]
    return f"[{ip}]:{_port(pod)}" if ":" in ip else f"{ip}:{_port(pod)}"


def _port(pod: Json) -> int:
    """Return the container port named grpc."""
    for container in pod["spec"]["containers"]:
        for port in container.get("ports") or ():
            if port.get("name") == GRPC_PORT:
                return int(port["containerPort"])
    raise invalid(f"pod {pod['metadata']['name']}", f"has no port named {GRPC_PORT}; add one to the manifest")
