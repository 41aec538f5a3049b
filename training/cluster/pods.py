"""What the API says of pods, in words. Pure."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

Json = Mapping[str, Any]

_MESSAGE_CHARACTERS: Final = 400


def containers(pod: Json) -> Iterator[tuple[str, Json]]:
    """Each container's status, with its kind."""
    status = pod.get("status") or {}
    for one in status.get("initContainerStatuses") or ():
        yield "init container", one
    for one in status.get("containerStatuses") or ():
        yield "container", one


def how_it_ended(ended: Json) -> str:
    """Exit code, reason and last words of a container's state ``terminated``."""
    reason = ended.get("reason", "Error")
    what = f"exit code {ended['exitCode']}" + ("" if reason == "Error" else f" ({reason})")
    message = _last_words(ended.get("message", ""))
    return f"{what}: {message}" if message else what


def _last_words(log: str) -> str:
    """Of the end of a log: the refusal, if there is one, else the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    refusals = [line for line in lines if line.startswith("error: ")]
    return short((refusals or lines or [""])[-1].removeprefix("error: "))


def waits_for(pod: Json) -> str:
    """What a pod that is not ready waits for."""
    scheduled = condition(pod, "PodScheduled")
    if scheduled.get("status") == "False":
        return f"{scheduled.get('reason', 'not scheduled')}: {short(scheduled.get('message', ''))}"
    for kind, status in containers(pod):
        state = status.get("state") or {}
        if waiting := state.get("waiting"):
            why = f"{waiting.get('reason', '')} {short(waiting.get('message', ''))}".strip()
            return f"{kind} {status['name']} waits: {why}"
        if kind == "init container" and "running" in state:
            return f"{kind} {status['name']} is running"
        if kind == "container" and not status.get("ready"):
            return f"{kind} {status['name']} is running and not ready"
    return str((pod.get("status") or {}).get("phase", "not known"))


def condition(thing: Json, kind: str) -> Json:
    """The condition of that type of a pod, or of another object; empty where it has none."""
    conditions = (thing.get("status") or {}).get("conditions") or ()
    return next((one for one in conditions if one.get("type") == kind), {})


def short(text: str) -> str:
    """A message as one line that is not too long."""
    return " ".join(str(text).split())[:_MESSAGE_CHARACTERS]
