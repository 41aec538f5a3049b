"""Evaluate models, or folders of clips, on the same prompts and seeds; others are compared with the first.

    milonga train evaluate mini-base                            # the sound world's validation prompts
    milonga train evaluate mini-base dpo=file:build/dpo         # two models, paired
    milonga train evaluate old/ new/ --prompts captions.csv     # clips of `milonga generate --prompts`
    milonga train evaluate mini-base a=file:a b=file:b --set comparisons=b:a    # these two as well

In ``--output``: `report.json` (every figure with its interval, by split), `report.md` (the tables),
`clips.jsonl` (what was heard of each clip), `distributions.png`, `spectrograms.png`, and `clips/`, where what
was generated is kept for the next evaluation. After whatever stopped it, the same call goes on.

This module imports the independent judge, so no training stage may import it. Its settings are in `config`.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from services.errors import FieldViolation, InvalidInputError
from services.files import write_atomically
from training.data.examples import Clip, FileClip
from training.data.store import digest_of, write_rows
from training.evaluation.clip_scores import ClipScores, embed_references, open_evaluators, score_clips
from training.evaluation.config import EvaluationConfig
from training.evaluation.markdown import written_report
from training.evaluation.plots import distribution_plot, spectrogram_sheet
from training.evaluation.prompts import SPLITS
from training.evaluation.report import (
    Figures,
    Measured,
    differences_of,
    figures_of,
    measure,
    split_units,
    too_few,
)
from training.evaluation.sources import (
    Asked,
    Clips,
    FolderSource,
    ModelSource,
    Source,
    clips_of,
    make_plan,
    open_source,
    same_seeds,
)
from training.loop.config import flatten
from training.loop.progress import progress
from training.loop.run_folder import finished_report

REPORT, TABLES, HEARD = "report.json", "report.md", "clips.jsonl"
DISTRIBUTIONS, SPECTROGRAMS = "distributions.png", "spectrograms.png"
CLIPS = "clips"
"""Folder of what was generated, in the output's."""


def evaluate(
    config: EvaluationConfig, sources: Sequence[str], output: Path, *, cache: Path | None = None
) -> dict[str, Any]:
    """Evaluate `sources`, each ``[NAME=]PLACE``: a model URI, or a folder of clips. Returns the report.

    Args:
        config: what is heard, and by whom.
        sources: the first is the one that the others are compared with, beside the config's comparisons.
        output: folder of the report; made if missing.
        cache: folder of generated clips, to be shared by several evaluations; None: in `output`.

    Raises:
        InvalidInputError: no prompts, other prompts in another folder, a comparison of what is no source, or
            too many clips that can't be read.
        ModelError: a model was refused.
        OutputError: `output` can't be written.
    """
    opened = [open_source(text) for text in sources]
    check_names(opened)
    compared = compared_names([source.name for source in opened], config.comparisons)
    plan = make_plan(config, opened)
    evaluators = open_evaluators(config)
    clips = [clips_of(source, plan, config, cache or output / CLIPS) for source in opened]
    references = embed_references(plan, evaluators, config)
    heard = {c.name: score_clips(c.name, c.files, plan, evaluators, references, config) for c in clips}

    # What can't be read of one model is left out of all: every column is of the same clips.
    splits = split_units(plan, np.logical_and.reduce([one.readable_N for one in heard.values()]))
    names = list(heard)
    bar = progress(total=len(splits) * len(names), desc="intervals", unit="table")
    measured: dict[str, dict[str, Measured]] = {name: {} for name in names}
    with bar:
        for split, units in splits.items():
            for name in names:
                measured[name][split] = measure(heard[name], references, plan, units, config)
                bar.update()
    warnings = too_few(references, splits)
    warnings += [
        f"{source.name} has clips of other seeds than {names[0]}: they are paired by prompt alone"
        for source in opened[1:]
        if not same_seeds(source, plan)
    ]
    report: dict[str, Any] = {
        "prompts": {
            "count": len({asked.prompt.text for asked in plan}),
            "clips": len(plan),
            "references": len(np.unique(references.row_N[references.row_N >= 0])),
            "digest": plan_digest(plan),
            "splits": {split: len(units) for split, units in splits.items()},
        },
        "models": [
            {
                "name": one.name,
                "source": text.partition("=")[2] if text.startswith(f"{one.name}=") else text,
                "model": dict(one.identity),
                "unreadable": dict(heard[one.name].unreadable),
                "figures": {s: _plain(figures_of(part)) for s, part in measured[one.name].items()},
            }
            for one, text in zip(clips, sources, strict=True)
        ],
        "comparisons": [
            {
                "name": name,
                "against": against,
                "differences": {
                    split: _plain(differences_of(measured[against][split], part))
                    for split, part in measured[name].items()
                },
            }
            for name, against in compared
        ],
        "unreadable_references": dict(references.unreadable),
        "warnings": warnings,
        "heard_by": evaluators.digests(),
        "settings": {k: list(v) if isinstance(v, tuple) else v for k, v in flatten(config).items()},
    }
    write_results(report, heard, clips, plan, config, output)
    tell(report)
    return report


def finished_evaluation(
    config: EvaluationConfig, sources: Sequence[str], output: Path
) -> dict[str, Any] | None:
    """The report in `output`, if it is of the same settings, prompts and weights; otherwise None.

    None as well where a source is a folder: nothing says whether its clips are still the same. Raises what
    `evaluate` raises of sources and prompts.
    """
    report = finished_report(output / REPORT, flatten(config))
    opened = [open_source(text) for text in sources]
    if report is None or any(isinstance(source, FolderSource) for source in opened):
        return None
    before = [(model["name"], model["model"].get("digest")) for model in report["models"]]
    now = [(source.name, source.model.digest) for source in opened if isinstance(source, ModelSource)]
    same = before == now and report["prompts"]["digest"] == plan_digest(make_plan(config, opened))
    return report if same else None


def plan_digest(plan: Sequence[Asked]) -> str:
    """Of the prompts and seeds."""
    return digest_of([[asked.prompt.text, asked.seed] for asked in plan])


def compared_names(names: Sequence[str], comparisons: Sequence[str]) -> list[tuple[str, str]]:
    """Who is compared with whom: all others with the first, in their order; then `comparisons`, each once.

    Raises `InvalidInputError` where a comparison, ``NAME:AGAINST``, names what is no source.
    """
    pairs = [(name, names[0]) for name in names[1:]]
    for text in comparisons:
        name, _, against = text.partition(":")
        if unknown := [one for one in (name, against) if one not in names]:
            raise InvalidInputError(
                FieldViolation(
                    "comparisons",
                    f"has {text!r}, and no source is called {' or '.join(unknown)}; there are "
                    f"{', '.join(names)}",
                )
            )
        pairs.append((name, against))
    return list(dict.fromkeys(pairs))


def check_names(sources: Sequence[Source]) -> None:
    """Raise `InvalidInputError` where there is no source, or two of one name."""
    names = [source.name for source in sources]
    if not names:
        raise InvalidInputError(FieldViolation("SOURCE", "is missing; give a model URI or a folder of clips"))
    if len(set(names)) < len(names):
        raise InvalidInputError(
            FieldViolation(
                "SOURCE", f"two have one name ({', '.join(names)}); write NAME=SOURCE to tell them apart"
            )
        )


def write_results(
    report: Mapping[str, Any],
    heard: Mapping[str, ClipScores],
    clips: Sequence[Clips],
    plan: Sequence[Asked],
    config: EvaluationConfig,
    output: Path,
) -> None:
    """Write every file of the output, the report last. Raises `OutputError`."""
    rows = [
        {
            "model": one.name,
            "prompt": asked.prompt.text,
            "seed": asked.seed,
            "location": str(one.files[number]),
            "splits": [name for name, belongs in SPLITS.items() if name != "all" and belongs(asked.prompt)],
            "figures": {
                name: round(float(column[number]), 6)
                for name, column in heard[one.name].values.items()
                if math.isfinite(column[number])
            },
        }
        for one in clips
        for number, asked in enumerate(plan)
    ]
    write_rows(output / HEARD, rows)
    figures = dict.fromkeys(name for one in heard.values() for name in one.values)
    pictures = {
        DISTRIBUTIONS: distribution_plot(
            {name: {model: one.values[name] for model, one in heard.items()} for name in figures}
        ),
        SPECTROGRAMS: _sheet(clips, plan, config),
    }
    for name, picture in pictures.items():
        if picture is None:
            (output / name).unlink(missing_ok=True)  # an earlier evaluation's
        else:
            write_atomically(output / name, picture)
    write_atomically(output / TABLES, written_report(report))
    write_atomically(output / REPORT, json.dumps(report, indent=1, allow_nan=False) + "\n")


def tell(report: Mapping[str, Any]) -> None:
    """Print on stderr what was left out, and what to be careful of."""
    left_out = {
        f"{m['name']}: {clip}": why for m in report["models"] for clip, why in m["unreadable"].items()
    }
    left_out |= {f"reference: {clip}": why for clip, why in report["unreadable_references"].items()}
    if left_out:
        print(f"can't be read and are left out: {len(left_out)}", file=sys.stderr)
        print(*(f"  {clip}: {why}" for clip, why in left_out.items()), sep="\n", file=sys.stderr)
    for warning in report["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)


def _sheet(clips: Sequence[Clips], plan: Sequence[Asked], config: EvaluationConfig) -> bytes | None:
    """Spectrograms of the first clip of some prompts, evenly spaced: not those that look best."""
    first: dict[str, int] = {}
    for number, asked in enumerate(plan):
        first.setdefault(asked.prompt.text, number)
    spaced = np.linspace(0, len(first) - 1, min(config.sheet, len(first))).round().astype(int)
    chosen = [list(first.values())[position] for position in spaced]
    columns: dict[str, Sequence[Clip | None]] = {}
    if all(plan[number].prompt.reference is not None for number in chosen):
        columns["reference"] = [plan[number].prompt.reference for number in chosen]
    columns |= {one.name: [FileClip(path=one.files[number]) for number in chosen] for one in clips}
    return spectrogram_sheet([plan[number].prompt.text for number in chosen], columns)


def _plain(figures: Figures) -> dict[str, dict[str, float | int | None]]:
    """Figures as JSON has them, which knows no NaN."""
    return {
        name: {key: value if math.isfinite(value) else None for key, value in asdict(interval).items()}
        for name, interval in figures.items()
    }
