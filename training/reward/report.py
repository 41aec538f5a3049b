"""What a reward model is worth on held-out examples, and the folder that it leaves.

Shape legend: B examples.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from services.errors import MilongaError, OutputError
from services.models.manifest import Manifest, write_manifest
from services.models.reward.model import RewardModel, read_reward_config
from training.data.examples import Clip, Examples, Labelled, Pair
from training.evaluation.calibration import (
    expected_calibration_error,
    negative_log_likelihood,
    reliability,
    sigmoid,
)
from training.evaluation.plots import reliability_plot
from training.evaluation.statistics import area_under_curve, bootstrap_mean
from training.reward.data import ClapTokens

EVALUATION = "evaluation.json"
RELIABILITY = "reliability.png"
BATCH = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Heard:
    """Raw logits of a split."""

    labelled: tuple[Labelled, ...]
    logits_B: Tensor
    """Of the labelled examples."""
    pairs: tuple[Pair, ...]
    """The split's, or where it has none those that its labels make."""
    margins_B: Tensor
    """Of the pairs: logit of the chosen less that of the rejected clip."""

    def calibration(self) -> tuple[Tensor, Tensor]:
        """Logits and labels that the probability is fitted to: of labels if there are any, else the margins
        of the pairs, each in both orders."""
        if self.labelled:
            return self.logits_B, torch.tensor([example.label for example in self.labelled])
        ones_B = torch.ones_like(self.margins_B)
        return torch.cat([self.margins_B, -self.margins_B]), torch.cat([ones_B, 1 - ones_B])

    def progress(self) -> dict[str, float]:
        """The figures that are looked at while training: pair accuracy, area under the curve, likelihood."""
        logits_B, labels_B = self.calibration()
        figures = {"nll": negative_log_likelihood(logits_B, labels_B)}
        if self.pairs:
            figures["pair_accuracy"] = _won(self.margins_B).mean().item()
        if len({example.label > 0.5 for example in self.labelled}) == 2:
            figures["auc"] = area_under_curve(logits_B, labels_B)
        return figures


@torch.no_grad()
def hear(head: nn.Module, examples: Examples, tokens: ClapTokens) -> Heard:
    """Raw logits of examples, float32 on the CPU."""

    def logits(asked: Sequence[tuple[str, Clip]]) -> Tensor:
        parts = [asked[start : start + BATCH] for start in range(0, len(asked), BATCH)]
        heard = [
            head(tokens.text([p for p, _ in part]), tokens.audio([c for _, c in part])) for part in parts
        ]
        return torch.cat(heard).float().cpu() if heard else torch.empty(0)

    pairs = examples.comparable()
    chosen_B = logits([(pair.prompt, pair.chosen) for pair in pairs])
    rejected_B = logits([(pair.prompt, pair.rejected) for pair in pairs])
    return Heard(
        labelled=examples.labelled,
        logits_B=logits([(example.prompt, example.clip) for example in examples.labelled]),
        pairs=pairs,
        margins_B=chosen_B - rejected_B,
    )


def evaluate(heard: Heard, tokens: ClapTokens, temperature: float) -> dict[str, Any]:
    """The figures of evaluation.json: pair accuracy by the kind of mistake and the kind of recording, beside
    CLAP's own, with bootstrap intervals over prompts; and whether probabilities mean what they say."""
    report: dict[str, Any] = {}
    if heard.pairs:
        prompts = [pair.prompt for pair in heard.pairs]
        margins_B = tokens.scores(prompts, [pair.chosen for pair in heard.pairs])
        margins_B -= tokens.scores(prompts, [pair.rejected for pair in heard.pairs])
        report["pair_accuracy"] = _accuracy(heard.pairs, _won(heard.margins_B))
        report["clap_pair_accuracy"] = _accuracy(heard.pairs, _won(margins_B))
    logits_B, labels_B = heard.calibration()
    report["calibration"] = {
        "of": "labels" if heard.labelled else "pairs",
        "expected_calibration_error": {
            name: expected_calibration_error(sigmoid(logits_B / divisor), labels_B)
            for name, divisor in (("before", 1.0), ("after", temperature))
        },
        "negative_log_likelihood": {
            name: negative_log_likelihood(logits_B, labels_B, divisor)
            for name, divisor in (("before", 1.0), ("after", temperature))
        },
    }
    if heard.labelled:
        right_B = ((logits_B > 0) == (labels_B > 0.5)).double()
        report["labelled"] = {
            "auc": heard.progress().get("auc"),
            "accuracy": asdict(bootstrap_mean(right_B, [example.prompt for example in heard.labelled])),
        }
    return report


def plot(heard: Heard, temperature: float) -> bytes:
    """The reliability plot (PNG), before and after calibration."""
    logits_B, labels_B = heard.calibration()
    curves = {
        "before": reliability(sigmoid(logits_B), labels_B),
        f"temperature {temperature:.2f}": reliability(sigmoid(logits_B / temperature), labels_B),
    }
    return reliability_plot(curves, "held-out prompts")


def summary(report: Mapping[str, Any]) -> list[str]:
    """The report as lines for people."""
    lines = []
    for name, own in report.get("pair_accuracy", {}).items():
        clap = report["clap_pair_accuracy"][name]
        lines.append(f"{name:24} {_written(own)} of {own['count']:<5} CLAP itself {_written(clap)}")
    if "labelled" in report:
        accuracy, auc = report["labelled"]["accuracy"], report["labelled"]["auc"]
        area = "of one class only" if auc is None else f"area under the curve {auc:.3f}"
        lines.append(f"labels: {area}, accuracy {_written(accuracy)} of {accuracy['count']}")
    error = report["calibration"]["expected_calibration_error"]
    lines.append(
        f"temperature {report['temperature']:.2f}: expected calibration error {error['before']:.3f} before, "
        f"{error['after']:.3f} after"
    )
    lines.append(f"weights of step {report['best_step']} of {report['steps']}")
    return lines


def check_output(output: Path) -> None:
    """Raise `OutputError` where `output` can't become the model's folder, or holds something else."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        try:
            read_reward_config(output)
        except MilongaError as error:
            raise OutputError(
                f"{output} is there and holds no reward model; give another --output"
            ) from error
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{output.parent} can't be made: {error.strerror}; write elsewhere") from error


def write_model(
    model: RewardModel,
    output: Path,
    report: Mapping[str, Any],
    reliability_png: bytes,
    *,
    name: str,
    version: str,
    license: str,
) -> Manifest:
    """Write the folder under a temporary name, then put it in the place of an older one.

    Raises `OutputError`; what was there before is then still there.
    """
    temporary, old = (output.with_name(f".{output.name}.{what}") for what in ("part", "old"))
    try:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)
        model.save(temporary)
        (temporary / EVALUATION).write_text(
            json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )
        (temporary / RELIABILITY).write_bytes(reliability_png)
        manifest = write_manifest(temporary, name=name, version=version, license=license)
        (temporary / "README.md").write_text(_card(manifest, model, report), encoding="utf-8")
        for path in temporary.iterdir():
            path.chmod(0o644)  # safetensors writes what only its owner may read
        if output.exists():
            output.rename(old)
        temporary.rename(output)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not output.exists():
            old.rename(output)
        raise OutputError(f"{output} can't be written: {error.strerror or error}") from error
    return manifest


def _accuracy(pairs: Sequence[Pair], won_B: Tensor) -> dict[str, dict[str, float]]:
    """Pair accuracy of all, of each kind, and of each kind in each domain."""
    prompts, found = [pair.prompt for pair in pairs], {}
    groupings: tuple[Callable[[Pair], str], ...] = (
        lambda pair: "all",
        lambda pair: pair.kind,
        lambda pair: f"{pair.kind}, {pair.chosen.domain}",
    )
    for grouping in groupings:
        names = [grouping(pair) for pair in pairs]
        for name in sorted(set(names)):
            here = [index for index, other in enumerate(names) if other == name]
            found[name] = asdict(bootstrap_mean(won_B[here], [prompts[index] for index in here]))
    return found


def _won(margins_B: Tensor) -> Tensor:
    """1 where the chosen clip is above the rejected one, 1/2 where they are level."""
    return (margins_B.double().sign() + 1) / 2


def _written(interval: Mapping[str, float]) -> str:
    return f"{interval['value']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def _card(manifest: Manifest, model: RewardModel, report: Mapping[str, Any]) -> str:
    """The model card."""
    lines = "\n".join(f"    {line}" for line in summary(report))
    return f"""---
license: {manifest.license.lower()}
tags: [reward-model, text-to-audio, preference]
---

# {manifest.name}

A reward model: how much listeners would like a clip for a prompt. A head on the tokens of the frozen CLAP
model `{model.config.clap_name}` (`{model.config.clap_digest}`), without which it
can't be used. Its output is a logit, divided by the temperature; the sigmoid is a probability at the share of
liked clips in its held-out data.

    milonga serve reward --model file:THIS-FOLDER --clap {report["clap"]["uri"]}

Version {manifest.version}, `{manifest.digest}`.
Held-out prompts of the test split, 95 % bootstrap intervals over prompts; pair accuracy by what is wrong with
the rejected clip, and by the kind of recording:

{lines}

All figures and settings: `{EVALUATION}`; reliability of the probabilities: `{RELIABILITY}`.
"""
