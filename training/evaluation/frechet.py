"""The Fréchet distance of two sets of clips, each taken for a Gaussian in an embedding space.

It is called FAD where the embeddings are VGGish's (arXiv 1812.08466) and FD where they are PANNs' (AudioLDM,
arXiv 2301.12503). Its unit is the embedding's, squared: figures of different embeddings can't be compared.

Shape legend: N clips, D embedding width, K rows of a covariance's root.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

CLIPS_PER_DIMENSION = 2
"""Clips for each dimension below which the estimate is mostly bias: a covariance of rank N - 1 lacks most of
the space. `training.evaluation.kernel` needs fewer."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Gaussian:
    """A mean, and a covariance by its root: no covariance is too singular for it."""

    mean_D: NDArray[np.float64]
    root_KD: NDArray[np.float64]
    """The covariance is its transpose times itself."""

    @classmethod
    def fit(cls, embeddings_ND: ArrayLike) -> "Gaussian":
        """Mean and unbiased covariance of two or more embeddings."""
        embeddings = np.asarray(embeddings_ND, dtype=np.float64)
        count, width = embeddings.shape
        if count < 2:
            raise ValueError(f"a covariance needs two clips or more, got {count}")
        mean_D = embeddings.mean(axis=0)
        root = (embeddings - mean_D) / np.sqrt(count - 1)
        if count > width:  # the same covariance in D rows
            values, vectors = np.linalg.eigh(root.T @ root)
            root = np.sqrt(values.clip(min=0.0))[:, None] * vectors.T
        return cls(mean_D=mean_D, root_KD=root)


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """``|m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½)``, 0 or more; 0 for equal Gaussians, symmetric.

    With ``C = AᵀA`` the last trace is the sum of the singular values of ``A1 A2ᵀ``: no root of an
    ill-conditioned product, no imaginary part to throw away, nothing added to a diagonal. It is a biased
    estimate: with N clips it is too large by a term of order D / N, so compare at equal N only, and with
    at least `CLIPS_PER_DIMENSION` clips a dimension.
    """
    gap_D = first.mean_D - second.mean_D
    spread = float(np.square(first.root_KD).sum() + np.square(second.root_KD).sum())
    shared = float(np.linalg.svd(first.root_KD @ second.root_KD.T, compute_uv=False).sum())
    return max(0.0, float(gap_D @ gap_D) + spread - 2.0 * shared)
