"""Metrics of a tagger's posteriors: KL divergence from a reference clip, and the inception score.

Shape legend: N clips, K classes.
"""

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, log_softmax, softmax, xlogy

Convention = Literal["softmax", "sigmoid"]
"""How posteriors are computed from logits. `softmax`: one distribution over all classes, as in AudioGen's and
Tango's tables. `sigmoid`: each class by itself, without the terms of absent classes, as in audioldm_eval; it
is not a divergence of distributions and may be negative."""

FLOOR = 1e-6
"""Added to the posteriors of the generated clip before the logarithm, as in audioldm_eval: it bounds the term
of a class."""


def kl_divergence(
    reference_NK: ArrayLike, generated_NK: ArrayLike, convention: Convention = "softmax"
) -> NDArray[np.float64]:
    """Return ``sum_k p log(p / q)`` of each pair of clips, float64 [N], in nats.

    p is the posterior of the reference clip, q that of the generated clip. About 0 if they are equal, at most
    13.8 (softmax). Raises ValueError if the shapes differ.
    """
    reference, generated = (np.asarray(logits, dtype=np.float64) for logits in (reference_NK, generated_NK))
    if reference.shape != generated.shape:
        raise ValueError(f"pairs of clips must have equal shapes, got {reference.shape}, {generated.shape}")
    if convention == "softmax":
        p, q = softmax(reference, axis=1), softmax(generated, axis=1)
    else:
        p, q = expit(reference), expit(generated)
    return np.asarray((xlogy(p, p) - p * np.log(q + FLOOR)).sum(axis=1))


def inception_score(logits_NK: ArrayLike, *, splits: int = 1, seed: int = 2020) -> float:
    """Return ``exp(mean KL(instance ‖ marginal))`` (arXiv 1606.03498) of softmax posteriors.

    It is between 1 (all posteriors equal) and K (every posterior one-hot, all classes equally frequent), and
    needs no references. Raises ValueError if there are fewer clips than splits.

    Args:
        logits_NK: logits of a tagger.
        splits: number of parts whose scores are averaged. Papers use 10; each part should have many more
            clips than classes, since a marginal of few clips makes the score too small.
        seed: seed of the shuffling into parts (torch-fidelity's default).
    """
    logits = np.asarray(logits_NK, dtype=np.float64)
    count = len(logits)
    if not 1 <= splits <= count:
        raise ValueError(f"{count} clips can't be divided into {splits} parts")
    if splits > 1:
        logits = logits[np.random.RandomState(seed).permutation(count)]
    scores = []
    for part in range(splits):
        own = log_softmax(logits[part * count // splits : (part + 1) * count // splits], axis=1)
        p = np.exp(own)
        marginal = p.mean(axis=0)
        # A posterior may underflow to zero while its logarithm is finite; their product is zero.
        scores.append(np.exp((p * own).sum(axis=1).mean() - xlogy(marginal, marginal).sum()))
    return float(np.mean(scores))
