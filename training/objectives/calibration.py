"""Calibration of probabilities: temperature scaling, and how far probabilities are from observed shares.

Temperature scaling (Guo et al., arXiv 1706.04599) divides logits by one number, fitted on held-out examples.
It does not change their order.

Shape legend: N examples.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar

TEMPERATURES = (0.05, 20.0)
"""Bounds of a fitted temperature: if no held-out example is classified wrongly, the optimum would be 0."""

BINS = 15
"""Bins of equal width over [0, 1], as in the paper."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReliabilityBin:
    """The examples whose predicted probability falls into one bin."""

    count: int
    """Number of examples."""
    probability: float
    """Mean predicted probability."""
    share: float
    """Share of positive examples."""


def sigmoid(logits_N: ArrayLike) -> NDArray[np.float64]:
    """Return the probabilities of logits, float64 [N], without overflow."""
    return np.asarray(np.exp(-np.logaddexp(0.0, -np.asarray(logits_N, dtype=float))))


def negative_log_likelihood(logits_N: ArrayLike, labels_N: ArrayLike, temperature: float = 1.0) -> float:
    """Return the mean of ``-[y log s(z / T) + (1 - y) log s(-z / T)]``, s the sigmoid, in nats."""
    scaled, labels = np.asarray(logits_N, dtype=float) / temperature, np.asarray(labels_N, dtype=float)
    return float(np.mean(labels * np.logaddexp(0, -scaled) + (1 - labels) * np.logaddexp(0, scaled)))


def fit_temperature(logits_N: ArrayLike, labels_N: ArrayLike) -> float:
    """Return the temperature in `TEMPERATURES` with the smallest negative log-likelihood; 1 if N is 0.

    The likelihood is concave in 1 / T, so there is one minimum.
    """
    if not np.size(logits_N):
        return 1.0
    minimum = minimize_scalar(
        lambda log: negative_log_likelihood(logits_N, labels_N, math.exp(log)),
        bounds=(math.log(TEMPERATURES[0]), math.log(TEMPERATURES[1])),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return math.exp(minimum.x)


def reliability(
    probabilities_N: ArrayLike, labels_N: ArrayLike, bins: int = BINS
) -> tuple[ReliabilityBin, ...]:
    """Return the bins that contain examples, in order of probability."""
    probabilities, labels = np.asarray(probabilities_N, dtype=float), np.asarray(labels_N, dtype=float)
    bin_N = np.clip((probabilities * bins).astype(int), 0, bins - 1)
    return tuple(
        ReliabilityBin(
            count=int(mask.sum()),
            probability=float(probabilities[mask].mean()),
            share=float(labels[mask].mean()),
        )
        for mask in (bin_N == number for number in range(bins))
        if mask.any()
    )


def expected_calibration_error(probabilities_N: ArrayLike, labels_N: ArrayLike, bins: int = BINS) -> float:
    """Return the mean distance between probability and share of positives over the bins; NaN if N is 0.

    Bins are weighted by their examples. This is the binary form: of the probability of a positive, not of the
    more likely class.
    """
    found = reliability(probabilities_N, labels_N, bins)
    total = sum(part.count for part in found)
    if not total:
        return float("nan")
    return sum(part.count * abs(part.share - part.probability) for part in found) / total
