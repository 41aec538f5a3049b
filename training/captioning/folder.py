"""The model folder that the training of a captioner writes."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from services.api.reading import EVENTS
from services.models.captioner.model import Captioner
from services.models.manifest import Manifest, write_manifest
from services.models.writing import replaced_folder

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
    with replaced_folder(output) as temporary:
        captioner.save_pretrained(temporary)
        if (start / EVENTS).exists():
            shutil.copyfile(start / EVENTS, temporary / EVENTS)
        text = json.dumps(report, indent=1, allow_nan=False) + "\n"
        (temporary / REPORT).write_text(text, encoding="utf-8")
        manifest = write_manifest(temporary, name=name, version=version, license=license)
        (temporary / "README.md").write_text(_card(manifest, report), encoding="utf-8")
    return manifest


def summary(report: Mapping[str, Any]) -> list[str]:
    """Return the report as lines of text."""
    parent, data, parameters, figures = (report[key] for key in ("parent", "data", "parameters", "figures"))
    before = report["figures_before"].get("validation_loss")
    worse = before is not None and before <= figures["validation_loss"]
    return [
        f"from {parent['name']} {parent['version']}: {report['steps']} steps on {data['train']} captions, "
        f"{parameters['learn']:,} of {parameters['all']:,} parameters learnt",
        f"weights of step {report['best_step']}: loss {figures['validation_loss']:.4f} on "
        f"{data['validation']} captions of other clips, {figures['validation_accuracy']:.1%} of their tokens "
        "predicted",
        *([] if before is None else [f"loss before the first step: {before:.4f}"]),
        *(["training did not lower the loss: serve the start, or lower loop.learning_rate"] if worse else []),
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
