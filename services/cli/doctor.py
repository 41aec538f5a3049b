"""`milonga doctor`: report installed packages, devices and models, what is missing and how to install it."""

import dataclasses
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich.console import Console
from rich.table import Table

from services.catalogue import CATALOGUE
from services.errors import DigestMismatchError, MilongaError

Status = Literal["ok", "note", "missing"]

_MARKERS = {
    "serving": "torch",
    "training": "datasets",
    "triton": "tritonclient",
    "web": "uvicorn",
    "provenance": "c2pa-python",
    "ratings": "sqlalchemy",
    "mcp": "mcp",
    "judges": "ai-edge-litert",
    "laion-clap": "laion-clap",
    "dev": "pytest",
}
"""The distribution that marks an extra as in use: if it is installed, the rest of the extra is required."""
_PURPOSES = {
    "serving": "to generate in this process, to serve and to convert",
    "training": "to train",
    "triton": "to serve from Triton",
    "web": "to serve HTTP in front of the services",
    "provenance": "to sign clips and to verify them",
    "ratings": "to have pairs of clips rated",
    "mcp": "to give agents the services as tools",
    "judges": "to examine models of your own sounds with YAMNet",
    "laion-clap": "to run laion-clap:PATH by LAION's own package, and to compare ours with it; "
    "laion:PATH does not need it",
    "dev": "to work on milonga",
}
_ALONE = {"laion-clap": "numpy"}
"""Extras that need a separate environment, because they need an older release of this distribution."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One line of the report."""

    group: str
    """Section of the report: python, packages, devices or models."""
    name: str
    status: Status
    """ok; note: optional, nothing fails; missing: required, and not installed or not valid."""
    found: str
    """Result of the check."""
    remedy: str = ""
    """Command that fixes it."""


def requirements() -> tuple[Requirement, ...]:
    """Return the requirements of the installed milonga; those of extras have markers."""
    try:
        lines = importlib.metadata.requires("milonga") or []
    except importlib.metadata.PackageNotFoundError:
        lines = list(_source_requirements())
    return tuple(Requirement(line) for line in lines)


def _source_requirements() -> Iterator[str]:
    """Yield the requirements from pyproject.toml, for a checkout that is not installed."""
    path = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if not path.is_file():
        return
    project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    yield from project["dependencies"]
    for extra, lines in project["optional-dependencies"].items():
        yield from (f"{line} ; extra == '{extra}'" for line in lines)


def _requirements_of(extra: str | None) -> list[Requirement]:
    """Return the requirements of the base install (None), or those that one extra adds."""
    found: dict[str, Requirement] = {}
    for requirement in requirements():
        marker = requirement.marker
        in_base = marker is None or marker.evaluate({"extra": ""})
        belongs = in_base if extra is None else not in_base and marker.evaluate({"extra": extra})  # type: ignore[union-attr]
        if belongs and canonicalize_name(requirement.name) != "milonga":
            found[canonicalize_name(requirement.name)] = requirement
    return sorted(found.values(), key=lambda requirement: canonicalize_name(requirement.name))


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package_check(requirement: Requirement, extra: str | None) -> Check:
    version = _installed(requirement.name)
    # prereleases: torch's version has a local part (2.13.0+cpu), and the range is one of releases.
    fits = version is not None and requirement.specifier.contains(version, prereleases=True)
    target = "milonga" if extra is None else f"'milonga[{extra}]'"
    return Check(
        group="packages",
        name=requirement.name,
        status="ok" if fits else "missing",
        found=f"{version or 'not installed'} (requires {requirement.specifier or 'any'})",
        remedy="" if fits else f"pip install {target}",
    )


def package_checks() -> Iterator[Check]:
    """Compare installed with required versions, for the base install and each extra in use."""
    checked: set[str] = set()
    for requirement in _requirements_of(None):
        checked.add(requirement.name)
        yield _package_check(requirement, None)
    for extra, marker in _MARKERS.items():
        if _installed(marker) is None:
            target = f"'milonga[{extra}]'"
            if extra in _ALONE:
                target = f"'milonga[serving,{extra}]' in a separate environment ({_ALONE[extra]} < 2)"
            remedy = f"pip install {target}, {_PURPOSES[extra]}"
            yield Check(
                group="packages", name=f"[{extra}]", status="note", found="not installed", remedy=remedy
            )
            continue
        # Extras include each other, and installed metadata list each with all its requirements.
        for requirement in (one for one in _requirements_of(extra) if one.name not in checked):
            checked.add(requirement.name)
            yield _package_check(requirement, extra)
    yield from _conflict_checks()
    for name in ("torchvision", "torchaudio"):
        if _installed(name) is not None and "+cpu" in (_installed("torch") or ""):
            yield Check(
                group="packages",
                name=name,
                status="missing",
                found="installed with a CPU build of torch, where it breaks imports of transformers",
                remedy=f"pip uninstall {name}",
            )


def _conflict_checks() -> Iterator[Check]:
    """Report installed packages that conflict, although each is within its range."""
    numpy = _installed("numpy") or ""
    if _installed(_MARKERS["laion-clap"]) is not None and not numpy.startswith("1."):
        yield Check(
            group="packages",
            name="laion-clap",
            status="missing",
            found=f"installed with numpy {numpy}, but requires numpy < 2",
            remedy="pip uninstall laion-clap; use laion:PATH, or laion-clap:PATH in a separate environment",
        )


def python_checks() -> Iterator[Check]:
    """Check the interpreter, milonga's installation and the generated gRPC stubs."""
    fits = (3, 11) <= sys.version_info[:2] <= (3, 13)
    yield Check(
        group="python",
        name="python",
        status="ok" if fits else "missing",
        found=f"{platform.python_version()} on {platform.platform(terse=True)}",
        remedy="" if fits else "use Python 3.11, 3.12 or 3.13",
    )
    version = _installed("milonga")
    yield Check(
        group="python",
        name="milonga",
        status="ok" if version else "note",
        found=version or "run from its sources, not installed",
        remedy="" if version else "make setup, or pip install -e .",
    )
    try:
        importlib.import_module("milonga.v1.generation_pb2_grpc")
        yield Check(group="python", name="gRPC stubs", status="ok", found="generated")
    except ImportError as error:
        yield Check(
            group="python", name="gRPC stubs", status="missing", found=str(error), remedy="make protos"
        )


def _driver_gpus() -> list[str]:
    """Return the GPUs that nvidia-smi lists; none without a driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        run = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.partition(" (UUID")[0] for line in run.stdout.splitlines() if line.startswith("GPU")]


def device_checks() -> Iterator[Check]:
    """Report the devices that can run a model."""
    gpus = _driver_gpus()
    if _installed("torch") is None:
        found = "; ".join(gpus) or f"{os.cpu_count()} CPU cores"
        yield Check(group="devices", name="torch", status="note", found=f"not installed; {found}")
        return
    import torch

    yield Check(
        group="devices",
        name="cpu",
        status="ok",
        found=f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads",
    )
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        yield Check(
            group="devices", name=f"cuda:{index}", status="ok", found=f"{properties.name}, {memory:.0f} GiB"
        )
    if gpus and not torch.cuda.is_available():
        yield Check(
            group="devices",
            name="cuda",
            status="note",
            found=f"{'; '.join(gpus)}, which torch {torch.__version__} can't use",
            remedy="install the CUDA build: pip install --force-reinstall torch==2.13.0",
        )
    if torch.backends.mps.is_available():
        yield Check(group="devices", name="mps", status="ok", found="Apple GPU")


def model_checks(uris: tuple[str, ...]) -> Iterator[Check]:
    """Check each model as `milonga serve` would: digest, files, keys and shapes."""
    if _installed("torch") is None:
        yield Check(
            group="models",
            name="engine",
            status="note",
            found="models can't be run here",
            remedy="pip install 'milonga[serving]', or use a service with --server",
        )
        return
    from services.weights import uri as model_uri

    for uri in uris:
        try:
            resolved = model_uri.resolve(uri)
            check_model(resolved.folder)
        except MilongaError as error:
            yield Check(group="models", name=uri, status="missing", found=str(error))
            continue
        version = resolved.identity
        found = f"{version.name} {version.version}, {version.digest}, {version.license}; {resolved.folder}"
        yield Check(group="models", name=uri, status="ok", found=found)


def check_model(path: Path) -> None:
    """Raise `ModelError` unless `path` holds a complete model: a generator, CLAP, reward model or captioner.

    Imports torch. Compares keys and shapes without loading tensors; a LAION checkpoint, a single file, is
    loaded.
    """
    from services.models.architectures import check_generator
    from services.models.captioner.config import CLASS_NAME
    from services.models.captioner.model import check_captioner
    from services.models.clap.laion import load_laion
    from services.models.clap.loading import check_clap_folder, clap_config
    from services.models.folders import read_json
    from services.models.reward.model import MODEL_TYPE

    if path.is_file():
        load_laion(path)
        return
    config = path / "config.json"
    fields = read_json(config) if config.exists() else {}
    kind = fields.get("model_type", fields.get("_class_name"))
    if kind == "clap":
        check_clap_folder(path, clap_config(path))
    elif kind == MODEL_TYPE:
        _check_reward(path)
    elif kind == CLASS_NAME:
        check_captioner(path)
    else:
        check_generator(path)


def _check_reward(folder: Path) -> None:
    from services.models.folders import read_layout
    from services.models.manifest import read_manifest
    from services.models.mini import mini_folder
    from services.models.reward.model import RewardHead, read_reward_config
    from services.models.state_dicts import check_weights, on_meta

    config = read_reward_config(folder)
    check_weights(str(folder), on_meta(lambda: RewardHead(config)), read_layout(folder))
    if folder == mini_folder("reward"):
        clap = read_manifest(mini_folder("clap-a"))
        if clap.digest != config.clap_digest:
            raise DigestMismatchError(
                f"{folder} was trained on {config.clap_name} ({config.clap_digest}), but the embedded CLAP "
                f"model is {clap.digest}; install milonga again"
            )


def embedded_models() -> tuple[str, ...]:
    """Return the model URIs of the embedded models that commands use by default."""
    values = [weights.embedded for entry in CATALOGUE.values() for weights in entry.weights]
    uris = [uri for one in values for uri in ([one] if isinstance(one, str) else one.values())]
    # Training starts from mini-base, which no service serves by default.
    return tuple(dict.fromkeys((uris[0], "mini-base", *uris)))


def examine(models: tuple[str, ...]) -> tuple[Check, ...]:
    """Return every check of the report. Models are the embedded ones, MILONGA_MODEL and `models`."""
    named = os.environ.get("MILONGA_MODEL")
    uris = dict.fromkeys((*embedded_models(), *([named] if named else []), *models))
    return (*python_checks(), *package_checks(), *device_checks(), *model_checks(tuple(uris)))


def _show(checks: tuple[Check, ...]) -> None:
    colours = {"ok": "green", "note": "yellow", "missing": "red"}
    table = Table(box=None, pad_edge=False, show_header=False)
    for column in ("status", "name", "found"):
        table.add_column(column, overflow="fold", no_wrap=column != "found")
    group = ""
    for check in checks:
        if check.group != group:
            group = check.group
            table.add_row(f"[bold]{group}[/bold]", "", "")
        remedy = f"\n→ {check.remedy}" if check.remedy else ""
        text = f"{check.found}{remedy}".replace("[", r"\[")
        table.add_row(f"  [{colours[check.status]}]{check.status}[/]", check.name.replace("[", r"\["), text)
    Console().print(table)


def doctor(
    model: Annotated[
        list[str] | None, typer.Option(help="Check this model URI too; can be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Report versions, devices and models, what is missing and how to install it.

    Exit code: 1 if something required is missing, otherwise 0.
    """
    checks = examine(tuple(model or ()))
    healthy = all(check.status != "missing" for check in checks)
    if as_json:
        report = {"healthy": healthy, "checks": [dataclasses.asdict(check) for check in checks]}
        typer.echo(json.dumps(report, ensure_ascii=False, indent=2))
    else:
        _show(checks)
        typer.echo("healthy" if healthy else "something required is missing: see the lines marked missing")
    if not healthy:
        raise typer.Exit(1)
