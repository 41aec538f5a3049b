"""What the tables are computed from: the figures of every clip, distances of sets of clips, the trainings.

Distances (FAD, KAD) need the embeddings, which are too large to keep in the repository; their values and
intervals are kept instead.
"""

import gzip
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.study2.config import BASE, METHODS, StudyRun
from benchmarks.study2.scoring import Kind, read_references, read_scores
from benchmarks.study2.worlds import World
from services.files import write_atomically
from services.weights.uri import resolve
from training.data.store import read_json
from training.evaluation.report import (
    Metrics,
    SplitMetrics,
    compute_metrics,
    metric_differences,
    metric_intervals,
)
from training.finetuning.session import TRAINING
from training.loop.config import flatten

CLIPS, SETS, TRAININGS = "clips.json.gz", "sets.json", "trainings.json"
DECIMALS: Final = 3
"""Of the figures of a clip."""


def write_inputs(
    config: StudyRun, world: World, output: Path, names: Sequence[str], kinds: Sequence[Kind]
) -> None:
    """Write the three files of ``result/``, `TRAININGS` last."""
    result = output / "result"
    clips: dict[str, Any] = {"kinds": {}}
    sets: dict[str, Any] = {}
    for kind in kinds:
        plan = world.plan(kind)
        scores = {name: read_scores(output / "figures" / kind / f"{name}.npz") for name in names}
        clips["kinds"][kind] = {
            "prompts": [planned.prompt.text for planned in plan],
            "relations": [planned.prompt.truth.relation if planned.prompt.truth else "" for planned in plan],
            "seeds": [planned.seed for planned in plan],
            "figures": {name: _columns(found.values) for name, found in scores.items()},
        }
        references = read_references(output / "figures" / kind / "references.npz")
        settings = world.sampled(kind)
        # A clip that is unreadable for one model is left out for all.
        indices = np.flatnonzero(np.logical_and.reduce([found.readable_N for found in scores.values()]))
        metrics = {
            name: replace_values(compute_metrics(found, references, plan, indices, settings))
            for name, found in scores.items()
        }
        sets[kind] = {
            "figures": {name: plain(metric_intervals(found)) for name, found in metrics.items()},
            "differences": [
                {"name": name, "against": against}
                | {"figures": plain(metric_differences(metrics[against], metrics[name]))}
                for name, against in comparisons(names)
            ],
        }
    result.mkdir(parents=True, exist_ok=True)
    packed = gzip.compress(json.dumps(clips, separators=(",", ":")).encode(), mtime=0)
    write_atomically(result / CLIPS, packed)
    write_atomically(result / SETS, json.dumps(sets, indent=1) + "\n")
    reports = {name: read_json(output / "models" / name / TRAINING) for name in names if name != BASE}
    kept = ("stage", "parent", "steps", "figures", "parameters")
    study = {
        "name": config.name,
        "start": asdict(resolve(config.start).identity),
        "settings": {k: list(v) if isinstance(v, tuple) else v for k, v in flatten(config).items()},
        "trainings": {
            name: {key: report[key] for key in kept}
            | {"examples": report["data"]["examples"], "settings": report["settings"]}
            for name, report in reports.items()
        },
    }
    write_atomically(result / TRAININGS, json.dumps(study, indent=1) + "\n")


def comparisons(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return (model, against): all with the start, each method with SFT, rounds with DPO, of one seed."""
    found = [(name, BASE) for name in names if name != BASE]
    for name in names:
        method, _, seed = name.rpartition("-")
        for other in ("sft", "dpo"):
            against = f"{other}-{seed}"
            if method in METHODS and method not in ("sft", other) and against in names:
                found.append((name, against))
    return found


def read_inputs(folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return clips, sets and trainings of a result's folder."""
    clips: dict[str, Any] = json.loads(gzip.decompress((folder / CLIPS).read_bytes()))
    return clips, read_json(folder / SETS), read_json(folder / TRAININGS)


def clip_metrics(clips: Mapping[str, Any], name: str, kinds: Sequence[Kind]) -> SplitMetrics:
    """Return the figures of the clips of a model, of several kinds together."""
    prompts: list[str] = []
    parts: list[dict[str, np.ndarray[Any, Any]]] = []
    for kind in kinds:
        found = clips["kinds"][kind]
        prompts += found["prompts"]
        parts.append(
            {metric: np.array(column, dtype=float) for metric, column in found["figures"][name].items()}
        )
    return SplitMetrics(
        prompts=prompts,
        values={metric: np.concatenate([part[metric] for part in parts]) for metric in parts[0]},
        sets={},
    )


def replace_values(metrics: SplitMetrics) -> SplitMetrics:
    """Return the set metrics alone."""
    return replace(metrics, values={})


def plain(metrics: Metrics) -> dict[str, dict[str, float | int | None]]:
    """Return metrics as JSON values, null for NaN."""
    return {
        name: {key: value if math.isfinite(value) else None for key, value in asdict(interval).items()}
        for name, interval in metrics.items()
    }


def _columns(values: Mapping[str, Any]) -> dict[str, list[float | int | None]]:
    """Return the figures of the clips, short: whole numbers as such, null for NaN."""

    def short(value: float) -> float | int | None:
        if not math.isfinite(value):
            return None
        return int(value) if value == int(value) else round(float(value), DECIMALS)

    return {name: [short(value) for value in column] for name, column in values.items()}
