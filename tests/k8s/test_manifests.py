"""What linters do not see: that the manifests agree with the services, and with each other."""

import functools
import importlib
import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
import yaml  # type: ignore[import-untyped]

from k8s import lint
from services.catalogue import CATALOGUE, GENERATION, ServiceEntry
from services.cli.serve import service_of
from services.runtime.access import allows_anonymous
from services.runtime.server import CLOSE_SECONDS
from services.runtime.settings import ENV_PREFIX, ServerSettings, load_settings
from services.web.settings import WebSettings
from services.weights.uri import served_uri
from training.loop.config import override
from training.preferences.pipeline import PREFERENCES
from training.promotion.targets.cluster import NAME_LABEL, PIN_ANNOTATION
from training.runs.recipes import DPO, recipe
from training.runs.run_recipes import RUNS

Object = dict[str, Any]

OVERLAYS: Final = ("local", "production")
OTHER_OVERLAYS: Final = ("production-jobs", "production-triton", "production-triton-jobs")
"""Of Jobs; and of a Triton, see test_triton.py."""
JOBS: Final = ("align", "candidates", "multi-gpu", "multi-node", "promote")
SERVICES: Final[dict[str, ServiceEntry]] = {**CATALOGUE, "challenger": GENERATION}
"""What serves, by its Deployment."""
OTHERS: Final = {"MILONGA_CACHE", "MILONGA_RUN"}
"""Variables that are no setting of a service."""
SECRETS: Final = {
    "mlflow-store",
    "milonga-callers",
    "milonga-promoter-token",
    "milonga-tls",
    "milonga-web-signing",
    "milonga-web-tls",
}
"""What the user makes, as docs/kubernetes.md says."""


@functools.cache
def rendered(folder: str, *components: str) -> str:
    return lint.render((folder, components))


@functools.cache
def load(folder: str, *components: str) -> list[Object]:
    return list(yaml.safe_load_all(rendered(folder, *components)))


def overlay(name: str) -> list[Object]:
    return load(f"overlays/{name}")


def of_kind(objects: list[Object], kind: str) -> dict[str, Object]:
    return {one["metadata"]["name"]: one for one in objects if one["kind"] == kind}


def pod(one: Object) -> Object:
    found: Object = one["spec"]["template"]["spec"]
    return found


def containers(one: Object) -> list[Object]:
    return [*pod(one).get("initContainers", ()), *pod(one)["containers"]]


def labels_of(one: Object) -> dict[str, str]:
    """Labels of its pods."""
    found: dict[str, str] = one["spec"]["template"]["metadata"]["labels"]
    return found


def matches(selector: Object, labels: Mapping[str, str]) -> bool:
    """Whether a label selector takes a pod with `labels`."""
    expressions = selector.get("matchExpressions", ())
    assert all(expression["operator"] == "In" for expression in expressions)
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        labels.get(expression["key"]) in expression["values"] for expression in expressions
    )


def environment(objects: list[Object], container: Object) -> dict[str, str]:
    """What a container is told, as far as the manifests say it."""
    maps, found = of_kind(objects, "ConfigMap"), dict[str, str]()
    for source in container.get("envFrom", ()):
        if "configMapRef" in source:
            found |= maps[source["configMapRef"]["name"]]["data"]
    return found | {one["name"]: one["value"] for one in container.get("env", ()) if "value" in one}


def running() -> Iterator[tuple[str, Object]]:
    """Everything that has pods, with where it was found."""
    for place in ("jobs", *(f"overlays/{name}" for name in (*OVERLAYS, *OTHER_OVERLAYS))):
        for one in load(place):
            if one["kind"] in ("Deployment", "Job"):
                yield place, one


# Callers


@pytest.mark.parametrize("name", SERVICES)
def test_local_serves_anybody_and_production_only_callers_with_names(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(place: str) -> dict[str, str]:
        objects = overlay(place)
        return environment(objects, pod(of_kind(objects, "Deployment")[name])["containers"][0])

    local, production = told("local"), told("production")
    assert local["MILONGA_ANONYMOUS"] == "allowed"
    assert "MILONGA_CALLERS_FILE" not in local
    assert production["MILONGA_ANONYMOUS"] == "refused"
    assert production["MILONGA_REFLECTION"] == "false"
    (mount,) = (
        one
        for one in pod(of_kind(overlay("production"), "Deployment")[name])["containers"][0]["volumeMounts"]
        if one["name"] == "callers"
    )
    assert production["MILONGA_CALLERS_FILE"] == f"{mount['mountPath']}/callers.toml"
    assert "subPath" not in mount
    for texts in (local, production):
        for key, value in texts.items():
            monkeypatch.setenv(key, value)
        settings = load_settings(ServerSettings, listen="0.0.0.0:1")
        assert allows_anonymous(settings) is (texts is local)


def test_promotion_has_a_token_where_callers_have_names() -> None:
    job = of_kind(overlay("production-jobs"), "Job")["promote"]
    (container,) = pod(job)["containers"]
    mounts = {one["mountPath"]: one["name"] for one in container["volumeMounts"]}
    volumes = {one["name"]: one for one in pod(job)["volumes"]}
    folder, _, key = environment([], container)["MILONGA_TOKEN_FILE"].rpartition("/")
    assert volumes[mounts[folder]]["secret"]["secretName"] == "milonga-promoter-token"
    assert key == "token"
    assert "milonga-promoter-token" not in str(overlay("production-triton-jobs"))


# The stack that is applied


def test_the_rendered_stack_is_fresh() -> None:
    assert lint.STACK.read_text(encoding="utf-8") == lint.stack(), "run `make k8s`"


def test_apply_f_reads_the_stack_and_nothing_else() -> None:
    read = [path.name for path in lint.K8S.iterdir() if path.suffix in (".yaml", ".yml", ".json")]
    assert read == [lint.STACK.name]


def test_a_stale_stack_and_a_missing_kubectl_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(lint, "TOOLS", tmp_path)
    with pytest.raises(lint.LintError, match=r"kubectl is missing; run `make"):
        lint.stack()


def test_everything_there_is_is_rendered_by_the_linter() -> None:
    found = lint.scenarios()
    folders = {folder for folder, _ in found.values()}
    used = {name for _, names in found.values() for name in names}
    assert folders == {
        "base",
        "jobs",
        *(f"overlays/{path.name}" for path in (lint.K8S / "overlays").iterdir()),
    }
    assert {f"overlays/{name}" for name in (*OVERLAYS, *OTHER_OVERLAYS)} <= folders
    assert used == {path.name for path in (lint.K8S / "components").iterdir()}
    assert set(JOBS) == {path.stem for path in (lint.K8S / "jobs").glob("*.yaml")} - {"kustomization"}


@pytest.mark.parametrize("name", OVERLAYS)
def test_all_objects_lie_in_the_namespace_and_are_labelled(name: str) -> None:
    cluster_wide = ("Namespace", "PriorityClass")
    for one in overlay(name):
        where = f"{one['kind']} {one['metadata']['name']}"
        assert (one["metadata"].get("namespace") == "milonga") is (one["kind"] not in cluster_wide), where
        labels = one["metadata"]["labels"]
        assert labels["app.kubernetes.io/part-of"] == "milonga", where
        assert NAME_LABEL in labels, where
    assert of_kind(overlay(name), "Namespace").keys() == {"milonga"}


@pytest.mark.parametrize("name", OVERLAYS)
def test_what_objects_refer_to_is_there(name: str) -> None:
    objects = [*overlay(name), *load("overlays/production-jobs" if name == "production" else "jobs")]
    there = {kind: of_kind(objects, kind) for kind in ("ConfigMap", "ServiceAccount", "PriorityClass")}
    claims = of_kind(objects, "PersistentVolumeClaim")
    for one in (*of_kind(objects, "Deployment").values(), *of_kind(objects, "Job").values()):
        assert pod(one)["serviceAccountName"] in there["ServiceAccount"]
        assert pod(one).get("priorityClassName") in (None, *there["PriorityClass"])
        for volume in pod(one)["volumes"]:
            claim, secret = volume.get("persistentVolumeClaim"), volume.get("secret")
            assert claim is None or claim["claimName"] in claims
            assert secret is None or secret["secretName"] in SECRETS
        for container in containers(one):
            mounts = {mount["name"] for mount in container["volumeMounts"]}
            assert mounts <= {volume["name"] for volume in pod(one)["volumes"]}
            for source in container.get("envFrom", ()):
                if "secretRef" in source:
                    assert source["secretRef"]["name"] in SECRETS
                else:
                    assert source["configMapRef"]["name"] in there["ConfigMap"]
    scaled = {
        one["spec"]["scaleTargetRef"]["name"] for one in objects if one["kind"] == "HorizontalPodAutoscaler"
    }
    assert scaled <= of_kind(objects, "Deployment").keys()


def test_local_asks_for_no_secret_no_gpu_and_little() -> None:
    text = rendered("overlays/local")
    assert "secretRef" not in text
    assert "nvidia.com" not in text
    deployments = of_kind(overlay("local"), "Deployment").values()
    requested = [pod(one)["containers"][0]["resources"]["requests"]["cpu"] for one in deployments]
    assert sum(int(cpu.removesuffix("m")) for cpu in requested) <= 1000


# Services


@pytest.mark.parametrize("name", OVERLAYS)
@pytest.mark.parametrize("service", SERVICES)
def test_settings_are_the_services_own_and_load(
    name: str, service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry, deployment = SERVICES[service], of_kind(overlay(name), "Deployment")[service]
    kind = service_of(entry.name).settings
    for container in containers(deployment):
        variables = environment(overlay(name), container)
        ours = {variable for variable in variables if variable.startswith(ENV_PREFIX)} - OTHERS
        known = {f"{ENV_PREFIX}{field}".upper() for field in kind.model_fields}
        assert ours <= known
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    settings = load_settings(kind)
    assert settings.listen == f"0.0.0.0:{entry.port}"
    assert container["args"] == ["serve", entry.name]
    named = {one["name"]: one["containerPort"] for one in container["ports"]}
    assert named == {"grpc": entry.port, "health": settings.health_port, "metrics": settings.metrics_port}
    grace = pod(deployment)["terminationGracePeriodSeconds"]
    assert grace >= settings.drain_delay_seconds + settings.grace_seconds + CLOSE_SECONDS
    assert settings.drain_delay_seconds >= 5
    assert settings.max_connection_age_seconds is not None
    assert settings.log_format == "json"


@pytest.mark.parametrize("name", OVERLAYS)
@pytest.mark.parametrize("service", SERVICES)
def test_probes_ask_the_health_service_by_the_services_name(name: str, service: str) -> None:
    deployment = of_kind(overlay(name), "Deployment")[service]
    (container,) = pod(deployment)["containers"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["grpc"] == {"port": 8081, "service": SERVICES[service].rpc}
    start = container["startupProbe"]
    assert start["periodSeconds"] * start["failureThreshold"] >= 600
    assert deployment["spec"]["progressDeadlineSeconds"] > start["periodSeconds"] * start["failureThreshold"]
    assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"


@pytest.mark.parametrize("name", OVERLAYS)
@pytest.mark.parametrize("service", [*SERVICES, "mlflow"])
def test_names_are_one_and_services_find_their_pods(name: str, service: str) -> None:
    objects = overlay(name)
    deployment = of_kind(objects, "Deployment")[service]
    template = deployment["spec"]["template"]
    (container,) = template["spec"]["containers"]
    assert container["name"] == template["spec"]["serviceAccountName"] == service
    selector = {NAME_LABEL: service}
    assert deployment["spec"]["selector"]["matchLabels"] == selector
    assert template["metadata"]["labels"].items() >= selector.items()
    found = of_kind(objects, "Service")
    names = [service] if service == "mlflow" else [service, f"{service}-headless"]
    for one in names:
        assert found[one]["spec"]["selector"] == selector
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        for port in found[one]["spec"]["ports"]:
            assert port["name"] == port["targetPort"]
            assert port["port"] == ports[port["targetPort"]]
    if service != "mlflow":
        assert found[f"{service}-headless"]["spec"]["clusterIP"] == "None"


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_challenger_is_generation_without_traffic(name: str) -> None:
    deployments = of_kind(overlay(name), "Deployment")
    challenger, generation = deployments["challenger"], deployments["generation"]
    assert challenger["spec"]["replicas"] == 0

    def nameless(value: Any, name: str) -> Any:
        if isinstance(value, dict):
            return {key: nameless(one, name) for key, one in value.items()}
        if isinstance(value, list):
            return [nameless(one, name) for one in value]
        return None if value == name else value

    spread = {"topologySpreadConstraints": None}  # of many pods; there is one challenger
    expected = nameless(pod(generation) | spread, "generation")
    found = nameless(pod(challenger) | spread, "challenger")
    # Both serve, in the words of the command, generation.
    found["containers"][0]["args"] = nameless(found["containers"][0]["args"], "generation")
    assert found == expected


@pytest.mark.parametrize("name", OVERLAYS)
def test_replicas_are_the_autoscalers(name: str) -> None:
    for service in CATALOGUE:
        assert "replicas" not in of_kind(overlay(name), "Deployment")[service]["spec"]


def test_autoscalers_ask_for_metrics_that_exist_and_the_adapter_shows() -> None:
    adapter = yaml.safe_load((lint.K8S / "components/hpa-queue/prometheus-adapter-values.yaml").read_text())
    (rule,) = adapter["rules"]["custom"]
    shown = re.search(r'__name__=~"([^"]*)"', rule["seriesQuery"])
    assert shown is not None
    autoscalers = of_kind(load("base", "hpa-queue"), "HorizontalPodAutoscaler")
    assert autoscalers.keys() == CATALOGUE.keys()
    for service, autoscaler in autoscalers.items():
        (metric,) = autoscaler["spec"]["metrics"]
        asked = metric["pods"]["metric"]["name"]
        assert f'"{asked}"' in inspect.getsource(importlib.import_module(f"services.{service}.serve"))
        assert re.fullmatch(shown[1], asked)


# The pin


@pytest.mark.parametrize("place", ["overlays/local", "overlays/production"])
def test_no_manifest_says_what_is_pinned(place: str) -> None:
    for one in load(place):
        template = one["spec"].get("template", {}) if one["kind"] == "Deployment" else {}
        assert PIN_ANNOTATION not in one["metadata"].get("annotations", {})
        assert PIN_ANNOTATION not in template.get("metadata", {}).get("annotations", {})
    # Generation and challenger read it, each in `fetch` and in the service itself.
    text, reference = rendered(place), f"fieldPath: metadata.annotations['{PIN_ANNOTATION}']"
    assert text.count(PIN_ANNOTATION) == text.count(reference) == 4


@pytest.mark.parametrize("name", OVERLAYS)
@pytest.mark.parametrize("service", ["generation", "challenger"])
def test_the_init_container_alone_writes_to_the_cache(name: str, service: str) -> None:
    deployment = of_kind(overlay(name), "Deployment")[service]
    fetch, main = containers(deployment)
    assert fetch["args"] == ["fetch"]
    assert fetch["image"] == main["image"]
    mounts = [
        {mount["mountPath"]: mount.get("readOnly", False) for mount in one["volumeMounts"]}
        for one in (fetch, main)
    ]
    assert [one["/cache"] for one in mounts] == [False, True]
    assert environment(overlay(name), fetch) == environment(overlay(name), main)


def test_without_a_pin_local_serves_the_embedded_model_and_production_nothing() -> None:
    served = {}
    for name in OVERLAYS:
        deployment = of_kind(overlay(name), "Deployment")["generation"]
        served[name] = environment(overlay(name), containers(deployment)[1]).get("MILONGA_UNPINNED_MODEL")
    assert served == {"local": "mini", "production": None}
    assert served_uri("", served["local"] or "").path == "mini"


# What pods may do


def faults(spec: Object) -> list[str]:
    """What the pod security standard `restricted` would refuse."""
    security = spec.get("securityContext", {})
    found = [key for key in ("hostNetwork", "hostPID", "hostIPC") if spec.get(key)]
    if security.get("runAsNonRoot") is not True or not security.get("runAsUser"):
        found.append("runAsNonRoot")
    if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        found.append("seccompProfile")
    allowed = {"configMap", "downwardAPI", "emptyDir", "persistentVolumeClaim", "projected", "secret"}
    found += [volume["name"] for volume in spec["volumes"] if not (volume.keys() - {"name"}) <= allowed]
    for container in [*spec.get("initContainers", ()), *spec["containers"]]:
        own = container.get("securityContext", {})
        if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
            found.append(f"{container['name']}: privileges")
        if own.get("capabilities") != {"drop": ["ALL"]}:
            found.append(f"{container['name']}: capabilities")
        if own.get("readOnlyRootFilesystem") is not True:  # more than the standard asks for
            found.append(f"{container['name']}: writable root")
        if any("hostPort" in port for port in container.get("ports", ())):
            found.append(f"{container['name']}: hostPort")
    return found


def test_every_pod_is_restricted() -> None:
    seen = 0
    for place, one in running():
        assert faults(pod(one)) == [], f"{one['metadata']['name']} in {place}"
        seen += 1
    # The services, MLflow and the web door in each of two overlays.
    assert seen == 2 * (len(SERVICES) + 2) + 2 + 3 * len(JOBS)


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_web_door_loads_its_settings_and_calls_services_that_exist(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = overlay(name)
    deployment = of_kind(objects, "Deployment")["web"]
    (container,) = pod(deployment)["containers"]
    told = environment(objects, container)
    assert {key.removeprefix(ENV_PREFIX).lower() for key in told} <= WebSettings.model_fields.keys()
    for key, value in told.items():
        monkeypatch.setenv(key, value)
    settings = load_settings(WebSettings)
    for address in settings.addresses.values():
        assert address is not None
        service, _, port = address.removeprefix("dns:///").partition(":")
        assert int(port) in [one["port"] for one in of_kind(objects, "Service")[service]["spec"]["ports"]]
    assert settings.admits_anonymous is (name == "local")
    assert settings.services_tls is (name == "production")
    most = settings.drain_delay_seconds + settings.grace_seconds
    assert most < pod(deployment)["terminationGracePeriodSeconds"]
    ports = {one["name"]: one["containerPort"] for one in container["ports"]}
    assert settings.listen == f"0.0.0.0:{ports['http']}"
    assert settings.metrics_port == ports["metrics"]


def test_the_public_reaches_the_web_door_over_tls_and_not_its_metrics() -> None:
    objects = overlay("production")
    spec = of_kind(objects, "Ingress")["web"]["spec"]
    (rule,), (tls,) = spec["rules"], spec["tls"]
    assert tls["hosts"] == [rule["host"]]
    assert tls["secretName"] in SECRETS
    (path,) = rule["http"]["paths"]
    assert path["backend"]["service"] == {"name": "web", "port": {"name": "http"}}
    assert of_kind(objects, "HorizontalPodAutoscaler")["web"]["spec"]["minReplicas"] == 2


def test_the_web_door_signs_with_the_certificate_of_a_secret() -> None:
    for components in (("web", "web-signing"), ("web-signing", "web")):
        objects = load("base", *components)
        deployment = of_kind(objects, "Deployment")["web"]
        (container,) = pod(deployment)["containers"]
        told = environment(objects, container)
        volumes = {one["name"]: one.get("secret", {}).get("secretName") for one in pod(deployment)["volumes"]}
        mounts = {one["mountPath"]: one["name"] for one in container["volumeMounts"]}
        for name in ("MILONGA_SIGN_CERT", "MILONGA_SIGN_KEY"):
            folder = told[name].rpartition("/")[0]
            assert volumes[mounts[folder]] == "milonga-web-signing"


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_namespace_enforces_it(name: str) -> None:
    labels = of_kind(overlay(name), "Namespace")["milonga"]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_references_are_written_as_the_api_server_keeps_them() -> None:
    """Else it fills in defaults, takes the whole for changed, and server-side apply for a conflict."""
    seen = set()
    for place, one in running():
        for variable in (variable for container in containers(one) for variable in container.get("env", ())):
            source = variable.get("valueFrom", {})
            seen |= source.keys()
            assert source.get("fieldRef", {"apiVersion": "v1"})["apiVersion"] == "v1", place
            assert source.get("resourceFieldRef", {"divisor": "1"})["divisor"] == "1", place
    assert seen >= {"fieldRef", "resourceFieldRef"}


def test_every_container_says_what_it_needs() -> None:
    for place, one in running():
        for container in containers(one):
            where = f"{container['name']} in {place}"
            resources = container["resources"]
            for resource in ("cpu", "memory", "ephemeral-storage"):
                assert resource in resources["requests"], where
                assert resource in resources["limits"], where


def test_promotion_alone_gets_a_token_and_exactly_its_rights() -> None:
    for place, one in running():
        is_promotion = one["metadata"]["name"] == "promote"
        assert pod(one)["automountServiceAccountToken"] is is_promotion, place
        assert pod(one)["enableServiceLinks"] is False
        assert (pod(one)["serviceAccountName"] == "promoter") is is_promotion
    for name in OVERLAYS:
        roles = of_kind(overlay(name), "Role")
        assert roles.keys() == {"promoter"}
        assert roles["promoter"]["rules"] == [
            {
                "apiGroups": ["apps"],
                "resources": ["deployments", "deployments/scale"],
                "resourceNames": ["generation", "challenger"],
                "verbs": ["get", "patch", "watch"],
            },
            {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]},
            {
                "apiGroups": ["coordination.k8s.io"],
                "resources": ["leases"],
                "resourceNames": ["milonga-promote"],
                "verbs": ["get", "update", "patch"],
            },
        ]
        (binding,) = of_kind(overlay(name), "RoleBinding").values()
        assert [one["name"] for one in binding["subjects"]] == ["promoter"]
        assert not of_kind(overlay(name), "ClusterRole")
        lease = of_kind(overlay(name), "Lease")["milonga-promote"]
        assert "spec" not in lease, "it is the holder's"


def test_policies_name_every_job_and_let_promotion_reach_the_pods_and_the_api() -> None:
    policies = of_kind(load("base", "networkpolicy"), "NetworkPolicy")
    assert policies["default-deny"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}

    pods = {one["metadata"]["name"]: labels_of(one) for _, one in running()}

    def selects(policy: str) -> set[str]:
        selector = policies[policy]["spec"]["podSelector"]
        return {name for name, labels in pods.items() if matches(selector, labels)}

    assert selects("services-from-clients") == {*SERVICES} - {"challenger"}
    assert selects("registry") == {*SERVICES, *JOBS}
    assert selects("jobs-to-services") == set(JOBS)
    assert selects("promotion-to-the-api") == {"promote"}
    (rule,) = policies["jobs-to-services"]["spec"]["egress"]
    (peer,) = rule["to"]
    assert {name for name, labels in pods.items() if matches(peer["podSelector"], labels)} == {*SERVICES}


# Jobs


@pytest.mark.parametrize("name", JOBS)
def test_jobs_tell_preemption_from_failure_and_keep_their_work(name: str) -> None:
    job = of_kind(load("jobs"), "Job")[name]
    spec = job["spec"]
    (container,) = pod(job)["containers"]
    assert pod(job)["restartPolicy"] == "Never"
    assert spec["ttlSecondsAfterFinished"] > 0
    mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert mounted["/work"] == "work"
    assert mounted["/dev/shm"] == "shm"
    if name == "promote":
        assert spec["backoffLimit"] == 0
        return
    assert spec.get("backoffLimit") or spec.get("backoffLimitPerIndex")
    ignored, failed = spec["podFailurePolicy"]["rules"]
    assert ignored["action"] == "Ignore"
    assert ignored["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert failed["action"] == "FailJob"
    assert failed["onExitCodes"] == {"containerName": name, "operator": "In", "values": [2]}
    assert spec["podReplacementPolicy"] == "Failed"


@pytest.mark.parametrize("name", JOBS)
def test_variables_in_a_jobs_arguments_are_there(name: str) -> None:
    job = of_kind(load("jobs"), "Job")[name]
    (container,) = pod(job)["containers"]
    there = {one["name"] for one in container["env"]}
    if job["spec"].get("completionMode") == "Indexed":
        there.add("JOB_COMPLETION_INDEX")
    assert set(re.findall(r"\$\((\w+)\)", " ".join(container["args"]))) <= there


@pytest.mark.parametrize(
    ("name", "recipes"),
    [("align", RUNS), ("multi-gpu", RUNS), ("candidates", PREFERENCES), ("multi-node", DPO)],
)
def test_recipes_and_settings_of_jobs_exist(name: str, recipes: Any) -> None:
    (container,) = pod(of_kind(load("jobs"), "Job")[name])["containers"]
    flags = [word.split("=", 1) for word in container["args"] if word.startswith("--") and "=" in word]
    (asked,) = [value for flag, value in flags if flag == "--recipe"]
    override(recipe(recipes, asked), [value for flag, value in flags if flag == "--set"])


def test_numbers_that_stand_twice_are_one() -> None:
    jobs = of_kind(load("jobs"), "Job")

    def arguments(name: str) -> str:
        return " ".join(pod(jobs[name])["containers"][0]["args"])

    def gpus(name: str) -> int:
        return int(pod(jobs[name])["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])

    shards = jobs["candidates"]["spec"]["completions"]
    assert f"--shard=$(JOB_COMPLETION_INDEX)/{shards} " in arguments("candidates")
    assert f"--set=processes={gpus('multi-gpu')} " in arguments("multi-gpu")
    nodes = jobs["multi-node"]["spec"]["completions"]
    assert jobs["multi-node"]["spec"]["parallelism"] == nodes
    assert f"--num_machines={nodes} --num_processes={nodes * gpus('multi-node')} " in arguments("multi-node")
    services = of_kind(overlay("production"), "Service")
    assert services[pod(jobs["multi-node"])["subdomain"]]["spec"]["publishNotReadyAddresses"] is True


def test_kueue_gets_the_name_of_its_queue() -> None:
    jobs = of_kind(load("jobs", "kueue"), "Job")
    queues = {name: job["metadata"]["labels"].get("kueue.x-k8s.io/queue-name") for name, job in jobs.items()}
    assert queues.pop("promote") is None
    assert set(queues.values()) == {"milonga"}


def test_promotion_does_not_give_way_to_what_it_rolls_out() -> None:
    jobs = of_kind(overlay("production-jobs"), "Job")
    classes = {name: pod(job)["priorityClassName"] for name, job in jobs.items()}
    assert classes.pop("promote") == "milonga-serving"
    assert set(classes.values()) == {"milonga-training"}
