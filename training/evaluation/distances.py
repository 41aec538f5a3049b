"""Distances between two sets of clips in an embedding space: Fréchet (FAD, FD) and kernel (KAD).

The Fréchet distance takes each set for a Gaussian. It is called FAD where the embeddings are VGGish's (arXiv
1812.08466) and FD where they are PANNs' (AudioLDM, arXiv 2301.12503). Its unit is the embedding's, squared:
figures of different embeddings can't be compared.

KAD (arXiv 2502.15602) is the squared maximum mean discrepancy (Gretton et al. 2012, eq. 3) with a Gaussian
kernel, times 100, without bias. It fits no Gaussian, so a hundred clips are enough, which for the Fréchet
distance they are not.

Shape legend: N, M clips, D embedding width, K rows of a covariance's root.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import cdist, pdist

CLIPS_PER_DIMENSION = 2
"""Clips for each dimension below which the estimate is mostly bias: a covariance of rank N - 1 lacks most of
the space. KAD needs fewer."""
SCALE = 100.0
"""The paper's factor, for figures that are easier to read."""

Matrix = NDArray[np.float64]


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


def bandwidth_of(reference_MD: ArrayLike) -> float:
    """Median distance of two clips of the reference set (of an even number the lower one, as kadtk does).

    The paper takes it from the reference set; so one reference makes the figures of many models comparable.
    """
    distances = np.sort(pdist(np.asarray(reference_MD, dtype=np.float64)))
    if not len(distances):
        raise ValueError("a bandwidth needs two clips or more")
    return float(distances[(len(distances) - 1) // 2])


def gaussian_kernel(first_ND: ArrayLike, second_MD: ArrayLike, bandwidth: float) -> Matrix:
    """``exp(-|x - y|² / 2 bandwidth²)``, [N, M]."""
    squared = cdist(
        np.asarray(first_ND, dtype=np.float64), np.asarray(second_MD, dtype=np.float64), "sqeuclidean"
    )
    # kadtk adds 1e-8 as well: a reference of equal clips has a bandwidth of 0.
    return np.exp(-squared / (2.0 * bandwidth**2 + 1e-8))


def squared_discrepancy(
    within_NN: Matrix,
    within_MM: Matrix,
    between_NM: Matrix,
    *,
    groups_N: ArrayLike | None = None,
    groups_M: ArrayLike | None = None,
    counts_N: ArrayLike | None = None,
    counts_M: ArrayLike | None = None,
) -> float:
    """The unbiased estimate from kernel matrices; NaN where a set has no pairs.

    It is the mean within the one set and the mean within the other, less twice the mean between them.

    Args:
        within_NN: the kernel of each pair of clips of the first set.
        within_MM: of the second set.
        between_NM: of a clip of the first and one of the second.
        groups_N: numbers of what clips of the first set were made for. Pairs of one group are no draw of two
            independent clips and are left out, within the sets and between them. None: only pairs of a clip
            with itself are, as for two sets that have nothing to do with each other.
        groups_M: the same of the second set.
        counts_N: how often each clip counts, as a bootstrap draws them.
        counts_M: the same of the second set.
    """
    n, m = between_NM.shape
    first = np.ones(n) if counts_N is None else np.asarray(counts_N, dtype=np.float64)
    second = np.ones(m) if counts_M is None else np.asarray(counts_M, dtype=np.float64)
    own = np.arange(n) if groups_N is None else np.asarray(groups_N)
    other = np.arange(n, n + m) if groups_M is None else np.asarray(groups_M)
    return (
        _mean(within_NN, own, own, first, first)
        + _mean(within_MM, other, other, second, second)
        - 2.0 * _mean(between_NM, own, other, first, second)
    )


def _mean(
    kernel_NM: Matrix, groups_N: ArrayLike, groups_M: ArrayLike, counts_N: Matrix, counts_M: Matrix
) -> float:
    """Weighted mean over pairs of different groups."""
    pairs_NM = np.not_equal.outer(groups_N, groups_M)
    total = counts_N @ pairs_NM @ counts_M
    return float(counts_N @ (kernel_NM * pairs_NM) @ counts_M / total) if total else float("nan")


def kernel_audio_distance(
    generated_ND: ArrayLike, reference_MD: ArrayLike, bandwidth: float | None = None
) -> float:
    """KAD of two sets of two clips or more each; about 0, or a little below, for equal distributions.

    As kadtk computes it: the two sets are taken to be independent. Where clips are generated for the captions
    of the reference set they are not, and it comes out below 0 (by about 200 / N times the kernel of a pair);
    give `squared_discrepancy` groups then, as `report` does. Without a `bandwidth`, that of
    `bandwidth_of`.
    """
    width = bandwidth_of(reference_MD) if bandwidth is None else bandwidth
    return SCALE * squared_discrepancy(
        gaussian_kernel(generated_ND, generated_ND, width),
        gaussian_kernel(reference_MD, reference_MD, width),
        gaussian_kernel(generated_ND, reference_MD, width),
    )
