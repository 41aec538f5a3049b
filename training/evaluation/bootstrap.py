"""Confidence intervals of the difference of two models, and of metrics of whole sets, over prompts.

Two models are compared on the same prompts and seeds, so that the difficulty of a prompt cancels. Clips of
one prompt are taken together, since they are dependent. Differences of rates have a score interval, others a
bootstrap's.

Shape legend: N clips, P prompts, R resamples.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from training.objectives.statistics import NORMAL_QUANTILE, Interval, is_rate, rate_interval

Array = NDArray[np.float64]

RESAMPLES = 2_000
"""Resamples for metrics that are means over clips."""
SEED = 0

NOTHING = Interval(value=math.nan, low=math.nan, high=math.nan, count=0)
"""The interval of no values."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PromptSums:
    """A metric of one model, summed over the clips of each prompt."""

    sums_P: Array
    counts_P: NDArray[np.int64]
    """Number of clips whose value is not NaN."""

    @property
    def mean(self) -> Array:
        """Mean over clips."""
        return np.asarray(self.sums_P.sum(-1) / self.counts_P.sum(-1))


def paired_difference(
    first_N: ArrayLike, second_N: ArrayLike, prompts: Sequence[str], quantile: float = NORMAL_QUANTILE
) -> Interval:
    """Return the mean of the second model minus that of the first, with its interval over prompts.

    The interval of rates is that of `rate_difference`, of other means that of `bootstrap_difference`. NaN
    values are ignored for each model separately: order_given_presence, for instance, is defined only for
    clips with all events. `count` is the number of prompts. `quantile` is of the standard normal
    distribution; the default gives 95 % confidence.
    """
    sides = [np.asarray(side, dtype=float) for side in (first_N, second_N)]
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    prompt_N = np.array([numbers[prompt] for prompt in prompts], dtype=int)
    first, second = (_sums(side, prompt_N, len(numbers)) for side in sides)
    if not (first.counts_P.any() and second.counts_P.any()):
        return NOTHING
    rates = all(is_rate(side[~np.isnan(side)]) for side in sides)
    return (rate_difference if rates else bootstrap_difference)(first, second, quantile)


def bootstrap_difference(
    first: PromptSums, second: PromptSums, quantile: float = NORMAL_QUANTILE
) -> Interval:
    """Return the difference of the means with its percentile bootstrap interval.

    Each resample takes the same prompts for both models. For another `quantile` than that of 95 % the
    distances of the two ends are scaled: the resamples are too few to determine rarer percentiles.
    """
    prompts = len(first.sums_P)
    picks_RP = np.random.default_rng(SEED).integers(0, prompts, (RESAMPLES, prompts))
    with np.errstate(invalid="ignore"):  # a resample may have NaN values only
        means = [side.sums_P[picks_RP].sum(1) / side.counts_P[picks_RP].sum(1) for side in (first, second)]
    low, high = np.nanquantile(means[1] - means[0], [0.025, 0.975])
    return Interval(value=float(second.mean - first.mean), low=float(low), high=float(high), count=prompts)


def rate_difference(first: PromptSums, second: PromptSums, quantile: float = NORMAL_QUANTILE) -> Interval:
    """Return the difference of two rates with its score interval, paired by prompt: `rate_difference_ends`.

    Two models that are right on all of 80 prompts differ by 0.000 [-0.046, 0.046]; the quantiles of a
    bootstrap, 0.000 [0.000, 0.000], know of no uncertainty where two models never differ, and of too little
    where they hardly do.
    """
    low, high = rate_difference_ends(first, second, quantile)
    return Interval(
        value=float(second.mean - first.mean), low=float(low), high=float(high), count=len(first.sums_P)
    )


def rate_difference_ends(
    first: PromptSums, second: PromptSums, quantile: float = NORMAL_QUANTILE
) -> tuple[Array, Array]:
    """Return the two ends of the score interval of the difference of two rates.

    It combines the intervals of the two rates (`rate_interval`) by their correlation over prompts: Newcombe's
    method 10 (1998, Statistics in Medicine 17, 2635), as generalised by Zou and Donner (2008).

    Args:
        first: one model; dimensions before P are kept.
        second: the other, in the same shape.
        quantile: of the standard normal distribution; 1.96 for 95 % confidence.
    """
    (low1, high1), (low2, high2) = (
        rate_interval(side.sums_P, side.counts_P, quantile) for side in (first, second)
    )
    residual1_P, residual2_P = (
        side.sums_P - side.mean[..., None] * side.counts_P for side in (first, second)
    )
    product = (residual1_P * residual2_P).sum(-1)
    scale = np.sqrt(np.square(residual1_P).sum(-1) * np.square(residual2_P).sum(-1))
    correlation = np.divide(product, scale, out=np.zeros_like(scale), where=scale > 0)

    def distance(one: Array, other: Array) -> Array:
        return np.sqrt(np.maximum(0.0, one**2 + other**2 - 2 * correlation * one * other))

    value = second.mean - first.mean
    return (
        value - distance(second.mean - low2, high1 - first.mean),
        value + distance(high2 - second.mean, first.mean - low1),
    )


def prompt_resamples(prompts: int, resamples: int) -> Iterator[NDArray[np.int64]]:
    """Yield indices of prompts [P], drawn with replacement, `resamples` times; always the same ones."""
    rng = np.random.default_rng(SEED)
    for _ in range(resamples):
        yield rng.integers(0, prompts, prompts)


def normal_interval(
    value: float, resampled_R: ArrayLike, count: int, quantile: float = NORMAL_QUANTILE
) -> Interval:
    """Return the interval of a set metric (FAD, KAD, IS): ``value ± 1.96`` standard deviations of resamples.

    Quantiles would be biased: a resample contains clips twice, which shifts such metrics, so the quantiles
    may exclude the value itself. The standard deviation is not affected.
    """
    resampled = np.asarray(resampled_R, dtype=float)
    resampled = resampled[np.isfinite(resampled)]
    margin = quantile * float(resampled.std(ddof=1)) if len(resampled) > 1 else float("nan")
    return Interval(value=value, low=value - margin, high=value + margin, count=count)


def _sums(values_N: NDArray[np.float64], prompt_N: NDArray[np.int64], prompts: int) -> PromptSums:
    known = ~np.isnan(values_N)
    return PromptSums(
        sums_P=np.bincount(prompt_N, np.where(known, values_N, 0.0), minlength=prompts).astype(float),
        counts_P=np.bincount(prompt_N[known], minlength=prompts),
    )
