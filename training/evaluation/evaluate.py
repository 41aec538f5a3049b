"""Evaluate models or folders of clips on the same prompts and seeds, and compare them with the first.

    milonga train evaluate mini-base                            # the sound world's validation prompts
    milonga train evaluate mini-base dpo=file:build/dpo         # two models, paired
    milonga train evaluate old/ new/ --prompts captions.csv     # folders of `milonga generate --prompts`
    milonga train evaluate mini-base a=file:a b=file:b --set comparisons=b:a    # further comparisons

The folder ``--output`` contains `report.json` (all metrics with intervals, by split), `report.md` (tables),
`clips.jsonl` (metrics of each clip), `distributions.png`, `spectrograms.png`, and `clips/`, the cache of
generated clips. An interrupted evaluation is resumed by the same call.

This module imports the independent judge, so no training stage may import it. Settings are in `config`.
"""

import itertools
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from services.api.scoring import merge_warnings
from services.errors import invalid
from services.files import write_atomically
from services.models.architectures import architecture_of
from training.data.examples import Clip, FileClip, shown
from training.data.prompts import on_prompts, report_prompts, warning_line
from training.data.store import digest_of_value, write_rows
from training.evaluation.clip_scores import (
    ClipScores,
    References,
    embed_references,
    open_evaluators,
    score_clips,
)
from training.evaluation.config import EvaluationConfig
from training.evaluation.markdown import markdown_report
from training.evaluation.plots import distribution_plot, spectrogram_sheet
from training.evaluation.prompts import SPLITS
from training.evaluation.report import (
    Metrics,
    SplitMetrics,
    compute_metrics,
    metric_differences,
    metric_intervals,
    sample_size_warnings,
    split_indices,
)
from training.evaluation.sources import (
    FolderSource,
    ModelSource,
    PlannedClip,
    Source,
    SourceClips,
    make_plan,
    open_source,
    prepare_clips,
    same_seeds,
)
from training.evaluation.unused_words import unused_words
from training.loop.config import flatten
from training.loop.progress import progress
from training.loop.run_folder import finished_report

REPORT, TABLES, CLIP_METRICS = "report.json", "report.md", "clips.jsonl"
DISTRIBUTIONS, SPECTROGRAMS = "distributions.png", "spectrograms.png"
CLIPS = "clips"
"""Cache of generated clips, in the output folder."""


def evaluate(
    config: EvaluationConfig, sources: Sequence[str], output: Path, *, cache: Path | None = None
) -> dict[str, Any]:
    """Evaluate `sources`, each ``[NAME=]LOCATION`` of a model URI or a folder of clips. Return the report.

    Args:
        config: prompts, generation settings, scorers and metrics.
        sources: the others are compared with the first; further comparisons are in the config.
        output: folder of the report; created if missing.
        cache: cache of generated clips, to be shared by several evaluations; None: in `output`.

    Raises:
        InvalidInputError: there are no prompts, a folder has other prompts, a comparison names an unknown
            source, or too many clips are unreadable.
        ModelError: a model can't be loaded.
        OutputError: `output` can't be written.
    """
    opened = [open_source(text) for text in sources]
    _check_sources(opened, config)
    compared = comparison_pairs([source.name for source in opened], config.comparisons)
    plan = make_plan(config, opened)
    evaluators = open_evaluators(config)
    clips = [prepare_clips(source, plan, config, cache or output / CLIPS) for source in opened]
    references = embed_references(plan, evaluators, config)
    scores = {c.name: score_clips(c.name, c.files, plan, evaluators, references, config) for c in clips}
    _add_unused_words(scores, opened, clips, plan, config)

    # A clip that is unreadable for one source is left out for all, so that all metrics are of the same clips.
    splits = split_indices(plan, np.logical_and.reduce([found.readable_N for found in scores.values()]))
    bar = progress(total=len(splits) * len(scores), desc="intervals", unit="table")
    metrics: dict[str, dict[str, SplitMetrics]] = {name: {} for name in scores}
    with bar:
        for split, indices in splits.items():
            for name, found in scores.items():
                metrics[name][split] = compute_metrics(found, references, plan, indices, config)
                bar.update()
    inputs = _input_warnings(plan, opened, scores, references)
    report: dict[str, Any] = {
        "prompts": {
            "count": len({planned.prompt.text for planned in plan}),
            "clips": len(plan),
            "references": len(np.unique(references.row_N[references.row_N >= 0])),
            "digest": plan_digest(plan),
            "splits": {split: len(indices) for split, indices in splits.items()},
        },
        "models": [
            {
                "name": source.name,
                "source": text.partition("=")[2] if text.startswith(f"{source.name}=") else text,
                "model": dict(source.identity),
                "unreadable": dict(scores[source.name].unreadable),
                "figures": {s: _plain(metric_intervals(part)) for s, part in metrics[source.name].items()},
            }
            for source, text in zip(clips, sources, strict=True)
        ],
        "comparisons": [
            {
                "name": name,
                "against": against,
                "differences": {
                    split: _plain(metric_differences(metrics[against][split], part))
                    for split, part in metrics[name].items()
                },
            }
            for name, against in compared
        ],
        "unreadable_references": dict(references.unreadable),
        **inputs,
        "warnings": [
            *sample_size_warnings(references, splits),
            *_pairing_warnings(opened, plan),
            *([warning_line(found)] if (found := inputs["prompt_warnings"])["with_warnings"] else []),
            *shown(inputs["clip_warnings"]),
        ],
        "heard_by": evaluators.digests(),
        "settings": {k: list(v) if isinstance(v, tuple) else v for k, v in flatten(config).items()},
    }
    write_results(report, scores, clips, plan, config, output)
    print_warnings(report)
    return report


def _check_sources(sources: Sequence[Source], config: EvaluationConfig) -> None:
    check_names(sources)
    folders = [source.name for source in sources if isinstance(source, FolderSource)]
    if config.unused_words and folders:
        raise invalid("unused_words", f"is true, but {folders[0]} is a folder; give models, or leave it out")


def _add_unused_words(
    scores: dict[str, ClipScores],
    sources: Sequence[Source],
    clips: Sequence[SourceClips],
    plan: Sequence[PlannedClip],
    config: EvaluationConfig,
) -> None:
    """Add the metrics of words that a model does not use to its clips' scores, if the config wants them."""
    if not config.unused_words:
        return
    for source, made in zip(sources, clips, strict=True):
        assert isinstance(source, ModelSource)
        columns = unused_words(source.name, source.model, made.files, plan, config.device)
        scores[source.name] = replace(scores[source.name], values={**scores[source.name].values, **columns})


def _pairing_warnings(sources: Sequence[Source], plan: Sequence[PlannedClip]) -> list[str]:
    return [
        f"{source.name} has clips of other seeds than {sources[0].name}: they are paired by prompt alone"
        for source in sources[1:]
        if not same_seeds(source, plan)
    ]


def _input_warnings(
    plan: Sequence[PlannedClip],
    sources: Sequence[Source],
    scores: Mapping[str, ClipScores],
    references: References,
) -> dict[str, Any]:
    """Return the report's entries: prompts that a model or a scorer does not read in full, the decoder's."""
    places = {planned.prompt.text: planned.prompt.place for planned in plan}
    readers = {
        source.name: architecture_of(source.model.folder).prompt_reader(source.model.folder)
        for source in sources
        if isinstance(source, ModelSource)
    }
    found = {
        text: on_prompts(
            merge_warnings({name: reader(text) for name, reader in readers.items()}),
            *(one.prompt_warnings.get(text, ()) for one in scores.values()),
        )
        for text in places
    }
    of_clips = itertools.chain(references.warnings, *(one.warnings for one in scores.values()))
    prompts = report_prompts(places, found, "models and scorers", quiet=True)
    return prompts | {"clip_warnings": list(dict.fromkeys(of_clips))}


def finished_evaluation(
    config: EvaluationConfig, sources: Sequence[str], output: Path
) -> dict[str, Any] | None:
    """Return the report in `output` if it has the same settings, prompts and weights; otherwise None.

    Also None if a source is a folder, whose clips may have changed. If there is a report, raises what
    `evaluate` raises for sources and prompts.
    """
    report = finished_report(output / REPORT, flatten(config))
    if report is None:
        return None
    opened = [open_source(text) for text in sources]
    if any(isinstance(source, FolderSource) for source in opened):
        return None
    before = [(model["name"], model["model"].get("digest")) for model in report["models"]]
    now = [(source.name, source.model.digest) for source in opened if isinstance(source, ModelSource)]
    same = before == now and report["prompts"]["digest"] == plan_digest(make_plan(config, opened))
    return report if same else None


def plan_digest(plan: Sequence[PlannedClip]) -> str:
    """Return the digest of the prompts and seeds."""
    return digest_of_value([[planned.prompt.text, planned.seed] for planned in plan])


def comparison_pairs(names: Sequence[str], comparisons: Sequence[str]) -> list[tuple[str, str]]:
    """Return distinct pairs (name, against): the others with the first, in their order; then `comparisons`.

    Raises `InvalidInputError` if a comparison, ``NAME:AGAINST``, names an unknown source.
    """
    pairs = [(name, names[0]) for name in names[1:]]
    for text in comparisons:
        name, _, against = text.partition(":")
        if unknown := [side for side in (name, against) if side not in names]:
            raise invalid(
                "comparisons",
                f"has {text!r}, but no source is called {' or '.join(unknown)}; there are {', '.join(names)}",
            )
        pairs.append((name, against))
    return list(dict.fromkeys(pairs))


def check_names(sources: Sequence[Source]) -> None:
    """Raise `InvalidInputError` if there is no source, or two have the same name."""
    names = [source.name for source in sources]
    if not names:
        raise invalid("SOURCE", "is missing; give a model URI or a folder of clips")
    if len(set(names)) < len(names):
        raise invalid("SOURCE", f"two have the same name ({', '.join(names)}); give names by NAME=SOURCE")


def write_results(
    report: Mapping[str, Any],
    scores: Mapping[str, ClipScores],
    clips: Sequence[SourceClips],
    plan: Sequence[PlannedClip],
    config: EvaluationConfig,
    output: Path,
) -> None:
    """Write all files of the output, the report last. Raises `OutputError`."""
    rows = [
        {
            "model": source.name,
            "prompt": planned.prompt.text,
            "seed": planned.seed,
            "location": str(source.files[number]),
            "splits": [name for name, belongs in SPLITS.items() if name != "all" and belongs(planned.prompt)],
            "figures": {
                name: round(float(column[number]), 6)
                for name, column in scores[source.name].values.items()
                if math.isfinite(column[number])
            },
        }
        for source in clips
        for number, planned in enumerate(plan)
    ]
    write_rows(output / CLIP_METRICS, rows)
    names = dict.fromkeys(name for found in scores.values() for name in found.values)
    images = {
        DISTRIBUTIONS: distribution_plot(
            {name: {model: found.values[name] for model, found in scores.items()} for name in names}
        ),
        SPECTROGRAMS: _spectrograms(clips, plan, config),
    }
    for name, image in images.items():
        if image is None:
            (output / name).unlink(missing_ok=True)  # of an earlier evaluation
        else:
            write_atomically(output / name, image)
    write_atomically(output / TABLES, markdown_report(report))
    write_atomically(output / REPORT, json.dumps(report, indent=1, allow_nan=False) + "\n")


def print_warnings(report: Mapping[str, Any]) -> None:
    """Print unreadable clips and warnings on stderr."""
    unreadable = {
        f"{model['name']}: {clip}": reason
        for model in report["models"]
        for clip, reason in model["unreadable"].items()
    }
    unreadable |= {f"reference: {clip}": r for clip, r in report["unreadable_references"].items()}
    if unreadable:
        print(f"can't be read and are left out: {len(unreadable)}", file=sys.stderr)
        listed = [f"{clip}: {reason}" for clip, reason in unreadable.items()]
        print(*(f"  {line}" for line in shown(listed)), sep="\n", file=sys.stderr)
    for warning in report["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)


def _spectrograms(
    clips: Sequence[SourceClips], plan: Sequence[PlannedClip], config: EvaluationConfig
) -> bytes | None:
    """Return spectrograms of the first clips of `config.sheet` prompts, evenly spaced in the plan."""
    first: dict[str, int] = {}
    for number, planned in enumerate(plan):
        first.setdefault(planned.prompt.text, number)
    spaced = np.linspace(0, len(first) - 1, min(config.sheet, len(first))).round().astype(int)
    chosen = [list(first.values())[position] for position in spaced]
    columns: dict[str, Sequence[Clip | None]] = {}
    if all(plan[number].prompt.reference is not None for number in chosen):
        columns["reference"] = [plan[number].prompt.reference for number in chosen]
    columns |= {source.name: [FileClip(path=source.files[number]) for number in chosen] for source in clips}
    return spectrogram_sheet([plan[number].prompt.text for number in chosen], columns)


def _plain(metrics: Metrics) -> dict[str, dict[str, float | int | None]]:
    """Return metrics as JSON values, null for NaN."""
    return {
        name: {key: value if math.isfinite(value) else None for key, value in asdict(interval).items()}
        for name, interval in metrics.items()
    }
