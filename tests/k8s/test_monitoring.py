"""The component `monitoring`: expressions name what services expose; alerts fire when they should."""

import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
import yaml  # type: ignore[import-untyped]

from k8s import lint
from services import errors
from services.catalogue import CATALOGUE
from services.cli.serve import service_of
from tests.k8s.test_manifests import Object, load, of_kind
from tests.services.exposing import Exposed, exposed

PROMTOOL: Final = shutil.which("promtool")
needs_promtool: Final = pytest.mark.skipif(
    PROMTOOL is None, reason="promtool is missing; Debian's package prometheus has it"
)
RUNBOOK: Final = lint.ROOT / "docs/runbook.md"

OF_TARGETS: Final = {"namespace", "service", "pod", "part_of"}
"""Labels that Prometheus adds by the ServiceMonitor."""
PROMETHEUS: Final = {"up": Exposed(kind="gauge", text="", labels=set(), services=set(CATALOGUE))}

SERIES: Final = re.compile(r"\b(up|(?:milonga|process)_\w+)\b(?:\{([^}]*)\})?")
MATCHER: Final = re.compile(r'(\w+)\s*(?:=|!=|=~|!~)\s*"([^"]*)"')
GROUPING: Final = re.compile(r"\b(?:by|on) \(([^)]*)\)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Expression:
    where: str
    text: str


def component() -> list[Object]:
    return load("base", "monitoring")


def rules() -> list[Object]:
    groups = of_kind(component(), "PrometheusRule")["milonga"]["spec"]["groups"]
    return [rule for group in groups for rule in group["rules"]]


@cache
def dashboard() -> Any:
    config = of_kind(component(), "ConfigMap")["milonga-dashboard"]
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
    return json.loads(config["data"]["milonga.json"])


def panels() -> list[Any]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def expressions() -> Iterator[Expression]:
    for rule in rules():
        yield Expression(where=rule["alert"], text=rule["expr"])
    for panel in panels():
        for target in panel["targets"]:
            yield Expression(where=panel["title"], text=filled(target["expr"]))


def filled(text: str) -> str:
    """A dashboard's expression with values for its variables."""
    values = {"$__rate_interval": "5m", "$namespace": "milonga", "$service": "generation|scoring"}
    for name, value in values.items():
        text = text.replace(name, value)
    assert "$" not in text, text
    return text


@cache
def known() -> Mapping[str, Exposed]:
    """Every series by name."""
    every = {**PROMETHEUS, **exposed()}
    return {series: metric for name, metric in every.items() for series in metric.samples(name)}


@pytest.mark.parametrize("expression", list(expressions()), ids=lambda one: one.where)
def test_expressions_name_what_services_expose(expression: Expression) -> None:
    found = SERIES.findall(expression.text)
    assert found
    labels: set[str] = set()
    for name, matchers in found:
        assert name in known(), name
        labels |= known()[name].labels
        for label, value in MATCHER.findall(matchers):
            assert label in known()[name].labels | OF_TARGETS, f"{name} has no label {label}"
            if label == "code":
                assert set(value.split("|")) <= {code.name for code in grpc.StatusCode}
            if label == "reason":
                assert set(value.split("|")) <= reasons()
    groups = {label.strip() for group in GROUPING.findall(expression.text) for label in group.split(",")}
    assert groups <= labels | OF_TARGETS | {"le"}
    assert ("le" in groups) == ("histogram_quantile" in expression.text)


def test_the_web_door_is_scraped_once() -> None:
    objects = load("base", "web", "monitoring")
    (monitor,) = of_kind(objects, "ServiceMonitor").values()
    selected = monitor["spec"]["selector"]["matchLabels"].items()
    (endpoint,) = monitor["spec"]["endpoints"]
    scraped = [
        one["spec"]["selector"]
        for one in of_kind(objects, "Service").values()
        if selected <= one["metadata"]["labels"].items()
        and endpoint["port"] in [port["name"] for port in one["spec"]["ports"]]
    ]
    assert scraped.count({"app.kubernetes.io/name": "web"}) == 1


def reasons() -> set[str]:
    kinds = [one for one in vars(errors).values() if isinstance(one, type)]
    return {"time", *(one.refusal for one in kinds if issubclass(one, errors.MilongaError) and one.refusal)}


def test_the_dashboard_is_laid_out_without_overlaps() -> None:
    assert len({panel["id"] for panel in dashboard()["panels"]}) == len(dashboard()["panels"])
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in dashboard()["panels"])
        for x, y in itertools.product(
            range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        )
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) == 23
    for panel in panels():
        assert panel["type"] == "table" or panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references)


def test_the_dashboard_shows_every_histogram_and_refusals_and_gpus() -> None:
    text = " ".join(one.text for one in expressions())
    for name, metric in exposed().items():
        if metric.kind == "histogram" or name.startswith(("milonga_gpu_", "milonga_refusals")):
            assert name in text


# Alerts


def test_each_alert_has_a_section_in_the_runbook_and_no_section_is_left() -> None:
    sections = re.split(r"^## ", RUNBOOK.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    found = {section.partition("\n")[0]: section for section in sections}
    assert list(found) == sorted(found, key=list(found).index)
    assert found.keys() == {rule["alert"] for rule in rules()}
    for rule in rules():
        name = rule["alert"]
        assert rule["annotations"]["runbook"] == f"docs/runbook.md#{name.lower()}"
        assert rule["labels"]["severity"] in ("warning", "critical")
        for part in ("**Meaning.**", "**Check.**", "**Remedy.**"):
            assert part in found[name], f"{name}: {part}"


def test_the_runbook_names_settings_and_panels_that_exist() -> None:
    text = " ".join(RUNBOOK.read_text(encoding="utf-8").split())
    settings = {field for name in CATALOGUE for field in service_of(name).settings.model_fields}
    assert {name.lower() for name in re.findall(r"`MILONGA_([A-Z_]+)", text)} <= settings
    titles = {dashboard()["title"], *(panel["title"] for panel in panels())}
    assert set(re.findall(r'"([^"]+)"', text)) <= titles


def test_the_monitor_gives_targets_the_labels_that_alerts_use() -> None:
    (monitor,) = of_kind(component(), "ServiceMonitor").values()
    (endpoint,) = monitor["spec"]["endpoints"]
    given = {one["targetLabel"] for one in endpoint["relabelings"]}
    assert OF_TARGETS - given == {"namespace", "pod"}, "the operator gives these"
    objects = component()
    for deployment in of_kind(objects, "Deployment").values():
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        for one in endpoint["relabelings"]:
            (source,) = one["sourceLabels"]
            names = {re.sub(r"\W", "_", label): label for label in labels}
            assert source.removeprefix("__meta_kubernetes_pod_label_") in names


def promtool(*words: str) -> str:
    assert PROMTOOL is not None
    done = subprocess.run([PROMTOOL, *words], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def write(path: Path, content: Any) -> str:
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(path)


@needs_promtool
def test_promtool_accepts_rules_and_dashboard(tmp_path: Path) -> None:
    (rule,) = of_kind(component(), "PrometheusRule").values()
    recorded = [
        {"record": f"dashboard:{number}", "expr": one.text} for number, one in enumerate(expressions())
    ]
    panels = {"groups": [{"name": "dashboard", "rules": recorded}]}
    said = promtool(
        "check", "rules", "--lint=all", "--lint-fatal",
        write(tmp_path / "rules.yaml", rule["spec"]), write(tmp_path / "panels.yaml", panels),
    )  # fmt: skip
    assert f"SUCCESS: {len(rules())} rules found" in said
    assert f"SUCCESS: {len(recorded)} rules found" in said


POD: Final = 'namespace="milonga", service="generation", pod="generation-1", part_of="milonga"'
CALLS: Final = f'milonga_requests_total{{{POD}, rpc="GenerateAudio", code="%s"}}'
REFUSALS: Final = f'milonga_refusals_total{{{POD}, rpc="GenerateAudio", reason="%s"}}'
WAITS: Final = f'milonga_queue_wait_seconds_bucket{{{POD}, queue="engine", priority="%s", le="%s"}}'
MODEL: Final = 'milonga_model_info{namespace="milonga", service="%s", pod="%s", digest="%s"}'


def one(name: str) -> str:
    return f"{name}{{{POD}}}"


def waits(priority: str, upper: str) -> dict[str, str]:
    """Waits below a bucket, one per second."""
    bounds = ("0.1", "20.0", "50.0", "+Inf")
    return {
        WAITS % (priority, bound): "0+60x120" if index >= bounds.index(upper) else "0x120"
        for index, bound in enumerate(bounds)
    }


Samples = Mapping[str, str]

CASES: Final[Mapping[str, tuple[list[Samples], list[Samples]]]] = {
    "MilongaTargetDown": ([{one("up"): "1x30 0x90"}], [{one("up"): "1x120"}]),
    "MilongaServiceGone": (
        [{one("up"): "1x30 _x90"}],
        [
            {one("up"): "1x120"},
            {one("up").replace("generation", "challenger"): "1x30 _x90"},
            {one("up"): "1x30 _x90", one("up").replace("generation-1", "generation-2"): "_x25 1x95"},
        ],
    ),
    "MilongaRestarting": (
        [{one("process_start_time_seconds"): "0x59 1x9 2x9 3x60"}],
        [{one("process_start_time_seconds"): "0x59 1x9 2x60"}],
    ),
    "MilongaFileDescriptorsShort": (
        [{one("process_open_fds"): "900x120", one("process_max_fds"): "1000x120"}],
        [{one("process_open_fds"): "90x120", one("process_max_fds"): "1000x120"}],
    ),
    "MilongaGpuMemoryShort": (
        [
            {
                one("milonga_gpu_memory_allocated_bytes"): "95x120",
                one("milonga_gpu_memory_total_bytes"): "99x120",
            }
        ],
        [
            {
                one("milonga_gpu_memory_allocated_bytes"): "80x120",
                one("milonga_gpu_memory_total_bytes"): "99x120",
            }
        ],
    ),
    "MilongaInternalErrors": (
        [{CALLS % "OK": "0+60x120", CALLS % "INTERNAL": "0+1x120"}],
        [
            {CALLS % "OK": "0+600x120", CALLS % "INTERNAL": "0+1x120"},
            {CALLS % "OK": "0+60x120", CALLS % "INVALID_ARGUMENT": "0+60x120"},
        ],
    ),
    "MilongaDeadlinesMissed": (
        [{CALLS % "OK": "0+60x120", CALLS % "DEADLINE_EXCEEDED": "0+6x120"}],
        [{CALLS % "OK": "0+60x120", CALLS % "DEADLINE_EXCEEDED": "0+1x120"}],
    ),
    "MilongaOverloaded": (
        [
            {
                CALLS % "OK": "0+60x120",
                CALLS % "RESOURCE_EXHAUSTED": "0+30x120",
                REFUSALS % reason: "0+30x120",
            }
            for reason in ("room", "time")
        ],
        [
            {
                CALLS % "OK": "0+60x120",
                CALLS % "RESOURCE_EXHAUSTED": "0+30x120",
                REFUSALS % "quota": "0+30x120",
            },
            {CALLS % "OK": "0+60x120", REFUSALS % "room": "0+3x120"},
        ],
    ),
    "MilongaCallersRefused": (
        [{REFUSALS % "token": "0+120x120"}, {REFUSALS % "role": "0+120x120"}],
        [{REFUSALS % "token": "0+6x120"}, {REFUSALS % "room": "0+120x120"}],
    ),
    "MilongaQueueSlow": (
        [waits("interactive", "50.0")],
        [waits("interactive", "20.0"), waits("batch", "50.0")],
    ),
    "MilongaEngineStalled": (
        [{one("milonga_running"): "2x120", one("milonga_denoiser_calls_total"): "0+9x30 270x90"}],
        [
            {one("milonga_running"): "2x120", one("milonga_denoiser_calls_total"): "0+9x120"},
            {one("milonga_running"): "0x120", one("milonga_denoiser_calls_total"): "270x120"},
        ],
    ),
    "MilongaModelsDiffer": (
        [{MODEL % ("generation", "a", "1"): "1x120", MODEL % ("generation", "b", "2"): "1x120"}],
        [
            {MODEL % ("generation", "a", "1"): "1x120", MODEL % ("generation", "b", "1"): "1x120"},
            {MODEL % ("generation", "a", "1"): "1x120", MODEL % ("challenger", "b", "2"): "1x120"},
        ],
    ),
    "MilongaCertificateExpires": (
        [{one("milonga_tls_certificate_expiry_timestamp_seconds"): "500000x120"}],
        [{one("milonga_tls_certificate_expiry_timestamp_seconds"): "5000000x120"}],
    ),
}
"""By alert: series with which it fires after an hour and a half, and series with which it does not.

Samples are a minute apart.
"""


def test_each_alert_has_cases_of_series_that_exist() -> None:
    assert CASES.keys() == {rule["alert"] for rule in rules()}
    for case in (case for sides in CASES.values() for side in sides for case in side):
        for series in case:
            ((name, matchers),) = SERIES.findall(series)
            labels = {label for label, _ in MATCHER.findall(matchers)} - OF_TARGETS - {"le"}
            assert labels <= known()[name].labels


@needs_promtool
@pytest.mark.parametrize("alert", CASES)
def test_alerts_fire_when_they_should(alert: str, tmp_path: Path) -> None:
    (rule,) = of_kind(component(), "PrometheusRule").values()
    expr = f'count(ALERTS{{alertname="{alert}", alertstate="firing"}})'
    tests = [
        {
            "interval": "1m",
            "input_series": [{"series": name, "values": values} for name, values in case.items()],
            "promql_expr_test": [
                {
                    "expr": expr,
                    "eval_time": "90m",
                    "exp_samples": [{"labels": "{}", "value": 1}] if fires else [],
                }
            ],
        }
        for fires, cases in zip((True, False), CASES[alert], strict=True)
        for case in cases
    ]
    write(tmp_path / "rules.yaml", rule["spec"])
    content = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": tests}
    promtool("test", "rules", write(tmp_path / "tests.yaml", content))
