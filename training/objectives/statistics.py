"""Means with bootstrap confidence intervals, and the area under the ROC curve.

Shape legend: N values.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata


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


def bootstrap_mean(
    values_N: ArrayLike, groups: Sequence[object] | None = None, *, resamples: int = 2_000
) -> Interval:
    """Return the mean of `values_N` with its percentile bootstrap interval; all NaN if N is 0.

    Whole groups are resampled (say, all clips of a prompt), since their values depend on each other. The
    random numbers are fixed: the same values give the same interval.
    """
    values = np.asarray(values_N, dtype=float)
    if not values.size:
        return Interval(value=float("nan"), low=float("nan"), high=float("nan"), count=0)
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups or range(values.size)))}
    group_N = np.array([numbers[group] for group in groups or range(values.size)])
    sums, counts = np.bincount(group_N, weights=values), np.bincount(group_N)
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(numbers), (resamples, len(numbers)))
    means = sums[picks].sum(1) / counts[picks].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(value=float(values.mean()), low=float(low), high=float(high), count=values.size)


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
