"""Bootstrap confidence intervals of metrics, and of the difference of two models, over prompts.

Two models are compared on the same prompts and seeds, and each resample takes the same prompts for both, so
that the difficulty of a prompt cancels. Clips of one prompt are resampled together, since they are dependent.

Shape legend: N clips, P prompts, R resamples.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from training.objectives.statistics import Interval, bootstrap_mean

RESAMPLES = 2_000
"""Resamples for metrics that are means over clips."""
NORMAL_QUANTILE = 1.959964
"""97.5 % quantile of the standard normal distribution."""
SEED = 0


def mean_interval(values_N: ArrayLike, prompts: Sequence[str]) -> Interval:
    """Return the mean with its 95 % interval over prompts; NaN values are ignored."""
    values = np.asarray(values_N, dtype=float)
    valid = np.flatnonzero(~np.isnan(values))
    return bootstrap_mean(values[valid], [prompts[i] for i in valid.tolist()], resamples=RESAMPLES)


def paired_difference(first_N: ArrayLike, second_N: ArrayLike, prompts: Sequence[str]) -> Interval:
    """Return the mean of the second model minus that of the first, with its 95 % interval over prompts.

    NaN values are ignored for each model separately: order_given_presence, for instance, is defined only for
    clips with all events. `count` is the number of prompts.
    """
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    prompt_N = np.array([numbers[prompt] for prompt in prompts], dtype=int)
    sums, counts = [], []
    for side in (first_N, second_N):
        values = np.asarray(side, dtype=float)
        valid = ~np.isnan(values)
        sums.append(np.bincount(prompt_N, np.where(valid, values, 0.0), minlength=len(numbers)))
        counts.append(np.bincount(prompt_N, valid, minlength=len(numbers)))
    if not all(count.sum() for count in counts):
        return Interval(value=float("nan"), low=float("nan"), high=float("nan"), count=0)
    rng = np.random.default_rng(SEED)
    picks_RP = rng.integers(0, len(numbers), (RESAMPLES, len(numbers)))
    with np.errstate(invalid="ignore"):  # a resample may have NaN values only
        means = [
            total[picks_RP].sum(1) / count[picks_RP].sum(1) for total, count in zip(sums, counts, strict=True)
        ]
    low, high = np.nanquantile(means[1] - means[0], [0.025, 0.975])
    value = sums[1].sum() / counts[1].sum() - sums[0].sum() / counts[0].sum()
    return Interval(value=float(value), low=float(low), high=float(high), count=len(numbers))


def prompt_resamples(prompts: int, resamples: int) -> Iterator[NDArray[np.int64]]:
    """Yield indices of prompts [P], drawn with replacement, `resamples` times; always the same ones."""
    rng = np.random.default_rng(SEED)
    for _ in range(resamples):
        yield rng.integers(0, prompts, prompts)


def normal_interval(value: float, resampled_R: ArrayLike, count: int) -> Interval:
    """Return the interval of a set metric (FAD, KAD, IS): ``value ± 1.96`` standard deviations of resamples.

    Quantiles would be biased: a resample contains clips twice, which shifts such metrics, so the quantiles
    may exclude the value itself. The standard deviation is not affected.
    """
    resampled = np.asarray(resampled_R, dtype=float)
    resampled = resampled[np.isfinite(resampled)]
    margin = NORMAL_QUANTILE * float(resampled.std(ddof=1)) if len(resampled) > 1 else float("nan")
    return Interval(value=value, low=value - margin, high=value + margin, count=count)
