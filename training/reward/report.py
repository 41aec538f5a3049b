"""Metrics of a reward model on held-out examples, and the model folder that training writes.

Shape legend: B examples.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from services.errors import MilongaError, OutputError
from services.models.manifest import Manifest, write_manifest
from services.models.reward.model import RewardModel, read_reward_config
from services.models.writing import replaced_folder
from training.data.examples import Clip, Examples, LabelledClip, Pair
from training.objectives.calibration import (
    Scaling,
    expected_calibration_error,
    negative_log_likelihood,
    sigmoid,
)
from training.objectives.reliability_plot import reliability_figure
from training.objectives.statistics import area_under_curve, mean_interval
from training.reward.data import ClapTokens

EVALUATION = "evaluation.json"
RELIABILITY = "reliability.png"
BATCH = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadOutputs:
    """Uncalibrated logits of a split."""

    labelled: tuple[LabelledClip, ...]
    logits_B: Tensor
    """Logits of `labelled`."""
    pairs: tuple[Pair, ...]
    """The pairs of the split, or if it has none, those derived from its labels."""
    margins_B: Tensor
    """For each of `pairs`, the logit of the chosen clip minus that of the rejected one."""

    def calibration_data(self) -> tuple[Tensor, Tensor]:
        """Return the logits and labels to calibrate on.

        They are those of the labelled clips; if there are none, the margins of the pairs in both orders.
        """
        if self.labelled:
            return self.logits_B, torch.tensor([example.label for example in self.labelled])
        ones_B = torch.ones_like(self.margins_B)
        return torch.cat([self.margins_B, -self.margins_B]), torch.cat([ones_B, 1 - ones_B])

    def validation_metrics(self) -> dict[str, float]:
        """Return the metrics logged during training: nll, and if defined, pair_accuracy and auc."""
        logits_B, labels_B = self.calibration_data()
        metrics = {"nll": negative_log_likelihood(logits_B, labels_B)}
        if self.pairs:
            metrics["pair_accuracy"] = _correct(self.margins_B).mean().item()
        if len({example.label > 0.5 for example in self.labelled}) == 2:
            metrics["auc"] = area_under_curve(logits_B, labels_B)
        return metrics


@torch.no_grad()
def evaluate_head(head: nn.Module, examples: Examples, tokens: ClapTokens) -> HeadOutputs:
    """Return the head's logits of `examples`, float32 on the CPU."""

    def logits(inputs: Sequence[tuple[str, Clip]]) -> Tensor:
        parts = [inputs[start : start + BATCH] for start in range(0, len(inputs), BATCH)]
        outputs = [
            head(tokens.text([p for p, _ in part]), tokens.audio([c for _, c in part])) for part in parts
        ]
        return torch.cat(outputs).float().cpu() if outputs else torch.empty(0)

    pairs = examples.preference_pairs()
    chosen_B = logits([(pair.prompt, pair.chosen) for pair in pairs])
    rejected_B = logits([(pair.prompt, pair.rejected) for pair in pairs])
    return HeadOutputs(
        labelled=examples.labelled,
        logits_B=logits([(example.prompt, example.clip) for example in examples.labelled]),
        pairs=pairs,
        margins_B=chosen_B - rejected_B,
    )


def evaluation_report(outputs: HeadOutputs, tokens: ClapTokens, scaling: Scaling) -> dict[str, Any]:
    """Return the metrics for evaluation.json, those that are means with 95 % intervals over prompts.

    These are pair accuracy by mistake and domain, with that of the CLAP score; calibration before and after
    `scaling`; and, for labels, accuracy and area under the ROC curve.
    """
    report: dict[str, Any] = {}
    if outputs.pairs:
        prompts = [pair.prompt for pair in outputs.pairs]
        margins_B = tokens.scores(prompts, [pair.chosen for pair in outputs.pairs])
        margins_B -= tokens.scores(prompts, [pair.rejected for pair in outputs.pairs])
        report["pair_accuracy"] = _pair_accuracy(outputs.pairs, _correct(outputs.margins_B))
        report["clap_pair_accuracy"] = _pair_accuracy(outputs.pairs, _correct(margins_B))
    logits_B, labels_B = outputs.calibration_data()
    scaled = {"before": logits_B.numpy(), "after": scaling(logits_B)}
    report["calibration"] = {
        "of": "labels" if outputs.labelled else "pairs",
        "expected_calibration_error": {
            name: expected_calibration_error(sigmoid(values_B), labels_B) for name, values_B in scaled.items()
        },
        "negative_log_likelihood": {
            name: negative_log_likelihood(values_B, labels_B) for name, values_B in scaled.items()
        },
    }
    if outputs.labelled:
        correct_B = (torch.from_numpy(scaled["after"] > 0) == (labels_B > 0.5)).double()
        report["labelled"] = {
            "auc": outputs.validation_metrics().get("auc"),
            "accuracy": asdict(mean_interval(correct_B, [example.prompt for example in outputs.labelled])),
        }
    return report


def reliability_plot(outputs: HeadOutputs, scaling: Scaling) -> bytes:
    """Return a PNG: predicted probability against the share of positives, before and after calibration."""
    logits_B, labels_B = outputs.calibration_data()
    after = f"temperature {scaling.temperature:.2f}, bias {scaling.bias:.2f}"
    return reliability_figure({"before": sigmoid(logits_B), after: sigmoid(scaling(logits_B))}, labels_B)


def summary(report: Mapping[str, Any]) -> list[str]:
    """Return the report as lines of text."""
    lines = []
    for name, own in report.get("pair_accuracy", {}).items():
        clap = report["clap_pair_accuracy"][name]
        lines.append(f"{name:24} {_format(own)} of {own['count']:<5} CLAP itself {_format(clap)}")
    if "labelled" in report:
        accuracy, auc = report["labelled"]["accuracy"], report["labelled"]["auc"]
        area = "of one class only" if auc is None else f"area under the curve {auc:.3f}"
        lines.append(f"labels: {area}, accuracy {_format(accuracy)} of {accuracy['count']}")
    error = report["calibration"]["expected_calibration_error"]
    lines.append(
        f"temperature {report['temperature']:.2f}, bias {report['bias']:.2f}: expected calibration error "
        f"{error['before']:.3f} before, {error['after']:.3f} after"
    )
    lines.append(f"weights of step {report['best_step']} of {report['steps']}")
    return lines


def check_output(output: Path) -> None:
    """Raise `OutputError` if `output` can't be created, or contains anything but a reward model."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        try:
            read_reward_config(output)
        except MilongaError as error:
            raise OutputError(f"{output} exists and is not a reward model; give another --output") from error
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{output.parent} can't be created: {error.strerror}; write elsewhere") from error


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
    """Write the model folder `output` and return its manifest; an older folder is replaced as a whole.

    Raises `OutputError`; the older folder is then unchanged.
    """
    with replaced_folder(output) as temporary:
        model.save(temporary)
        (temporary / EVALUATION).write_text(
            json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )
        (temporary / RELIABILITY).write_bytes(reliability_png)
        manifest = write_manifest(temporary, name=name, version=version, license=license)
        (temporary / "README.md").write_text(_card(manifest, model, report), encoding="utf-8")
    return manifest


def _pair_accuracy(pairs: Sequence[Pair], correct_B: Tensor) -> dict[str, dict[str, float]]:
    """Return the pair accuracy of all pairs, of each kind, and of each kind and domain."""
    prompts, accuracy = [pair.prompt for pair in pairs], {}
    groupings: tuple[Callable[[Pair], str], ...] = (
        lambda pair: "all",
        lambda pair: pair.kind,
        lambda pair: f"{pair.kind}, {pair.chosen.domain}",
    )
    for grouping in groupings:
        names = [grouping(pair) for pair in pairs]
        for name in sorted(set(names)):
            rows = [row for row, other in enumerate(names) if other == name]
            accuracy[name] = asdict(mean_interval(correct_B[rows], [prompts[row] for row in rows]))
    return accuracy


def _correct(margins_B: Tensor) -> Tensor:
    """Return 1 for a positive margin, 1/2 for a tie, else 0: float64 [B]."""
    return (margins_B.double().sign() + 1) / 2


def _format(interval: Mapping[str, float]) -> str:
    return f"{interval['value']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def _card(manifest: Manifest, model: RewardModel, report: Mapping[str, Any]) -> str:
    """Return the model card, README.md."""
    lines = "\n".join(f"    {line}" for line in summary(report))
    return f"""---
license: {manifest.license.lower()}
tags: [reward-model, text-to-audio, preference]
---

# {manifest.name}

A reward model: how much listeners would like a clip for a prompt. It is a head on the tokens of the frozen
CLAP model `{model.config.clap_name}` (`{model.config.clap_digest}`), which it needs.
Its output is a calibrated logit; its sigmoid is the probability that the clip is liked, at
the share of liked clips in the held-out data.

    milonga serve reward --model file:THIS-FOLDER --clap {report["clap"]["uri"]}

Version {manifest.version}, `{manifest.digest}`.
Results on the held-out prompts of the test split, with 95 % intervals over prompts (Wilson's, of the
effective number of pairs); pair accuracy by the mistake in the rejected clip, and by the kind of recording:

{lines}

All metrics and settings: `{EVALUATION}`; reliability of the probabilities: `{RELIABILITY}`.
"""
