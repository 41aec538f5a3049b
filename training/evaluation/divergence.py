"""What a tagger's posteriors tell: KL against a reference clip, and the inception score.

Shape legend: N clips, K classes.
"""

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, log_softmax, softmax, xlogy

Convention = Literal["softmax", "sigmoid"]
"""How logits become posteriors. `softmax`: one distribution over all classes (AudioGen's, and that of Tango's
tables). `sigmoid`: each class by itself; the terms of absent classes are left out (audioldm_eval's form), so
it is no divergence of distributions and may be negative."""

FLOOR = 1e-6
"""Added to the generated clip's posteriors before the logarithm, as audioldm_eval does: it bounds what one
class that is missed outright can cost."""


def kl_divergence(
    reference_NK: ArrayLike, generated_NK: ArrayLike, convention: Convention = "softmax"
) -> NDArray[np.float64]:
    """``sum_k p log(p / q)`` of each pair of clips [N], in nats, from logits.

    p is the reference's posterior, q the generated clip's. About 0 where they agree, 13.8 at most (softmax).
    One pair is enough for its own figure.
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
    """``exp(mean KL(instance ‖ marginal))`` (arXiv 1606.03498) of softmax posteriors: from 1 (every clip
    alike, or no clip clear) to K (each clip clear, all classes alike often). Needs no reference.

    Args:
        logits_NK: of a tagger.
        splits: parts, whose scores are averaged; papers take 10, each of which should have many more clips
            than classes: a marginal of few clips makes the score small.
        seed: of the shuffling into parts (torch-fidelity's default).
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
        # Where a posterior is zero in floating point its own logarithm is not: the product is zero.
        scores.append(np.exp((p * own).sum(axis=1).mean() - xlogy(marginal, marginal).sum()))
    return float(np.mean(scores))
