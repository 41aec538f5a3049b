"""Render every overlay, component and Job, and hold the result to what Kubernetes and its linters say.

    .venv/bin/python k8s/lint.py        # what `make lint-manifests` runs; the tools come from .venv-k8s

The rendered objects are in ``build/k8s/`` afterwards: of each scenario the objects that no earlier one has.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
K8S: Final = ROOT / "k8s"
TOOLS: Final = ROOT / ".venv-k8s" / "bin"
OUTPUT: Final = ROOT / "build" / "k8s"

STACK: Final = K8S / "milonga.yaml"
"""`overlays/local` rendered: what `kubectl apply -f k8s/` reads."""

HEADER: Final = "# overlays/local, rendered by `make k8s`. Change that, not this.\n"
"""First line of `STACK`."""

VERSIONS: Final = ("1.34", "1.37")
"""Oldest and newest supported version of Kubernetes."""

FOREIGN: Final = ("PrometheusRule", "ServiceMonitor")
"""Kinds of custom resources: no version of Kubernetes has a schema of them."""

IMAGES: Final = ("milonga-services", "milonga-training")
"""Images as base and components name them; the overlays say where they are, and which."""

DOCKERFILES: Final = ("services/Dockerfile", "training/Dockerfile", "services/inference/triton/Dockerfile")

EXAMPLES: Final = ("examples/kserve/generation.yaml",)
"""Objects of KServe, whose schemas are in `k8s/schemas/`."""

ALTERNATIVES: Final = (("mlflow", "mlflow-sqlite"), ("hpa-queue", "hpa-cpu"))
"""Components of which an overlay takes one."""

OF_JOBS: Final = ("kueue",)
"""Components that vary Jobs, not the stack."""

Scenario = tuple[str, Sequence[str]]
"""A folder under `K8S`, and the components on top of it."""


class LintError(Exception):
    """A finding, in the words of the tool."""


def scenarios() -> dict[str, Scenario]:
    """Everything that is rendered, by name.

    Besides overlays and Jobs: each component by itself, and all of them at once, each side of the
    alternatives, in order and in reverse, since none may count on another, or on coming after it.
    """
    components = sorted(path.name for path in (K8S / "components").iterdir() if path.is_dir())
    overlays = sorted(path.name for path in (K8S / "overlays").iterdir() if path.is_dir())
    of_stack = [name for name in components if name not in OF_JOBS]
    found: dict[str, Scenario] = {name: (f"overlays/{name}", ()) for name in overlays}
    found["jobs"] = ("jobs", ())
    found |= {name: ("jobs" if name in OF_JOBS else "base", (name,)) for name in components}
    for number, side in enumerate(("first", "second")):
        others = {pair[1 - number] for pair in ALTERNATIVES}
        together = [name for name in of_stack if name not in others]
        found[f"all-{side}"] = ("base", together)
        found[f"all-{side}-reversed"] = ("base", together[::-1])
    return found


def render(scenario: Scenario) -> str:
    """The scenario's objects, as YAML.

    Raises `LintError` where kustomize can't, and where `make .venv-k8s/.milonga-ready` was not run.
    """
    kubectl = TOOLS / "kubectl"
    if not kubectl.exists():
        raise LintError(f"{kubectl} is missing; run `make .venv-k8s/.milonga-ready`")
    folder, components = scenario
    place = K8S / folder
    if components:
        place = OUTPUT / "scenarios" / f"{folder}+{'+'.join(components)}"
        place.mkdir(parents=True, exist_ok=True)
        lines = ["resources:", f"  - {_relative(K8S / folder, place)}", "components:"]
        lines += [f"  - {_relative(K8S / 'components' / name, place)}" for name in components]
        # As an overlay would.
        lines += ["images:", *(f"  - {{name: {name}, newTag: lint}}" for name in IMAGES)]
        (place / "kustomization.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    done = subprocess.run(
        [kubectl, "kustomize", place], capture_output=True, text=True, check=False, timeout=120
    )
    if done.returncode:
        raise LintError(f"{folder} with {', '.join(components) or 'no component'}: {done.stderr.strip()}")
    return done.stdout


def stack() -> str:
    """Return the expected content of `STACK`."""
    return HEADER + render(("overlays/local", ()))


def objects(text: str) -> list[str]:
    """The objects of a rendered text, each as YAML."""
    return [part.strip("\n") for part in text.split("\n---\n")]


def main() -> int:
    """Run all checks; the exit code."""
    start = time.monotonic()
    missing = [path for path in (*DOCKERFILES, *EXAMPLES) if not (ROOT / path).exists()]
    try:
        if missing:
            raise LintError(f"{', '.join(missing)} is not there to be checked")
        shutil.rmtree(OUTPUT, ignore_errors=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            rendered = dict(zip(scenarios(), pool.map(render, scenarios().values()), strict=True))
        if STACK.read_text(encoding="utf-8") != HEADER + rendered["local"]:
            raise LintError("k8s/milonga.yaml is not what overlays/local renders to now; run `make k8s`")
        files = write_new(rendered)
        print(f"kubectl kustomize: {len(rendered)} scenarios, {_passed(start)}", flush=True)
        validate(files)
        print(f"kubernetes-validate: Kubernetes {' and '.join(VERSIONS)}, {_passed(start)}", flush=True)
        run("python", "k8s/schemas/kserve.py", *EXAMPLES)
        print(f"KServe's models: {', '.join(EXAMPLES)}, {_passed(start)}", flush=True)
        run("checkov", *_checkov(files))
        print(f"checkov: {_passed(start)}", flush=True)
        run("hadolint", *DOCKERFILES)
        print(f"hadolint: {_passed(start)}", flush=True)
    except LintError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def write_new(rendered: Mapping[str, str]) -> list[str]:
    """Write of each scenario the objects that none before it has; the files' paths."""
    seen: set[str] = set()
    files = []
    for name, text in rendered.items():
        new = [one for one in objects(text) if one not in seen]
        seen.update(new)
        if new:
            path = OUTPUT / f"{name}.yaml"
            path.write_text("\n---\n".join(new) + "\n", encoding="utf-8")
            files.append(str(path.relative_to(ROOT)))
    return files


def validate(files: Sequence[str]) -> None:
    """Hold the files to Kubernetes' own schemas, which allow no unknown field."""
    flags = [word for version in VERSIONS for word in ("-k", version)]
    said = run("kubernetes-validate", *flags, "--strict", "--quiet", *files).splitlines()
    # Of a kind that it does not know it only warns.
    unknown = [line for line in said if not any(f"for kind {kind} " in line for kind in FOREIGN)]
    if unknown:
        raise LintError("\n".join(unknown))


def run(tool: str, *arguments: str) -> str:
    """Return the output of a tool. Raises `LintError` with it if the tool fails."""
    done = subprocess.run(
        [TOOLS / tool, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=900
    )
    if done.returncode:
        raise LintError(f"{tool}:\n{done.stdout}{done.stderr}")
    return done.stdout


def _checkov(files: Sequence[str]) -> list[str]:
    named = [word for path in (*files, *DOCKERFILES) for word in ("--file", path)]
    frameworks = ["--framework", "kubernetes", "dockerfile"]
    return ["--skip-download", "--quiet", "--compact", *named, *frameworks]


def _relative(path: Path, start: Path) -> str:
    return os.path.relpath(path, start)


def _passed(start: float) -> str:
    return f"{time.monotonic() - start:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
