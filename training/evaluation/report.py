"""From what was heard to figures with intervals: of one model, and of two models paired.

Shape legend: N clips, P prompts, R bootstrap draws, D embedding width, K classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.evaluation.bootstrap import draws, mean_interval, paired_difference, set_interval
from training.evaluation.clip_scores import ClipScores, References
from training.evaluation.config import EvaluationConfig
from training.evaluation.distances import (
    CLIPS_PER_DIMENSION,
    SCALE,
    Gaussian,
    bandwidth_of,
    frechet_distance,
    gaussian_kernel,
    squared_discrepancy,
)
from training.evaluation.divergence import inception_score
from training.evaluation.prompts import SPLITS
from training.evaluation.sources import Asked
from training.evaluation.statistics import Interval

Figures = dict[str, Interval]
"""By name."""

LOWER_IS_BETTER = ("fad.", "fd.", "kad.", "kl.", "silent", "clipped", "reversed_given_presence")
"""What the names begin with of figures that should be small."""
NEITHER = ("loudness_db",)
"""Figures that should be neither."""

Indices = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Drawn:
    """A figure of a whole set of clips, and of each bootstrap draw of it."""

    value: float
    draws_R: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Measured:
    """The figures of one model on some clips, with what intervals are made from."""

    prompts: Sequence[str]
    """Of each clip."""
    values: Mapping[str, NDArray[np.float64]]
    """Figures of single clips [N]; NaN where one does not count."""
    sets: Mapping[str, Drawn]
    """Figures of the set."""


def split_units(plan: Sequence[Asked], readable_N: NDArray[np.bool_]) -> dict[str, Indices]:
    """The readable clips of each split that has any."""
    found = {
        name: np.array(
            [n for n, asked in enumerate(plan) if readable_N[n] and belongs(asked.prompt)], dtype=int
        )
        for name, belongs in SPLITS.items()
    }
    return {name: units for name, units in found.items() if len(units)}


def measure(
    heard: ClipScores, references: References, plan: Sequence[Asked], units: Indices, config: EvaluationConfig
) -> Measured:
    """The figures of the clips `units`, none of which is unreadable."""
    return Measured(
        prompts=[plan[unit].prompt.text for unit in units],
        values={name: values[units] for name, values in heard.values.items()},
        sets=_set_figures(heard, references, plan, units, config),
    )


def figures_of(measured: Measured) -> Figures:
    """The figures of one model, each with its interval; those that no clip counts for are left out."""
    found = {name: mean_interval(values, measured.prompts) for name, values in measured.values.items()}
    for name, drawn in measured.sets.items():
        found[name] = set_interval(drawn.value, drawn.draws_R, len(measured.prompts))
    return {name: interval for name, interval in found.items() if interval.count}


def differences_of(first: Measured, second: Measured) -> Figures:
    """Each figure of `second` less that of `first`: on the same clips, and the same draws of prompts.

    `count` is the number of prompts.
    """
    found = {
        name: paired_difference(values, second.values[name], first.prompts)
        for name, values in first.values.items()
    }
    for name, drawn in first.sets.items():
        other = second.sets[name]
        difference, prompts = other.value - drawn.value, len(set(first.prompts))
        found[name] = set_interval(difference, other.draws_R - drawn.draws_R, prompts)
    return {name: interval for name, interval in found.items() if interval.count}


def too_few(references: References, splits: Mapping[str, Indices]) -> list[str]:
    """A warning for each space that has not twice as many clips, or references, as dimensions."""
    warnings = []
    for label, space in references.spaces.items():
        wanted = CLIPS_PER_DIMENSION * space.embeddings_ND.shape[1]
        rows = {name: references.row_N[units] for name, units in splits.items()}
        counts = {name: min(len(row), len(np.unique(row[row >= 0]))) for name, row in rows.items()}
        if few := [f"{name} {count}" for name, count in counts.items() if count < wanted]:
            warnings.append(
                f"{frechet_name(label)} wants {wanted} clips and as many references, and is too large with "
                f"fewer; here are: {', '.join(few)}. Read kad.{label} instead"
            )
    return warnings


def frechet_name(label: str) -> str:
    """What papers call the Fréchet distance in the space `label`: FD by PANNs, FAD by others."""
    return f"fd.{label}" if label == "panns" else f"fad.{label}"


def is_better(name: str, difference: float) -> bool | None:
    """Whether a figure that changed by `difference` became better; None where neither way is better."""
    if name in NEITHER or not difference:
        return None
    return (difference < 0) == name.startswith(LOWER_IS_BETTER)


def _set_figures(
    heard: ClipScores, references: References, plan: Sequence[Asked], units: Indices, config: EvaluationConfig
) -> dict[str, Drawn]:
    """Fréchet distance, KAD and inception score in every space that can tell them."""
    prompts = list(dict.fromkeys(plan[unit].prompt.text for unit in units))
    number = {text: position for position, text in enumerate(prompts)}
    clips_of: list[list[int]] = [[] for _ in prompts]
    for position, unit in enumerate(units):
        clips_of[number[plan[unit].prompt.text]].append(position)
    reference_P = np.array([references.row_N[units[clips[0]]] for clips in clips_of], dtype=int)
    picks = [np.arange(len(prompts)), *draws(len(prompts), config.set_resamples)]
    drawn_clips = [np.concatenate([clips_of[pick] for pick in picked]).astype(int) for picked in picks]
    drawn_references = [reference_P[picked][reference_P[picked] >= 0] for picked in picks]
    drawn_references[0] = np.unique(drawn_references[0])

    found: dict[str, Drawn] = {}
    for label, space in heard.spaces.items():
        values: dict[str, list[float]] = {}
        embeddings_ND = space.embeddings_ND[units].astype(np.float64)
        if len(drawn_references[0]) >= 2 and len(units) >= 2:
            reference_RD = references.spaces[label].embeddings_ND.astype(np.float64)
            values[frechet_name(label)] = _frechet(embeddings_ND, reference_RD, drawn_clips, drawn_references)
            row_N = references.row_N[units]
            # A clip's group is its reference: captions that share one are no independent witnesses either.
            groups_N = np.where(
                row_N >= 0, row_N, -1 - np.array([number[plan[u].prompt.text] for u in units])
            )
            values[f"kad.{label}"] = _kernel(
                embeddings_ND, reference_RD, groups_N, drawn_clips, drawn_references
            )
        if space.logits_NK is not None and len(units) >= config.inception_splits:
            logits_NK = space.logits_NK[units]
            values[f"inception.{label}"] = [
                inception_score(logits_NK[clips], splits=config.inception_splits) for clips in drawn_clips
            ]
        for name, (value, *drawn) in values.items():
            found[name] = Drawn(value=value, draws_R=np.array(drawn))
    return found


def _frechet(
    embeddings_ND: NDArray[np.float64],
    reference_RD: NDArray[np.float64],
    clips: Sequence[Indices],
    references: Sequence[Indices],
) -> list[float]:
    return [
        frechet_distance(Gaussian.fit(embeddings_ND[own]), Gaussian.fit(reference_RD[real]))
        if len(own) > 1 and len(real) > 1
        else float("nan")
        for own, real in zip(clips, references, strict=True)
    ]


def _kernel(
    embeddings_ND: NDArray[np.float64],
    reference_RD: NDArray[np.float64],
    groups_N: Indices,
    clips: Sequence[Indices],
    references: Sequence[Indices],
) -> list[float]:
    # Of all references, whatever the split: one ruler for all figures.
    bandwidth = bandwidth_of(reference_RD)
    within_NN = gaussian_kernel(embeddings_ND, embeddings_ND, bandwidth)
    within_RR = gaussian_kernel(reference_RD, reference_RD, bandwidth)
    between_NR = gaussian_kernel(embeddings_ND, reference_RD, bandwidth)
    return [
        SCALE
        * squared_discrepancy(
            within_NN,
            within_RR,
            between_NR,
            groups_N=groups_N,
            groups_M=np.arange(len(reference_RD)),
            counts_N=np.bincount(own, minlength=len(embeddings_ND)),
            counts_M=np.bincount(real, minlength=len(reference_RD)),
        )
        for own, real in zip(clips, references, strict=True)
    ]
