"""Promotion on Kubernetes: the pin is an annotation of the pod template, and the Deployment does the rest."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from services.client import TLS, AudioClient, ModelVersion
from services.errors import FieldViolation, InvalidInputError, MilongaError, ServiceUnavailableError
from training.cluster.namespace import Json
from training.promotion.errors import RolloutError
from training.promotion.target import Pin, Tell, digest_of
from training.promotion.targets.asking import (
    CALLS,
    OURS,
    VERIFY_SECONDS,
    check_tls,
    served_model,
    settle,
    wrong_answer,
)
from training.promotion.targets.cluster import Cluster
from training.promotion.targets.forwarding import Forwarding
from training.promotion.targets.locks import LEASE_SECONDS, LeaseLock, lease_lock
from training.promotion.targets.rollouts import (
    difference_of,
    fault_of,
    is_complete,
    pin_of,
    ready_pods,
    story,
)

GENERATION: Final = "generation"
"""Name of the Deployment that serves, and of its Service."""
CHALLENGER: Final = "challenger"
"""Name of the Deployment that gets no traffic."""
GRPC_PORT: Final = "grpc"
"""Name of the containers' port."""
POLL_SECONDS: Final = 0.5


class KubernetesTarget:
    """The Deployments `generation` and `challenger` of a namespace. See `Target`."""

    def __init__(
        self,
        cluster: Cluster,
        *,
        tell: Tell,
        inside: bool,
        tls: TLS | None = None,
        generation_address: str | None = None,
        challenger_address: str | None = None,
        poll_seconds: float = POLL_SECONDS,
        verify_seconds: float = VERIFY_SECONDS,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        """Nothing is called yet.

        Args:
            cluster: its namespace.
            tell: says what is waited for.
            inside: whether pods' addresses and the Service's name can be reached from here. Otherwise pods
                are reached by way of the API server.
            tls: how pods are spoken to.
            generation_address: of the Service, as it can be reached from here. None: inside its name, outside
                it is not asked, and each pod is.
            challenger_address: of the challenger, likewise. None: its pod.
            poll_seconds: time between two looks at the Deployment and its pods.
            verify_seconds: see `VERIFY_SECONDS`.
            lease_seconds: see `LEASE_SECONDS`.
        """
        self._cluster, self._tell, self._tls, self._inside = cluster, tell, tls, inside
        self._generation_address, self._challenger_address = generation_address, challenger_address
        self._poll, self._verify, self._lease_seconds = poll_seconds, verify_seconds, lease_seconds
        self._forwarding: Forwarding | None = None

    @property
    def place(self) -> str:
        """See `Target`. By the Deployment's own id: a cluster has other names from elsewhere."""
        uid = self._cluster.deployment(GENERATION)["metadata"]["uid"]
        return f"kubernetes/{self._cluster.namespace}/{uid}"

    @property
    def serving(self) -> str:
        """See `Target`: all of the challenger's pods but the pin."""
        template: Json = self._cluster.deployment(CHALLENGER)["spec"]["template"]["spec"]
        return f"kubernetes {hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:16]}"

    @contextmanager
    def lock(self) -> Iterator[LeaseLock]:
        """See `Target`. Changes are made within the time that the Lease is good for."""
        with lease_lock(self._cluster, self._tell, seconds=self._lease_seconds) as lock:
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
            raise InvalidInputError(
                FieldViolation(f"the Deployment {GENERATION}", "is scaled to 0; scale it to 1 or more")
            )
        if not challenger:
            return
        found = difference_of(self._cluster.deployment(GENERATION), self._cluster.deployment(CHALLENGER))
        if found:
            raise InvalidInputError(
                FieldViolation(
                    f"the Deployment {CHALLENGER}",
                    f"would not run what {GENERATION} does: {found}; apply the manifests, which have both",
                )
            )

    def check_reach(self) -> None:
        """See `Target`: whether one ready pod can be asked, and then whether the Service can."""
        pods = ready_pods(self._cluster.pods(GENERATION))
        if not any(self._answers(pod) for pod in pods):
            return  # there is none, or they are broken
        address = self._service(pods[0])
        if address is None:
            return
        try:
            settle(lambda: self._silence(address), seconds=self._verify)
        except RolloutError as error:
            check_tls(address, self._tls, f"the Service at {address}")
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
        self._let_go()
        # In this order, and replaced, not rolled, as the manifest has it: there may be no device for two.
        self._cluster.apply_pin(CHALLENGER, pin)
        self._cluster.scale(CHALLENGER, 1)
        self._watch(CHALLENGER, pin, end, seconds)
        address = self._challenger_address or self._reach(ready_pods(self._cluster.pods(CHALLENGER)))
        ask, digest = (lambda: self._ask(address, self._forwarding)), digest_of(pin)
        settle(lambda: wrong_answer(ask, digest, "the challenger"), seconds=self._verify)
        return address

    def clip_client(self, address: str, timeout: float) -> AudioClient:
        """See `Target`."""
        return AudioClient(address, tls=self._tls, timeout=timeout, retries=4)

    def stop_challenger(self) -> None:
        """See `Target`."""
        self._let_go()
        self._cluster.scale(CHALLENGER, 0)

    def set_pin(self, pin: Pin | None, seconds: float) -> None:
        """See `Target`."""
        self._cluster.apply_pin(GENERATION, pin)

    def wait(self, pin: Pin, seconds: float) -> None:
        """See `Target`."""
        self._watch(GENERATION, pin, time.monotonic() + seconds, seconds)

    def verify(self, digest: str) -> None:
        """See `Target`. Pods may come and go meanwhile: each round asks those that there are."""
        settle(lambda: self._pods_fault(digest), seconds=self._verify)
        pods = ready_pods(self._cluster.pods(GENERATION))
        address = self._generation_address if not pods else self._service(pods[0])
        if address is not None:
            settle(
                lambda: wrong_answer(lambda: self._ask(address), digest, f"the Service at {address}"),
                calls=CALLS,
                seconds=self._verify,
            )

    def _pods_fault(self, digest: str) -> str:
        pods = ready_pods(self._cluster.pods(GENERATION))
        if not pods:
            return f"no pod of the Deployment {GENERATION} is ready"
        for pod in pods:
            with self._reached(pod) as (_, ask):
                if fault := wrong_answer(ask, digest, _name(pod)):
                    return fault
        return ""

    def _answers(self, pod: Json) -> bool:
        """Whether a pod says what it serves. Raises where it does not because of us."""
        with self._reached(pod) as (address, ask):
            try:
                ask()
            except OURS:
                raise
            except MilongaError:
                check_tls(address, self._tls, _name(pod))
                return False
        return True

    def _silence(self, address: str) -> str:
        try:
            self._ask(address)
        except OURS:
            raise
        except MilongaError as error:
            return str(error)
        return ""

    @contextmanager
    def _reached(self, pod: Json) -> Iterator[tuple[str, Callable[[], ModelVersion]]]:
        """Where a pod is spoken to, and what asks it."""
        if self._inside:
            address = _pod_address(pod)
            yield address, lambda: self._ask(address)
        else:
            with self._forward(pod) as forwarding:
                yield forwarding.address, lambda: self._ask(forwarding.address, forwarding)

    def _ask(self, address: str, forwarding: Forwarding | None = None) -> ModelVersion:
        """What is served. Raises the cluster's error where that is why nothing answers."""
        try:
            return served_model(address, self._tls)
        except MilongaError as error:
            if forwarding is not None and isinstance(forwarding.error, OURS):
                raise forwarding.error from error
            raise

    def _service(self, pod: Json) -> str | None:
        """The Service's address, where it can be reached."""
        if self._generation_address is None and self._inside:
            return f"{GENERATION}.{self._cluster.namespace}:{_port(pod)}"
        return self._generation_address

    def _watch(self, name: str, pin: Pin, end: float, seconds: float) -> None:
        """Return when all pods of a Deployment are of `pin` and available."""
        while True:
            deployment, pods = self._cluster.deployment(name), self._cluster.pods(name)
            if pin_of(deployment["spec"]["template"]) != pin:
                raise RolloutError(f"the pin of the Deployment {name} was changed by somebody else meanwhile")
            if not deployment["spec"].get("replicas", 1):
                raise RolloutError(f"the Deployment {name} is scaled to 0; scale it to 1 or more")
            fault = fault_of(pods, pin)
            if fault is not None:
                raise RolloutError(f"the Deployment {name} does not come up: {fault}")
            if is_complete(deployment):
                return
            if time.monotonic() > end:
                raise RolloutError(
                    f"the Deployment {name} is not ready after {seconds:.0f} s: "
                    f"{story(deployment, pods, pin)}; give a longer --deadline if that is all it needs"
                )
            time.sleep(self._poll)

    def _reach(self, pods: Sequence[Json]) -> str:
        """An address of the one challenger."""
        if not pods:
            raise RolloutError("the challenger's pod went away as soon as it was ready")
        if self._inside:
            return _pod_address(pods[0])
        self._forwarding = self._forward(pods[0])
        return self._forwarding.address

    def _forward(self, pod: Json) -> Forwarding:
        name, port = pod["metadata"]["name"], _port(pod)
        return Forwarding(lambda: self._cluster.forward(name, port))

    def _let_go(self) -> None:
        if self._forwarding is not None:
            self._forwarding.close()
            self._forwarding = None


def _name(pod: Json) -> str:
    return f"pod {pod['metadata']['name']}"


def _pod_address(pod: Json) -> str:
    ip = pod["status"]["podIP"]
    return f"[{ip}]:{_port(pod)}" if ":" in ip else f"{ip}:{_port(pod)}"


def _port(pod: Json) -> int:
    """The port that is named grpc."""
    for container in pod["spec"]["containers"]:
        for port in container.get("ports") or ():
            if port.get("name") == GRPC_PORT:
                return int(port["containerPort"])
    raise InvalidInputError(
        FieldViolation(f"pod {pod['metadata']['name']}", f"has no port named {GRPC_PORT}; name it")
    )
