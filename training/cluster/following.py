"""What becomes of a Job, told as it comes about, with the log of its pod, until it is over."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from services.errors import FieldViolation, InvalidInputError, MilongaError
from training.cluster.jobs import Jobs
from training.cluster.namespace import ForbiddenError
from training.cluster.pods import Json, condition, containers, how_it_ended, short, waits_for

POLL_SECONDS: Final = 1.0
"""Between two looks at a Job and its pods."""
LOG_SECONDS: Final = 5.0
"""How long a connection is given to bring the end of the log of a container that has ended."""
WRONG_INPUT: Final = 2
"""Exit code of `milonga` where trying again is of no use."""

_ORDINARY: Final = ("ContainerCreating", "PodInitializing")
_TOLD_BY_PODS: Final = ("FailedScheduling", "Failed", "BackOff", "InspectFailed")
"""Reasons of events that say what a pod's own status says."""


class JobFailedError(MilongaError):
    """The Job failed, or is there no more."""


def follow(
    jobs: Jobs,
    job: Json,
    *,
    tell: Callable[[str], None],
    write: Callable[[str], None],
    poll_seconds: float = POLL_SECONDS,
) -> None:
    """Return when the Job is complete.

    Args:
        jobs: its namespace.
        job: as the API server gave it.
        tell: says what goes on.
        write: gets each line of the log of its pod.
        poll_seconds: see `POLL_SECONDS`.

    Raises:
        InvalidInputError: it failed, since its input is wrong.
        JobFailedError: it failed otherwise, or was deleted.
        ServiceUnavailableError: the cluster does not answer any more, or does not let us look.
    """
    name, uid = job["metadata"]["name"], job["metadata"]["uid"]
    container = job["spec"]["template"]["spec"]["containers"][0]["name"]
    told: set[Hashable] = set()
    known: dict[str, Json] = {}
    log: Log | None = None
    while True:
        found = jobs.job(name)
        # Looked at after the Job: they are at least as new, and tell why it has ended.
        pods = [] if found is None else jobs.pods(uid)
        known |= {pod["metadata"]["name"]: pod for pod in pods}
        warnings = [] if found is None else _warnings(jobs, uid, pods)
        if found is not None:
            for key, line in news(found, _with_gone(known, pods), warnings):
                if key not in told:
                    told.add(key)
                    tell(line)
        log = _turned(log, jobs, pods, container, write)
        if found is None or found["metadata"]["uid"] != uid or is_over(found):
            if log is not None:
                log.finish()
            if found is None or found["metadata"]["uid"] != uid:
                raise JobFailedError(f"the Job {name} was deleted meanwhile")
            fail(found, pods)
            tell(f"the Job {name} is complete")
            return
        if log is None:
            time.sleep(poll_seconds)
        else:
            log.pump(poll_seconds)


def news(job: Json, pods: Sequence[Json], warnings: Sequence[Json]) -> Iterator[tuple[Hashable, str]]:
    """All that can be told of a Job, in order, each line with a key that stays: most of it was told before.

    Args:
        job: the Job.
        pods: oldest first, those that are gone among them as if they were being deleted.
        warnings: events about it and its pods.
    """
    suspended = condition(job, "Suspended")
    if suspended.get("status") == "True":
        yield "suspended", f"the Job waits: {suspended.get('message', 'it is suspended')}"
    before = None
    for pod in pods:
        name, status = pod["metadata"]["name"], pod.get("status") or {}
        if before is not None:
            yield ("next", name), f"pod {name} goes on where {before} was, from its last checkpoint"
        if (node := pod["spec"].get("nodeName")) and status.get("phase") == "Pending":
            yield ("node", name), f"pod {name} is on node {node}, and gets its image and volumes"
        if text := pending(pod):
            yield (name, text), f"pod {name}: {text}"
        if status.get("phase") == "Running":
            yield ("runs", name), f"pod {name} runs" + (f" on node {node}" if node else "")
        if (why := lost(pod)) is not None:
            yield ("lost", name), f"pod {name} lost ({why})"
            before = name
    for event in warnings:
        about, reason = event["involvedObject"], event.get("reason", "")
        if reason not in _TOLD_BY_PODS:
            yield (
                (about["name"], reason),
                f"{about['kind']} {about['name']}: {reason}: {short(event.get('message', ''))}",
            )


def pending(pod: Json) -> str | None:
    """What a pod waits for that may not come by itself; None where it is only being started."""
    if (pod.get("status") or {}).get("phase") != "Pending":
        return None
    reasons = [(one.get("state") or {}).get("waiting", {}).get("reason") for _, one in containers(pod)]
    stuck = any(reason and reason not in _ORDINARY for reason in reasons)
    return waits_for(pod) if stuck or condition(pod, "PodScheduled").get("status") == "False" else None


def lost(pod: Json) -> str | None:
    """Why a pod has ended before its work was done; None where it has not."""
    status, deleted = pod.get("status") or {}, pod["metadata"].get("deletionTimestamp")
    if status.get("phase") == "Succeeded" or not (status.get("phase") == "Failed" or deleted):
        return None
    taken = condition(pod, "DisruptionTarget")
    for one in (taken if taken.get("status") == "True" else {}, status):
        if one.get("reason"):
            return f"{one['reason']}: {short(one.get('message', ''))}".removesuffix(": ")
    if deleted:
        return "deleted"
    end = _bad_end(pod)
    return how_it_ended(end) if end else "nobody says why"


def is_over(job: Json) -> bool:
    """Whether a Job is complete or has failed."""
    return any(condition(job, kind).get("status") == "True" for kind in ("Complete", "Failed"))


def fail(job: Json, pods: Sequence[Json]) -> None:
    """Raise, in the words of its last pod, where a Job that is over has failed."""
    failed, name = condition(job, "Failed"), job["metadata"]["name"]
    if failed.get("status") != "True":
        return
    rule = f"{failed.get('reason', '')}: {short(failed.get('message', ''))}".strip(": ")
    ends = [(pod, why) for pod in pods if (why := lost(pod)) is not None]
    if not ends:
        raise JobFailedError(f"the Job {name} failed: {rule}")
    pod, why = ends[-1]
    text = f"failed: pod {pod['metadata']['name']}: {why} ({rule})"
    if _bad_end(pod).get("exitCode") == WRONG_INPUT:
        raise InvalidInputError(FieldViolation(f"the Job {name}", text))
    raise JobFailedError(f"the Job {name} {text}")


@dataclass
class Log:
    """What a pod's container writes: each line once, over as many connections as it takes."""

    jobs: Jobs
    pod: str
    container: str
    write: Callable[[str], None]
    _come: queue.SimpleQueue[str | ForbiddenError] = field(default_factory=queue.SimpleQueue)
    _thread: threading.Thread | None = None
    _seen: set[int] = field(default_factory=set)
    """Of lines with their times: each connection begins at the beginning."""

    def pump(self, seconds: float) -> None:
        """Write what comes in that time. Raises `ForbiddenError` where logs are not for us."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._listen, name=f"log-of-{self.pod}", daemon=True)
            self._thread.start()
        end = time.monotonic() + seconds
        with contextlib.suppress(queue.Empty):
            while (left := end - time.monotonic()) > 0:
                self._take(self._come.get(timeout=left))

    def finish(self) -> None:
        """Write what is left, as far as it can still be had."""
        if self._thread is not None:
            self._thread.join(LOG_SECONDS)
        with contextlib.suppress(queue.Empty):
            while True:
                self._take(self._come.get_nowait())
        with contextlib.suppress(MilongaError):  # the pod may be gone, and its node
            for line in self.jobs.log(self.pod, self.container, follow=False):
                self._take(line)

    def _listen(self) -> None:
        try:
            for line in self.jobs.log(self.pod, self.container, follow=True):
                self._come.put(line)
        except ForbiddenError as error:
            self._come.put(error)
        except MilongaError:
            pass  # connected again at the next look, if there is still something to hear

    def _take(self, come: str | ForbiddenError) -> None:
        if isinstance(come, ForbiddenError):
            raise come
        if hash(come) not in self._seen:
            self._seen.add(hash(come))
            self.write(come.partition(" ")[2])


def _turned(
    log: Log | None, jobs: Jobs, pods: Sequence[Json], container: str, write: Callable[[str], None]
) -> Log | None:
    """The log of the newest pod that has begun to work."""
    begun = [pod["metadata"]["name"] for pod in pods if _has_begun(pod, container)]
    if not begun or (log is not None and log.pod == begun[-1]):
        return log
    if log is not None:
        log.finish()
    return Log(jobs, begun[-1], container, write)


def _has_begun(pod: Json, container: str) -> bool:
    return any(
        status["name"] == container and (status.get("state") or {}).keys() & {"running", "terminated"}
        for _, status in containers(pod)
    )


def _warnings(jobs: Jobs, uid: str, pods: Sequence[Json]) -> list[Json]:
    """Events about the Job and those of its pods that wait, unless one works."""
    phases = [(pod.get("status") or {}).get("phase") for pod in pods]
    if {"Running", "Succeeded"} & {*phases}:
        return []
    waiting = [pod["metadata"]["uid"] for pod, phase in zip(pods, phases, strict=True) if phase == "Pending"]
    return [event for one in (uid, *waiting) for event in jobs.warnings(one)]


def _with_gone(known: dict[str, Json], pods: Sequence[Json]) -> list[Json]:
    """All pods that were ever seen, oldest first."""
    there = {pod["metadata"]["name"] for pod in pods}
    return [
        pod if name in there else {**pod, "metadata": {**pod["metadata"], "deletionTimestamp": "gone"}}
        for name, pod in known.items()
    ]


def _bad_end(pod: Json) -> Json:
    """The state of a pod's container that ended with an exit code other than 0; empty where none did."""
    ends = [(one.get("state") or {}).get("terminated") or {} for _, one in containers(pod)]
    return next((one for one in ends if one.get("exitCode")), {})
