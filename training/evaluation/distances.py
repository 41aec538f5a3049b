"""Distances between two sets of clips in an embedding space: Fréchet (FAD, FD) and kernel (KAD).

The Fréchet distance fits a Gaussian to each set. It is called FAD for VGGish's embeddings (arXiv 1812.08466)
and FD for PANNs' (AudioLDM, arXiv 2301.12503). Its unit is that of the embedding squared, so distances in
different embedding spaces can't be compared.

KAD (arXiv 2502.15602) is an unbiased estimate of the squared maximum mean discrepancy (Gretton et al. 2012,
eq. 3) with a Gaussian kernel, times 100. It fits no Gaussian, so a hundred clips are enough; for the Fréchet
distance they are not.

Shape legend: N, M clips, D embedding width, K rows of the root of a covariance.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import cdist, pdist

CLIPS_PER_DIMENSION = 2
"""Clips per dimension below which the Fréchet distance is mostly bias: a covariance of rank N - 1 lacks most
of the space. KAD needs fewer."""
KAD_SCALE = 100.0
"""Factor of KAD, as in the paper."""

Matrix = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Gaussian:
    """A Gaussian with its covariance as a matrix root, which may be singular."""

    mean_D: NDArray[np.float64]
    root_KD: NDArray[np.float64]
    """The covariance is ``root.T @ root``."""

    @classmethod
    def fit(cls, embeddings_ND: ArrayLike) -> "Gaussian":
        """Fit mean and unbiased covariance to two or more embeddings. Raises ValueError for fewer."""
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
    """Return ``|m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½)``: symmetric, 0 or more, 0 for equal Gaussians.

    With ``C = AᵀA`` the trace of the root is the sum of the singular values of ``A1 A2ᵀ``; this needs no
    matrix root of an ill-conditioned product. The estimate is biased upwards by a term of order D / N:
    compare it at equal N only, with at least `CLIPS_PER_DIMENSION` clips per dimension.
    """
    gap_D = first.mean_D - second.mean_D
    spread = float(np.square(first.root_KD).sum() + np.square(second.root_KD).sum())
    shared = float(np.linalg.svd(first.root_KD @ second.root_KD.T, compute_uv=False).sum())
    return max(0.0, float(gap_D @ gap_D) + spread - 2.0 * shared)


def median_bandwidth(reference_MD: ArrayLike) -> float:
    """Return the median distance of two reference clips (of an even number the lower one, as in kadtk).

    As in the paper, it depends on the references alone, so that KADs of several models are comparable. Raises
    ValueError for fewer than two clips.
    """
    distances = np.sort(pdist(np.asarray(reference_MD, dtype=np.float64)))
    if not len(distances):
        raise ValueError("a bandwidth needs two clips or more")
    return float(distances[(len(distances) - 1) // 2])


def gaussian_kernel(first_ND: ArrayLike, second_MD: ArrayLike, bandwidth: float) -> Matrix:
    """Return the kernel matrix ``exp(-|x - y|² / 2 bandwidth²)``, [N, M]."""
    squared = cdist(
        np.asarray(first_ND, dtype=np.float64), np.asarray(second_MD, dtype=np.float64), "sqeuclidean"
    )
    # 1e-8 as in kadtk: equal reference clips have a bandwidth of 0.
    return np.exp(-squared / (2.0 * bandwidth**2 + 1e-8))


def squared_mmd(
    within_NN: Matrix,
    within_MM: Matrix,
    between_NM: Matrix,
    *,
    groups_N: ArrayLike | None = None,
    groups_M: ArrayLike | None = None,
    counts_N: ArrayLike | None = None,
    counts_M: ArrayLike | None = None,
) -> float:
    """Return the unbiased estimate of the squared maximum mean discrepancy; NaN if a set has no pairs.

    It is the mean of the kernel within the first set plus that within the second, minus twice that between
    them.

    Args:
        within_NN: kernel matrix of the first set.
        within_MM: kernel matrix of the second set.
        between_NM: kernel matrix between the sets.
        groups_N: group of each clip of the first set. Pairs of clips of one group are dependent, and are left
            out within the sets and between them. None: every clip is a group of its own, as for two
            independent sets.
        groups_M: the same for the second set.
        counts_N: how often each clip counts, in a bootstrap resample.
        counts_M: the same for the second set.
    """
    n, m = between_NM.shape
    first = np.ones(n) if counts_N is None else np.asarray(counts_N, dtype=np.float64)
    second = np.ones(m) if counts_M is None else np.asarray(counts_M, dtype=np.float64)
    own = np.arange(n) if groups_N is None else np.asarray(groups_N)
    other = np.arange(n, n + m) if groups_M is None else np.asarray(groups_M)
    return (
        _pair_mean(within_NN, own, own, first, first)
        + _pair_mean(within_MM, other, other, second, second)
        - 2.0 * _pair_mean(between_NM, own, other, first, second)
    )


def _pair_mean(
    kernel_NM: Matrix, groups_N: ArrayLike, groups_M: ArrayLike, counts_N: Matrix, counts_M: Matrix
) -> float:
    """Return the weighted mean over pairs of clips of different groups."""
    pairs_NM = np.not_equal.outer(groups_N, groups_M)
    total = counts_N @ pairs_NM @ counts_M
    return float(counts_N @ (kernel_NM * pairs_NM) @ counts_M / total) if total else float("nan")
