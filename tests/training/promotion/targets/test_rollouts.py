"""States of pods and Deployments as a rollout reads them."""

from typing import Any

import pytest

from training.promotion.targets.cluster import PIN_ANNOTATION
from training.promotion.targets.rollouts import (
    first_difference,
    is_complete,
    permanent_fault,
    progress_summary,
    ready_pods,
)

PIN = "models:/milonga-tango/7#sha256:" + "7" * 64
OLD = "models:/milonga-tango/6#sha256:" + "6" * 64
LOG = '{"event": "settings"}\nerror: what the registry gave is not sha256:77\n'


def pod(
    *,
    pin: str = PIN,
    ready: bool = False,
    init: dict[str, Any] | None = None,
    main: dict[str, Any] | None = None,
    restarts: int = 0,
    last: dict[str, Any] | None = None,
    deleted: bool = False,
    unscheduled: str = "",
) -> dict[str, Any]:
    conditions = [{"type": "Ready", "status": "True" if ready else "False"}]
    if unscheduled:
        conditions.append(
            {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": unscheduled}
        )

    def container(name: str, state: dict[str, Any]) -> dict[str, Any]:
        return {
            "name": name,
            "state": state,
            "restartCount": restarts,
            "lastState": last or {},
            "ready": ready,
        }

    return {
        "metadata": {
            "name": "generation-x",
            "annotations": {PIN_ANNOTATION: pin},
            **({"deletionTimestamp": "now"} if deleted else {}),
        },
        "status": {
            "phase": "Pending",
            "conditions": conditions,
            "initContainerStatuses": [container("fetch", init)] if init else [],
            "containerStatuses": [container("generation", main)] if main else [],
        },
    }


def deployment(
    *, wanted: int = 2, updated: int = 2, total: int = 2, available: int = 2, seen: int = 5
) -> dict[str, Any]:
    return {
        "metadata": {"generation": 5},
        "spec": {"replicas": wanted},
        "status": {
            "observedGeneration": seen,
            "updatedReplicas": updated,
            "replicas": total,
            "availableReplicas": available,
        },
    }


@pytest.mark.parametrize(
    ("state", "complete"),
    [
        ({}, True),
        ({"seen": 4}, False),
        ({"updated": 1}, False),
        ({"total": 3}, False),
        ({"available": 1}, False),
    ],
)
def test_a_rollout_is_complete_when_only_new_pods_are_there(state: dict[str, int], complete: bool) -> None:
    assert is_complete(deployment(**state)) is complete


def test_a_deployment_that_was_never_seen_is_not_complete() -> None:
    assert not is_complete({"metadata": {"generation": 1}, "spec": {"replicas": 1}})


WAITING = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s"}}


@pytest.mark.parametrize(
    ("found", "fault"),
    [
        (pod(), None),
        (pod(init={"running": {}}), None),
        (pod(main={"waiting": {"reason": "ContainerCreating"}}), None),
        (pod(init={"waiting": {"reason": "ErrImagePull", "message": "x"}}), None),  # tried again by itself
        (
            pod(init={"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling image x"}}),
            "pod generation-x, init container fetch: ImagePullBackOff: Back-off pulling image x",
        ),
        (
            pod(init={"terminated": {"exitCode": 2, "reason": "Error", "message": LOG}}),
            "pod generation-x, init container fetch: ended with exit code 2: what the registry gave is not "
            "sha256:77",
        ),
        (pod(init={"terminated": {"exitCode": 0}}), None),
        (pod(init={"terminated": {"exitCode": 3, "message": "error: away"}}), None),  # may come back
        (
            pod(init=WAITING, restarts=3, last={"terminated": {"exitCode": 3, "message": "error: away"}}),
            "pod generation-x, init container fetch: ended with exit code 3: away",
        ),
        (
            pod(main=WAITING, restarts=1, last={"terminated": {"exitCode": 137, "reason": "OOMKilled"}}),
            "pod generation-x, container generation: ended with exit code 137 (OOMKilled)",
        ),
        (pod(main={"running": {}}, restarts=1, last={"terminated": {"exitCode": 1}}), None),
        # It serves, or did until just now: what it died of weeks ago says nothing of this rollout.
        (pod(ready=True, main={"running": {}}, restarts=9, last={"terminated": {"exitCode": 2}}), None),
        (pod(main={"running": {}}, restarts=9, last={"terminated": {"exitCode": 137}}), None),
        (pod(main={"terminated": {"exitCode": 137}}, restarts=9), None),
        (
            pod(main={"terminated": {"exitCode": 2, "message": "error: --model: is empty"}}),
            "pod generation-x, container generation: ended with exit code 2: --model: is empty",
        ),
        (pod(pin=OLD, main={"terminated": {"exitCode": 2}}), None),
        (pod(deleted=True, main={"terminated": {"exitCode": 2}}), None),
    ],
)
def test_permanent_faults_are_reported_at_once(found: dict[str, Any], fault: str | None) -> None:
    assert permanent_fault([pod(pin=OLD, ready=True), found], PIN) == fault


def test_the_progress_summary_gives_the_reason_of_each_waiting_pod() -> None:
    pods = [
        pod(pin=OLD, ready=True),
        pod(unscheduled="0/1 nodes are available: 1 Insufficient nvidia.com/gpu."),
        pod(init={"running": {}}),
        pod(main={"running": {}}),
    ]
    assert progress_summary(deployment(updated=1), pods, PIN) == (
        "0 of 2 new pods ready; pod generation-x: Unschedulable: 0/1 nodes are available: 1 Insufficient "
        "nvidia.com/gpu.; pod generation-x: init container fetch is running; pod generation-x: container "
        "generation is running and not ready"
    )
    quota = {"type": "ReplicaFailure", "status": "True", "message": "exceeded quota"}
    refused = {"metadata": {"generation": 1}, "spec": {"replicas": 1}, "status": {"conditions": [quota]}}
    assert progress_summary(refused, [], PIN) == "0 of 1 new pods ready; exceeded quota"


def test_pods_being_deleted_get_no_traffic() -> None:
    assert ready_pods([pod(), pod(ready=True, deleted=True)]) == []
    assert len(ready_pods([pod(ready=True)])) == 1


def runs(name: str, **changes: Any) -> dict[str, Any]:
    threads = {"resourceFieldRef": {"containerName": name, "resource": "limits.cpu"}}
    main = {
        "name": name,
        "image": "services:1",
        "env": [{"name": "B", "value": "1"}, {"name": "MILONGA_THREADS", "valueFrom": threads}],
        "resources": {"limits": {"cpu": "1"}},
        **changes,
    }
    spec = {"initContainers": [{"name": "fetch", "image": "services:1"}], "containers": [main]}
    return {"metadata": {"name": name}, "spec": {"template": {"spec": spec}}}


def test_what_two_deployments_run_differs_in_more_than_their_names() -> None:
    served = runs("generation")
    assert first_difference(served, runs("challenger")) == ""
    assert first_difference(served, runs("challenger", image="localhost/missing:1")) == (
        "image of the main container is localhost/missing:1, expected is services:1"
    )
    assert "resources of the main container is {'limits': {'cpu': '2'}}" in first_difference(
        served, runs("challenger", resources={"limits": {"cpu": "2"}})
    )
    assert first_difference(served, runs("challenger", env=[{"name": "B", "value": "1"}])).startswith(
        "env MILONGA_THREADS of the main container is missing, expected is {"
    )
    bare = runs("challenger")
    del bare["spec"]["template"]["spec"]["initContainers"]
    assert first_difference(served, bare) == "initContainers none, expected fetch"
