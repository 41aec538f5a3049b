"""Metrics with confidence intervals: of one model, and paired differences of two models.

Metrics of single clips are averaged; set metrics (Fréchet distance, KAD, inception score) are computed on all
clips of a split.

Shape legend: N clips, P prompts, R bootstrap resamples, B reference clips, D embedding width, K classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.evaluation.bootstrap import normal_interval, paired_difference, prompt_resamples
from training.evaluation.clip_scores import ClipScores, References
from training.evaluation.config import AUDIOSET_TAGGERS, EvaluationConfig
from training.evaluation.distances import (
    CLIPS_PER_DIMENSION,
    KAD_SCALE,
    Gaussian,
    frechet_distance,
    gaussian_kernel,
    median_bandwidth,
    squared_mmd,
)
from training.evaluation.divergence import inception_score
from training.evaluation.prompts import SPLITS
from training.evaluation.sources import PlannedClip
from training.objectives.statistics import NORMAL_QUANTILE, Interval, mean_interval

Metrics = dict[str, Interval]
"""Metrics with their intervals, by name."""

LOWER_IS_BETTER = ("fad.", "fd.", "kad.", "kl.", "silent", "clipped", "overshoot", "reversed_given_presence",
                   "unused_words")  # fmt: skip
"""Prefixes of metrics of which lower is better."""
UNDIRECTED = ("loudness_db",)
"""Metrics of which neither lower nor higher is better."""

Indices = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SetMetric:
    """A metric of a set of clips, with its values on bootstrap resamples of the prompts."""

    value: float
    resampled_R: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SplitMetrics:
    """The metrics of a model on a split, before the computation of intervals."""

    prompts: Sequence[str]
    """The prompt of each clip."""
    values: Mapping[str, NDArray[np.float64]]
    """Metrics of single clips [N] by name; NaN if undefined."""
    sets: Mapping[str, SetMetric]
    """Set metrics by name."""


def split_indices(plan: Sequence[PlannedClip], readable_N: NDArray[np.bool_]) -> dict[str, Indices]:
    """Return the indices of the readable clips of each split; empty splits are left out."""
    splits = {
        name: np.array(
            [n for n, planned in enumerate(plan) if readable_N[n] and belongs(planned.prompt)], dtype=int
        )
        for name, belongs in SPLITS.items()
    }
    return {name: indices for name, indices in splits.items() if len(indices)}


def compute_metrics(
    scores: ClipScores,
    references: References,
    plan: Sequence[PlannedClip],
    indices: Indices,
    config: EvaluationConfig,
) -> SplitMetrics:
    """Return the metrics on the clips at `indices`, all of them readable."""
    return SplitMetrics(
        prompts=[plan[index].prompt.text for index in indices],
        values={name: values[indices] for name, values in scores.values.items()},
        sets=_set_metrics(scores, references, plan, indices, config),
    )


def metric_intervals(metrics: SplitMetrics) -> Metrics:
    """Return each metric with its interval; those that are undefined for all clips are left out."""
    intervals = {name: mean_interval(values, metrics.prompts) for name, values in metrics.values.items()}
    for name, metric in metrics.sets.items():
        intervals[name] = normal_interval(metric.value, metric.resampled_R, len(metrics.prompts))
    return {name: interval for name, interval in intervals.items() if interval.count}


def metric_differences(
    first: SplitMetrics, second: SplitMetrics, quantile: float = NORMAL_QUANTILE
) -> Metrics:
    """Return each metric of `second` minus that of `first`, paired by clip and by resample.

    `count` is the number of prompts; `quantile` is of the standard normal distribution, by default that of
    95 % intervals.
    """
    intervals = {
        name: paired_difference(values, second.values[name], first.prompts, quantile)
        for name, values in first.values.items()
    }
    for name, metric in first.sets.items():
        other = second.sets[name]
        difference, prompts = other.value - metric.value, len(set(first.prompts))
        resampled_R = other.resampled_R - metric.resampled_R
        intervals[name] = normal_interval(difference, resampled_R, prompts, quantile)
    return {name: interval for name, interval in intervals.items() if interval.count}


def sample_size_warnings(references: References, splits: Mapping[str, Indices]) -> list[str]:
    """Return a warning for each embedder that needs more clips or references for the Fréchet distance."""
    warnings = []
    for label, embeddings in references.embeddings.items():
        minimum = CLIPS_PER_DIMENSION * embeddings.embeddings_BD.shape[1]
        rows = {name: references.row_N[indices] for name, indices in splits.items()}
        counts = {name: min(len(row), len(np.unique(row[row >= 0]))) for name, row in rows.items()}
        if few := [f"{name} {count}" for name, count in counts.items() if count < minimum]:
            warnings.append(
                f"{frechet_name(label)} needs {minimum} clips and as many references, and is biased upwards "
                f"with fewer ({', '.join(few)}); use kad.{label} instead"
            )
    return warnings


def frechet_name(label: str) -> str:
    """Return the metric name of the Fréchet distance: fd.panns and fd.passt as in papers, else fad.LABEL."""
    return f"fd.{label}" if label in AUDIOSET_TAGGERS else f"fad.{label}"


def is_better(name: str, difference: float) -> bool | None:
    """Return whether `difference` is an improvement of a metric; None if neither."""
    if name in UNDIRECTED or not difference:
        return None
    return (difference < 0) == name.startswith(LOWER_IS_BETTER)


def _set_metrics(
    scores: ClipScores,
    references: References,
    plan: Sequence[PlannedClip],
    indices: Indices,
    config: EvaluationConfig,
) -> dict[str, SetMetric]:
    """Return Fréchet distance, KAD and inception score for every embedder that provides them."""
    prompts = list(dict.fromkeys(plan[index].prompt.text for index in indices))
    number = {text: position for position, text in enumerate(prompts)}
    clips_by_prompt: list[list[int]] = [[] for _ in prompts]
    for position, index in enumerate(indices):
        clips_by_prompt[number[plan[index].prompt.text]].append(position)
    reference_P = np.array([references.row_N[indices[clips[0]]] for clips in clips_by_prompt], dtype=int)
    # The first sample is the set itself, the others are its resamples.
    samples = [np.arange(len(prompts)), *prompt_resamples(len(prompts), config.set_resamples)]
    sampled_clips = [np.concatenate([clips_by_prompt[p] for p in sample]).astype(int) for sample in samples]
    sampled_references = [reference_P[sample][reference_P[sample] >= 0] for sample in samples]
    sampled_references[0] = np.unique(sampled_references[0])

    metrics: dict[str, SetMetric] = {}
    for label, embeddings in scores.embeddings.items():
        values: dict[str, list[float]] = {}
        embeddings_ND = embeddings.embeddings_BD[indices].astype(np.float64)
        if len(sampled_references[0]) >= 2 and len(indices) >= 2:
            reference_BD = references.embeddings[label].embeddings_BD.astype(np.float64)
            values[frechet_name(label)] = _frechet(
                embeddings_ND, reference_BD, sampled_clips, sampled_references
            )
            row_N = references.row_N[indices]
            # A clip's group is its reference: clips of prompts that share one are dependent too.
            groups_N = np.where(
                row_N >= 0, row_N, -1 - np.array([number[plan[i].prompt.text] for i in indices])
            )
            values[f"kad.{label}"] = _kad(
                embeddings_ND, reference_BD, groups_N, sampled_clips, sampled_references
            )
        if embeddings.logits_BK is not None and len(indices) >= config.inception_splits:
            logits_NK = embeddings.logits_BK[indices]
            values[f"inception.{label}"] = [
                inception_score(logits_NK[clips], splits=config.inception_splits) for clips in sampled_clips
            ]
        for name, (value, *resampled) in values.items():
            metrics[name] = SetMetric(value=value, resampled_R=np.array(resampled))
    return metrics


def _frechet(
    embeddings_ND: NDArray[np.float64],
    reference_BD: NDArray[np.float64],
    clips: Sequence[Indices],
    references: Sequence[Indices],
) -> list[float]:
    """Return the Fréchet distance of each sample; NaN with fewer than two clips or references."""
    return [
        frechet_distance(Gaussian.fit(embeddings_ND[own]), Gaussian.fit(reference_BD[real]))
        if len(own) > 1 and len(real) > 1
        else float("nan")
        for own, real in zip(clips, references, strict=True)
    ]


def _kad(
    embeddings_ND: NDArray[np.float64],
    reference_BD: NDArray[np.float64],
    groups_N: Indices,
    clips: Sequence[Indices],
    references: Sequence[Indices],
) -> list[float]:
    """Return the KAD of each sample."""
    # From all references, so that all splits have the same bandwidth.
    bandwidth = median_bandwidth(reference_BD)
    within_NN = gaussian_kernel(embeddings_ND, embeddings_ND, bandwidth)
    within_BB = gaussian_kernel(reference_BD, reference_BD, bandwidth)
    between_NB = gaussian_kernel(embeddings_ND, reference_BD, bandwidth)
    return [
        KAD_SCALE
        * squared_mmd(
            within_NN,
            within_BB,
            between_NB,
            groups_N=groups_N,
            groups_M=np.arange(len(reference_BD)),
            counts_N=np.bincount(own, minlength=len(embeddings_ND)),
            counts_M=np.bincount(real, minlength=len(reference_BD)),
        )
        for own, real in zip(clips, references, strict=True)
    ]
