"""docs/metrics.md lists what services expose: name, type, labels, services, meaning."""

import re
from pathlib import Path
from typing import Final

from services.catalogue import CATALOGUE
from tests.services.exposing import Exposed
from tests.services.exposing import exposed as everything

ROOT: Final = Path(__file__).parents[2]
PAGE: Final = ROOT / "docs/metrics.md"


def exposed() -> dict[str, Exposed]:
    """What services expose of their own."""
    return {name: metric for name, metric in everything().items() if name.startswith("milonga_")}


def rows() -> list[str]:
    """The rows that the page must have, by name."""
    found = []
    for name, metric in sorted(exposed().items()):
        labels = ", ".join(f"`{label}`" for label in sorted(metric.labels))
        services = ", ".join(one for one in CATALOGUE if one in metric.services)
        where = "all" if metric.services == set(CATALOGUE) else services
        found.append(
            f"| `{name}` | {metric.kind} | {labels} | {where} | {metric.text} |".replace("|  |", "| |")
        )
    return found


def test_the_page_lists_every_metric() -> None:
    text = PAGE.read_text(encoding="utf-8")
    found = [line for line in text.splitlines() if line.startswith("| `milonga_")]
    assert found == rows()


def test_names_follow_prometheus_conventions() -> None:
    for name, metric in exposed().items():
        assert re.fullmatch(r"milonga(_[a-z]+)+", name)
        if metric.kind == "histogram":
            assert name.endswith(("_seconds", "_ratio")), name
        assert (metric.kind == "counter") == name.endswith("_total"), name
        assert not re.search(r"_(ms|milliseconds|kb|mib|percent)(_|$)", name), name
        assert metric.text.endswith("."), name


def test_every_other_page_names_metrics_that_exist() -> None:
    known = {series for name, metric in exposed().items() for series in {name, *metric.samples(name)}}
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        if page.name == "CHANGELOG.md":
            continue
        named = set(re.findall(r"`(milonga_[a-z_]+)(?:\{[^`]*)?`", page.read_text(encoding="utf-8")))
        assert named <= known, page.name
