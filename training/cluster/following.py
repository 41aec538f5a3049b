"""Progress of a Job until it ends, with the log of its pod.

Polls the Job, its pods and its events, in this order. `kubernetes.watch` would take more code: three streams
whose events come in no common order, lists again after a lost connection, and the right to watch.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from services.errors import MilongaError, invalid
from training.cluster.jobs import Jobs
from training.cluster.namespace import ForbiddenError, Json
from training.cluster.pods import condition, container_statuses, exit_summary, shorten, waiting_reason

POLL_SECONDS: Final = 1.0
"""Time between two polls of a Job and its pods."""
LOG_SECONDS: Final = 5.0
"""Time for which the rest of the log of a terminated container is waited for."""
WRONG_INPUT: Final = 2
"""Exit code of `milonga` that a retry does not change."""

_USUAL_REASONS: Final = ("ContainerCreating", "PodInitializing")
_REPEATED_REASONS: Final = ("FailedScheduling", "Failed", "BackOff", "InspectFailed")
"""Reasons of events that repeat the status of a pod."""


class JobFailedError(MilongaError):
    """The Job failed, or was deleted."""


def follow(
    jobs: Jobs,
    job: Json,
    *,
    report: Callable[[str], None],
    write: Callable[[str], None],
    poll_seconds: float = POLL_SECONDS,
) -> None:
    """Report the progress of a Job and write its log; return when the Job is complete.

    Args:
        jobs: namespace of the Job.
        job: the Job as the API server returned it.
        report: called with each line of progress.
        write: called with each line of the log of the Job's pod.
        poll_seconds: see `POLL_SECONDS`.

    Raises:
        InvalidInputError: the Job failed because its input is wrong.
        JobFailedError: the Job failed for another reason, or was deleted.
        ServiceUnavailableError: the cluster no longer answers, or does not permit the calls.
    """
    name, uid = job["metadata"]["name"], job["metadata"]["uid"]
    container = job["spec"]["template"]["spec"]["containers"][0]["name"]
    reported: set[Hashable] = set()
    known: dict[str, Json] = {}
    log: Log | None = None
    while True:
        found = jobs.job(name)
        deleted = found is None or found["metadata"]["uid"] != uid
        # Read after the Job: its pods are at least as new, and show why it has ended.
        pods = [] if deleted else jobs.pods(uid)
        known |= {pod["metadata"]["name"]: pod for pod in pods}
        if found is not None and not deleted:
            for key, line in status_lines(found, _with_deleted(known, pods), _warnings(jobs, uid, pods)):
                if key not in reported:
                    reported.add(key)
                    report(line)
        log = _newest_log(log, jobs, pods, container, write)
        if found is None or deleted or is_over(found):
            if log is not None:
                log.finish()
            if found is None or deleted:
                raise JobFailedError(f"the Job {name} was deleted")
            raise_if_failed(found, pods)
            report(f"the Job {name} is complete")
            return
        if log is None:
            time.sleep(poll_seconds)
        else:
            log.write_for(poll_seconds)


def status_lines(job: Json, pods: Sequence[Json], warnings: Sequence[Json]) -> Iterator[tuple[Hashable, str]]:
    """Yield everything to report of a Job, in order: pairs of a stable key and a line.

    Args:
        job: the Job.
        pods: its pods, oldest first; those that were deleted with a deletion timestamp.
        warnings: events of the Job and its pods.
    """
    suspended = condition(job, "Suspended")
    if suspended.get("status") == "True":
        yield "suspended", f"the Job waits: {suspended.get('message', 'it is suspended')}"
    before = None
    for pod in pods:
        name, status = pod["metadata"]["name"], pod.get("status") or {}
        if before is not None:
            yield ("next", name), f"pod {name} replaces {before}, and resumes from its last checkpoint"
        if (node := pod["spec"].get("nodeName")) and status.get("phase") == "Pending":
            yield ("node", name), f"pod {name} is on node {node}, pulling its image and mounting volumes"
        if text := pending_reason(pod):
            yield (name, text), f"pod {name}: {text}"
        if status.get("phase") == "Running":
            yield ("runs", name), f"pod {name} runs" + (f" on node {node}" if node else "")
        if (why := loss_reason(pod)) is not None:
            yield ("lost", name), f"pod {name} lost ({why})"
            before = name
    for event in warnings:
        about, reason = event["involvedObject"], event.get("reason", "")
        if reason not in _REPEATED_REASONS:
            yield (
                (about["name"], reason),
                f"{about['kind']} {about['name']}: {reason}: {shorten(event.get('message', ''))}",
            )


def pending_reason(pod: Json) -> str | None:
    """Return what a pending pod waits for; None if it is not pending, or only starting."""
    if (pod.get("status") or {}).get("phase") != "Pending":
        return None
    states = [one.get("state") or {} for _, one in container_statuses(pod)]
    reasons = [state.get("waiting", {}).get("reason") for state in states]
    stuck = any(reason and reason not in _USUAL_REASONS for reason in reasons)
    unscheduled = condition(pod, "PodScheduled").get("status") == "False"
    return waiting_reason(pod) if stuck or unscheduled else None


def loss_reason(pod: Json) -> str | None:
    """Return why a pod ended before its work was done; None if it did not."""
    status, deleted = pod.get("status") or {}, pod["metadata"].get("deletionTimestamp")
    if status.get("phase") == "Succeeded" or not (status.get("phase") == "Failed" or deleted):
        return None
    disruption = condition(pod, "DisruptionTarget")
    for one in (disruption if disruption.get("status") == "True" else {}, status):
        if one.get("reason"):
            return f"{one['reason']}: {shorten(one.get('message', ''))}".removesuffix(": ")
    if deleted:
        return "deleted"
    terminated = _failed_state(pod)
    return exit_summary(terminated) if terminated else "no reason given"


def is_over(job: Json) -> bool:
    """Return whether a Job is complete or has failed."""
    return any(condition(job, kind).get("status") == "True" for kind in ("Complete", "Failed"))


def raise_if_failed(job: Json, pods: Sequence[Json]) -> None:
    """Raise, with the last lost pod's reason, where a Job that is over has failed."""
    failed, name = condition(job, "Failed"), job["metadata"]["name"]
    if failed.get("status") != "True":
        return
    rule = f"{failed.get('reason', '')}: {shorten(failed.get('message', ''))}".strip(": ")
    losses = [(pod, why) for pod in pods if (why := loss_reason(pod)) is not None]
    if not losses:
        raise JobFailedError(f"the Job {name} failed: {rule}")
    pod, why = losses[-1]
    text = f"failed: pod {pod['metadata']['name']}: {why} ({rule})"
    if _failed_state(pod).get("exitCode") == WRONG_INPUT:
        raise invalid(f"the Job {name}", text)
    raise JobFailedError(f"the Job {name} {text}")


@dataclass
class Log:
    """The log of a pod's container: each line written once, over any number of connections."""

    jobs: Jobs
    pod: str
    container: str
    write: Callable[[str], None]
    _received: queue.SimpleQueue[str | ForbiddenError] = field(default_factory=queue.SimpleQueue)
    _thread: threading.Thread | None = None
    _seen: set[int] = field(default_factory=set)
    """Hashes of the lines with their timestamps: each connection starts at the first line."""

    def write_for(self, seconds: float) -> None:
        """Write the lines that arrive within `seconds`. Raises `ForbiddenError` without the right."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._receive, name=f"log-of-{self.pod}", daemon=True)
            self._thread.start()
        end = time.monotonic() + seconds
        with contextlib.suppress(queue.Empty):
            while (left := end - time.monotonic()) > 0:
                self._write_new(self._received.get(timeout=left))

    def finish(self) -> None:
        """Write the rest, as far as it is still available."""
        if self._thread is not None:
            self._thread.join(LOG_SECONDS)
        with contextlib.suppress(queue.Empty):
            while True:
                self._write_new(self._received.get_nowait())
        with contextlib.suppress(MilongaError):  # the pod may be gone, and its node
            for line in self.jobs.log(self.pod, self.container, follow=False):
                self._write_new(line)

    def _receive(self) -> None:
        try:
            for line in self.jobs.log(self.pod, self.container, follow=True):
                self._received.put(line)
        except ForbiddenError as error:
            self._received.put(error)
        except MilongaError:
            pass  # `write_for` connects again

    def _write_new(self, received: str | ForbiddenError) -> None:
        if isinstance(received, ForbiddenError):
            raise received
        if hash(received) not in self._seen:
            self._seen.add(hash(received))
            self.write(received.partition(" ")[2])


def _newest_log(
    log: Log | None, jobs: Jobs, pods: Sequence[Json], container: str, write: Callable[[str], None]
) -> Log | None:
    """Return the log of the newest pod whose container has started. Another pod's `log` is finished."""
    started = [pod["metadata"]["name"] for pod in pods if _has_started(pod, container)]
    if not started or (log is not None and log.pod == started[-1]):
        return log
    if log is not None:
        log.finish()
    return Log(jobs, started[-1], container, write)


def _has_started(pod: Json, container: str) -> bool:
    return any(
        status["name"] == container and bool((status.get("state") or {}).keys() & {"running", "terminated"})
        for _, status in container_statuses(pod)
    )


def _warnings(jobs: Jobs, uid: str, pods: Sequence[Json]) -> list[Json]:
    """Return events of the Job and of its pending pods, unless a pod runs."""
    phases = [(pod.get("status") or {}).get("phase") for pod in pods]
    if {"Running", "Succeeded"} & {*phases}:
        return []
    waiting = [pod["metadata"]["uid"] for pod, phase in zip(pods, phases, strict=True) if phase == "Pending"]
    return [event for one in (uid, *waiting) for event in jobs.warnings(one)]


def _with_deleted(known: dict[str, Json], pods: Sequence[Json]) -> list[Json]:
    """Return all pods ever seen, oldest first; those not in `pods` with a deletion timestamp."""
    existing = {pod["metadata"]["name"] for pod in pods}
    return [
        pod if name in existing else {**pod, "metadata": {**pod["metadata"], "deletionTimestamp": "gone"}}
        for name, pod in known.items()
    ]


def _failed_state(pod: Json) -> Json:
    """Return the state of the first container with an exit code other than 0; an empty dict without one."""
    ends = [(one.get("state") or {}).get("terminated") or {} for _, one in container_statuses(pod)]
    return next((one for one in ends if one.get("exitCode")), {})
