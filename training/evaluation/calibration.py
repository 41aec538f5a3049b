"""Whether a probability means what it says, and how to make it so. Shapes: N examples.

Temperature scaling (Guo et al., arXiv 1706.04599): logits are divided by one number, found on held-out
examples. The order of rewards stays what it was.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar

TEMPERATURES = (0.05, 20.0)
"""Bounds of a fitted temperature: without a wrong example among the held-out ones the best would be 0."""

BINS = 15
"""Bins of equal width over [0, 1] (the paper's number)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReliabilityBin:
    """The examples whose probability lies in one bin."""

    count: int
    probability: float
    """Mean of what was said."""
    share: float
    """Mean of what was so."""


def sigmoid(logits_N: ArrayLike) -> NDArray[np.float64]:
    """Logits to probabilities, without overflow."""
    return np.asarray(np.exp(-np.logaddexp(0.0, -np.asarray(logits_N, dtype=float))))


def negative_log_likelihood(logits_N: ArrayLike, labels_N: ArrayLike, temperature: float = 1.0) -> float:
    """Mean of ``-[y log s(z / T) + (1 - y) log s(-z / T)]``."""
    scaled, labels = np.asarray(logits_N, dtype=float) / temperature, np.asarray(labels_N, dtype=float)
    return float(np.mean(labels * np.logaddexp(0, -scaled) + (1 - labels) * np.logaddexp(0, scaled)))


def fit_temperature(logits_N: ArrayLike, labels_N: ArrayLike) -> float:
    """The temperature of the smallest negative log-likelihood, within `TEMPERATURES`. 1 without examples.

    The likelihood is concave in 1 / T, so there is one minimum.
    """
    if not np.size(logits_N):
        return 1.0
    found = minimize_scalar(
        lambda log: negative_log_likelihood(logits_N, labels_N, math.exp(log)),
        bounds=(math.log(TEMPERATURES[0]), math.log(TEMPERATURES[1])),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return math.exp(found.x)


def reliability(
    probabilities_N: ArrayLike, labels_N: ArrayLike, bins: int = BINS
) -> tuple[ReliabilityBin, ...]:
    """The bins that hold examples, in order."""
    probabilities, labels = np.asarray(probabilities_N, dtype=float), np.asarray(labels_N, dtype=float)
    member = np.clip((probabilities * bins).astype(int), 0, bins - 1)
    return tuple(
        ReliabilityBin(
            count=int(here.sum()),
            probability=float(probabilities[here].mean()),
            share=float(labels[here].mean()),
        )
        for here in (member == number for number in range(bins))
        if here.any()
    )


def expected_calibration_error(probabilities_N: ArrayLike, labels_N: ArrayLike, bins: int = BINS) -> float:
    """Mean distance of said and true shares, bins weighted by their examples. NaN without examples.

    The binary form: of the probability of a positive, not of the more likely class.
    """
    found = reliability(probabilities_N, labels_N, bins)
    total = sum(part.count for part in found)
    if not total:
        return float("nan")
    return sum(part.count * abs(part.share - part.probability) for part in found) / total
