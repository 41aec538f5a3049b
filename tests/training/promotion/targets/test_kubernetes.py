"""Requests of a promotion to the Kubernetes API, and the effects of its answers."""

import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
from kubernetes import client

from milonga.v1 import generation_pb2_grpc
from services.client import ServiceOptions
from services.errors import InvalidInputError, MilongaError, ServiceUnavailableError
from tests.training.promotion.targets.api import Api, Json, Weights, api_served, weights_served
from training.cluster import namespace
from training.promotion.errors import BusyError, RolloutError, exit_code
from training.promotion.targets import locks
from training.promotion.targets.cluster import Cluster, connect_cluster
from training.promotion.targets.forwarding import Forwarding
from training.promotion.targets.kubernetes import KubernetesTarget

OLD_DIGEST, NEW_DIGEST = "sha256:" + "6" * 64, "sha256:" + "7" * 64
OLD, NEW = f"models:/milonga-tango/6#{OLD_DIGEST}", f"models:/milonga-tango/7#{NEW_DIGEST}"
SECONDS = 0.5


@pytest.fixture
def weights() -> Iterator[tuple[Weights, int]]:
    with weights_served() as served:
        yield served


@pytest.fixture
def api(weights: tuple[Weights, int]) -> Api:
    api = Api(port=weights[1])
    api.add("generation", 2, OLD)
    api.add("challenger", 0)
    weights[0].digest = OLD_DIGEST
    return api


@pytest.fixture
def cluster(api: Api) -> Iterator[Cluster]:
    with api_served(api) as cluster:
        yield cluster


@pytest.fixture
def target(
    cluster: Cluster, weights: tuple[Weights, int], monkeypatch: pytest.MonkeyPatch
) -> KubernetesTarget:
    return KubernetesTarget(
        cluster,
        report=lambda line: None,
        inside=True,
        generation_address=f"127.0.0.1:{weights[1]}",
        poll_seconds=0.02,
        verify_seconds=0.2,
        lease_seconds=3.0,
    )


def roll_out(target: KubernetesTarget) -> None:
    target.set_pin(NEW, SECONDS)
    target.wait(NEW, SECONDS)


def test_the_pin_is_server_side_applied_by_its_owner_and_nothing_else(
    target: KubernetesTarget, api: Api
) -> None:
    roll_out(target)
    assert api.pin("generation") == NEW
    (patch,) = [request for request in api.requests if request.method == "PATCH"]
    assert patch.path == "/apis/apps/v1/namespaces/milonga/deployments/generation"
    assert patch.content_type == "application/apply-patch+yaml"
    assert patch.query == {"fieldManager": "milonga-promote", "force": "true"}
    assert patch.body == {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "generation", "namespace": "milonga"},
        "spec": {"template": {"metadata": {"annotations": {"milonga.dev/pin": NEW}}}},
    }
    roll_out(target)  # once more changes nothing
    assert api.deployments["generation"]["metadata"]["generation"] == 2
    target.set_pin(None, SECONDS)
    assert target.current_pin() is None


def test_the_challenger_is_pinned_then_scaled_up_and_back(
    target: KubernetesTarget, api: Api, weights: tuple[Weights, int]
) -> None:
    weights[0].digest = NEW_DIGEST
    assert target.start_challenger(NEW, SECONDS) == f"127.0.0.1:{weights[1]}"
    patches = [request for request in api.requests if request.method == "PATCH"]
    assert [request.path.rpartition("/")[2] for request in patches] == ["challenger", "scale"]
    assert patches[1].content_type == "application/merge-patch+json"
    assert patches[1].body == {"spec": {"replicas": 1}}
    assert (api.pin("challenger"), api.pin("generation")) == (NEW, OLD)
    target.stop_challenger()
    target.stop_challenger()
    assert api.pods["challenger"] == []


def test_a_challenger_with_other_weights_fails(target: KubernetesTarget) -> None:
    with pytest.raises(RolloutError, match=f"the challenger serves {OLD_DIGEST} .*, expected {NEW_DIGEST}"):
        target.start_challenger(NEW, SECONDS)


def test_every_ready_pod_and_the_service_are_verified(
    target: KubernetesTarget, api: Api, weights: tuple[Weights, int]
) -> None:
    target.verify(OLD_DIGEST)
    with pytest.raises(RolloutError, match=f"pod generation-0 serves {OLD_DIGEST} .*, expected {NEW_DIGEST}"):
        target.verify(NEW_DIGEST)
    for pod in api.pods["generation"]:
        pod["status"]["conditions"] = []
    with pytest.raises(RolloutError, match="no pod of the Deployment generation is ready"):
        target.verify(OLD_DIGEST)


def broken(state: Json) -> Callable[[Api, str], None]:
    return lambda api, name: api.reconcile(name, state)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}},
            "generation failed: pod generation-0, init container fetch: ImagePullBackOff: no such",
        ),
        (
            {"terminated": {"exitCode": 2, "message": "error: not sha256:77, which it was registered as"}},
            "init container fetch: ended with exit code 2: not sha256:77, which it was registered as",
        ),
        ({"running": {}}, "not ready after 0 s: 0 of 2 new pods ready; pod generation-0: init container"),
    ],
)
def test_a_failed_rollout_gives_its_reason(
    target: KubernetesTarget, api: Api, state: Json, message: str
) -> None:
    api.roll = broken(state)
    with pytest.raises(RolloutError, match=message) as caught:
        roll_out(target)
    assert exit_code(caught.value) == 4


def test_a_rollout_of_a_deployment_at_zero_fails(target: KubernetesTarget, api: Api) -> None:
    api.add("generation", 0, OLD)
    with pytest.raises(RolloutError, match="scaled to 0; scale it to 1 or more"):
        roll_out(target)


def test_a_pin_that_somebody_else_changes_fails_the_rollout(target: KubernetesTarget, api: Api) -> None:
    def roll(api: Api, name: str) -> None:
        api.deployments[name]["spec"]["template"]["metadata"]["annotations"] = {"milonga.dev/pin": OLD}

    api.roll = roll
    with pytest.raises(RolloutError, match="somebody else changed the pin"):
        roll_out(target)


def test_nothing_is_promoted_to_a_deployment_at_zero(target: KubernetesTarget, api: Api) -> None:
    target.check_setup(challenger=False)
    api.add("generation", 0, OLD)
    with pytest.raises(InvalidInputError, match="the Deployment generation: is scaled to 0"):
        target.check_setup(challenger=False)
    assert target.idle


def test_a_challenger_that_would_run_something_else_is_refused(target: KubernetesTarget, api: Api) -> None:
    target.check_setup(challenger=True)
    image(api, "challenger", "localhost/missing:1")
    target.check_setup(challenger=False)
    with pytest.raises(InvalidInputError, match=r"image of .* is localhost/missing:1, .*apply the manifests"):
        target.check_setup(challenger=True)
    image(api, "generation", "localhost/missing:1")
    target.check_setup(challenger=True)


def image(api: Api, name: str, text: str) -> None:
    api.deployments[name]["spec"]["template"]["spec"]["containers"][0]["image"] = text


def outside(cluster: Cluster) -> KubernetesTarget:
    return KubernetesTarget(cluster, report=lambda line: None, inside=False, verify_seconds=0.2)


def test_a_missing_right_to_reach_pods_is_an_error_before_any_change(cluster: Cluster, api: Api) -> None:
    words = 'pods "generation-0" is forbidden: User "x" cannot get resource "pods/portforward"'
    api.status["portforward"] = (403, words)
    for ask in (lambda one: one.check_reach(), lambda one: one.verify(OLD_DIGEST)):
        with pytest.raises(
            ServiceUnavailableError, match=r"pods/portforward of pod .*does not permit it: pods"
        ):
            ask(outside(cluster))
    with pytest.raises(ServiceUnavailableError) as caught:
        outside(cluster).check_reach()
    assert (exit_code(caught.value), str(caught.value).count("\n")) == (6, 0)
    api.status["portforward"] = (500, "the pod's node is away")
    outside(cluster).check_reach()  # broken pods are what a rollback is for
    api.pods["generation"] = []
    outside(cluster).check_reach()


def test_missing_or_unsupported_tls_is_an_error(
    cluster: Cluster, api: Api, weights: tuple[Weights, int], tmp_path: Path
) -> None:
    key, certificate = self_signed(tmp_path)
    tls = ServiceOptions(tls_ca=certificate, tls_server_name="generation")
    target = KubernetesTarget(
        cluster, report=lambda line: None, inside=True, connection=tls, verify_seconds=0.2
    )
    with pytest.raises(
        InvalidInputError, match=r"--tls: the handshake with pod generation-0 failed: .*plaintext"
    ):
        target.check_reach()
    server = grpc.server(ThreadPoolExecutor(2))
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(weights[0], server)
    identity = [(key.read_bytes(), certificate.read_bytes())]
    api.port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials(identity))
    api.reconcile("generation")
    server.start()
    try:
        KubernetesTarget(
            cluster,
            report=lambda line: None,
            inside=True,
            connection=tls,
            generation_address=f"127.0.0.1:{api.port}",
            verify_seconds=0.2,
        ).check_reach()
        with pytest.raises(InvalidInputError, match="--tls: is missing, and pod generation-0 uses TLS"):
            KubernetesTarget(cluster, report=lambda line: None, inside=True).check_reach()
        other = KubernetesTarget(
            cluster,
            report=lambda line: None,
            inside=True,
            connection=ServiceOptions(tls_ca=certificate),
            verify_seconds=0.2,
        )
        with pytest.raises(
            InvalidInputError, match=r"--tls: the handshake with pod generation-0 failed: .*127.0.0.1"
        ):
            other.check_reach()
    finally:
        server.stop(0).wait()


def self_signed(folder: Path) -> tuple[Path, Path]:
    key, certificate = folder / "tls.key", folder / "tls.crt"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=x"),
            *("-addext", "subjectAltName=DNS:generation", "-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    return key, certificate


def test_a_wrong_service_address_is_an_error_before_any_change(cluster: Cluster) -> None:
    target = KubernetesTarget(
        cluster,
        report=lambda line: None,
        inside=True,
        generation_address="127.0.0.1:1",
        verify_seconds=0.2,
    )
    with pytest.raises(ServiceUnavailableError, match=r"127.0.0.1:1 does not answer, and its pods do"):
        target.check_reach()


def test_no_change_is_sent_after_the_lease_has_expired(
    target: KubernetesTarget, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=1000.0)

    def sleep(seconds: float) -> None:
        clock.now += seconds

    monkeypatch.setattr(namespace, "time", SimpleNamespace(monotonic=lambda: clock.now, sleep=sleep))
    monkeypatch.setattr(locks, "_now", lambda: clock.now)
    with target.lock():
        target._cluster._patience = 30.0
        api.status["PATCH"] = (503, "etcdserver: leader changed")
        with pytest.raises(MilongaError):
            target.set_pin(NEW, SECONDS)
        assert 1000.5 < clock.now <= 1002.0  # two thirds of 3 s
    assert target._cluster.left is None


def test_the_lease_is_held_and_released(target: KubernetesTarget, api: Api) -> None:
    with target.lock() as lock:
        lock.check()
        assert api.lease is not None
        assert "@" in api.lease["spec"]["holderIdentity"]
        assert api.lease["metadata"]["name"] == "milonga-promote"
        api.lease["spec"]["leaseDurationSeconds"] = 60
        with pytest.raises(BusyError, match="holds the Lease"), target.lock():
            pass
    assert api.lease["spec"]["holderIdentity"] == ""


def test_clips_of_another_image_are_not_compared(target: KubernetesTarget, api: Api) -> None:
    before = target.serving
    api.deployments["challenger"]["spec"]["template"]["spec"]["containers"][0]["image"] = "y"
    assert target.serving != before
    assert target.place == "kubernetes/milonga/uid-of-generation"


def test_what_is_missing_or_forbidden_is_one_line(target: KubernetesTarget, api: Api) -> None:
    del api.deployments["generation"]
    with pytest.raises(
        InvalidInputError, match="the Deployment generation: is not in the namespace milonga"
    ) as missing:
        target.current_pin()
    assert exit_code(missing.value) == 2
    api.status["PATCH .*challenger"] = (
        403,
        'deployments.apps "challenger" is forbidden: User "x" cannot patch',
    )
    with pytest.raises(ServiceUnavailableError, match=r"does not permit it: .*cannot patch") as forbidden:
        target.start_challenger(NEW, SECONDS)
    assert exit_code(forbidden.value) == 6
    api.status = {"PATCH": (422, "is invalid")}
    with pytest.raises(MilongaError, match=r"refused a request as invalid \(422\): is invalid") as refused:
        target.stop_challenger()
    assert exit_code(refused.value) == 6


def test_transient_errors_are_retried(target: KubernetesTarget, api: Api) -> None:
    target.current_pin()
    api.status["GET .*deployments"] = (503, "etcdserver: leader changed")
    threading.Timer(0.15, api.status.clear).start()
    assert target.current_pin() == OLD
    api.status["GET .*deployments"] = (503, "etcdserver: leader changed")
    with pytest.raises(ServiceUnavailableError, match="can't be reached: etcdserver"):
        target.current_pin()


def test_a_missing_cluster_is_an_error_at_once() -> None:
    configuration = client.Configuration()
    configuration.host, configuration.retries = "http://127.0.0.1:1", False
    with pytest.raises(ServiceUnavailableError, match=r"the cluster x can't be reached: .*refused") as caught:
        Cluster("milonga", configuration=configuration, where="the cluster x").deployment("generation")
    assert "\n" not in str(caught.value)


def test_a_context_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    with pytest.raises(InvalidInputError, match=r"--context: .*no cluster can be chosen"):
        connect_cluster("milonga")
    with pytest.raises(InvalidInputError, match=r"--context: is kind-x: no cluster can be chosen"):
        connect_cluster("milonga", "kind-x")


def test_a_forwarded_port_passes_bytes_on_and_ends_with_its_pod() -> None:
    echo = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        near, _ = echo.accept()
        with near:
            near.sendall(near.recv(100).upper())

    threading.Thread(target=serve, daemon=True).start()
    with echo, Forwarding(lambda: socket.create_connection(echo.getsockname())) as forwarding:
        host, _, port = forwarding.address.rpartition(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"milonga")
            assert connection.recv(100) == b"MILONGA"
            assert connection.recv(100) == b""

    def refuse() -> socket.socket:
        raise OSError("no such pod")

    with Forwarding(refuse) as forwarding:
        host, _, port = forwarding.address.rpartition(":")
        with socket.create_connection((host, int(port))) as connection:
            assert connection.recv(100) == b""
