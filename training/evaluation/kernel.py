"""KAD, the kernel audio distance (arXiv 2502.15602): an unbiased estimate of how two sets of clips differ.

The squared maximum mean discrepancy (Gretton et al. 2012, eq. 3) with a Gaussian kernel, times 100. No
Gaussian is fitted, so it can be trusted with a hundred clips, where the Fréchet distance can't.

Shape legend: N, M clips, D embedding width.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import cdist, pdist

SCALE = 100.0
"""The paper's factor, for figures that are easier to read."""

Matrix = NDArray[np.float64]


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
