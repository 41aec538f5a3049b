"""How far a figure, and the difference of two models, may be trusted: prompts are drawn again.

Two models are compared on the same prompts and seeds, and each draw takes the same prompts for both: what is
hard about a prompt is hard for both and cancels. Clips of one prompt go together, since they are no
independent witnesses.

Shape legend: N clips, P prompts, R resamples.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from training.evaluation.statistics import Interval, bootstrap_mean

RESAMPLES = 2_000
"""Draws for a figure that is a mean over clips."""
NORMAL_QUANTILE = 1.959964
"""97.5 % of a normal distribution lie below so many deviations."""
SEED = 0


def mean_interval(values_N: ArrayLike, prompts: Sequence[str]) -> Interval:
    """Mean with its 95 % interval over prompts; NaN marks a clip that does not count."""
    values = np.asarray(values_N, dtype=float)
    counted = np.flatnonzero(~np.isnan(values))
    return bootstrap_mean(values[counted], [prompts[i] for i in counted.tolist()], resamples=RESAMPLES)


def paired_difference(first_N: ArrayLike, second_N: ArrayLike, prompts: Sequence[str]) -> Interval:
    """Mean of the second model less that of the first, with its 95 % interval over prompts.

    A clip that does not count (NaN) in one model may count in the other: order given presence is asked of
    those clips alone that hold all events. `count` is the number of prompts.
    """
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    member = np.array([numbers[prompt] for prompt in prompts], dtype=int)
    sums, counts = [], []
    for side in (first_N, second_N):
        values = np.asarray(side, dtype=float)
        valid = ~np.isnan(values)
        sums.append(np.bincount(member, np.where(valid, values, 0.0), minlength=len(numbers)))
        counts.append(np.bincount(member, valid, minlength=len(numbers)))
    if not all(count.sum() for count in counts):
        return Interval(value=float("nan"), low=float("nan"), high=float("nan"), count=0)
    rng = np.random.default_rng(SEED)
    picks_RP = rng.integers(0, len(numbers), (RESAMPLES, len(numbers)))
    with np.errstate(invalid="ignore"):  # a draw may hold no clip that counts
        means = [
            total[picks_RP].sum(1) / count[picks_RP].sum(1) for total, count in zip(sums, counts, strict=True)
        ]
    low, high = np.nanquantile(means[1] - means[0], [0.025, 0.975])
    value = sums[1].sum() / counts[1].sum() - sums[0].sum() / counts[0].sum()
    return Interval(value=float(value), low=float(low), high=float(high), count=len(numbers))


def draws(prompts: int, resamples: int) -> Iterator[NDArray[np.int64]]:
    """Numbers of prompts [P], drawn with replacement, `resamples` times; the same ones for two models."""
    rng = np.random.default_rng(SEED)
    for _ in range(resamples):
        yield rng.integers(0, prompts, prompts)


def set_interval(value: float, draws_R: ArrayLike, count: int) -> Interval:
    """The interval of a figure of a whole set (FAD, KAD, IS): ``value ± 1.96`` deviations of its draws.

    Not the draws' quantiles: a draw holds clips twice, which shifts such figures, so the quantiles may miss
    the value itself. Their spread is right all the same.
    """
    found = np.asarray(draws_R, dtype=float)
    found = found[np.isfinite(found)]
    margin = NORMAL_QUANTILE * float(found.std(ddof=1)) if len(found) > 1 else float("nan")
    return Interval(value=value, low=value - margin, high=value + margin, count=count)
