"""Promotion on Kubernetes: the pin is an annotation of the pod template, and the Deployment does the rest."""

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Final

from services.client import TLS
from services.errors import FieldViolation, InvalidInputError
from training.pods import Json
from training.promotion.asking import CALLS, VERIFY_SECONDS, check_digest, served_model
from training.promotion.cluster import Cluster
from training.promotion.errors import RolloutError
from training.promotion.forwarding import Forwarding
from training.promotion.locks import LEASE_SECONDS, LeaseLock, lease_lock
from training.promotion.rollouts import fault_of, is_complete, pin_of, ready_pods, story
from training.promotion.target import Pin, Tell, digest_of

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

    def lock(self) -> AbstractContextManager[LeaseLock]:
        """See `Target`."""
        return lease_lock(self._cluster, self._tell, seconds=self._lease_seconds)

    def current_pin(self) -> Pin | None:
        """See `Target`."""
        return pin_of(self._template(GENERATION))

    def start_challenger(self, pin: Pin, seconds: float) -> str:
        """See `Target`."""
        end = time.monotonic() + seconds
        self._let_go()
        # In this order, and replaced, not rolled, as the manifest has it: there may be no device for two.
        self._cluster.apply_pin(CHALLENGER, pin)
        self._cluster.scale(CHALLENGER, 1)
        self._watch(CHALLENGER, pin, end, seconds)
        address = self._challenger_address or self._reach(ready_pods(self._cluster.pods(CHALLENGER)))
        self._check(address, digest_of(pin), "the challenger")
        return address

    def stop_challenger(self) -> None:
        """See `Target`."""
        self._let_go()
        self._cluster.scale(CHALLENGER, 0)

    def roll_out(self, pin: Pin | None, seconds: float) -> None:
        """See `Target`."""
        end = time.monotonic() + seconds
        self._cluster.apply_pin(GENERATION, pin)
        if pin is not None:
            self._watch(GENERATION, pin, end, seconds)

    def verify(self, digest: str) -> None:
        """See `Target`. Pods may come and go meanwhile: each round asks those that there are."""
        end = time.monotonic() + self._verify
        while True:
            pods = ready_pods(self._cluster.pods(GENERATION))
            try:
                if not pods:
                    raise RolloutError(f"no pod of the Deployment {GENERATION} is ready")
                for pod in pods:
                    self._check_pod(pod, digest)
                break
            except RolloutError:
                if time.monotonic() > end:
                    raise
                time.sleep(self._poll)
        address = self._generation_address
        if address is None and self._inside:
            address = f"{GENERATION}.{self._cluster.namespace}:{_port(pods[0])}"
        if address is not None:
            self._check(address, digest, f"the Service at {address}", calls=CALLS)

    def _check_pod(self, pod: Json, digest: str) -> None:
        who = f"pod {pod['metadata']['name']}"
        if self._inside:
            self._check(_pod_address(pod), digest, who, seconds=0)
        else:
            with self._forward(pod) as forwarding:
                self._check(forwarding.address, digest, who, seconds=0)

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

    def _template(self, name: str) -> Json:
        template: Json = self._cluster.deployment(name)["spec"]["template"]
        return template

    def _check(
        self, address: str, digest: str, who: str, *, calls: int = 1, seconds: float | None = None
    ) -> None:
        check_digest(
            lambda: served_model(address, self._tls),
            *(digest, who),
            calls=calls,
            seconds=self._verify if seconds is None else seconds,
        )

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
