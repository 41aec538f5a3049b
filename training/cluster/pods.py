"""Descriptions of pods in words, from the API's JSON. Pure functions."""

from collections.abc import Iterator
from typing import Final

from training.cluster.namespace import Json

_MESSAGE_CHARACTERS: Final = 400


def container_statuses(pod: Json) -> Iterator[tuple[str, Json]]:
    """Yield kind (``init container`` or ``container``) and status of each container."""
    status = pod.get("status") or {}
    for one in status.get("initContainerStatuses") or ():
        yield "init container", one
    for one in status.get("containerStatuses") or ():
        yield "container", one


def exit_summary(terminated: Json) -> str:
    """Return exit code, reason and last error line of a container's state ``terminated``."""
    reason = terminated.get("reason", "Error")
    what = f"exit code {terminated['exitCode']}" + ("" if reason == "Error" else f" ({reason})")
    message = _error_line(terminated.get("message", ""))
    return f"{what}: {message}" if message else what


def _error_line(log: str) -> str:
    """Return the last line of `log` that begins with ``error:``, else its last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return shorten((errors or lines or [""])[-1].removeprefix("error: "))


def waiting_reason(pod: Json) -> str:
    """Return why a pod is not ready."""
    scheduled = condition(pod, "PodScheduled")
    if scheduled.get("status") == "False":
        return f"{scheduled.get('reason', 'not scheduled')}: {shorten(scheduled.get('message', ''))}"
    for kind, status in container_statuses(pod):
        state = status.get("state") or {}
        if waiting := state.get("waiting"):
            why = f"{waiting.get('reason', '')} {shorten(waiting.get('message', ''))}".strip()
            return f"{kind} {status['name']} waits: {why}"
        if kind == "init container" and "running" in state:
            return f"{kind} {status['name']} is running"
        if kind == "container" and not status.get("ready"):
            return f"{kind} {status['name']} is running and not ready"
    return str((pod.get("status") or {}).get("phase", "not known"))


def condition(thing: Json, kind: str) -> Json:
    """Return the condition of type `kind` of a pod or another object; an empty dict if it has none."""
    conditions = (thing.get("status") or {}).get("conditions") or ()
    return next((one for one in conditions if one.get("type") == kind), {})


def shorten(text: str) -> str:
    """Return `text` in one line of at most 400 characters."""
    return " ".join(str(text).split())[:_MESSAGE_CHARACTERS]
