"""Embeddings and logits for comparing our metrics with other implementations. RandomState is stable."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def embeddings(count: int, width: int, seed: int, *, shift: float = 0.0) -> Array:
    """Correlated, of unequal variances; of a rank below `width` if `count` is at most that."""
    random = np.random.RandomState(seed)
    mixing = np.random.RandomState(width).randn(width, width) / np.sqrt(width)
    return np.asarray(random.randn(count, width) @ (mixing * np.linspace(0.2, 2.0, width)) + shift)


def logits(count: int, classes: int, seed: int) -> Array:
    """With some confident classes, like a tagger's."""
    random = np.random.RandomState(seed)
    return np.asarray(
        3.0 * random.randn(count, classes) + 6.0 * np.eye(classes)[random.randint(classes, size=count)]
    )


SETS = {
    "many clips": (embeddings(300, 24, 0), embeddings(260, 24, 1, shift=0.3)),
    "equal counts": (embeddings(200, 16, 2), embeddings(200, 16, 3, shift=-0.2)),
    "fewer clips than dimensions": (embeddings(20, 48, 4), embeddings(25, 48, 5, shift=0.1)),
}
"""Generated and reference embeddings by case."""
PAIRED = logits(80, 14, 6), logits(80, 14, 7)
"""Generated and reference logits."""
SCORED = logits(400, 14, 8)
