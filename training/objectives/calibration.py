"""Calibration of probabilities: Platt scaling, and how far probabilities are from observed shares.

Platt scaling divides logits by a temperature (Guo et al., arXiv 1706.04599) and adds a bias, both fitted on
held-out examples. It does not change their order.

Shape legend: N examples.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize

TEMPERATURES = (0.05, 20.0)
"""Bounds of a fitted temperature: if no held-out example is classified wrongly, the optimum would be 0."""

BIAS = 20.0
"""Bound of a fitted bias, for the same reason."""

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaling:
    """A calibration of logits."""

    temperature: float = 1.0
    bias: float = 0.0

    def __call__(self, logits_N: ArrayLike) -> NDArray[np.float64]:
        """Return ``z / temperature + bias`` of logits z, float64 [N]."""
        return np.asarray(logits_N, dtype=float) / self.temperature + self.bias


def negative_log_likelihood(logits_N: ArrayLike, labels_N: ArrayLike) -> float:
    """Return the mean of ``-[y log s(z) + (1 - y) log s(-z)]``, s the sigmoid, in nats."""
    logits, labels = np.asarray(logits_N, dtype=float), np.asarray(labels_N, dtype=float)
    return float(np.mean(labels * np.logaddexp(0, -logits) + (1 - labels) * np.logaddexp(0, logits)))


def fit_scaling(logits_N: ArrayLike, labels_N: ArrayLike) -> Scaling:
    """Return the scaling with the smallest negative log-likelihood, its temperature in `TEMPERATURES`.

    The likelihood is concave in 1 / T and the bias, so there is one minimum. If N is 0, nothing is scaled.
    """
    if not np.size(logits_N):
        return Scaling()
    low, high = TEMPERATURES

    def scaling(x_2: NDArray[np.float64]) -> Scaling:
        return Scaling(temperature=float(1 / x_2[0]), bias=float(x_2[1]))

    def loss(x_2: NDArray[np.float64]) -> float:
        return negative_log_likelihood(scaling(x_2)(logits_N), labels_N)

    bounds = ((1 / high, 1 / low), (-BIAS, BIAS))
    minimum = minimize(loss, [1.0, 0.0], method="L-BFGS-B", bounds=bounds, tol=1e-12)
    return scaling(minimum.x)


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
