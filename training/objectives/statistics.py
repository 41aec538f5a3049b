"""Means with confidence intervals, and the area under the ROC curve.

Shape legend: N values, G groups of values that depend on each other.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

NORMAL_QUANTILE = 1.959964
"""97.5 % quantile of the standard normal distribution."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A value with its 95 % confidence interval."""

    value: float
    low: float
    high: float
    count: int
    """Number of values, or of groups, that it is computed from."""

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] of {self.count}"


def mean_interval(
    values_N: ArrayLike, groups: Sequence[object] | None = None, *, resamples: int = 2_000
) -> Interval:
    """Return the mean of `values_N` with its interval; NaN values are ignored, all NaN if none is left.

    Values of a group (say, all clips of a prompt) depend on each other. A rate has the interval of
    `rate_interval`. Other means have a percentile bootstrap interval, for which whole groups are resampled.
    The random numbers are fixed: the same values give the same interval.
    """
    given = np.asarray(values_N, dtype=float)
    known = np.flatnonzero(~np.isnan(given))
    if not known.size:
        return Interval(value=math.nan, low=math.nan, high=math.nan, count=0)
    values, keys = given[known], [groups[i] if groups else i for i in known.tolist()]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    group_N = np.array([numbers[key] for key in keys])
    sums_G, counts_G = np.bincount(group_N, weights=values), np.bincount(group_N)
    if is_rate(values):
        low, high = rate_interval(sums_G, counts_G)
    else:
        picks = np.random.default_rng(0).integers(0, len(numbers), (resamples, len(numbers)))
        low, high = np.quantile(sums_G[picks].sum(1) / counts_G[picks].sum(1), [0.025, 0.975])
    return Interval(value=float(values.mean()), low=float(low), high=float(high), count=values.size)


def is_rate(values_N: NDArray[np.float64]) -> bool:
    """Return whether the mean of the values is a rate: all are 0 or 1, or 1/2 for a tie."""
    return bool(np.isin(values_N, (0.0, 0.5, 1.0)).all())


def rate_interval(
    sums_G: NDArray[Any], counts_G: NDArray[Any], quantile: float = NORMAL_QUANTILE
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return Wilson's score interval of a rate, of the effective number of values: its two ends.

    It contains more than one value where all are equal: 80 prompts of 80 are 1.000 [0.954, 1.000]; their
    resamples are all 1, so that a bootstrap knows of no uncertainty. The effective number is N over the
    design effect, the variance of the rate over that of N independent values (Kish 1965), by linearisation
    and 1 or more. Two groups of ones and two of zeros are added to compute it, as Agresti and Coull (1998)
    add values: where hardly any value differs, groups don't show how dependent their values are, and each
    counts as one value, as if they were wholly so.

    Args:
        sums_G: sum of the values, each from 0 to 1, of each group. Dimensions before G are kept.
        counts_G: number of values of each group, in the same shape.
        quantile: of the standard normal distribution; 1.96 for 95 % confidence.
    """
    total, successes = counts_G.sum(-1), sums_G.sum(-1)
    size = total / (counts_G > 0).sum(-1)
    rate, shrunk = successes / total, (successes + 2 * size) / (total + 4 * size)
    residual = np.square(sums_G - shrunk[..., None] * counts_G).sum(-1)
    residual += 2 * size**2 * (shrunk**2 + (1 - shrunk) ** 2)
    independent = shrunk * (1 - shrunk) * (total + 4 * size)
    z = quantile**2 / total * np.maximum(1.0, residual / independent)
    half = np.sqrt(z * (rate * (1 - rate) + z / 4))
    low, high = (rate + z / 2 - half) / (1 + z), (rate + z / 2 + half) / (1 + z)
    return np.where(rate == 0, 0.0, low), np.where(rate == 1, 1.0, high)


def area_under_curve(scores_N: ArrayLike, labels_N: ArrayLike) -> float:
    """Return the area under the ROC curve; NaN if one of the classes is missing.

    It is the probability that a positive (label above 1/2) scores higher than a negative; ties count half.
    """
    positive = np.asarray(labels_N) > 0.5
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives:
        return float("nan")
    ranks = rankdata(np.asarray(scores_N))
    rank_sum = ranks[positive].sum() - positives * (positives + 1) / 2
    return float(rank_sum / (positives * negatives))
