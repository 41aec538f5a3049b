"""A Kubernetes API server that accepts Jobs, with controllers that a test scripts."""

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.training.promotion.targets.api import Api, Json, Request

UID = "uid-of-the-job"


@dataclass
class JobsApi(Api):
    """The state of the namespace `milonga`. Pods are in `pods` by the uid of their Job."""

    jobs: dict[str, Json] = field(default_factory=dict)
    events: list[Json] = field(default_factory=list)
    logs: dict[str, Any] = field(default_factory=dict)
    """What each pod's container writes, each line after its time; iterated once a connection."""
    looks: int = 0
    """How often a Job was read."""
    acts: dict[int, Any] = field(default_factory=dict)
    """What happens before the Job is read for the n-th time."""

    def answer(self, request: Request) -> tuple[int, Json | Iterator[str]]:
        for pattern, (code, message) in self.status.items():
            if re.search(pattern, f"{request.method} {request.path}"):
                self.requests.append(request)
                return code, {"kind": "Status", "message": message}
        jobs, core = "/apis/batch/v1/namespaces/milonga/jobs", "/api/v1/namespaces/milonga"
        if request.path == jobs and request.method == "POST":
            self.requests.append(request)
            name = request.body["metadata"]["name"]
            if name in self.jobs:
                return 409, {"kind": "Status", "message": f'jobs.batch "{name}" already exists'}
            made = {**request.body, "metadata": {**request.body["metadata"], "uid": UID}}
            if "dryRun" not in request.query:
                self.jobs[name] = made
            return 201, made
        if request.path.startswith(f"{jobs}/"):
            self.looks += 1
            self.acts.get(self.looks, lambda: None)()
            job = self.jobs.get(request.path.rpartition("/")[2])
            return (404, {"message": "not found"}) if job is None else (200, copy.deepcopy(job))
        if request.path == f"{core}/events":
            uid, kind = (one.partition("=")[2] for one in request.query["fieldSelector"].split(","))
            assert kind == "Warning"
            return 200, {"items": [one for one in self.events if one["involvedObject"]["uid"] == uid]}
        if found := re.fullmatch(rf"{core}/pods/([\w-]+)/log", request.path):
            assert request.query["timestamps"] == "true"
            self.requests.append(request)
            lines = self.logs.get(found[1])
            if lines is None:
                return 404, {"message": "not found"}
            # A list keeps growing, and its container with it.
            return 200, (f"{line}\n" for line in (list(lines) if isinstance(lines, list) else lines))
        return super().answer(request)

    def end(self, name: str, kind: str, reason: str = "", message: str = "") -> None:
        """The Job is over."""
        condition = {"type": kind, "status": "True", "reason": reason, "message": message}
        self.jobs[name]["status"] = {"conditions": [condition]}

    def set_pod(self, name: str, phase: str, **status: Any) -> Json:
        """Make a pod, or change it."""
        pods = self.pods.setdefault(UID, [])
        state = {
            "Pending": {"waiting": {"reason": "ContainerCreating"}},
            "Running": {"running": {}},
            "Succeeded": {"terminated": {"exitCode": 0}},
        }.get(phase, {"terminated": {"exitCode": 1, "reason": "Error"}})
        pod = {
            "metadata": {"name": name, "uid": f"uid-of-{name}", "creationTimestamp": f"{len(pods):02}"},
            "spec": {"nodeName": "node-1"},
            "status": {
                "phase": phase,
                "containerStatuses": [{"name": "align", "state": state, "ready": False}],
                **status,
            },
        }
        old = next((i for i, one in enumerate(pods) if one["metadata"]["name"] == name), None)
        if old is None:
            pods.append(pod)
        else:
            pod["metadata"] = pods[old]["metadata"]
            pods[old] = pod
        return pod
