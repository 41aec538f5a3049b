"""What `follow` reports of a Job, and how it ends."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import typer

from services.errors import InvalidInputError, ServiceUnavailableError
from tests.training.cluster.jobs_api import UID, JobsApi
from tests.training.promotion.targets.api import Json, namespace_served
from training.cluster import following
from training.cluster.following import JobFailedError, follow, loss_reason, pending_reason, status_lines
from training.cluster.jobs import Jobs
from training.cluster.submit import EXIT_CODES
from training.commands.submit import _follow
from training.exits import exit_code

NAME = "align-7"
SECONDS = 0.02


@pytest.fixture
def api() -> JobsApi:
    template = {"spec": {"containers": [{"name": "align"}]}}
    job = {"metadata": {"name": NAME, "uid": UID}, "spec": {"template": template}}
    return JobsApi(port=0, jobs={NAME: job})


@pytest.fixture
def jobs(api: JobsApi) -> Iterator[Jobs]:
    with namespace_served(api, Jobs) as jobs:
        yield jobs


class Following:
    """Follow a Job, and record what is reported and written, in order."""

    def __init__(self, jobs: Jobs, api: JobsApi, acts: list[Callable[[], Any]]) -> None:
        api.acts = dict(enumerate(acts, start=1))
        self.reported: list[str] = []
        self.log: list[str] = []
        self.end: BaseException | None = None
        try:
            follow(
                jobs, api.jobs[NAME], report=self.reported.append, write=self.log.append, poll_seconds=SECONDS
            )
        except Exception as error:
            self.end = error


def test_a_job_is_followed_from_its_pod_to_its_end(api: JobsApi, jobs: Jobs) -> None:
    def begin() -> None:
        api.logs["a"] = ["t1 stage: reward", "t2 step 1"]
        api.set_pod("a", "Running")

    def finish() -> None:
        api.logs["a"].append("t3 done")
        api.set_pod("a", "Succeeded")
        api.end(NAME, "Complete")

    acts = [lambda: None, lambda: api.set_pod("a", "Pending"), begin, lambda: None, finish]
    followed = Following(jobs, api, acts)
    assert followed.end is None
    assert followed.reported == [
        "pod a is on node node-1, pulling its image and mounting volumes",
        "pod a runs on node node-1",
        "the Job align-7 is complete",
    ]
    # Over several connections, each from the beginning of the log.
    assert followed.log == ["stage: reward", "step 1", "done"]


class Stream:
    """A log that is generated while it is read, from its first line for each connection."""

    def __init__(self, lines: Callable[[], Iterator[str]]) -> None:
        self.lines = lines

    def __iter__(self) -> Iterator[str]:
        return self.lines()


def test_a_line_is_written_while_the_container_goes_on(api: JobsApi, jobs: Jobs) -> None:
    held = threading.Event()

    def lines() -> Iterator[str]:
        yield "t1 step 1"
        assert held.wait(10)
        yield "t2 step 2"

    def write(line: str) -> None:
        written.append(line)
        if line == "step 1":
            api.end(NAME, "Complete")
            held.set()

    written: list[str] = []
    api.set_pod("a", "Running")
    api.logs["a"] = Stream(lines)
    follow(jobs, api.jobs[NAME], report=lambda line: None, write=write, poll_seconds=SECONDS)
    assert written == ["step 1", "step 2"]


def test_a_connection_that_breaks_is_made_again(api: JobsApi, jobs: Jobs) -> None:
    connections = []

    def lines() -> Iterator[str]:
        connections.append(1)
        yield "t1 step 1"
        yield "t2 step 1"  # as often as it was written
        if len(connections) < 3:
            raise ConnectionAbortedError
        api.end(NAME, "Complete")
        yield "t3 step 2"

    api.set_pod("a", "Running")
    api.logs["a"] = Stream(lines)
    followed = Following(jobs, api, [])
    assert followed.end is None
    assert followed.log == ["step 1", "step 1", "step 2"]


def test_a_lost_pod_and_its_replacement_are_reported(api: JobsApi, jobs: Jobs) -> None:
    api.logs = {"a": ["t1 step 1"], "b": ["t2 from step 1", "t3 step 2"]}
    taken = {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler", "message": "m"}

    def finish() -> None:
        api.set_pod("b", "Succeeded")
        api.end(NAME, "Complete")

    followed = Following(
        jobs,
        api,
        [
            lambda: api.set_pod("a", "Running"),
            lambda: None,
            lambda: api.set_pod("a", "Failed", conditions=[taken]),
            lambda: api.set_pod("b", "Running"),
            lambda: None,
            finish,
        ],
    )
    assert followed.end is None
    assert followed.reported == [
        "pod a runs on node node-1",
        "pod a lost (PreemptionByScheduler: m)",
        "pod b replaces a, and resumes from its last checkpoint",
        "pod b runs on node node-1",
        "the Job align-7 is complete",
    ]
    assert followed.log == ["step 1", "from step 1", "step 2"]


def test_a_pod_that_vanishes_was_deleted(api: JobsApi, jobs: Jobs) -> None:
    def vanish() -> None:
        api.pods[UID].clear()

    def next_one() -> None:
        api.set_pod("b", "Succeeded")
        api.end(NAME, "Complete")

    followed = Following(jobs, api, [lambda: api.set_pod("a", "Running"), vanish, next_one])
    assert followed.reported == [
        "pod a runs on node node-1",
        "pod a lost (deleted)",
        "pod b replaces a, and resumes from its last checkpoint",
        "the Job align-7 is complete",
    ]


@pytest.mark.parametrize(
    ("exit_status", "code", "message"),
    [
        (
            {"exitCode": 2, "reason": "Error", "message": "settings\nerror: start: is 'x', must be mini\n"},
            2,
            "the Job align-7: failed: pod a: exit code 2: start: is 'x', must be mini "
            "(PodFailurePolicy: rule 1)",
        ),
        (
            {"exitCode": 137, "reason": "OOMKilled"},
            4,
            "the Job align-7 failed: pod a: exit code 137 (OOMKilled) (PodFailurePolicy: rule 1)",
        ),
    ],
)
def test_a_failed_job_gives_the_reason_of_its_pod(
    api: JobsApi, jobs: Jobs, exit_status: Json, code: int, message: str
) -> None:
    api.logs["a"] = ["t1 settings", "t2 error: start: is 'x', must be mini"]

    def fail() -> None:
        states = [{"name": "align", "state": {"terminated": exit_status}}]
        api.set_pod("a", "Failed", containerStatuses=states)
        api.end(NAME, "Failed", "PodFailurePolicy", "rule 1")

    followed = Following(jobs, api, [fail])
    assert isinstance(followed.end, InvalidInputError if code == 2 else JobFailedError)
    assert str(followed.end) == message
    assert exit_code(followed.end, EXIT_CODES) == code
    assert followed.log == ["settings", "error: start: is 'x', must be mini"]


def test_a_failed_job_without_pods_gives_its_own_reason(api: JobsApi, jobs: Jobs) -> None:
    followed = Following(
        jobs, api, [lambda: api.end(NAME, "Failed", "DeadlineExceeded", "was active too long")]
    )
    assert str(followed.end) == "the Job align-7 failed: DeadlineExceeded: was active too long"


def test_a_job_that_is_deleted_or_replaced_is_reported(api: JobsApi, jobs: Jobs) -> None:
    followed = Following(jobs, api, [lambda: None, lambda: api.jobs[NAME]["metadata"].update(uid="another")])
    assert str(followed.end) == "the Job align-7 was deleted"
    api.looks, job = 0, api.jobs[NAME]
    api.acts = {2: lambda: api.jobs.pop(NAME)}
    with pytest.raises(JobFailedError, match="was deleted") as caught:
        follow(jobs, job, report=print, write=print, poll_seconds=SECONDS)
    assert exit_code(caught.value, EXIT_CODES) == 4


def test_what_a_job_waits_for_is_reported_once(api: JobsApi, jobs: Jobs) -> None:
    full = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": "Insufficient cpu",
    }
    pull = {"waiting": {"reason": "ErrImagePull", "message": "x:1: not found"}}
    api.events = [
        {
            "involvedObject": {"kind": "Job", "name": NAME, "uid": UID},
            "reason": "FailedCreate",
            "message": f"Error creating: attempt {number}: exceeded quota",
        }
        for number in range(2)
    ]

    def mount() -> None:
        api.set_pod("a", "Pending")
        about = {"kind": "Pod", "name": "a", "uid": "uid-of-a"}
        api.events = [
            {"involvedObject": about, "reason": "FailedMount", "message": "no secret"},
            {"involvedObject": about, "reason": "Failed", "message": "reported by the pod"},
        ]

    statuses = [{"name": "align", "state": pull, "ready": False}]
    followed = Following(
        jobs,
        api,
        [
            lambda: None,
            lambda: api.set_pod("a", "Pending", conditions=[full], containerStatuses=[])["spec"].clear(),
            lambda: None,
            lambda: api.set_pod("a", "Pending", containerStatuses=statuses),
            mount,
            lambda: api.end(NAME, "Failed"),
        ],
    )
    assert followed.reported == [
        "Job align-7: FailedCreate: Error creating: attempt 0: exceeded quota",
        "pod a: Unschedulable: Insufficient cpu",
        "pod a is on node node-1, pulling its image and mounting volumes",
        "pod a: container align waits: ErrImagePull x:1: not found",
        "Pod a: FailedMount: no secret",
    ]


def test_a_suspended_job_waits() -> None:
    condition = {"type": "Suspended", "status": "True", "message": "Job suspended"}
    job = {"metadata": {"name": NAME}, "status": {"conditions": [condition]}}
    assert [line for _, line in status_lines(job, [], [])] == ["the Job waits: Job suspended"]


def test_a_pod_that_is_only_starting_is_not_reported(api: JobsApi) -> None:
    assert pending_reason(api.set_pod("a", "Pending")) is None
    assert pending_reason(api.set_pod("a", "Running")) is None


@pytest.mark.parametrize(
    ("phase", "status", "why"),
    [
        ("Running", {}, None),
        ("Succeeded", {}, None),
        ("Failed", {"reason": "Evicted", "message": "low on memory"}, "Evicted: low on memory"),
        ("Failed", {"reason": "NodeLost"}, "NodeLost"),
        ("Failed", {}, "exit code 1"),
        ("Failed", {"containerStatuses": []}, "no reason given"),
    ],
)
def test_the_reason_why_a_pod_was_lost(api: JobsApi, phase: str, status: Json, why: str | None) -> None:
    assert loss_reason(api.set_pod("a", phase, **status)) == why


def test_forbidden_logs_and_a_lost_cluster_leave_the_job(api: JobsApi, jobs: Jobs) -> None:
    api.set_pod("a", "Running")
    api.status["GET .*/log"] = (403, 'cannot get resource "pods/log"')
    with pytest.raises(ServiceUnavailableError, match=r'permit it: cannot get resource "pods/log"') as caught:
        _follow(jobs, api.jobs[NAME], None)
    assert str(caught.value).endswith(
        "the Job align-7 is unaffected; to follow it: milonga train submit --follow align-7; to "
        "delete it: kubectl --namespace milonga delete job align-7"
    )
    api.status = {"GET": (503, "shutting down")}
    with pytest.raises(ServiceUnavailableError, match=r"shutting down; .*; the Job align-7 is unaffected"):
        _follow(jobs, api.jobs[NAME], None)


def test_an_interruption_leaves_the_job(
    api: JobsApi, jobs: Jobs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(following, "follow", interrupt)
    with pytest.raises(typer.Exit) as caught:
        _follow(jobs, api.jobs[NAME], "kind-x")
    assert caught.value.exit_code == 130
    assert (
        "the Job align-7 keeps running; to follow it: milonga train submit --follow align-7 --context kind-x"
        in (capsys.readouterr().err)
    )
    assert NAME in api.jobs
