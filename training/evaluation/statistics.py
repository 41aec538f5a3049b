"""Figures with what they are uncertain by. Shapes: N examples."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A mean with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float
    count: int
    """Values that the mean is of."""

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] of {self.count}"


def bootstrap_mean(
    values_N: ArrayLike, groups: Sequence[object] | None = None, *, resamples: int = 2_000
) -> Interval:
    """The mean of `values_N`; whole groups (say, prompts) are drawn again, as their values go together.

    The same values give the same interval. All are NaN where there are no values.
    """
    values = np.asarray(values_N, dtype=float)
    if not values.size:
        return Interval(value=float("nan"), low=float("nan"), high=float("nan"), count=0)
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups or range(values.size)))}
    member = np.array([numbers[group] for group in groups or range(values.size)])
    sums, counts = np.bincount(member, weights=values), np.bincount(member)
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(numbers), (resamples, len(numbers)))
    means = sums[picks].sum(1) / counts[picks].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(value=float(values.mean()), low=float(low), high=float(high), count=values.size)


def area_under_curve(scores_N: ArrayLike, labels_N: ArrayLike) -> float:
    """Probability that a positive (label above 1/2) scores higher than a negative; ties count half.

    The area under the receiver operating characteristic, by ranks. NaN where one of the classes is missing.
    """
    positive = np.asarray(labels_N) > 0.5
    wins, losses = int(positive.sum()), int((~positive).sum())
    if not wins or not losses:
        return float("nan")
    ranks = rankdata(np.asarray(scores_N))
    return float((ranks[positive].sum() - wins * (wins + 1) / 2) / (wins * losses))
