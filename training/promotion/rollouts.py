"""How a rollout stands, from what the API says of a Deployment and its pods. Pure."""

from collections.abc import Sequence
from typing import Final

from training.pods import Json, condition, containers, how_it_ended, short, waits_for
from training.promotion.cluster import PIN_ANNOTATION
from training.promotion.target import Pin

HOPELESS: Final = (
    *("ImagePullBackOff", "ErrImageNeverPull", "InvalidImageName", "ImageInspectError"),
    *("CreateContainerConfigError", "CreateContainerError", "RunContainerError"),
)
"""Reasons of a container that waits for what will not come by itself."""
TRANSIENT_EXIT_CODE: Final = 3
"""Exit code of `milonga` where a service, above all the registry, does not answer: it may come back."""
TRIES: Final = 3
"""Starts of a container that may fail so, or for a reason that is not known."""


def is_complete(deployment: Json) -> bool:
    """Whether all pods are of the newest template, and available: kubectl's own rule."""
    wanted, status = deployment["spec"].get("replicas", 1), deployment.get("status") or {}
    if status.get("observedGeneration", 0) < deployment["metadata"]["generation"]:
        return False
    updated = status.get("updatedReplicas", 0)
    return bool(
        updated >= wanted
        and status.get("replicas", 0) <= updated
        and status.get("availableReplicas", 0) >= updated
    )


def pinned_pods(pods: Sequence[Json], pin: Pin) -> list[Json]:
    """Those that were made with the pin and are not being taken down."""
    return [pod for pod in pods if pin_of(pod) == pin and not pod["metadata"].get("deletionTimestamp")]


def ready_pods(pods: Sequence[Json]) -> list[Json]:
    """Those that get traffic."""
    return [
        pod
        for pod in pods
        if not pod["metadata"].get("deletionTimestamp") and condition(pod, "Ready").get("status") == "True"
    ]


def pin_of(thing: Json) -> Pin | None:
    """The pin in the metadata of a pod, or of a pod template."""
    return (thing["metadata"].get("annotations") or {}).get(PIN_ANNOTATION) or None


def fault_of(pods: Sequence[Json], pin: Pin) -> str | None:
    """Why the pods of `pin` will never be ready, if that can be told already."""
    for pod in pinned_pods(pods, pin):
        for kind, status in containers(pod):
            if text := _fault(kind, status):
                return f"pod {pod['metadata']['name']}, {kind} {status['name']}: {text}"
    return None


def story(deployment: Json, pods: Sequence[Json], pin: Pin) -> str:
    """How far it is, and what each pod that is not ready waits for."""
    status, wanted = deployment.get("status") or {}, deployment["spec"].get("replicas", 1)
    own = pinned_pods(pods, pin)
    waiting = [f"pod {pod['metadata']['name']}: {waits_for(pod)}" for pod in own if not ready_pods([pod])]
    progress = next(
        (
            one.get("message", "")
            for one in status.get("conditions") or ()
            if (one.get("type") == "Progressing" and one.get("status") == "False")
            or one.get("type") == "ReplicaFailure"
        ),
        "",
    )
    parts = [f"{len(ready_pods(own))} of {wanted} new pods ready", *waiting[:3]]
    return "; ".join([*parts, progress] if progress else parts)


def _fault(kind: str, status: Json) -> str | None:
    state = status.get("state") or {}
    waiting = state.get("waiting") or {}
    if waiting.get("reason") in HOPELESS:
        return f"{waiting['reason']}: {short(waiting.get('message', ''))}"
    ended = state.get("terminated") or (status.get("lastState") or {}).get("terminated") or {}
    if not ended.get("exitCode"):
        return None
    code, restarts = ended["exitCode"], status.get("restartCount", 0)
    # Wrong input and refused weights stay so; anything else gets another try or two.
    hopeless = code == 2 or (kind == "init container" and code != TRANSIENT_EXIT_CODE)
    if hopeless or restarts >= TRIES or (kind == "container" and waiting.get("reason") == "CrashLoopBackOff"):
        return f"ended with {how_it_ended(ended)}"
    return None
