"""The overlay of a Triton, its image, and the example for KServe: what linters do not see of them."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest
import yaml  # type: ignore[import-untyped]

from k8s import lint
from services.catalogue import GENERATION
from services.cli.triton import MODELS
from services.generation.settings import GenerationSettings
from services.runtime.settings import ENV_PREFIX
from tests.k8s.test_manifests import SECRETS, containers, faults, load, of_kind, pod
from training.promotion.targets.triton_client import RESTRICTION

Object = dict[str, Any]

OVERLAY: Final = "overlays/production-triton"
JOBS: Final = "overlays/production-triton-jobs"
KSERVE: Final = lint.ROOT / "examples" / "kserve" / "generation.yaml"
CHECK: Final = lint.K8S / "schemas" / "kserve.py"


def deployment() -> Object:
    return of_kind(load(OVERLAY), "Deployment")["triton"]


def arguments(container: Object) -> dict[str, list[str]]:
    """Flags, and what they were given."""
    found: dict[str, list[str]] = {}
    for one in container["args"]:
        name, _, value = one.partition("=")
        found.setdefault(name, []).append(value)
    return found


# The pod


def test_it_loads_the_models_that_export_writes_and_their_pins_alone() -> None:
    export, server = containers(deployment())
    flags = arguments(server)
    assert server["command"] == ["tritonserver"]
    models = flags["--load-model"]
    assert {*models} == {*MODELS}
    assert flags["--model-control-mode"] == ["explicit"]
    (script,) = export["args"]
    assert f"for model in {' '.join(models)};" in script
    repository = flags["--model-repository"][0]
    mounts = [{one["mountPath"]: one for one in each["volumeMounts"]} for each in (export, server)]
    assert mounts[0][repository]["name"] == mounts[1][repository]["name"] == "repository"
    assert "readOnly" not in mounts[0][repository]
    assert mounts[1][repository]["readOnly"] is True
    assert export["image"] == server["image"]


def test_the_first_export_leaves_what_is_there_and_is_told_everything(tmp_path: Path) -> None:
    """Run as it stands, with a `milonga` that only writes down what it is asked."""
    export = containers(deployment())[0]
    (settings,) = export["envFrom"]
    told = of_kind(load(OVERLAY), "ConfigMap")[settings["configMapRef"]["name"]]["data"]
    repository, called = tmp_path / "repository", tmp_path / "called"
    (repository / "clap").mkdir(parents=True)
    (repository / "clap" / "config.pbtxt").touch()
    command = tmp_path / "milonga"
    command.write_text(f'#!/bin/sh\nfor word; do echo "$word" >> {called}; done\n', encoding="utf-8")
    command.chmod(0o755)
    script = export["args"][0].replace("/repository", str(repository))
    subprocess.run(
        [*export["command"], script],
        check=True,
        env={**told, "PATH": f"{tmp_path}:/usr/bin:/bin"},
        timeout=60,
    )
    words = called.read_text(encoding="utf-8").split()
    runs = " ".join(words).split("triton export ")[1:]
    assert [run.split()[1] for run in runs] == ["tango", "reward", "caption", "explain"]
    for run in runs:
        model = run.split()[1]
        assert run.split() == [
            *("--only", model, "--model", told["MODEL"], "--scorer", told["SCORER_A"]),
            *("--scorer", told["SCORER_B"], "--reward", told["REWARD"], "--clap", told["CLAP"]),
            *(
                "--captioner",
                told["CAPTIONER"],
                "--captioner-clap",
                told["CLAP"],
                "--explained",
                told["MODEL"],
            ),
            *("--set", f"{model}.device=cuda", str(repository)),
        ]


def test_a_promotion_takes_no_traffic_from_it() -> None:
    """Triton's strict readiness is false while a version loads, and after one was refused."""
    server = containers(deployment())[1]
    assert arguments(server)["--strict-readiness"] == ["false"]
    assert "--exit-on-error" not in arguments(server)


def test_probes_ask_tritons_health_and_ports_are_tritons_own() -> None:
    server = containers(deployment())[1]
    assert {one["name"]: one["containerPort"] for one in server["ports"]} == {
        "http": 8000,
        "grpc": 8001,
        "metrics": 8002,
    }
    for probe in ("startup", "readiness"):
        assert server[f"{probe}Probe"]["httpGet"] == {"path": "/v2/health/ready", "port": "http"}
    loaded = arguments(server)["--load-model"]
    assert server["livenessProbe"]["exec"]["command"] == [
        *("python3", "-m", "services.inference.triton.alive", "--models", str(len(loaded)))
    ]
    start = server["startupProbe"]
    assert start["periodSeconds"] * start["failureThreshold"] >= 600
    assert (
        deployment()["spec"]["progressDeadlineSeconds"] > start["periodSeconds"] * start["failureThreshold"]
    )


def test_it_stops_when_clients_have_left_and_requests_are_done() -> None:
    server = containers(deployment())[1]
    flags = arguments(server)
    delay = server["lifecycle"]["preStop"]["sleep"]["seconds"]
    age = int(flags["--grpc-max-connection-age"][0]) / 1000
    assert age < delay
    assert age + 30 < deployment()["spec"]["minReadySeconds"]
    assert pod(deployment())["terminationGracePeriodSeconds"] > delay + int(flags["--exit-timeout-secs"][0])


def test_shared_memory_is_enough_and_counted() -> None:
    volumes = {one["name"]: one for one in pod(deployment())["volumes"]}
    mounts = {one["mountPath"]: one["name"] for one in containers(deployment())[1]["volumeMounts"]}
    shared = volumes[mounts["/dev/shm"]]["emptyDir"]
    assert shared["medium"] == "Memory"
    size = int(shared["sizeLimit"].removesuffix("Gi")) * 1024
    # Two versions of each model and a challenger, 64 MiB each.
    assert size >= (2 * len(MODELS) + 1) * 64
    assert (
        int(containers(deployment())[1]["resources"]["limits"]["memory"].removesuffix("Gi")) * 1024 > 8 * size
    )


def test_it_has_one_gpu_and_one_replica() -> None:
    server = containers(deployment())[1]
    assert deployment()["spec"]["replicas"] == 1
    assert server["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert pod(deployment())["nodeSelector"] == {"nvidia.com/gpu.present": "true"}


# What is around it


@pytest.mark.parametrize("place", [OVERLAY, JOBS])
def test_what_objects_refer_to_is_there(place: str) -> None:
    there = load(OVERLAY)
    claims = of_kind(there, "PersistentVolumeClaim")
    for one in load(place):
        assert one["metadata"]["labels"]["app.kubernetes.io/part-of"] == "milonga"
        if one["kind"] not in ("Deployment", "Job"):
            continue
        assert pod(one)["serviceAccountName"] in of_kind(there, "ServiceAccount")
        assert pod(one).get("priorityClassName") in (None, *of_kind(there, "PriorityClass"))
        for volume in pod(one)["volumes"]:
            assert volume.get("persistentVolumeClaim", {}).get("claimName") in (None, *claims)
            assert volume.get("secret", {}).get("secretName") in (None, "triton-operator", *SECRETS)
        for container in containers(one):
            mounts = {mount["name"] for mount in container["volumeMounts"]}
            assert mounts <= {volume["name"] for volume in pod(one)["volumes"]}


def test_the_namespace_is_the_bases() -> None:
    mine, base = (lint.K8S / folder / "namespace.yaml" for folder in (OVERLAY, "base"))
    assert mine.read_text(encoding="utf-8") == base.read_text(encoding="utf-8")


def test_services_find_the_pod_and_prometheus_its_metrics() -> None:
    labels = deployment()["spec"]["template"]["metadata"]["labels"]
    ports = {one["name"]: one["containerPort"] for one in containers(deployment())[1]["ports"]}
    services = of_kind(load(OVERLAY), "Service")
    for name in ("triton", "triton-headless"):
        assert services[name]["spec"]["selector"].items() <= labels.items()
        for port in services[name]["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"]
    assert services["triton-headless"]["spec"]["clusterIP"] == "None"
    # HTTP has no TLS and takes loads too: it is for the kubelet.
    assert not any(
        port["name"] == "http"
        for name in services
        for port in services[name]["spec"]["ports"]
        if "triton" in name
    )
    (monitor,) = of_kind(load("base", "monitoring"), "ServiceMonitor").values()
    headless = services["triton-headless"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= headless["metadata"]["labels"].items()
    assert {one["port"] for one in monitor["spec"]["endpoints"]} & {
        one["name"] for one in headless["spec"]["ports"]
    }
    budget = of_kind(load(OVERLAY), "PodDisruptionBudget")["triton"]
    assert budget["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_clients_and_promotion_reach_grpc_and_nothing_else_does() -> None:
    policies = of_kind(load(OVERLAY), "NetworkPolicy")
    assert "default-deny" in policies
    (rule,) = policies["triton-from-clients"]["spec"]["ingress"]
    assert rule["ports"] == [{"port": "grpc", "protocol": "TCP"}] or rule["ports"] == [{"port": "grpc"}]
    (job,) = (one for one in load(JOBS) if one["metadata"]["name"] == "promote")
    selector = policies["promotion-to-triton"]["spec"]["podSelector"]["matchLabels"]
    assert selector.items() <= job["spec"]["template"]["metadata"]["labels"].items()


def test_promotion_writes_the_repository_that_the_server_reads() -> None:
    jobs = of_kind(load(JOBS), "Job")
    promote = jobs["promote"]
    (container,) = containers(promote)
    flags = arguments(container)
    service = of_kind(load(OVERLAY), "Service")["triton"]
    port = service["spec"]["ports"][0]["port"]
    assert flags["--target"] == [f"triton://{service['metadata']['name']}:{port}"]
    assert flags["--tls-server-name"] == [service["metadata"]["name"]]
    mounted = {one["mountPath"]: one["name"] for one in container["volumeMounts"]}
    volumes = {one["name"]: one for one in pod(promote)["volumes"]}
    claims = [
        next(one["persistentVolumeClaim"] for one in found if one["name"] == "repository")
        for found in (pod(promote)["volumes"], pod(deployment())["volumes"])
    ]
    assert claims[0] == claims[1]
    assert volumes[mounted[flags["--repository"][0]]]["name"] == "repository"
    assert flags["--tls-ca"][0].rpartition("/")[0] in mounted
    # The other Jobs are production's.
    others = {name: one for name, one in jobs.items() if name != "promote"}
    expected = of_kind(load("overlays/production-jobs"), "Job")
    assert others == {name: one for name, one in expected.items() if name != "promote"}


def test_promotion_alone_has_the_token_that_loads_models() -> None:
    server = containers(deployment())[1]
    (container,) = containers(of_kind(load(JOBS), "Job")["promote"])
    told = {one["name"]: one["valueFrom"] for one in server["env"]}
    secret = told["OPERATOR_TOKEN"]["secretKeyRef"]
    grpc, http = (
        arguments(server)[flag][0].split(":")
        for flag in ("--grpc-restricted-protocol", "--http-restricted-api")
    )
    assert {"model-repository", "shared-memory"} <= {*grpc[0].split(",")} < {*http[0].split(",")}
    assert not {"health", "metadata", "inference"} & {*grpc[0].split(",")}
    assert "health" not in http[0]
    assert grpc[1] == http[1] == f"{RESTRICTION}=$(OPERATOR_TOKEN)"
    folder, _, key = arguments(container)["--operator-token-file"][0].rpartition("/")
    (name,) = (one["name"] for one in container["volumeMounts"] if one["mountPath"] == folder)
    (volume,) = (one for one in pod(of_kind(load(JOBS), "Job")["promote"])["volumes"] if one["name"] == name)
    assert (volume["secret"]["secretName"], key) == (secret["name"], secret["key"])


# The image


def test_the_image_stands_on_nvidias_by_tag_and_digest() -> None:
    text = (lint.ROOT / "services/inference/triton/Dockerfile").read_text(encoding="utf-8")
    (image,) = re.findall(r"^ARG TRITON_IMAGE=(\S+)$", text, re.MULTILINE)
    assert re.fullmatch(r"nvcr\.io/nvidia/tritonserver:\d\d\.\d\d-py3@sha256:[0-9a-f]{64}", image)


def test_the_image_has_tools_of_the_other_images_and_runs_as_a_number() -> None:
    services, triton = (
        (lint.ROOT / path).read_text(encoding="utf-8")
        for path in ("services/Dockerfile", "services/inference/triton/Dockerfile")
    )
    for tool in ("pip", "uv"):
        found = re.search(rf" {tool}==(\S+) ", services)
        assert found is not None
        assert f" {tool}=={found[1]}" in triton
    users = [line for line in triton.splitlines() if line.startswith("USER ")]
    assert users[-1] == "USER 10001:10001"
    # tritonserver is the pod's command: nothing stands between it and SIGTERM.
    assert "ENTRYPOINT []" in triton.splitlines()
    environment = re.search(r"^ENV PATH=.*?[^\\]$", services, re.MULTILINE | re.DOTALL)
    assert environment is not None
    assert environment[0] in triton


# KServe


def examples() -> dict[str, Object]:
    return {one["kind"]: one for one in yaml.safe_load_all(KSERVE.read_text(encoding="utf-8"))}


def checked(path: Path) -> "subprocess.CompletedProcess[str]":
    command = [lint.TOOLS / "python", CHECK, path]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_kserves_models_take_the_example() -> None:
    done = checked(KSERVE)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("protocolVersions:", "protocolVersion:", "'protocolVersion' was unexpected"),
        ("storageUri:", "storageURI:", "'storageURI' was unexpected"),
        ("containerPort: 50051", "containerPort: '50051'", "'50051' is not of type 'integer'"),
        ("    - name: kserve-container\n      image", "    - image", "'name' is a required property"),
        ("kind: ServingRuntime", "kind: ServingRuntimes", "no schema for serving.kserve.io/v1alpha1"),
    ],
)
def test_kserves_models_refuse_what_is_wrong(right: str, wrong: str, said: str, tmp_path: Path) -> None:
    text = KSERVE.read_text(encoding="utf-8")
    assert right in text
    (tmp_path / "wrong.yaml").write_text(text.replace(right, wrong, 1), encoding="utf-8")
    done = checked(tmp_path / "wrong.yaml")
    assert done.returncode == 1
    assert said in done.stdout


def test_the_schemas_say_where_they_come_from() -> None:
    comment = json.loads(CHECK.with_suffix(".json").read_text(encoding="utf-8"))["$comment"]
    assert "kserve-0.21.0" in comment
    assert "Apache License 2.0" in comment


def test_the_example_is_the_generation_service_by_the_protocol() -> None:
    runtime, service = examples()["ServingRuntime"], examples()["InferenceService"]
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    assert model["modelFormat"]["name"] in [one["name"] for one in runtime["spec"]["supportedModelFormats"]]
    (container,) = runtime["spec"]["containers"]
    assert container["name"] == "kserve-container"
    assert container["args"] == ["serve", "generation"]
    told = {one["name"]: one["value"] for one in container["env"]}
    assert {name for name in told if name.startswith(ENV_PREFIX)} <= {
        f"{ENV_PREFIX}{field}".upper() for field in GenerationSettings.model_fields
    }
    assert told["MILONGA_LISTEN"] == f"0.0.0.0:{GENERATION.port}"
    assert container["ports"][0]["containerPort"] == GENERATION.port
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        health = {"port": int(told["MILONGA_HEALTH_PORT"]), "service": GENERATION.rpc}
        assert container[probe]["grpc"] == health
    stop = int(told["MILONGA_DRAIN_DELAY_SECONDS"]) + int(told["MILONGA_GRACE_SECONDS"])
    assert service["spec"]["predictor"]["terminationGracePeriodSeconds"] > stop


def test_the_example_is_as_restricted_as_our_own_pods() -> None:
    spec = examples()["ServingRuntime"]["spec"]
    security = spec["containers"][0]["securityContext"]
    # KServe has no place for a pod's in a runtime, so the container says it all.
    assert faults({**spec, "securityContext": security}) == []
