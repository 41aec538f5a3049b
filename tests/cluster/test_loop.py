"""The whole loop on a real cluster, in this order: each test continues from the state of the one before."""

import json
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from services.models.manifest import read_manifest, write_manifest
from services.models.mini import mini_folder
from tests.cluster.harness import KUBECTL, MILONGA, NAMESPACE, OUTPUT, Cluster, PodLoad, digest, forwarded

HERE = Path(__file__).parent
QUICK = ("--gates", HERE / "gates-quick.toml")
PROMOTE = ("promote", "run", "--model", "milonga-tango")
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
BASE = read_manifest(mini_folder("mini-base")).digest
MINI = read_manifest(mini_folder("mini")).digest


def test_one_file_brings_the_stack_up(cluster: Cluster) -> None:
    cluster.kubectl("delete", "namespace", NAMESPACE, "--ignore-not-found", timeout=300)
    start = time.monotonic()
    cluster.kubectl("apply", "-f", "k8s/")
    cluster.ready()
    cluster.transcript.figure("stack ready, s", time.monotonic() - start)


def test_sound_comes_through_the_service(cluster: Cluster) -> None:
    with forwarded(cluster, "service/generation", 50051) as address:
        clip = OUTPUT / "clip.wav"
        cluster.milonga("generate", "A dog barks then a siren wails", "-o", clip, "--server", address)
        assert clip.stat().st_size > 16_000


def test_the_registry_moves_to_postgresql_and_s3(cluster: Cluster) -> None:
    make_store_secret(cluster)
    start = time.monotonic()
    cluster.kubectl("apply", "-k", HERE / "stack")
    cluster.ready("postgres", "s3", "mlflow")
    cluster.transcript.figure("MLflow on PostgreSQL and S3 ready, s", time.monotonic() - start)


def test_bootstrap_registers_and_pins(cluster: Cluster, registry: str) -> None:
    assert cluster.pin() is None
    done = cluster.milonga("promote", "bootstrap", mini_folder("mini-base"))
    cluster.transcript.figure("bootstrap, s", done.seconds)
    assert digest(cluster.pin()) == BASE
    assert "already" in cluster.milonga("promote", "bootstrap", mini_folder("mini-base")).output


def test_manifests_that_are_applied_again_leave_the_pin(cluster: Cluster) -> None:
    pin = cluster.pin()
    cluster.kubectl("apply", "-k", HERE / "stack")
    assert cluster.pin() == pin
    cluster.kubectl("apply", "--server-side", "--force-conflicts", "-k", HERE / "stack")
    assert cluster.pin() == pin
    cluster.kubectl("apply", "-f", "k8s/", "--selector", "app.kubernetes.io/name=generation")
    assert cluster.pin() == pin
    cluster.ready("generation")


def test_training_survives_the_loss_of_its_pod(cluster: Cluster, registry: str) -> None:
    start = time.monotonic()
    settings = ("--set", "dpo.loop.steps=120", "--set", "dpo.loop.checkpoint_seconds=5")
    job = cluster.start(MILONGA, "train", "submit", "--recipe", "smoke", *settings, "--name", "align-test")
    job.wait_for("dpo dpo-smoke:")
    time.sleep(15)
    (pod,) = cluster.pods("align")
    cluster.kubectl("-n", NAMESPACE, "delete", "pod", pod, "--wait=false")
    done = job.finish()
    assert done.code == 0, done.output
    cluster.transcript.figure("training Job (smoke), one pod lost, s", time.monotonic() - start)
    _, _, after = done.output.partition("lost")
    steps = re.search(r"dpo dpo-smoke: +(\d+)%", after)
    assert steps and int(steps[1]) > 0, "the second pod started over"


def test_shards_and_nodes_share_a_volume(cluster: Cluster, registry: str) -> None:
    """Candidates by an Indexed Job, then DPO on them by two nodes; as the files are, but for size."""
    names = {
        "--recipe=mini": "--recipe=smoke",
        "--shard=$(JOB_COMPLETION_INDEX)/4": "--shard=$(JOB_COMPLETION_INDEX)/2",
    }
    start = time.monotonic()
    cluster.create_job("candidates", lambda arg: names.get(arg, arg), completions=2, parallelism=2)
    cluster.wait_for_job("candidates")
    cluster.transcript.figure("candidates by two shards (smoke), s", time.monotonic() - start)
    names = {
        "--num_processes=8": "--num_processes=2",
        "-m": "--cpu -m",
        "--recipe=tango2": "--recipe=smoke",
        "--set=start=file:/work/models/tango2-sft": "--set=loop.device=cpu",
        "--set=reference=file:/work/models/tango-full-ft-audiocaps": "--set=loop.steps=6",
        "--set=data.pairs=/work/data/pairs": "--set=data.pairs=/work/preferences/candidates",
    }
    start = time.monotonic()
    cluster.create_job("multi-node", lambda arg: names.get(arg, arg))
    cluster.wait_for_job("multi-node")
    cluster.transcript.figure("DPO on two nodes (smoke, gloo), s", time.monotonic() - start)
    log = cluster.kubectl("-n", NAMESPACE, "logs", "job/multi-node", "--tail=30")
    assert re.search(r"6 steps on \d+ examples", log), log


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--version", "99"], 2, "99"),
        (["--version", "2", "--namespace", "elsewhere"], 2, "elsewhere"),
        (["--version", "2", "--context", "none"], 2, "--context"),
    ],
)
def test_wrong_input_changes_nothing(
    cluster: Cluster, registry: str, words: list[str], code: int, message: str
) -> None:
    pin = cluster.pin()
    assert message in cluster.milonga(*PROMOTE, *words, code=code).error
    assert (cluster.pin(), cluster.challengers()) == (pin, 0)


def test_better_weights_are_promoted(cluster: Cluster, registry: str, load: PodLoad) -> None:
    cluster.milonga("train", "register", mini_folder("mini"))
    load.mark("promote mini")
    done = cluster.milonga(*PROMOTE)
    load.mark("")
    cluster.transcript.figure("promotion with gates, s", done.seconds)
    assert digest(cluster.pin()) == MINI
    assert cluster.challengers() == 0


def test_weights_worse_only_in_order_are_refused(cluster: Cluster, registry: str, load: PodLoad) -> None:
    load.mark("promote mini-base")
    done = cluster.milonga(*PROMOTE, "--version", "1", code=3)
    load.mark("")
    cluster.transcript.figure("refusal by gates, s", done.seconds)
    assert "present_and_in_order" in done.error
    assert digest(cluster.pin()) == MINI
    assert cluster.challengers() == 0


def test_damaged_weights_do_not_come_up(cluster: Cluster, registry: str, load: PodLoad) -> None:
    folder = OUTPUT / "other"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(mini_folder("mini"), folder)
    weights = load_file(folder / WEIGHTS)
    save_file({name: tensor * (1 + 2**-10) for name, tensor in weights.items()}, folder / WEIGHTS)
    write_manifest(folder, name="other", version="1", license="apache-2.0")
    cluster.milonga("train", "register", folder)
    # One byte more, in the store itself.
    damage = f"for file in $(find /data/mlflow -path '*{WEIGHTS}' -mmin -1); do printf x >> $file; done"
    cluster.kubectl("-n", NAMESPACE, "exec", "deployment/s3", "--", "sh", "-c", damage)
    load.mark("promote damaged")
    done = cluster.milonga(*PROMOTE, *QUICK, code=4)
    load.mark("")
    cluster.transcript.figure("refusal of damaged weights, s", done.seconds)
    assert "sha256" in done.error or "digest" in done.error
    assert digest(cluster.pin()) == MINI
    assert cluster.challengers() == 0


def test_an_image_that_cannot_be_pulled_is_said(cluster: Cluster, registry: str, load: PodLoad) -> None:
    missing = "localhost/missing:1"
    cluster.kubectl("-n", NAMESPACE, "set", "image", "deployment/challenger", f"*={missing}")
    assert missing in cluster.milonga(*PROMOTE, "--version", "1", *QUICK, code=2).error
    # Where both would run it, the challenger is who finds out; the pods that serve stay.
    cluster.kubectl("-n", NAMESPACE, "set", "image", "deployment/generation", f"*={missing}")
    load.mark("image missing")
    done = cluster.milonga(*PROMOTE, "--version", "1", *QUICK, code=4)
    load.mark("")
    cluster.transcript.figure("failure by a missing image, s", done.seconds)
    assert missing in done.error
    assert digest(cluster.pin()) == MINI
    assert cluster.challengers() == 0
    cluster.kubectl("apply", "-k", HERE / "stack")
    cluster.ready("generation")


def test_pods_that_never_get_ready_are_rolled_back(cluster: Cluster, registry: str, load: PodLoad) -> None:
    (node,) = (node["metadata"]["name"] for node in cluster.get("nodes")["items"])
    load.mark("no room")
    run = cluster.start(MILONGA, *PROMOTE, "--version", "1", *QUICK, "--deadline", "35")
    # Before the gates end: the new pod is scheduled within a second of that.
    run.wait_for("starting a challenger on milonga-tango version 1")
    scheduled = ("-l", "app.kubernetes.io/name=challenger", f"--field-selector=spec.nodeName={node}")
    while not cluster.get("pods", *scheduled)["items"]:
        time.sleep(0.2)
    cluster.kubectl("cordon", node)
    try:
        done = run.finish()
    finally:
        cluster.kubectl("uncordon", node)
    load.mark("")
    assert done.code == 4, done.output
    assert "unschedulable" in done.error
    assert digest(cluster.pin()) == MINI
    cluster.ready("generation")


def test_rollback(cluster: Cluster, registry: str, load: PodLoad) -> None:
    load.mark("rollback")
    done = cluster.milonga("promote", "rollback")
    load.mark("")
    cluster.transcript.figure("rollback, s", done.seconds)
    assert digest(cluster.pin()) == BASE
    load.mark("promote mini")
    cluster.milonga("train", "register", mini_folder("mini"))
    cluster.milonga(*PROMOTE, *QUICK)
    load.mark("")
    assert digest(cluster.pin()) == MINI


def test_a_promoter_that_died_in_the_gates_is_undone(cluster: Cluster, registry: str, load: PodLoad) -> None:
    run = cluster.start(MILONGA, *PROMOTE, "--version", "1")
    run.wait_for("starting a challenger on")
    while cluster.challengers() == 0:
        time.sleep(0.2)
    run.process.send_signal(signal.SIGKILL)
    load.mark("promoter killed")
    assert run.finish().code == -signal.SIGKILL
    assert "promote resume`" in cluster.milonga(*PROMOTE, "--version", "1", *QUICK, code=5).error
    done = cluster.milonga("promote", "resume")
    load.mark("")
    cluster.transcript.figure("resume that undoes, s", done.seconds)
    assert digest(cluster.pin()) == MINI
    assert cluster.challengers() == 0


def test_a_promoter_that_died_in_the_rollout_is_finished(
    cluster: Cluster, registry: str, load: PodLoad
) -> None:
    run = cluster.start(MILONGA, *PROMOTE, "--version", "1", *QUICK)
    run.wait_for("passed ")
    while digest(cluster.pin()) != BASE:
        time.sleep(0.2)
    run.process.send_signal(signal.SIGKILL)
    load.mark("promoter killed in the rollout")
    assert run.finish().code == -signal.SIGKILL
    done = cluster.milonga("promote", "resume")
    load.mark("")
    cluster.transcript.figure("resume that finishes, s", done.seconds)
    assert digest(cluster.pin()) == BASE


def test_pods_that_are_deleted_meanwhile_lose_no_call(cluster: Cluster, registry: str, load: PodLoad) -> None:
    """And the running promotion continues. It runs as a Job, under the promoter's account."""
    cluster.kubectl("-n", NAMESPACE, "scale", "deployment/generation", "--replicas=2")
    cluster.ready("generation")
    # The alias challenger, which the Job takes, points to the damaged version: registering moves it back.
    cluster.milonga("train", "register", mini_folder("mini"))
    load.mark("promotion by Job")
    start = time.monotonic()
    cluster.kubectl("create", "-f", "k8s/jobs/promote.yaml")
    while digest(cluster.pin("challenger") or BASE) != MINI:
        assert time.monotonic() < start + 600
        time.sleep(1)
    for _ in range(2):
        pod = cluster.pods("generation")[0]
        load.mark("pod deleted")
        cluster.kubectl("-n", NAMESPACE, "delete", "pod", pod)
        cluster.ready("generation")
    cluster.kubectl(
        "-n", NAMESPACE, "wait", "job/promote", "--for=condition=Complete", "--timeout=600s", timeout=700
    )
    load.mark("")
    cluster.transcript.figure("promotion by Job, two pods deleted meanwhile, s", time.monotonic() - start)
    cluster.kubectl("-n", NAMESPACE, "logs", "job/promote")
    assert digest(cluster.pin()) == MINI


def test_no_call_was_lost_and_none_mixed(cluster: Cluster, load: PodLoad) -> None:
    time.sleep(5)
    summary = load.stop()
    cluster.transcript.figure("calls", summary["calls"])
    cluster.transcript.figure("calls that failed", sum(summary["failed"].values()))
    cluster.transcript.figure("answers that were mixed", summary["mixed"])
    assert set(summary["models"]) == {BASE, MINI}
    assert not summary["failed"]
    assert not summary["mixed"]


def test_the_ledger_has_it_all(cluster: Cluster, registry: str) -> None:
    cluster.milonga("promote", "history")
    entries = json.loads(cluster.milonga("promote", "history", "--json").output)
    outcomes = [entry["outcome"] for entry in reversed(entries)]
    assert outcomes == [
        "bootstrapped", "promoted", "refused", "failed", "failed", "failed", "rolled back", "promoted",
        "failed", "promoted", "promoted",
    ]  # fmt: skip


ALLOWED = [
    *[
        (verb, f"deployments.apps/{name}")
        for verb in ("get", "patch", "watch")
        for name in ("generation", "challenger")
    ],
    *[
        (verb, f"deployments.apps/{name} --subresource=scale")
        for verb in ("get", "patch")
        for name in ("generation", "challenger")
    ],
    *[(verb, "pods") for verb in ("get", "list", "watch")],
    *[(verb, "leases.coordination.k8s.io/milonga-promote") for verb in ("get", "update", "patch")],
]
REFUSED = [
    *[(verb, "deployments.apps/generation") for verb in ("delete", "create", "update")],
    *[(verb, "deployments.apps/reward") for verb in ("get", "patch", "watch")],
    ("list", "deployments.apps"),
    ("create", "leases.coordination.k8s.io"),
    ("get", "leases.coordination.k8s.io/other"),
    *[(verb, "pods") for verb in ("create", "delete", "patch")],
    ("create", "pods --subresource=exec"),
    ("create", "pods --subresource=portforward"),
    *[(verb, "secrets") for verb in ("get", "list")],
    ("get", "configmaps"),
    ("create", "jobs.batch"),
    ("get", "nodes"),
    ("bind", "roles.rbac.authorization.k8s.io"),
]


def test_the_promoter_may_do_what_it_must_and_nothing_else(cluster: Cluster) -> None:
    account = f"--as=system:serviceaccount:{NAMESPACE}:promoter"
    for expected, requests in (("yes", ALLOWED), ("no", REFUSED)):
        for verb, what in requests:
            done = cluster.run(KUBECTL, "-n", NAMESPACE, "auth", "can-i", verb, *what.split(), account)
            assert done.output.split()[-1] == expected, (verb, what)
    done = cluster.run(
        KUBECTL,
        "-n",
        NAMESPACE,
        "--as=system:serviceaccount:milonga:promoter",
        "delete",
        "deployment",
        "generation",
    )
    assert done.code == 1
    assert "forbidden" in done.output


def test_production_is_accepted_as_it_is(cluster: Cluster) -> None:
    """In an empty namespace: of a volume that is there the access mode can't be changed."""
    cluster.kubectl("delete", "namespace", NAMESPACE, timeout=300)
    cluster.kubectl("apply", "-f", "k8s/base/namespace.yaml")
    for overlay in ("production", "production-jobs"):
        cluster.kubectl("apply", "--dry-run=server", "-k", f"k8s/overlays/{overlay}")


def test_production_is_scheduled_on_gpus_and_says_that_it_has_no_pin(cluster: Cluster) -> None:
    """On a node that is told that it has GPUs; there is no device behind them."""
    (node,) = (node["metadata"]["name"] for node in cluster.get("nodes")["items"])
    resource = [{"op": "add", "path": "/status/capacity/nvidia.com~1gpu", "value": "4"}]
    cluster.kubectl("patch", "node", node, "--subresource=status", "--type=json", "-p", json.dumps(resource))
    cluster.kubectl("label", "node", node, "nvidia.com/gpu.present=true", "--overwrite")
    make_store_secret(cluster)
    make_certificate(cluster)
    make_callers(cluster)
    cluster.kubectl("apply", "-k", HERE / "production")
    cluster.ready("mlflow")
    end = time.monotonic() + 180
    while True:
        pods = cluster.get("pods", "-l", "app.kubernetes.io/name=generation")["items"]
        fetches = [status for pod in pods for status in pod["status"].get("initContainerStatuses", ())]
        ended = [status.get("lastState", {}).get("terminated") for status in fetches]
        if ended and all(ended):
            break
        assert time.monotonic() < end, json.dumps(pods)
        time.sleep(2)
    cluster.kubectl("-n", NAMESPACE, "get", "pods", "-o", "wide")
    for pod in pods:
        assert pod["spec"]["nodeName"] == node
        assert pod["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert not any(status["ready"] for status in pod["status"]["containerStatuses"])
    for state in ended:
        assert state["exitCode"] == 2
        assert "there is no pin; `milonga promote bootstrap` sets one" in state["message"]


def make_store_secret(cluster: Cluster) -> None:
    """Where MLflow's stores are, and their keys."""
    secret = {
        "password": "of-the-test",
        "MLFLOW_BACKEND_STORE_URI": "postgresql+psycopg://milonga:of-the-test@postgres:5432/postgres",
        "MLFLOW_ARTIFACTS_DESTINATION": "s3://mlflow/artifacts",
        "MLFLOW_S3_ENDPOINT_URL": "http://s3:9000",
        "AWS_ACCESS_KEY_ID": "milonga",
        "AWS_SECRET_ACCESS_KEY": "of-the-test-too",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    literals = [f"--from-literal={name}={value}" for name, value in secret.items()]
    cluster.kubectl("-n", NAMESPACE, "create", "secret", "generic", "mlflow-store", *literals)


def make_callers(cluster: Cluster) -> None:
    """What the component callers asks for: one caller, whose token nobody has."""
    text = f"[callers.promoter]\ntokens = ['sha256:{'0' * 64}']\n"
    cluster.kubectl(
        *("-n", NAMESPACE, "create", "secret", "generic", "milonga-callers"),
        f"--from-literal=callers.toml={text}",
    )


def make_certificate(cluster: Cluster) -> None:
    """What the component tls asks for, signed by itself."""
    folder = OUTPUT / "tls"
    folder.mkdir(exist_ok=True)
    names = "subjectAltName=DNS:generation,DNS:scoring,DNS:reward,DNS:challenger"
    done = cluster.run(
        *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=milonga"),
        *("-addext", names, "-keyout", folder / "tls.key", "-out", folder / "tls.crt"),
    )
    assert done.code == 0, done.output
    shutil.copy(folder / "tls.crt", folder / "ca.crt")
    files = [f"--from-file={folder / name}" for name in ("tls.crt", "tls.key", "ca.crt")]
    cluster.kubectl(
        *("-n", NAMESPACE, "create", "secret", "generic", "milonga-tls"), "--type=kubernetes.io/tls", *files
    )
