"""The model folder that the training of a captioner writes."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError

from services.api.reading import EVENTS
from services.errors import OutputError
from services.models.captioner.model import Captioner
from services.models.manifest import Manifest, write_manifest

REPORT: Final = "training.json"
"""File with the report of the training."""


def write_captioner(
    captioner: Captioner,
    start: Path,
    output: Path,
    report: Mapping[str, Any],
    *,
    name: str,
    version: str,
    license: str,
) -> Manifest:
    """Write the model folder `output` and return its manifest; an older folder is replaced as a whole.

    The start's list of events, if it has one, is copied. Raises `OutputError`; an older folder is then
    unchanged.
    """
    temporary, old = (output.with_name(f".{output.name}.{what}") for what in ("part", "old"))
    try:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)
        captioner.save_pretrained(temporary)
        if (start / EVENTS).exists():
            shutil.copyfile(start / EVENTS, temporary / EVENTS)
        text = json.dumps(report, indent=1, allow_nan=False) + "\n"
        (temporary / REPORT).write_text(text, encoding="utf-8")
        manifest = write_manifest(temporary, name=name, version=version, license=license)
        (temporary / "README.md").write_text(_card(manifest, report), encoding="utf-8")
        for path in (temporary, *temporary.rglob("*")):
            # safetensors creates files that only their owner can read.
            path.chmod(0o755 if path.is_dir() else 0o644)
        if output.exists():
            output.rename(old)
        temporary.rename(output)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not output.exists():
            old.rename(output)
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"{output} can't be written: {reason}; make room, or write elsewhere") from error
    return manifest


def summary(report: Mapping[str, Any]) -> list[str]:
    """Return the report as lines of text."""
    parent, data, parameters, figures = (report[key] for key in ("parent", "data", "parameters", "figures"))
    return [
        f"from {parent['name']} {parent['version']}: {report['steps']} steps on {data['train']} captions, "
        f"{parameters['learn']:,} of {parameters['all']:,} parameters learnt",
        f"weights of step {report['best_step']}: loss {figures['validation_loss']:.4f} on "
        f"{data['validation']} captions of other clips, {figures['validation_accuracy']:.1%} of their tokens "
        "predicted",
    ]


def _card(manifest: Manifest, report: Mapping[str, Any]) -> str:
    """Return the model card."""
    lines = "\n".join(f"    {line}" for line in summary(report))
    parent = report["parent"]
    return f"""---
license: {manifest.license.lower()}
pipeline_tag: audio-to-text
tags: [audio-captioning, slam-aac]
---

# {manifest.name}

Version {manifest.version}, `{manifest.digest}`: the captioner `{parent["name"]}` {parent["version"]}
(`{parent["digest"]}`) after training of its projector{
        " and adapters" if report["settings"]["use_lora"] else ""
    }. Encoder and language model are unchanged.

    milonga serve captioning --model file:THIS-FOLDER

{lines}

All settings and training data: `{REPORT}`.
"""
