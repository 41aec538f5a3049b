"""A new service is a file in `k8s/base`, and its settings. Every component applies to it by its labels."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import yaml  # type: ignore[import-untyped]

from k8s import lint
from tests.k8s.test_manifests import Object, labels_of, matches, of_kind, pod

MODEL: Final = "scoring"
"""The service that the new one is a copy of."""
NEW: Final = "imaginary"
PORTS: Final = {MODEL: "50052", NEW: "50099"}

Render = Callable[..., list[Object]]


def add_service(k8s: Path) -> None:
    """Add the service `NEW` to manifests in a folder: all that a new service changes."""
    text = (k8s / "base" / f"{MODEL}.yaml").read_text(encoding="utf-8")
    (k8s / "base" / f"{NEW}.yaml").write_text(renamed(text, MODEL, NEW), encoding="utf-8")
    path = k8s / "base" / "kustomization.yaml"
    base = yaml.safe_load(path.read_text(encoding="utf-8"))
    base["resources"].append(f"{NEW}.yaml")
    model = next(one for one in base["configMapGenerator"] if one["name"] == f"{MODEL}-settings")
    literals = [literal.replace(PORTS[MODEL], PORTS[NEW]) for literal in model["literals"]]
    base["configMapGenerator"].append({"name": f"{NEW}-settings", "literals": literals})
    path.write_text(yaml.safe_dump(base), encoding="utf-8")


def renamed(text: str, old: str, new: str) -> str:
    """A service's text as if it were another's. Hashes of ConfigMaps are left out."""
    text = re.sub(r"(?<=-settings)-[a-z0-9]{10}\b", "", text)
    for one, other in ((old, new), (old.capitalize(), new.capitalize()), (PORTS[old], PORTS[new])):
        text = text.replace(one, other)
    return text


def objects_of(objects: list[Object], service: str) -> dict[tuple[str, str], Any]:
    """The objects of a service, under the names of `MODEL`."""
    own = [one for one in objects if re.match(rf"{service}\b", one["metadata"]["name"])]
    found = yaml.safe_load(renamed(yaml.safe_dump(own), service, MODEL))
    return {(one["kind"], one["metadata"]["name"]): one for one in found}


@pytest.fixture
def k8s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the manifests, which `lint` renders."""
    folder = tmp_path / "k8s"
    shutil.copytree(lint.K8S, folder)
    monkeypatch.setattr(lint, "K8S", folder)
    monkeypatch.setattr(lint, "OUTPUT", tmp_path / "build")
    add_service(folder)
    return folder


def load(folder: str, *components: str) -> list[Object]:
    return list(yaml.safe_load_all(lint.render((folder, components))))


@pytest.mark.parametrize(
    ("component", "added"),
    [
        ("availability", "PodDisruptionBudget"),
        ("hpa-cpu", "HorizontalPodAutoscaler"),
        ("hpa-queue", "HorizontalPodAutoscaler"),
        *((name, None) for name in ("no-surge", "priorities", "tls", "weights-pvc")),
    ],
)
def test_a_component_does_to_a_new_service_what_it_does_to_the_others(
    k8s: Path, component: str, added: str | None
) -> None:
    plain, objects = load("base"), load("base", component)
    assert objects_of(objects, NEW) == objects_of(objects, MODEL)
    assert objects_of(objects, NEW) != objects_of(plain, NEW)
    kinds = {kind for kind, _ in objects_of(objects, NEW)} - {kind for kind, _ in objects_of(plain, NEW)}
    assert kinds == ({added} if added else set())


def test_production_takes_in_a_new_service(k8s: Path) -> None:
    objects = load("overlays/production")
    found, expected = objects_of(objects, NEW), objects_of(objects, MODEL)
    for one in (found, expected):
        del one["ConfigMap", f"{MODEL}-settings"]  # the models, which are each service's own
    assert found == expected


def test_policies_and_monitoring_select_a_new_service(k8s: Path) -> None:
    objects = load("base", "networkpolicy", "monitoring")
    labels = labels_of(of_kind(objects, "Deployment")[NEW])
    policies = of_kind(objects, "NetworkPolicy")
    for name in ("services-from-clients", "registry"):
        assert matches(policies[name]["spec"]["podSelector"], labels)
    (rule,) = policies["jobs-to-services"]["spec"]["egress"]
    assert matches(rule["to"][0]["podSelector"], labels)
    monitor = of_kind(objects, "ServiceMonitor")["milonga"]
    service = of_kind(objects, "Service")[f"{NEW}-headless"]
    assert matches(monitor["spec"]["selector"], service["metadata"]["labels"])


def test_a_new_service_gets_a_gpu_by_its_label(k8s: Path) -> None:
    deployments = of_kind(load("base", "gpu"), "Deployment")
    assert "nodeSelector" not in pod(deployments[NEW])
    path = k8s / "base" / f"{NEW}.yaml"
    text = path.read_text(encoding="utf-8")
    path.write_text(
        text.replace("  labels:\n", '  labels:\n    milonga.dev/gpu: "true"\n', 1), encoding="utf-8"
    )
    for objects in (load("base", "gpu"), load("overlays/production")):
        deployments = of_kind(objects, "Deployment")
        new, generation = pod(deployments[NEW]), pod(deployments["generation"])
        assert new["containers"][0]["resources"] == generation["containers"][0]["resources"]
        assert (new["nodeSelector"], new["tolerations"]) == (
            generation["nodeSelector"],
            generation["tolerations"],
        )


def test_the_adapter_shows_a_new_services_queue(k8s: Path) -> None:
    values = (k8s / "components/hpa-queue/prometheus-adapter-values.yaml").read_text(encoding="utf-8")
    (rule,) = yaml.safe_load(values)["rules"]["custom"]
    shown = re.search(r'__name__=~"([^"]*)"', rule["seriesQuery"])
    assert shown is not None
    assert re.fullmatch(shown[1], f"milonga_{NEW}_queue_seconds")
    assert not re.fullmatch(shown[1], "milonga_requests_total")
