"""Clips of a model, and their figures: generated once, scored once, kept as arrays.

Shape legend: N clips, D embedding width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from benchmarks.study2.config import Prompts
from services.weights.uri import resolve
from training.data.examples import FileClip
from training.data.scenes import SceneClip
from training.evaluation.clip_scores import (
    ClipScores,
    References,
    embed_references,
    open_evaluators,
    score_clips,
)
from training.evaluation.config import EvaluationConfig
from training.evaluation.embedders import Embeddings
from training.evaluation.prompts import Prompt
from training.evaluation.sources import ModelSource, PlannedClip, clip_seed, prepare_clips
from training.loop.progress import progress
from training.soundworld.captions import CaptionTruth
from training.soundworld.scenes import SceneConfig, draw_caption

Kind = Literal["short", "long", "held_out"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
PRIMARY_KINDS: Final[tuple[Kind, ...]] = ("short", "long")
"""Kinds that the primary figure is of."""
SECONDS: Final[Mapping[Kind, float]] = {"short": 2.56, "long": 5.12, "held_out": 2.56}
PROMPT_SEED: Final = 90_211


class ClipJudge(Protocol):
    """A judge of clips by the events of their prompts."""

    def figures(
        self, truth: CaptionTruth, waveform_N: NDArray[np.float32], sampling_rate: int
    ) -> dict[str, float]:
        """Return the figures of a mono clip; NaN where undefined. All clips have the same ones."""


def study_plan(prompts: Prompts, kind: Kind, seeds: int) -> tuple[PlannedClip, ...]:
    """Return the prompts and seeds of one kind: two events, or at 5.12 s three events in sequence.

    Empty if the study has no prompts of this kind.
    """
    scenes = SceneConfig(duration=SECONDS[kind], single=0.0, sequence=0.7, split=prompts.split)
    if kind == "long":
        scenes = replace(scenes, sequence=1.0, three=1.0)
    if kind == "held_out":
        scenes = replace(scenes, held_out_templates=True)
    count: int = getattr(prompts, kind)
    found: dict[str, Prompt] = {}
    index = 0
    while len(found) < count:
        key = (PROMPT_SEED + KINDS.index(kind), index)
        text, truth = draw_caption(np.random.default_rng(key), scenes)
        reference = SceneClip(truth=truth, seed=key, duration=scenes.duration, gain=0.0)
        found.setdefault(text, Prompt(text=text, truth=truth, reference=reference))
        index += 1
    return tuple(
        PlannedClip(prompt=prompt, seed=clip_seed(prompt.text, number))
        for prompt in found.values()
        for number in range(seeds)
    )


def sampled(config: EvaluationConfig, kind: Kind) -> EvaluationConfig:
    """Return the settings for clips of one kind."""
    return replace(config, sampling=replace(config.sampling, duration=SECONDS[kind]))


def score_model(
    name: str,
    uri: str,
    plan: Sequence[PlannedClip],
    config: EvaluationConfig,
    judge: ClipJudge,
    references: References,
    cache: Path,
) -> ClipScores:
    """Return the figures and embeddings of the clips of a model; its clips stay in `cache`."""
    source = ModelSource(name=name, model=resolve(uri))
    files = prepare_clips(source, plan, config, cache).files
    scores = score_clips(name, files, plan, open_evaluators(config), references, config)
    rows: list[Mapping[str, float]] = []
    bar = progress(files, total=len(files), desc=f"judging {name}", unit="clip")
    for planned, file in zip(plan, bar, strict=True):
        assert planned.prompt.truth is not None
        waveform, rate = FileClip(path=file).read()
        rows.append(judge.figures(planned.prompt.truth, np.atleast_2d(waveform).mean(axis=0), rate))
    judged = {metric: np.array([row[metric] for row in rows]) for metric in rows[0]}
    return replace(scores, values={**scores.values, **judged})


def references_of(plan: Sequence[PlannedClip], config: EvaluationConfig) -> References:
    """Return the embeddings of the sound world's own clips of the prompts."""
    return embed_references(plan, open_evaluators(config), config)


def write_scores(path: Path, scores: ClipScores) -> None:
    """Write the figures and embeddings of a model to an .npz file, atomically."""
    _write(
        path,
        {f"value.{name}": values.astype(np.float32) for name, values in scores.values.items()}
        | _arrays(scores.embeddings)
        | {"readable": scores.readable_N},
    )


def read_scores(path: Path) -> ClipScores:
    """Read what `write_scores` wrote."""
    with np.load(path) as stored:
        return ClipScores(
            values={
                name.removeprefix("value."): stored[name].astype(np.float64)
                for name in stored.files
                if name.startswith("value.")
            },
            embeddings=_embeddings(stored),
            readable_N=stored["readable"],
            unreadable={},
            warnings=(),
            prompt_warnings={},
        )


def write_references(path: Path, references: References) -> None:
    """Write the references' embeddings to an .npz file, atomically."""
    _write(path, _arrays(references.embeddings) | {"rows": references.row_N})


def read_references(path: Path) -> References:
    """Read what `write_references` wrote."""
    with np.load(path) as stored:
        return References(embeddings=_embeddings(stored), row_N=stored["rows"], unreadable={}, warnings=())


def _arrays(embeddings: Mapping[str, Embeddings]) -> dict[str, Any]:
    found: dict[str, Any] = {f"space.{label}": one.embeddings_BD for label, one in embeddings.items()}
    return found | {
        f"logits.{label}": one.logits_BK for label, one in embeddings.items() if one.logits_BK is not None
    }


def _embeddings(stored: Any) -> dict[str, Embeddings]:
    labels = [name.removeprefix("space.") for name in stored.files if name.startswith("space.")]
    return {
        label: Embeddings(
            embeddings_BD=stored[f"space.{label}"],
            logits_BK=stored[f"logits.{label}"] if f"logits.{label}" in stored.files else None,
        )
        for label in labels
    }


def _write(path: Path, arrays: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.part.npz")
    np.savez(temporary, **arrays)
    temporary.replace(path)
