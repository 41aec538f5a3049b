"""State of a rollout, from the API's JSON of a Deployment and its pods. Pure functions."""

from collections.abc import Sequence
from typing import Final

from training.cluster.namespace import Json
from training.cluster.pods import condition, container_statuses, exit_summary, shorten, waiting_reason
from training.promotion.target import Pin
from training.promotion.targets.cluster import PIN_ANNOTATION

HOPELESS: Final = (
    *("ImagePullBackOff", "ErrImageNeverPull", "InvalidImageName", "ImageInspectError"),
    *("CreateContainerConfigError", "CreateContainerError", "RunContainerError"),
)
"""Waiting reasons of containers that do not resolve by themselves."""
TRANSIENT_EXIT_CODE: Final = 3
"""Exit code of `milonga` where a service, usually the registry, does not answer: a retry may help."""
TRIES: Final = 3
"""Starts of an init container that may end with that code."""

_RUNS: Final = ("image", "command", "args", "env", "envFrom", "resources")
"""Fields of a container that define what it runs."""


def is_complete(deployment: Json) -> bool:
    """Return whether all pods are of the newest template and available, as `kubectl rollout status` does."""
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
    """Return the pods with the pin that are not being deleted."""
    return [pod for pod in pods if pin_of(pod) == pin and not pod["metadata"].get("deletionTimestamp")]


def ready_pods(pods: Sequence[Json]) -> list[Json]:
    """Return the pods that receive traffic."""
    return [
        pod
        for pod in pods
        if not pod["metadata"].get("deletionTimestamp") and condition(pod, "Ready").get("status") == "True"
    ]


def pin_of(thing: Json) -> Pin | None:
    """Return the pin of a pod, or of a pod template; None without one."""
    return (thing["metadata"].get("annotations") or {}).get(PIN_ANNOTATION) or None


def permanent_fault(pods: Sequence[Json], pin: Pin) -> str | None:
    """Return why a pod of `pin` has failed for good; None if none has."""
    for pod in pinned_pods(pods, pin):
        for kind, status in container_statuses(pod):
            if text := _fault(kind, status):
                return f"pod {pod['metadata']['name']}, {kind} {status['name']}: {text}"
    return None


def progress_summary(deployment: Json, pods: Sequence[Json], pin: Pin) -> str:
    """Return how many pods are ready, and why the others are not."""
    status, wanted = deployment.get("status") or {}, deployment["spec"].get("replicas", 1)
    own = pinned_pods(pods, pin)
    waiting = [
        f"pod {pod['metadata']['name']}: {waiting_reason(pod)}" for pod in own if not ready_pods([pod])
    ]
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


def first_difference(generation: Json, challenger: Json) -> str:
    """Return the first difference between what the containers of two Deployments run; empty without one."""
    for kind in ("initContainers", "containers"):
        found, expected = _containers(challenger, kind), _containers(generation, kind)
        if list(found) != list(expected):
            return f"{kind} {', '.join(found) or 'none'}, expected {', '.join(expected) or 'none'}"
        for name, container in expected.items():
            for field in sorted({*container, *found[name]}):
                value, wanted = found[name].get(field), container.get(field)
                if value != wanted:
                    return f"{field} of {name} {shorten(_shown(value))}, expected {shorten(_shown(wanted))}"
    return ""


def _containers(deployment: Json, kind: str) -> dict[str, dict[str, object]]:
    """Return each container's fields, and its variables by name. The Deployment's name is replaced."""
    own, spec = deployment["metadata"]["name"], deployment["spec"]["template"]["spec"]
    result: dict[str, dict[str, object]] = {}
    for container in spec.get(kind) or ():
        fields: dict[str, object] = {f: container[f] for f in _RUNS if f != "env" and container.get(f)}
        for variable in container.get("env") or ():
            value = variable.get("value") or variable.get("valueFrom") or ""
            if isinstance(value, dict) and value.get("resourceFieldRef", {}).get("containerName") == own:
                value = {"resourceFieldRef": {**value["resourceFieldRef"], "containerName": "its own"}}
            fields[f"env {variable['name']}"] = value
        name = container.get("name", "")
        result["the main container" if name == own else name] = fields
    return result


def _shown(value: object) -> str:
    return "is missing" if value is None else f"is {value}"


def _fault(kind: str, status: Json) -> str | None:
    state = status.get("state") or {}
    waiting = state.get("waiting") or {}
    if waiting.get("reason") in HOPELESS:
        return f"{waiting['reason']}: {shorten(waiting.get('message', ''))}"
    ended = state.get("terminated") or {}
    if waiting:
        # Only of a waiting container: a running one may have ended for an unrelated reason, weeks ago.
        ended = (status.get("lastState") or {}).get("terminated") or {}
    if not ended.get("exitCode"):
        return None
    # Wrong input and refused weights don't change by a retry; other errors may.
    if kind == "init container":
        hopeless = ended["exitCode"] != TRANSIENT_EXIT_CODE or status.get("restartCount", 0) >= TRIES
    else:
        hopeless = ended["exitCode"] == 2 or waiting.get("reason") == "CrashLoopBackOff"
    return f"ended with {exit_summary(ended)}" if hopeless else None
